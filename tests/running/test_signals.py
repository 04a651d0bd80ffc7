"""Signals end a run in order: an exit code and how to go on, no process left, and a clean resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import terminal
from tests.conftest import config_data, write_suite

pytestmark = pytest.mark.end_to_end


def signalled(zoo: Path, folder: Path, *names: str) -> dict[str, Any]:
    """Run `signals`; return what it found."""
    write_suite(folder, generate=False)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(zoo, folder, budget={"generations": 2}), sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "tests.running.signals", path, folder, *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def found(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return signalled(tiny_zoo, tmp_path_factory.mktemp("signals"), "SIGTERM", "SIGINT")


def check_the_end(found: dict[str, Any], sent: str, code: int, kind: str) -> None:
    struck = found["struck"][sent]
    assert struck["code"] == code, struck["said"]
    assert "everything scored so far is stored" in struck["said"]
    assert "evomerge resume" in struck["said"]
    assert len(struck["said"][struck["said"].index("stopped; ") :].splitlines()) == 2
    assert "Traceback" not in struck["said"]
    assert struck["processes"] >= 3
    assert struck["orphans"] == []
    assert struck["log"]["event"] == "stopped"
    assert (struck["log"]["kind"], struck["log"]["reason"]) == (kind, sent)
    assert struck["resumed"] == found["whole"]


@pytest.mark.parametrize(
    ("sent", "code", "kind"),
    [
        ("SIGTERM", 143, "Terminated"),  # to all processes, six times: as batch schedulers do
        ("SIGINT", 130, "KeyboardInterrupt"),
    ],
)
def test_a_signal_ends_a_run_in_order(found: dict[str, Any], sent: str, code: int, kind: str) -> None:
    check_the_end(found, sent, code, kind)


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_in_order(tiny_zoo: Path, tmp_path: Path) -> None:
    check_the_end(signalled(tiny_zoo, tmp_path, "SIGHUP"), "SIGHUP", 129, "Terminated")


def test_a_run_that_goes_on_is_not_resumed_by_another(found: dict[str, Any]) -> None:
    second = found["second"]
    assert second["code"] == 2
    assert "another process is working on this run" in second["said"]
    assert f"process {second['holder']} on {socket.gethostname()}" in second["said"]
    assert "evomerge status" in second["said"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    code = (
        "import signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from evomerge.cli import terminal\n"
        "with terminal.orderly_shutdown():\n"
        "    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
        "    assert callable(signal.getsignal(signal.SIGTERM))\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert terminal.PATIENCE > 0


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)]
)
def test_a_signal_that_a_library_swallowed_ends_the_run_at_its_next_event(number: str, code: int) -> None:
    """As in cma, which has bare `except:` clauses."""
    program = (
        "import os, signal, typer\n"
        "from evomerge.cli import terminal\n"
        "from evomerge.running.observers import StopsAtPhases\n"
        "app = typer.Typer()\n"
        "@terminal.command(app, 'work')\n"
        "def work() -> None:\n"
        "    events = StopsAtPhases(terminal.raise_swallowed)\n"
        "    events.phase('before', 1, 0)\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "        signal.sigtimedwait([], 0.1)\n"
        "    except:\n"
        "        pass\n"
        "    events.phase('after', 1, 0)\n"
        "    print('not stopped')\n"
        "with terminal.as_program():\n"
        "    app()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr == "stopped; nothing was stored\n"
