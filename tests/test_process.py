"""The command as a process: what shells, schedulers and bare environments do to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.running.store import RunStore

PROGRAM = [sys.executable, "-c", "from evomerge.cli import main; main()"]


def interruptible() -> None:
    """As a command in the foreground: jobs that a script starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
        **options,
    )


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "words", [["--help"], pytest.param(["report"], marks=pytest.mark.slow), ["report", "--json"]]
)
def test_a_reader_that_goes_away_ends_a_command_silently(words: list[str], finished_run: Path) -> None:
    """As in `evomerge report RUN | head -1`."""
    with start(*words, *([] if words == ["--help"] else [finished_run])) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def semaphores() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("sem.mp-*")} if folder.is_dir() else set()


@pytest.fixture
def working(config: Callable[..., Path], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a run with a worker process, and return it when the first scores are stored."""

    def begin(**options: Any) -> subprocess.Popen[str]:
        executor = {"name": "local", "workers": 1, "threads": 1, "batch_size": 32}
        path = config(
            generate=False,
            executor=executor,
            baselines=[],
            budget={"generations": 200},
            optimizer={"population": 32},
        )
        process = start("run", path, **options)
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            if RunStore.exists(tmp_path / "run"):
                with RunStore.read(tmp_path / "run") as store:
                    if store.scored_blocks("search"):
                        return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError(process.communicate())

    return begin


@pytest.mark.slow  # running/test_signals.py sends some to forks of one process, whose workers are formulas
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT] * 6, 130),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM], 143),
    ],
    ids=["Ctrl-C six times", "others during the shutdown"],
)
def test_the_first_signal_counts(
    signals: list[signal.Signals], code: int, working: Callable[..., subprocess.Popen[str]]
) -> None:
    before = semaphores()
    process = working()
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(0.05)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert said.startswith("stopped; everything scored so far is stored"), said
    assert len(said.splitlines()) == 2, said
    assert semaphores() <= before


@pytest.mark.slow
def test_a_temporary_folder_that_is_swept_while_workers_start_is_a_message(
    working: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    process = working(env={**os.environ, "TMPDIR": str(tmp_path / "t")})
    shutil.rmtree(tmp_path / "t")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    servers = [child for child in children if "forkserver" in Path(f"/proc/{child}/cmdline").read_text()]
    workers = Path(f"/proc/{servers[0]}/task/{servers[0]}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert "the files that connect them to this process were removed" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_bare_environment_is_enough(config: Callable[..., Path], tmp_path: Path) -> None:
    """No HOME, no PATH, LANG=C, and a TMPDIR that does not exist."""
    path = config(generate=False, budget={"generations": 1})
    done = subprocess.run(
        [*PROGRAM, "run", path],
        env={"LANG": "C", "TMPDIR": str(tmp_path / "missing")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with RunStore.read(tmp_path / "run") as store:
        assert store.entries("winner")
