"""Whole runs in simulated time: the real search, store, scorer and budget; workers and clock are made up."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Failure, joined
from evomerge.running.batches import Batches
from evomerge.running.breaker import tried_again
from evomerge.running.budget import Budget, BudgetSpec
from evomerge.running.clock import Clock
from evomerge.running.forecast import Forecast, Watch
from evomerge.running.observers import Observers
from evomerge.running.scorer import Scorer
from evomerge.running.store import RunStore, Timing, facts
from evomerge.running.worker import GradientJob, Job, NotBegun, Result
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.racing import RacingSpec
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.search.fakes import SUITE
from tests.search.test_guided_loop import BLOCKS, SPACE, Landscape

FINALISTS = 3
POPULATION = 6
_LANDSCAPE = Landscape()


class Time:
    """A clock that others move; each begins on another day."""

    _day = itertools.count(10_000)

    def __init__(self, at: float | None = None) -> None:
        self.at = 86400.0 * next(self._day) if at is None else at

    def __call__(self) -> float:
        return self.at


@dataclass
class Simulated:
    """An executor of workers that take made-up seconds.

    begun: (when, job) of everything it began. down: job number from which on everything fails.
    """

    time: Time
    workers: int = 2
    seconds: Callable[[Job], float] = lambda job: 20.0 + 5.0 * len(job.blocks)
    down: float = np.inf
    begun: list[tuple[float, Job]] = field(default_factory=list)

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        waiting, busy = list(jobs), []
        while waiting or busy:
            while waiting and len(busy) < self.workers:
                job = waiting.pop(0)
                assert isinstance(job, Job)
                if job.not_after is not None and self.time() >= job.not_after:
                    yield Result(job=job, outcome=NotBegun())
                    continue
                self.begun.append((self.time(), job))
                heapq.heappush(busy, (self.time() + self.seconds(job), len(self.begun), job))
            if busy:
                self.time.at, number, job = heapq.heappop(busy)
                yield self._result(job, number)

    def _result(self, job: Job, number: int) -> Result:
        if number >= self.down:
            return Result(job=job, outcome=Failure(kind="error", reason="the disk is gone"))
        parts = tuple(_LANDSCAPE._part(job.recipe, job.split, block) for block in job.blocks)
        timing = Timing(total=self.seconds(job), merge=0.0, forward=0.0, worker="0")
        return Result(job=job, outcome=joined(parts), timing=timing, parts=parts)

    def close(self) -> None: ...


def spend_night(
    folder: Path,
    executor: Simulated,
    budget: BudgetSpec,
    *,
    seed: int = 0,
    surrogate: SurrogateSpec | None = None,
    several: tuple[str, ...] = (),
    observer: Silent | None = None,
    keep: float = 1.0,
    optimizer: str = "cma_es",
) -> Outcome:
    """Run, or go on with, the run in a folder; one session."""
    time = executor.time
    config = {"models": {"base": "base", "sources": {"a": "a", "b": "b"}}, "budget": budget.model_dump()}
    begun = {facts.CONFIG: config, facts.BLOCKS: BLOCKS, facts.SUITE: SUITE.model_dump(mode="json")}
    with mock.patch("evomerge.running.store.store.time", SimpleNamespace(time=time, monotonic=time)):
        exists = RunStore.exists(folder)
        with RunStore.open(folder) if exists else RunStore.create(folder, begun) as store:
            store._db.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug here
            clock = Clock(time, earlier=store.hours())
            forecast = Forecast(
                store, clock, budget, workers=executor.workers, finalists=FINALISTS, several=bool(several)
            )
            store.begin_session({}, started=time())
            shown = observer or Silent()
            watch = Observers(Watch(forecast, store, budget, shown, time), shown)
            search = Search(
                SearchPlan(
                    suite=SUITE,
                    space=SPACE,
                    template=SPACE.decode(np.full(SPACE.dimension, 0.5)),
                    norms={"a": 1.0, "b": 1.0},
                    optimizer=OptimizerSpec.model_validate({"name": optimizer, "population": POPULATION}),
                    objective=ObjectiveSpec(several=several),
                    racing=RacingSpec(blocks=BLOCKS, keep=keep),
                    surrogate=surrogate,
                    finalists=FINALISTS,
                    seed=seed,
                ),
                scorer=Scorer(store, executor, watch, Batches(store, 64), failures=budget.failures, now=time),
                journal=store,
                budget=Budget.of_run(store, budget, clock, forecast.reserve),
                observer=watch,
            )
            with tried_again(store):
                outcome = search.run()
            facts.STOPPED.set(store, outcome.stopped)
            time.at += 1.0
            return outcome


def course(folder: Path) -> list[tuple[bytes, bytes | None]]:
    """The genomes and losses of all generations."""
    with RunStore.read(folder) as store:
        return [
            (g.genomes.tobytes(), None if g.losses is None else g.losses.tobytes())
            for g in store.generations()
        ]
