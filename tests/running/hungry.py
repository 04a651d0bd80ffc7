"""A worker whose device is too small, and a program: kill such a run, resume it, compare what is stored.

Usage: python -m tests.running.hungry CONFIG FOLDER PLACE ... , with places as in `Small.parse`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.running import executors
from evomerge.running.batches import decisions
from evomerge.running.executors import LocalProcesses
from evomerge.running.store import RunStore
from evomerge.running.worker import Job, Result, Worker, WorkerSpec
from tests.running.killed import die_at, facts, forked

Place = tuple[str, int, str]
"""A split, a block and a recipe's hash; "" for any recipe."""


@dataclass(frozen=True, slots=True)
class Small:
    """A device that takes batches of `most` at some places, and any batch elsewhere."""

    places: frozenset[Place]
    most: int = 16

    @classmethod
    def parse(cls, words: list[str]) -> Small:
        """Read places as `split/block/hash`."""
        parts = [word.split("/") for word in words]
        return cls(frozenset((split, int(block), recipe) for split, block, recipe in parts))

    def fits(self, batch_size: int, split: str, block: int, recipe: str) -> bool:
        return batch_size <= self.most or self.places.isdisjoint({(split, block, recipe), (split, block, "")})


class Hungry(Worker):
    """Raises torch's own error where a batch is larger than its device holds."""

    def __init__(self, small: Small, spec: WorkerSpec, name: str) -> None:
        super().__init__(spec, name)
        self._evaluate, self._small, self._recipe = self._harness.evaluate, small, ""
        self._harness.evaluate = self._bounded  # type: ignore[method-assign]

    def run(self, job: Any) -> Result:
        self._recipe = job.recipe.hash
        return super().run(job)

    def _bounded(self, model: Any, items: Any, *, batch_size: int | None = None) -> Any:
        assert batch_size is not None
        scores = self._evaluate(model, items, batch_size=batch_size)
        if not self._small.fits(batch_size, items.split, items.block, self._recipe):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 7 MiB free"
            )
        return scores


class InOne:
    """An executor in this process, around one such worker."""

    def __init__(self, small: Small, spec: WorkerSpec) -> None:
        self._worker = Hungry(small, spec, "inline")
        self.jobs: list[Job] = []

    def run(self, jobs: Any) -> Any:
        for job in jobs:
            self.jobs.append(job)
            yield self._worker.run(job)

    def close(self) -> None: ...


def in_two(small: Small, spec: WorkerSpec) -> LocalProcesses:
    return LocalProcesses(spec, workers=2, timeout=60, worker=partial(Hungry, small))


def main(config_path: Path, folder: Path, small: Small) -> None:
    torch.set_num_threads(1)
    executor = InOne(small, compose.prepare(RunConfig.load(config_path)).worker)
    executors.build = lambda *_: executor  # type: ignore[assignment]

    def start(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    def finish(name: str) -> None:
        compose.start(compose.stored_config(folder / name), Silent())

    assert forked(lambda: (die_at(10**9, before_commit=False), start("whole"), _dump(folder))) == 0
    names: list[str] = json.loads((folder / "events.json").read_text())
    found = {}
    halvings = [i for i, name in enumerate(names, start=1) if name == "drop_scores"]
    first, last = halvings
    for number, before_commit in ((first - 1, False), (first, True), (first + 1, False), (last, False)):
        name = f"killed-{number}-{before_commit}"

        def die(number: int = number, before: bool = before_commit, name: str = name) -> None:
            die_at(number, before_commit=before)
            start(name)

        status = forked(die)
        assert os.WIFSIGNALED(status), name
        assert os.WTERMSIG(status) == signal.SIGKILL, name
        assert forked(lambda name=name: finish(name)) == 0, name  # type: ignore[misc]
        found[name] = facts(folder / name)
    with RunStore.read(folder / "whole") as store:
        made = [each.sentence for each in decisions(store)]
    print(json.dumps({"whole": facts(folder / "whole"), "killed": found, "decisions": made}))


def _dump(folder: Path) -> None:
    from tests.running import killed

    (folder / "events.json").write_text(json.dumps(killed._events))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Small.parse(sys.argv[3:]))
