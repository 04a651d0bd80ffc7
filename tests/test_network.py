"""Nothing is asked of the network where no model and no data set of the hub is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AUDIT = """
import os, sys
HERE = (None, "", b"", "localhost", "127.0.0.1", "::1")
def audit(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        asked = arguments[1][0]
    else:
        return
    if asked not in HERE:
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{event} {asked}\\n")
sys.addaudithook(audit)
"""
MAIN = [sys.executable, "-c", "from evomerge.cli import main; main()"]
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")


def _no_route() -> list[str]:
    """Return the words that run a command without a network, none where that is forbidden."""
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    return alone if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode == 0 else []


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a command line of evomerge; return what it and its processes asked of other machines."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AUDIT)
    log = tmp_path / "asked"

    def run(*words: object, route: bool = True) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
        environment |= {
            "ASKED": str(log),
            "HF_HOME": str(tmp_path / "hf"),  # no cache that would answer
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        }
        start = [] if route else _no_route()
        command = [*start, *MAIN, *map(str, words)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return log.read_text().splitlines() if log.exists() else []

    return run


def test_the_audit_sees_what_is_asked(asked: Callable[..., list[str]], tmp_path: Path) -> None:
    script = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9))"
    environment = {**os.environ, "ASKED": str(tmp_path / "asked"), "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True)
    assert (tmp_path / "asked").read_text() == "socket.connect 192.0.2.1\n"


@pytest.mark.end_to_end
def test_a_local_check_asks_nothing(asked: Callable[..., list[str]], config: Callable[..., Path]) -> None:
    assert asked("check", config(generate=False)) == []


@pytest.mark.skipif(not _no_route(), reason="namespaces are forbidden here")
@pytest.mark.slow
def test_a_local_run_needs_no_route(asked: Callable[..., list[str]], config: Callable[..., Path]) -> None:
    executor = {"name": "local", "workers": 1, "threads": 1, "batch_size": 32}
    path = config(executor=executor, budget={"generations": 1}, tracking=["tensorboard"])
    assert asked("run", path, route=False) == []


@pytest.mark.slow
def test_the_other_commands_ask_nothing(
    asked: Callable[..., list[str]], config: Callable[..., Path], tmp_path: Path
) -> None:
    route = not _no_route()
    assert asked("run", config(budget={"generations": 1}, tracking=["mlflow"]), route=route) == []
    assert asked("export", tmp_path / "run", tmp_path / "model", route=route) == []
    assert asked("evaluate", tmp_path / "model", "--suite", tmp_path / "suite.yaml", route=route) == []


@pytest.mark.slow
def test_the_demo_asks_nothing(asked: Callable[..., list[str]], tmp_path: Path) -> None:
    assert asked("demo", "--evaluations", 20, "--out", tmp_path / "demo", route=not _no_route()) == []
