"""Run as a program: kill runs at random moments, go on with them, check that they end in the same bits.

Every process is a fork of one that has imported everything. Usage: python -m tests.running.torture CONFIG
FOLDER KILLS WORKERS; with 0 workers the models are real and scored in the killed process itself, else they
are formulas in worker processes that are sometimes killed with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from tests.running import quick
from tests.running.crash import facts, forked, wait_for_end
from tests.running.signals import members

LONGEST = {"models": 0.5, "workers": 1.0}
"""How long a process lives at most before it is killed, as a share of what an unbroken run takes.

Worker processes take a large part of a short run to start.
"""


def main(config_path: Path, folder: Path, kills: int, workers: int) -> None:
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent
    from evomerge.prepare import prepare
    from evomerge.running import executors

    forkserver.set_forkserver_preload = lambda *_: None  # a formula needs no torch
    if workers:
        os.environ["EVOMERGE_TEST_NAP"] = "0.02"
        compose.executors.build = quick.build(workers)
    else:
        inline = executors.Inline(prepare(RunConfig.load(config_path)).worker)
        compose.executors.build = lambda *_: inline  # type: ignore[assignment]

    def go_on(run: Path) -> None:
        compose.start(RunConfig.load(config_path, out=str(run)), Silent())

    if workers:
        built, compose.executors.build = compose.executors.build, quick.build(0)
        go_on(folder / "warm")  # imports, caches
        compose.executors.build = built
    started = time.monotonic()
    assert forked(lambda: go_on(folder / "whole")) == 0
    unbroken = time.monotonic() - started
    whole, draw = facts(folder / "whole"), random.Random(0)
    made, sessions, ends = 0, 0, []
    while made < kills or (folder / f"run-{len(ends)}").exists():
        run = folder / f"run-{len(ends)}"
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                go_on(run)
                os._exit(0)
            finally:
                os._exit(1)
        sessions += 1
        if made < kills:
            time.sleep(draw.uniform(0.0, LONGEST["workers" if workers else "models"] * unbroken))
        else:
            _, status = os.waitpid(pid, 0)
            assert status == 0
            pid = 0
        if pid and os.waitpid(pid, os.WNOHANG) == (0, 0):
            those = members(pid)
            if workers and draw.random() < 0.5:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            made += 1
            orphans = wait_for_end(those)
            assert not orphans, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in orphans]
            continue
        ends.append(facts(run) == whole)
        assert ends[-1], (facts(run), whole)
        shutil.rmtree(run)
    seconds = time.monotonic() - started
    print(json.dumps({"kills": made, "sessions": sessions, "ends": len(ends), "seconds": round(seconds)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
