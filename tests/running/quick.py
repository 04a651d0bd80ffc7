"""Runs whose worker is a formula: real driver, store, search and worker processes, but no model.

A run of a few generations takes a fraction of a second, so it can be killed many times. Nothing heavy is
imported here: a worker process of these runs starts in a moment.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores, joined
from evomerge.evaluation.smooth_loss import Gradient
from evomerge.merging.recipe import Recipe
from evomerge.running.store import Timing
from evomerge.running.worker import GradientJob, Job, Result, WorkerSpec

TARGET = {"upper": 0.7, "reverse": 0.5}
FAILING = 0.1
"""Share of the candidates that can't be scored."""


class Formula:
    """Scores a recipe by how far its weights are from TARGET, item by item; some recipes fail.

    EVOMERGE_TEST_NAP: seconds a job takes.
    """

    sharing = None

    def __init__(self, spec: WorkerSpec, name: str = "inline") -> None:
        self._spec, self.name = spec, name
        self._nap = float(os.environ.get("EVOMERGE_TEST_NAP", "0"))

    def run(self, job: Job | GradientJob) -> Result:
        time.sleep(self._nap)
        if isinstance(job, GradientJob):
            return Result(job=job, outcome=_gradient(job.recipe))
        if _unlucky(job.recipe):
            return Result(job=job, outcome=Failure(kind="error", reason="RuntimeError: no luck"))
        parts = tuple(self._part(job.recipe, job.split, block) for block in job.blocks)
        timing = Timing(total=0.1, merge=0.01, forward=0.05, worker=self.name)
        return Result(job=job, outcome=joined(parts), timing=timing, parts=parts)

    def _part(self, recipe: Recipe, split: Split, block: int) -> Scores:
        found = []
        for task in self._spec.suite.tasks:
            items = getattr(task.splits, split)
            if items is None:
                continue
            assert isinstance(items, int)
            count = items // len(self._spec.blocks_of(split))
            seed = _number(f"{task.task} {split} {block}")
            hard = np.random.default_rng(seed).normal(0.3, 0.4, count)
            margin = 3.0 * (_quality(recipe, task.specialist) - hard)
            if task.role == "retention":
                found.append(TaskScores(task=task.task, metric=-2.0 + 0.1 * margin))
                continue
            smooth = 1.0 / (1.0 + np.exp(-margin))
            found.append(
                TaskScores(
                    task=task.task, metric=(margin > 0).astype(np.float64), smooth=smooth, margin=margin
                )
            )
        return Scores(split=split, tasks=tuple(found), blocks=(block,))


class InProcess:
    """An executor of one formula in this process."""

    sharing = None

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Formula(spec)

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        for job in jobs:
            yield self._worker.run(job)

    def close(self) -> None: ...


def build(processes: int, timeout: float = 60.0) -> Any:
    """Return what takes the place of `executors.build`: no process of its own, or so many workers."""
    from evomerge.running import executors

    if not processes:
        return lambda _, worker: InProcess(worker)
    return lambda _, worker: executors.LocalProcesses(
        worker, workers=processes, timeout=timeout, worker=Formula
    )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _weights(recipe: Recipe) -> dict[str, float]:
    group = recipe.groups[0]
    given = group.parameters.get("weight", 1.0 / len(group.sources))
    values = given if isinstance(given, tuple) else (given,) * len(group.sources)
    return dict(zip(group.sources, (float(v) for v in values), strict=True))


def _quality(recipe: Recipe, specialist: str | None) -> float:
    """1 for a specialist at its own task and 0 for the base; merges lie between, best near TARGET."""
    weights = _weights(recipe)
    if "base" in weights:
        return 0.0
    if len(weights) == 1:
        return 1.0 if specialist in weights else 0.1
    off = {name: abs(weights.get(name, 0.0) - best) for name, best in TARGET.items()}
    return 1.1 - off.get(specialist, 0.0) - 0.3 * sum(off.values()) if specialist else 0.5 - sum(off.values())


def _unlucky(recipe: Recipe) -> bool:
    """Say whether a candidate fails: never a parent, nor a baseline whose weights are round numbers."""
    weights = _weights(recipe).values()
    return any(round(w, 2) != w for w in weights) and _number(recipe.hash) % 100 < 100 * FAILING


def _gradient(recipe: Recipe) -> Gradient:
    weights = _weights(recipe)
    slopes = tuple(float(np.sign(w - TARGET.get(name, 0.0))) for name, w in weights.items())
    return Gradient(loss=0.5, groups=tuple({"weight": slopes} for _ in recipe.groups))
