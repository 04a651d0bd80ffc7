"""Run as a program: kill a run at a few of its stored events, resume it, print what it stored in the end.

One process loads the models and prepares the items; every run is a fork of it, so that a killed run takes
little longer than a whole one. Usage: python -m tests.running.killed CONFIG FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.store import RunStore

torch.set_num_threads(1)
_writing = RunStore._writing
_events: list[str] = []


def die_at(number: int, *, before_commit: bool) -> None:
    """Make this process die of SIGKILL at its `number`-th stored event (from 1)."""

    @contextmanager
    def writing(store: RunStore) -> Iterator[Any]:
        _events.append(sys._getframe(2).f_code.co_name)
        last = len(_events) == number
        with _writing(store) as db:
            yield db
            if last and before_commit:
                os.kill(os.getpid(), signal.SIGKILL)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    RunStore._writing = writing  # type: ignore[assignment, method-assign]


def forked(work: Callable[[], object]) -> int:
    """Do some work in a fork of this process; return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def moments(names: list[str]) -> list[tuple[int, bool]]:
    """Choose events to die at (number from 1, before or after its commit) from the names of all.

    In the warm start; in the last generation, at its ask, between scores and at its tell; when it is over.
    """
    steps = [i for i, name in enumerate(names, start=1) if name == "write_value"]
    ask = max(i for i, name in enumerate(names, start=1) if name == "record_ask")
    tell = max(i for i, name in enumerate(names, start=1) if name == "record_tell")
    winner = max(i for i, name in enumerate(names, start=1) if name == "record_entry")
    return [(steps[2], True), (ask, False), (ask + 3, False), (tell, True), (winner, False)]


def main(config_path: Path, folder: Path) -> None:
    executor = executors.Inline(prepare(RunConfig.load(config_path)).worker)
    executors.build = lambda *_: executor  # type: ignore[assignment]

    def start(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    def finish(name: str) -> None:
        compose.resume(folder / name, Silent())

    assert forked(lambda: (die_at(10**9, before_commit=False), start("whole"), _dump(folder))) == 0
    names: list[str] = json.loads((folder / "events.json").read_text())
    found = {}
    for number, before_commit in moments(names):
        name = f"killed-{number}-{'before' if before_commit else 'after'}-{names[number - 1]}"

        def die(number: int = number, before: bool = before_commit, name: str = name) -> None:
            die_at(number, before_commit=before)
            start(name)

        status = forked(die)
        assert os.WIFSIGNALED(status), name
        assert os.WTERMSIG(status) == signal.SIGKILL, name
        assert forked(lambda name=name: finish(name)) == 0, name  # type: ignore[misc]
        found[name] = facts(folder / name)
    print(json.dumps({"whole": facts(folder / "whole"), "killed": found}))


def _dump(folder: Path) -> None:
    (folder / "events.json").write_text(json.dumps(_events))


def facts(folder: Path) -> dict[str, Any]:
    """What must be the same: contents without places, winner, health of the file.

    proposed: candidates that the surrogate proposed itself. blocks: on how many a candidate was scored.
    """
    with RunStore.read(folder) as store:
        (integrity,) = store._db.execute("PRAGMA integrity_check").fetchone()
        return {
            "digest": store.digest(),
            "winner": store.entries("winner")[0].recipe.hash,
            "starts": [start.name for start in store.entries("start")],
            "proposed": sum(state.proposed for state in store.guide()),
            "blocks": sorted({len(blocks) for blocks in store.scored_blocks("search").values()}),
            "integrity": integrity,
            "files": sorted(p.name for p in folder.iterdir()),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
