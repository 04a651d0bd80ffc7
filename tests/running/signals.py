"""Run as a program: send signals to runs of the command line, and resume them; print what came of it.

One process imports everything; every command is a fork of it with two worker processes of its own. Usage:
python -m tests.running.signals CONFIG FOLDER SIGNAL ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.running import quick
from tests.running.crash import facts, forked, wait_for_end

NAP = "0.05"
"""Seconds that a job takes while signals are sent."""


def command(*words: object, output: Path) -> int:
    """Start a command in a process group of its own; return its process id."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            from evomerge.cli import app

            app([str(word) for word in words])
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    return pid


def members(group: int) -> list[int]:
    """Return the processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(log: Path, event: str, count: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if log.exists() and log.read_text().count(f'"event": "{event}"') >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(event)


def main(config_path: Path, folder: Path, names: list[str]) -> None:
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent

    forkserver.set_forkserver_preload = lambda *_: None  # a formula needs no torch

    def whole(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    compose.executors.build = quick.build(0)
    whole("warm")
    assert forked(lambda: whole("whole")) == 0

    def struck(name: str, send: Callable[[int], None]) -> dict[str, Any]:
        run, said = folder / name, folder / f"{name}.txt"
        compose.executors.build = quick.build(2)
        os.environ["EVOMERGE_TEST_NAP"] = NAP
        pid = command("run", config_path, "--out", run, output=said)
        wait_for(run / "log.jsonl", "scored", 8)
        pids = members(pid)
        started = time.monotonic()
        send(pid)
        _, status = os.waitpid(pid, 0)
        found = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "said": said.read_text(),
            "processes": len(pids),
            "orphans": wait_for_end(pids),
            "log": [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1],
        }
        os.environ["EVOMERGE_TEST_NAP"] = "0"
        compose.executors.build = quick.build(0)
        pid = command("resume", run, output=said)
        assert os.waitpid(pid, 0)[1] == 0, said.read_text()
        (run / "report.html").unlink()
        return found | {"resumed": facts(run)}

    def hang_up(pid: int) -> None:
        os.kill(pid, signal.SIGHUP)

    def again_and_again(pid: int) -> None:
        for _ in range(6):
            os.killpg(pid, signal.SIGTERM)
            time.sleep(0.03)

    def second(pid: int) -> None:
        """Try to resume a run that goes on; then end it."""
        said = folder / "second.txt"
        again = command("resume", folder / "live", output=said)
        code = os.waitstatus_to_exitcode(os.waitpid(again, 0)[1])
        (folder / "second.json").write_text(
            json.dumps({"code": code, "said": said.read_text(), "holder": pid})
        )
        os.kill(pid, signal.SIGINT)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ways = {"SIGTERM": ("group", again_and_again), "SIGHUP": ("hangup", hang_up), "SIGINT": ("live", second)}
    found: dict[str, Any] = {"struck": {name: struck(*ways[name]) for name in names}}
    found["whole"] = facts(folder / "whole")
    if "SIGINT" in names:
        found["second"] = json.loads((folder / "second.json").read_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
