"""Driver, workers or both killed at every kind of stored event: the run ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_suite

KINDS = {
    "create",
    "begin_session",
    "record base",
    "record parent",
    "record baseline",
    "record descent",
    "record standard",
    "record start",
    "record finalist",
    "record winner",
    "fact norms",
    "fact item_notes",
    "fact gradient",
    "fact gradient_parts",
    "fact gradient_seconds",
    "fact clock",
    "fact spent",
    "fact chosen_on",
    "fact frugal",
    "fact movements",
    "fact stopped",
    "scores search",
    "scores select",
    "scores test",
    "failure",
    "ask",
    "tell",
    "guide",
}
"""Every kind of event that a run with one objective stores."""

FULL: dict[str, Any] = {
    "warm_start": {"gradients": {"steps": 2, "share": 0.5}},
    "optimizer": {"population": 7},
}


def struck(config: Path, folder: Path, mode: str, *kinds: str, workers: int = 0) -> dict[str, Any]:
    """Run `crash`; check that what was killed and resumed is what was never killed."""
    command = [sys.executable, "-m", "tests.running.crash", str(config), str(folder), str(workers), mode]
    done = subprocess.run(
        [*command, *kinds],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"]["integrity"] == "ok"
    for name, facts in found["struck"].items():
        assert facts == found["whole"], name
    return found


@pytest.fixture
def quick_config(config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = config(**{"budget": {"generations": 2}, **changes})
        write_suite(tmp_path, generate=False)
        return path

    return write


@pytest.mark.end_to_end
def test_the_driver_killed_at_every_fourth_kind_of_event(
    quick_config: Callable[..., Path], tmp_path: Path
) -> None:
    """One run, killed again and again; slow tests below kill at all kinds, and a run of its own each time."""
    found = struck(quick_config(**FULL), tmp_path, "chain", *sorted(KINDS)[::4])
    assert set(found["events"]) == KINDS
    assert found["whole"]["failures"]


ARRIVALS = ("arrival", "fact pending", "fact proposed", "fact spent", "scores search", "tell", "failure")


@pytest.mark.slow  # test_asynchronous.py interrupts such a search in one process
def test_the_driver_of_an_asynchronous_search_killed(
    quick_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = quick_config(optimizer={"population": 7, "async": True}, budget={"generations": 3})
    struck(path, tmp_path, "chain", *ARRIVALS)


@pytest.mark.slow
def test_an_asynchronous_search_killed_at_each_kind_of_event(
    quick_config: Callable[..., Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "budget": {"generations": 6},
        "optimizer": {"population": 7, "async": True},
        "racing": {"blocks": 4},
        "surrogate": {"blocks": 1},
    }
    found = struck(quick_config(**changes), tmp_path, "each")
    assert set(ARRIVALS) <= set(found["kinds"])


@pytest.mark.slow
def test_the_driver_killed_where_it_decides_on_gradients_and_looks_at_unused_items(
    quick_config: Callable[..., Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "budget": {"generations": 6},
        "optimizer": {"population": 7},
        "racing": {"blocks": 4},
        "surrogate": {"blocks": 1},
        "warm_start": {"gradients": "auto"},
    }
    kinds = ("fact descent_plan", "guide", "fact chosen_on")
    found = struck(quick_config(**changes), tmp_path, "chain", *kinds)
    assert set(found["kinds"]) == set(kinds)


@pytest.mark.slow
def test_the_driver_killed_where_there_is_a_front(quick_config: Callable[..., Path], tmp_path: Path) -> None:
    path = quick_config(objective={"several": ["mean", "retention"]}, optimizer={"population": 8})
    struck(path, tmp_path, "chain", "front", "tell", "guide", "record front", "scores select")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("companion", "fact"), [("specialist", "fact answers"), ("distribution", "fact distributions")]
)
def test_the_driver_killed_where_specialists_answer(
    config: Callable[..., Path], tmp_path: Path, companion: str, fact: str
) -> None:
    path = config(budget={"generations": 2}, warm_start={"gradients": {"steps": 2, "share": 0.5}})
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    (task,) = (task for task in suite["tasks"] if task["metric"] == "exact_match")
    task |= {"weight": 1, "specialist": "upper", "splits": {"search": 12, "select": 8, "test": 8}}
    answering = {"companion": companion, "tasks": [task]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | answering))
    struck(path, tmp_path, "chain", "create", "fact norms", fact, "scores search")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("workers", marks=pytest.mark.slow), "both"])
def test_worker_processes_killed(quick_config: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    kinds = ("fact gradient", "scores search", "scores test")
    struck(quick_config(**FULL), tmp_path, mode, *kinds, workers=2)


@pytest.mark.slow
def test_all_workers_killed_at_every_kind_of_event(quick_config: Callable[..., Path], tmp_path: Path) -> None:
    found = struck(quick_config(**FULL), tmp_path, "workers", workers=2)
    assert set(found["kinds"]) == KINDS


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "workers"), [("each", 0), ("all", 2)])
def test_a_run_killed_at_each_kind_of_event(
    quick_config: Callable[..., Path], tmp_path: Path, mode: str, workers: int
) -> None:
    found = struck(quick_config(**FULL), tmp_path, mode, workers=workers)
    assert len(found["struck"]) == 2 * len(KINDS)


@pytest.mark.end_to_end
def test_sockets_of_a_killed_driver_are_swept_by_the_next() -> None:
    """In a folder of a short name: the path of a socket can't be long."""
    start = (
        "import os, signal, sys\n"
        "from multiprocessing import forkserver\n"
        "forkserver.set_forkserver_preload = lambda *_: None\n"
        "from evomerge.running.executors import LocalProcesses\n"
        "from tests.running.fakes import Obedient, spec\n"
        "executor = LocalProcesses(spec(), workers=1, timeout=60, worker=Obedient)\n"
    )
    with tempfile.TemporaryDirectory(prefix="evm", dir="/tmp") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        for end, left in (("os.kill(os.getpid(), signal.SIGKILL)", 1), ("executor.close()", 0)):
            command = [sys.executable, "-c", start + end]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert "Traceback" not in done.stderr, done.stderr
            found = list(Path(folder).iterdir())
            assert len(found) == left, found
