"""Run as a program: kill runs at random moments, go on with them, check that they end in the same bits.

A chain is one run that is killed and continued until it ends; then its contents are compared with those of
an unbroken run, and nothing may be left over. Every driver is a fork of one process that has imported all.
Usage: python -m tests.running.torture CONFIG FOLDER KILLS KIND, with one KIND of

    models  real models, scored in the killed process itself
    workers formulas in worker processes: the driver, its whole process group, or a worker is killed
    ray     formulas in actors of the driver's own Ray: the driver, an actor, the raylet or the GCS is killed
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.running import quick
from tests.running.crash import facts, forked, wait_for_end
from tests.running.signals import members

TARGETS = {
    "models": ("driver",),
    "workers": ("driver", "process group", "worker"),
    "ray": ("driver", "actor", "raylet", "GCS"),
}
PROGRAMS = {"actor": "ray::Actor", "raylet": "raylet/raylet", "GCS": "gcs/gcs_server"}
LONGEST = {"models": 0.5, "workers": 0.7, "ray": 1.0}
"""How long a process lives at most before it is struck, as a share of what an unbroken run takes.

Worker processes take a large part of a short run to start.
"""
NAP = {"models": "0", "workers": "0.02", "ray": "0.05"}
MARK = "EVOMERGE_TORTURE"
LOST = 2.0
"""Seconds until a cluster is lost."""
ENDS = {"models": {0}, "workers": {0, 2}, "ray": {0, 1, 2}}
"""Exit codes of drivers whose workers or cluster were struck: done, one message, or ended by Ray's own code.

Ray ends the process that it lives in when its node goes away while it starts.
"""


def build(kind: str, config: Any) -> Any:
    """Return what takes the place of `executors.build`."""
    from evomerge.prepare import prepare
    from evomerge.running import executors

    if kind == "models":
        inline = executors.Inline(prepare(config).worker)
        return lambda *_: inline
    if kind == "workers":
        return quick.build(2)
    from evomerge.running.executors import ray_actors

    ray_actors.LOST_SECONDS, ray_actors.PULSE_SECONDS = LOST, 0.5
    ray_actors._imported()
    return lambda _, worker: ray_actors.RayActors(
        worker, address="local", needs={"CPU": 1.0}, workers=2, timeout=60.0, worker=quick.Formula
    )


def marked() -> dict[int, str]:
    """Return the processes, forks apart, that were started by drivers of this program: number -> command."""
    mark = f"{MARK}={os.getpid()}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(folder.name)] = command
    return found


def ancestors(pid: int) -> list[int]:
    """Return the parent of a process, the parent's parent and so on."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        while pid > 1:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            found.append(pid)
    return found


class Victim:
    """A driver in a process group of its own, and the processes that belong to it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.status: int | None = None
        self.struck = False
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            try:
                work()
                os._exit(0)
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(2)
            finally:
                os._exit(1)

    def ended(self, seconds: float) -> bool:
        """Wait so long for its end; note its status."""
        end = time.monotonic() + seconds
        while self.status is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
            time.sleep(0.005)
        return self.status is not None

    def strike(self, target: str, draw: random.Random, *, patient: bool) -> bool:
        """Kill the driver or something of its; say whether there was such a thing.

        patient: do not wait for the end of what it leaves behind; Ray takes a while to see that it is gone.
        """
        if target in ("driver", "process group"):
            those = members(self.pid)
            (os.killpg if target == "process group" else os.kill)(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
            orphans = [] if patient else wait_for_end(those)
            assert not orphans, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in orphans]
            return True
        if target == "worker":
            found = [pid for pid in members(self.pid) if _is_worker(pid)]
        else:
            found = [pid for pid, command in marked().items() if PROGRAMS[target] in command]
            found = [pid for pid in found if self.pid in ancestors(pid)]
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(found), signal.SIGKILL)
        return True


def _is_worker(pid: int) -> bool:
    """Say whether a process was forked by a fork server."""
    with contextlib.suppress(OSError, IndexError):
        return b"forkserver" in (Path("/proc") / str(ancestors(pid)[0]) / "cmdline").read_bytes()
    return False


def chain(work: Callable[[], None], kind: str, left: int, longest: float, draw: random.Random) -> list[str]:
    """Kill and continue one run until it ends, or until `left` kills are made; return the kills."""
    kills: list[str] = []
    while True:
        victim = Victim(work)
        while not victim.ended(draw.uniform(0.0, longest) if len(kills) < left else 600.0):
            target = draw.choice(TARGETS[kind])
            # A second death in one job would be its failure, and rightly so.
            if (target in ("worker", "actor") and victim.struck) or not victim.strike(
                target, draw, patient=kind == "ray"
            ):
                continue
            kills.append(target)
            victim.struck = True
            if victim.status is not None:
                break
        if victim.status == 0:
            return kills
        assert victim.struck, victim.status
        code = os.waitstatus_to_exitcode(victim.status or 0)
        assert code == -signal.SIGKILL or code in ENDS[kind], code


def main(config_path: Path, folder: Path, kills: int, kind: str) -> None:
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent

    temporary = Path(tempfile.mkdtemp(prefix="evm", dir="/tmp"))  # short: sockets' paths can't be long
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    os.environ[MARK] = str(os.getpid())
    os.environ["RAY_TMPDIR"] = str(temporary)
    forkserver.set_forkserver_preload = lambda *_: None  # a formula needs no torch
    os.environ["EVOMERGE_TEST_NAP"] = "0"
    compose.executors.build = quick.build(0)

    def go_on(run: Path) -> None:
        compose.start(RunConfig.load(config_path, out=str(run)), Silent())

    go_on(folder / "warm")  # imports, caches
    compose.executors.build = build(kind, RunConfig.load(config_path))
    os.environ["EVOMERGE_TEST_NAP"] = NAP[kind]
    semaphores = set(Path("/dev/shm").glob("sem.*"))
    started = time.monotonic()
    assert forked(lambda: go_on(folder / "whole")) == 0
    unbroken = time.monotonic() - started
    whole, draw = facts(folder / "whole"), random.Random(0)
    made: list[str] = []
    chains = 0
    while len(made) < kills:
        run = folder / f"run-{chains}"
        made += chain(lambda run=run: go_on(run), kind, kills - len(made), LONGEST[kind] * unbroken, draw)  # type: ignore[misc]
        chains += 1
        found = facts(run)
        assert found == whole, (found, whole)
        shutil.rmtree(run)
    seconds = time.monotonic() - started
    # What killed processes left in the temporary folder is removed by the next run; here it is the last.
    assert forked(lambda: go_on(folder / "last")) == 0
    orphans = wait_for_end(list(marked()), 120)
    left = [path.name for path in temporary.iterdir() if "partial" in path.name]
    print(
        json.dumps(
            {
                "kind": kind,
                "kills": dict(collections.Counter(made)),
                "chains": chains,
                "seconds": round(seconds),
                "processes left": len(orphans),
                "temporary files left": left,
                "semaphores left": len(set(Path("/dev/shm").glob("sem.*")) - semaphores),
            }
        )
    )
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
