"""A worker for the executors' contract: obeys orders written into a recipe's seed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np

from evomerge.errors import UserError
from evomerge.evaluation.scores import Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running.store import Timing
from evomerge.running.worker import Job, Result, WorkerSpec, failure_of

CRASH, HANG, RAISE, EXIT, DIE_ONCE, HUNGRY, MEET = 900, 901, 902, 903, 904, 905, 906


def recipe(number: int, base: str = "base") -> Recipe:
    """A recipe whose scores are its number, or that makes the worker misbehave."""
    group = TensorGroup(method="dare_linear", sources=("a",))
    return Recipe(models={"base": base, "a": "a"}, base="base", groups=(group,), seed=number)


def scores(number: int, split: str = "search") -> Scores:
    task = TaskScores(task="skill", metric=np.full(3, number / 7), smooth=np.full(3, 0.1))
    return Scores(split=split, tasks=(task,))  # type: ignore[arg-type]


TIMING = Timing(total=0.2, merge=0.05, forward=0.1, worker="0")


class Obedient:
    """Does what the seed says: scores it, crashes, hangs, exits, raises, or waits for a second worker.

    The name of the worker in its timings is the number of its process.
    """

    sharing = None

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        if spec.device == "broken":
            raise UserError("no such device")
        if spec.device == "deadly":
            os._exit(3)

    def run(self, job: Job) -> Result:
        order = job.recipe.seed
        if order == CRASH:
            os.kill(os.getpid(), signal.SIGKILL)
        if order == DIE_ONCE and not Path(job.recipe.models["base"]).exists():
            Path(job.recipe.models["base"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if order == EXIT:
            os._exit(7)
        if order == HANG:
            time.sleep(600)
        if order == RAISE:
            return Result(job=job, outcome=failure_of(ValueError("bad luck\nsecond line")))
        if order == HUNGRY:
            return Result(job=job, outcome=failure_of(MemoryError("of a device")))
        if order == MEET:
            folder = Path(job.recipe.models["base"])
            (folder / str(os.getpid())).touch()
            deadline = time.monotonic() + 60
            while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        time.sleep(0.02 * (order % 3))
        timing = dataclasses.replace(TIMING, worker=str(os.getpid()))
        return Result(job=job, outcome=scores(order, job.split), timing=timing)


def spec(device: str = "cpu") -> WorkerSpec:
    suite = Suite.model_validate(
        {
            "name": "s",
            "tasks": [
                {
                    "task": "skill",
                    "metric": "acc",
                    "splits": {"search": "search", "select": "select", "test": "test"},
                }
            ],
        }
    )
    return WorkerSpec(
        models={"base": "base", "a": "a"},
        base="base",
        suite=suite,
        batch_size=8,
        dtype="float32",
        device=device,
        threads=1,
    )
