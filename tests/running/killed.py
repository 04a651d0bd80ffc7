"""Run as a program: kill a run after each stored event of a generation, resume it, print the digests.

One process loads the models and prepares the items; every run is a fork of it, so that dozens of killed
runs take seconds. Usage: python -m tests.running.killed CONFIG FOLDER
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


def main(config_path: Path, folder: Path) -> None:
    executor = executors.Inline(compose.prepare(RunConfig.load(config_path)).worker)
    executors.build = lambda *_: executor  # type: ignore[assignment]

    def start(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    def finish(name: str) -> None:
        compose.start(compose.stored_config(folder / name), Silent())

    assert forked(lambda: (die_at(10**9, before_commit=False), start("whole"), _dump(folder))) == 0
    names: list[str] = json.loads((folder / "events.json").read_text())
    asks = [i for i, name in enumerate(names, start=1) if name == "record_ask"]
    generation = range(asks[1], asks[2])  # the second generation: its ask, every score, its tell
    others = [1, 3, asks[0] - 1, asks[2] + 5, len(names) - 4, len(names)]
    found = {}
    for number in sorted({*generation, *others}):
        for before_commit in (False, True) if number in (asks[1], asks[1] + 1, asks[2] - 1) else (False,):
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


def gradients(config_path: Path, folder: Path) -> None:
    """Kill a run with a gradient start before and after its first and last steps; print all contents."""
    executor = executors.Inline(compose.prepare(RunConfig.load(config_path)).worker)
    executors.build = lambda *_: executor  # type: ignore[assignment]

    def start(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    assert forked(lambda: (die_at(10**9, before_commit=False), start("whole"), _dump(folder))) == 0
    names: list[str] = json.loads((folder / "events.json").read_text())
    steps = [i for i, name in enumerate(names, start=1) if name == "set_fact"][1:-1]  # but norms and the end
    found = [facts(folder / "whole")]
    for number in (steps[0], steps[-1]):
        for before in (False, True):
            name = f"killed-{number}-{before}"
            status = forked(
                lambda number=number, before=before, name=name: (  # type: ignore[misc]
                    die_at(number, before_commit=before),
                    start(name),
                )
            )
            assert os.WIFSIGNALED(status), name
            assert forked(lambda name=name: start(name)) == 0, name  # type: ignore[misc]
            found.append(facts(folder / name))
            with RunStore.read(folder / name) as store, RunStore.read(folder / "whole") as whole:
                assert store.digest() == whole.digest(), name
    print(json.dumps(found))


def _dump(folder: Path) -> None:
    (folder / "events.json").write_text(json.dumps(_events))


def facts(folder: Path) -> dict[str, Any]:
    """What must be the same: contents without places, winner, health of the file."""
    with RunStore.read(folder) as store:
        winner = store.entries("winner")[0].recipe
        (integrity,) = store._db.execute("PRAGMA integrity_check").fetchone()
        tables = {
            query: repr(store._db.execute(query).fetchall())
            for query in (
                "SELECT generation, position, genome, recipe FROM ask ORDER BY 1, 2",
                "SELECT generation, losses FROM tell ORDER BY 1",
                "SELECT recipe, split, block, task, metric, smooth, margin FROM score ORDER BY 1, 2, 3, 4",
                "SELECT role, position, name, recipe FROM entry ORDER BY 1, 2",
                "SELECT recipe, split, kind, reason FROM failure ORDER BY 1, 2",
            )
        }
    left = sorted(p.name for p in folder.iterdir())
    return {"winner": winner.hash, "tables": tables, "integrity": integrity, "files": left}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
