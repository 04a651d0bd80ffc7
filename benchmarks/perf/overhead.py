"""What the search itself costs: ask + tell + store per candidate, and the replay of a whole run.

    python benchmarks/perf/overhead.py [--candidates 5000] [--layers 49] [--optimizer auto] [--surrogate off]

Runs the real loop, optimizer, scorer and run store (in a temporary folder) on a space of 10 coordinates
per layer and 10 outside, with an executor that scores in no time; then runs it again on the full store, as
a resume does. Not covered: merging and evaluating, which is all that a real run waits for.
Limits are on the wall clock; processor time stands beside it, for busy machines.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.config import load_space
from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Scores, Split, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running.batches import Batches
from evomerge.running.budget import Budget, BudgetSpec
from evomerge.running.clock import Clock
from evomerge.running.scorer import Scorer
from evomerge.running.store import BASE, RunStore, Timing, facts
from evomerge.running.worker import Job, Result
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec, choose
from evomerge.search.plan import SearchPlan
from evomerge.search.spaces.merge_space import SearchSpace
from evomerge.search.spaces.space import Coordinate
from evomerge.search.surrogate.guide import SurrogateSpec
from evomerge.stored import StoredRun

SOURCES = ("a", "b", "c", "d", "e")
ITEMS = 200
LIMITS = {"milliseconds per candidate": 50.0, "seconds of replay": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of the wall clock, and of this process on a processor."""

    seconds: float
    processor: float


def suite() -> Suite:
    """Return a suite with one task per source."""
    splits = {"search": "search", "select": "select", "test": "test"}
    tasks = [{"task": name, "metric": "acc", "specialist": name, "splits": splits} for name in SOURCES]
    return Suite.model_validate({"name": "overhead", "tasks": tasks})


class Instant:
    """An executor whose scores follow from the recipe's weights alone, without a model.

    executed: number of recipes it was given. seconds, processor: time it took, which is not the search's.
    """

    def __init__(self) -> None:
        self.executed, self.seconds, self.processor = 0, 0.0, 0.0

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield one result per job, in order."""
        for job in jobs:
            started, processor = time.perf_counter(), time.process_time()
            result = Result(
                job=job,
                outcome=_scores(job.recipe, job.split),
                timing=Timing(total=0, merge=0, forward=0, worker="0"),
            )
            self.executed += 1
            self.seconds += time.perf_counter() - started
            self.processor += time.process_time() - processor
            yield result

    def close(self) -> None:
        """Close nothing."""


def _scores(recipe: Recipe, split: Split) -> Scores:
    """Score each task by how near its source's mean weight is to 0.6; some items are harder than others."""
    weights = np.zeros(len(SOURCES))
    for group in recipe.groups:
        for source, weight in zip(group.sources, group.parameters.get("weight", (1.0,)), strict=False):
            if source != BASE:
                weights[SOURCES.index(source)] += float(weight) / len(recipe.groups)
    noise = np.random.default_rng(0).random((len(SOURCES), ITEMS))
    chances = np.clip(1.0 - np.abs(weights - 0.6), 0.05, 0.95)
    return Scores(
        split=split,
        tasks=tuple(
            TaskScores(task=task, metric=(row < chance).astype(float), smooth=0.9 * chance + 0.1 * row)
            for task, row, chance in zip(SOURCES, noise, chances, strict=True)
        ),
    )


def session(
    folder: Path, layers: int, candidates: int, optimizer: OptimizerSpec, surrogate: SurrogateSpec | None
) -> tuple[Cost, Instant, int]:
    """Run, or continue, the search in a folder; return its cost, the executor, the dimension."""
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    tensors = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    template = Recipe(
        models={name: name for name in (BASE, *SOURCES)},
        groups=(TensorGroup(method="linear", sources=SOURCES),),
        base=BASE,
    )
    space = SearchSpace(
        load_space("task_arithmetic_layers"),
        template=template,
        sources=SOURCES,
        tensors=["model.embed_tokens.weight", *tensors, "model.norm.weight"],
    )
    begun = {facts.CONFIG: {"models": {"base": BASE, "sources": {name: name for name in SOURCES}}}}
    executor = Instant()
    started, processor = time.perf_counter(), time.process_time()
    opened = RunStore.open(folder) if RunStore.exists(folder) else RunStore.create(folder, begun)
    with opened as store:
        store.begin_session({})
        Search(
            SearchPlan(
                suite=suite(),
                space=space,
                template=template,
                norms=dict.fromkeys(SOURCES, 1.0),
                optimizer=optimizer,
                objective=ObjectiveSpec(),
                surrogate=surrogate,
                finalists=8,
                seed=0,
            ),
            scorer=Scorer(store, executor, Silent(), Batches(store, 1)),
            journal=store,
            budget=Budget(BudgetSpec(evaluations=candidates), Clock()),
            observer=Silent(),
        ).run()
    cost = Cost(
        seconds=time.perf_counter() - started - executor.seconds,
        processor=time.process_time() - processor - executor.processor,
    )
    return cost, executor, space.dimension


def main() -> None:
    """Measure and print; exit with 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=49)
    parser.add_argument("--optimizer", default="auto")
    parser.add_argument("--surrogate", choices=("on", "off"), default="on")
    given = parser.parse_args()
    optimizer = OptimizerSpec(name=given.optimizer)
    surrogate = SurrogateSpec() if given.surrogate == "on" else None
    settings = (given.layers, given.candidates, optimizer, surrogate)
    with tempfile.TemporaryDirectory() as folder:
        first, executor, dimension = session(Path(folder) / "run", *settings)
        size = (Path(folder) / "run" / "run.sqlite").stat().st_size / 1e6
        replay, again, _ = session(Path(folder) / "run", *settings)
        with StoredRun.read(Path(folder) / "run") as run:
            asked = sum(len(generation.recipes) for generation in run.store.generations())
    assert again.executed == 0, "a replay executes nothing"
    print(choose(optimizer, [Coordinate()] * dimension)[1])
    print(f"{asked} candidates asked, {executor.executed} results stored, in {size:.0f} MB")
    found = {}
    for name, cost, scale in zip(LIMITS, (first, replay), (1e3 / asked, 1.0), strict=True):
        found[name] = cost.seconds * scale
        processor = f"{cost.processor * scale:.1f} of the processor"
        print(f"{name}: {found[name]:.1f} (limit {LIMITS[name]:.0f}), {processor}")
    raise SystemExit(any(value > LIMITS[name] for name, value in found.items()))


if __name__ == "__main__":
    main()
