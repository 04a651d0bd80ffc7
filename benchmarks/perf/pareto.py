"""Is a Pareto search worth it? NSGA-II against weighted sums by CMA-ES, hypervolume on `test`, equal items.

    python benchmarks/perf/pareto.py [--seeds 0 1 2 3 4] [--evaluations 480] [--workers 2] [--json FILE]

The demo zoo, two objectives: the skill that single-objective winners give up (`reverse`) against the mean
of the other four. NSGA-II searches both at once; the rival spends the same evaluations on five CMA-ES runs,
each with another weight between the two. Both start from the same hand-made merges. Each method's front
on `search` is thinned to the same number of candidates, these are scored on `test`, and the hypervolume
they cover there is compared; the reference point is fixed by everything that was not searched. Items are
equal because every candidate is scored on all search items. Not covered: racing, more than two objectives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.worker import Job
from evomerge.search import baselines, optimizers, pareto
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec

ALONE = "demo_reverse"
OTHERS = ("demo_add", "demo_translate", "demo_upper", "demo_sort")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Weights of ALONE in the weighted sums."""

Losses = NDArray[np.float64]


class Bench:
    """The demo zoo, its references, and scores remembered by recipe and split.

    thinned: how many candidates of a front are scored on `test`.
    """

    def __init__(self, config: RunConfig, thinned: int) -> None:
        self.prepared = prepare(config)
        self.thinned = thinned
        self._executor = executors.build(config.executor, self.prepared.worker)
        self._known: dict[tuple[str, Split], Scores | Failure] = {}
        sources = self.prepared.space.sources
        self._parents = baselines.parents(self.prepared.template, sources)
        norms = compose.norms(self.prepared)
        hand_made = baselines.hand_made(self.prepared.template, sources, norms)
        self.unsearched = [named.recipe for named in (*self._parents, *hand_made)]
        spec = ObjectiveSpec(several=(ALONE, dict.fromkeys(OTHERS, 1.0)))
        self._objectives = {s: Objective(spec, self._normaliser(s)) for s in ("search", "test")}

    def close(self) -> None:
        self._executor.close()

    def losses(self, recipes: Sequence[Recipe], split: Split) -> Losses:
        """Return both losses of each recipe, shape (n, 2)."""
        return self._objectives[split].losses(self._scores(recipes, split))

    def reference(self, split: Split) -> Losses:
        return self._objectives[split].reference_point(self._scores(self.unsearched, split))

    def starts(self, scalar: Callable[[Losses], Losses]) -> list[Losses]:
        """Return the genomes of what was not searched and the space can express, best first."""
        order = np.argsort(scalar(self.losses(self.unsearched, "search")), kind="stable")
        genomes = [self.prepared.space.encode(self.unsearched[i]) for i in order]
        return [genome for genome in genomes if genome is not None]

    def search(
        self, name: str, evaluations: int, seed: int, scalar: Callable[[Losses], Losses] | None
    ) -> tuple[list[Recipe], Losses]:
        """Run one optimizer; `scalar` turns both losses into one; with None both are passed on."""
        optimizer = optimizers.create(
            OptimizerSpec(name=name),
            coordinates=self.prepared.space.coordinates,
            objectives=1 if scalar else 2,
            starts=self.starts(scalar or (lambda losses: losses.sum(axis=1))),
            seed=np.random.SeedSequence(seed),
        )
        recipes: list[Recipe] = []
        found: list[Losses] = []
        while len(recipes) < evaluations and optimizer.stop_reason() is None:
            genomes = optimizer.ask()
            asked = [self.prepared.space.decode(u) for u in genomes]
            losses = self.losses(asked, "search")
            optimizer.tell(scalar(losses)[:, None] if scalar else losses)
            recipes += asked
            found.append(losses)
        return recipes[:evaluations], np.concatenate(found)[:evaluations]

    def covered(self, recipes: Sequence[Recipe], losses: Losses) -> tuple[float, float, int]:
        """Return the hypervolume on search, that of the thinned front on test, and the front's size."""
        front = pareto.front(losses)
        chosen = [recipes[i] for i in pareto.spread(losses, self.thinned)]
        test = pareto.hypervolume(self.losses(chosen, "test"), self.reference("test"))
        return pareto.hypervolume(losses, self.reference("search")), test, len(front)

    def _normaliser(self, split: Split) -> Normaliser:
        scores = self._scores([parent.recipe for parent in self._parents], split)
        base, *parents = [s for s in scores if isinstance(s, Scores)]
        names = [parent.name for parent in self._parents[1:]]
        return Normaliser(self.prepared.suite, base=base, parents=dict(zip(names, parents, strict=True)))

    def _scores(self, recipes: Sequence[Recipe], split: Split) -> list[Scores | Failure]:
        blocks = self.prepared.worker.blocks_of(split)
        new = {
            r.hash: Job(recipe=r, split=split, blocks=blocks)
            for r in recipes
            if (r.hash, split) not in self._known
        }
        for result in self._executor.run(list(new.values())):
            self._known[result.job.recipe.hash, split] = result.outcome
        return [self._known[recipe.hash, split] for recipe in recipes]


def compare(bench: Bench, evaluations: int, seed: int) -> dict[str, dict[str, float]]:
    """Return what both methods cover with one seed."""
    rows = {}
    started = time.perf_counter()
    recipes, losses = bench.search("nsga2", evaluations, seed, None)
    rows["nsga2"] = _row(bench, recipes, losses, started)
    started = time.perf_counter()
    parts = [
        bench.search(
            "cma_es",
            evaluations // len(SHARES),
            1000 * seed + i,
            lambda both, share=share: share * both[:, 0] + (1 - share) * both[:, 1],
        )
        for i, share in enumerate(SHARES)
    ]
    recipes = [recipe for found, _ in parts for recipe in found]
    rows["weighted sums"] = _row(bench, recipes, np.concatenate([losses for _, losses in parts]), started)
    return rows


def _row(bench: Bench, recipes: Sequence[Recipe], losses: Losses, started: float) -> dict[str, float]:
    search, test, size = bench.covered(recipes, losses)
    return {
        "evaluations": len(recipes),
        "search": search,
        "test": test,
        "front": size,
        "best_alone": float(-losses[:, 0].min()),
        "best_others": float(-losses[:, 1].min()),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", type=int, default=480, help="of each method, all its runs together")
    parser.add_argument("--finalists", type=int, default=20, help="of each front, scored on test")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    config = RunConfig.load(DEMO_CONFIG, out="runs/pareto-benchmark")
    executor = config.executor.model_copy(update={"workers": options.workers})
    bench = Bench(config.model_copy(update={"executor": executor}), options.finalists)
    found: dict[int, dict[str, dict[str, float]]] = {}
    print("| seed | method | evaluations | front | hypervolume, search | hypervolume, test | seconds |")
    print("|---|---|---|---|---|---|---|")
    try:
        for seed in options.seeds:
            found[seed] = compare(bench, options.evaluations, seed)
            for name, row in found[seed].items():
                print(
                    f"| {seed} | {name} | {row['evaluations']} | {row['front']} | {row['search']:.4f} | "
                    f"{row['test']:.4f} | {row['seconds']:.0f} |",
                    flush=True,
                )
    finally:
        bench.close()
    for name in next(iter(found.values())):
        values = [rows[name]["test"] for rows in found.values()]
        print(
            f"{name}: median {statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}] on test"
        )
    ratios = [rows["nsga2"]["test"] / rows["weighted sums"]["test"] for rows in found.values()]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"nsga2 / weighted sums: median {middle:.3f} [{low:.3f}, {high:.3f}]")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
