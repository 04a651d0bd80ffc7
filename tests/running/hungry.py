"""A worker whose device is too small, in a real search on a real store; as a program, such a run killed.

Usage: python -m tests.running.hungry FOLDER PLACE ... , with places as in `Small.parse`. Scores depend on the
batch size in their last bits, as they do on a device.
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

import numpy as np
import torch

from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Scores, TaskScores, joined
from evomerge.running.batches import Batches, begun_again, decisions
from evomerge.running.budget import Budget, BudgetSpec
from evomerge.running.executors import LocalProcesses
from evomerge.running.scorer import Scorer
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import Job, Result, WorkerSpec, failure_of
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.racing import RacingSpec
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.running.fakes import TIMING, spec
from tests.running.killed import die_at, forked
from tests.search.fakes import SUITE, TARGET
from tests.search.spaces.test_merge_space import make

BLOCKS, ITEMS, BATCH = 3, 8, 32

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


class Hungry:
    """Scores weights by their distance from TARGET; raises torch's error where a batch does not fit."""

    sharing = None

    def __init__(self, small: Small, _spec: WorkerSpec, _name: str) -> None:
        self._small = small

    def run(self, job: Any) -> Result:
        parts = []
        for block in job.blocks:
            size = job.batch_sizes[block]
            if not self._small.fits(size, job.split, block, job.recipe.hash):
                said = f"CUDA out of memory. Tried to allocate 2.00 GiB; {os.getpid()} MiB are free"
                failure = failure_of(torch.OutOfMemoryError(said), f"at batch size {size}")
                return Result(job=job, outcome=failure, block=block)
            parts.append(_scores(job, block, size))
        return Result(job=job, outcome=joined(parts), parts=tuple(parts), timing=TIMING)


def _scores(job: Job, block: int, size: int) -> Scores:
    group = job.recipe.groups[0]
    weights = dict(zip(group.sources, group.parameters.get("weight", (0.5, 0.5)), strict=False))
    alone = group.method == "linear" and len(group.sources) == 1
    tasks = []
    for number, (task, target) in enumerate(TARGET.items()):
        near = float(group.sources == (task,)) if alone else 1 - abs(weights.get(task, 0.0) - target)
        hard = np.random.default_rng([number, block, len(job.split)]).random(ITEMS)
        margin = np.clip(near, 0, 1) - hard + 1e-9 * size
        smooth = 1 / (1 + np.exp(-4 * margin))
        tasks.append(TaskScores(task=task, metric=(margin > 0).astype(float), smooth=smooth, margin=margin))
    return Scores(split=job.split, tasks=tuple(tasks), blocks=(block,))


class InOne:
    """An executor in this process, around one such worker; it remembers its jobs."""

    def __init__(self, small: Small) -> None:
        self._worker = Hungry(small, spec(), "inline")
        self.jobs: list[Job] = []

    def run(self, jobs: Any) -> Any:
        for job in jobs:
            self.jobs.append(job)
            yield self._worker.run(job)

    def close(self) -> None: ...


def in_two(small: Small) -> LocalProcesses:
    return LocalProcesses(spec(), workers=2, timeout=60, worker=partial(Hungry, small))


def session(folder: Path, executor: Any, *, workers: int = 0) -> Outcome:
    """Run, or continue, the search in a folder; without generations where there are `workers`."""
    space = make("global_weights")
    plan = SearchPlan(
        suite=SUITE,
        space=space,
        template=space.decode(np.full(2, 0.5)),
        norms={"a": 1.0, "b": 2.0},
        optimizer=OptimizerSpec.model_validate({"name": "cma_es", "population": 6, "async": workers > 0}),
        objective=ObjectiveSpec(),
        racing=RacingSpec(blocks=BLOCKS, error=0.5),
        surrogate=SurrogateSpec(),
        finalists=2,
        seed=0,
    )
    models = {"base": "base", "sources": {"a": "a", "b": "b"}}
    begun = {facts.CONFIG: {"models": models}, facts.BLOCKS: BLOCKS}
    with RunStore.open(folder) if RunStore.exists(folder) else RunStore.create(folder, begun) as store:
        store.begin_session({})

        def search(batches: Batches) -> Outcome:
            return Search(
                plan,
                scorer=Scorer(store, executor, Silent(), batches),
                journal=store,
                budget=Budget(BudgetSpec(generations=3), store.hours),
                observer=Silent(),
                workers=max(workers, 1),
            ).run()

        return begun_again(store, BATCH, search)


def main(folder: Path, small: Small) -> None:
    assert (
        forked(lambda: (die_at(10**9, before_commit=False), _run(folder / "whole", small), _dump(folder)))
        == 0
    )
    names: list[str] = json.loads((folder / "events.json").read_text())
    first, last = (i for i, name in enumerate(names, start=1) if name == "drop_scores")
    moments = [(first - 1, False), (first, True), (first + 2, False), (last, False)]
    found = {}
    for number, before in moments:
        place = folder / f"killed-{number}-{before}"

        def die(place: Path = place, number: int = number, before: bool = before) -> None:
            die_at(number, before_commit=before)
            _run(place, small)

        status = forked(die)
        assert os.WIFSIGNALED(status), place
        assert os.WTERMSIG(status) == signal.SIGKILL, place
        assert forked(lambda place=place: _run(place, small)) == 0, place  # type: ignore[misc]
        found[place.name] = _facts(place)
    print(json.dumps({"whole": _facts(folder / "whole"), "killed": found}))


def _run(folder: Path, small: Small) -> None:
    session(folder, InOne(small))


def _facts(folder: Path) -> list[Any]:
    with RunStore.read(folder) as store:
        return [store.digest(), store.entries("winner")[0].recipe.hash, len(decisions(store))]


def _dump(folder: Path) -> None:
    from tests.running import killed

    (folder / "events.json").write_text(json.dumps(killed._events))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Small.parse(sys.argv[2:]))
