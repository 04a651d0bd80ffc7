"""Fronts of our search, of NSGA-II alone and of weighted sums by CMA-ES: hypervolume on `search` and `test`.

    python benchmarks/perf/pareto.py --methods ours:48 nsga2:480 [--config zoo/run.yaml] [--seeds 0 1 2]

Two objectives: the skill that the best hand-made merge has least of, and the mean of the others. `ours:48` is
`evomerge run` with a budget of 48 evaluations; `nsga2:480` scores 480 candidates on all search items, from
the same hand-made merges; `sums:480` spends them on five CMA-ES runs, each with another weight between the
two objectives. A front is what a method scored on all search items. It is thinned to the same number of
candidates (`--finalists`), these are scored on `test`, and the hypervolume they cover there is compared; the
reference point is fixed by everything that was not searched.

Of the demo's models, or of those of any run config. Each run leaves a JSON file in `--results`, which later
calls find.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.delivery.progress import Silent
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.worker import Job
from evomerge.search import baselines, optimizers, pareto
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.stored import StoredRun

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Weights of the first objective in the weighted sums."""
RESULTS = Path("runs/bench-pareto")

Losses = NDArray[np.float64]


class Bench:
    """Models, their references, and scores remembered by recipe and split.

    thinned: how many candidates of a front are scored on `test`.
    """

    def __init__(self, config: RunConfig, thinned: int) -> None:
        self.config, self.prepared = config, prepare(config)
        self.thinned = thinned
        self._executor = executors.build(config.executor, self.prepared.worker)
        self._known: dict[tuple[str, Split], Scores | Failure] = {}
        sources = self.prepared.space.sources
        self._parents = baselines.parents(self.prepared.template, sources)
        norms = compose.measure(self.prepared).norms
        hand_made = baselines.hand_made(self.prepared.template, sources, norms)
        self.unsearched = [named.recipe for named in (*self._parents, *hand_made)]
        self.spec = ObjectiveSpec(several=self._several([named.recipe for named in hand_made]))
        self._objectives = {s: Objective(self.spec, self._normaliser(s)) for s in ("search", "test")}

    def _several(self, hand_made: Sequence[Recipe]) -> tuple[str, dict[str, float]]:
        """Return the skill that the best hand-made merge has least of, and the group of the others."""
        normaliser = self._normaliser("search")
        scores = [s for s in self._scores(hand_made, "search") if isinstance(s, Scores)]
        best = normaliser.task(max(scores, key=normaliser.mean))
        alone = min(normaliser.counted, key=lambda task: best[task])
        return alone, {task: 1.0 for task in normaliser.counted if task != alone}

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
    ) -> list[Recipe]:
        """Run one optimizer; `scalar` turns both losses into one; with None both are passed on."""
        optimizer = optimizers.create(
            OptimizerSpec(name=name),
            coordinates=self.prepared.space.coordinates,
            objectives=1 if scalar else 2,
            starts=self.starts(scalar or (lambda losses: losses.sum(axis=1))),
            seed=np.random.SeedSequence(seed),
        )
        recipes: list[Recipe] = []
        while len(recipes) < evaluations and optimizer.stop_reason() is None:
            genomes = optimizer.ask()
            asked = [self.prepared.space.decode(u) for u in genomes]
            losses = self.losses(asked, "search")
            optimizer.tell(scalar(losses)[:, None] if scalar else losses)
            recipes += asked
        return recipes[:evaluations]

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


def ours(bench: Bench, evaluations: int, seed: int) -> list[Recipe]:
    """Run evomerge; return the candidates of its last front."""
    with tempfile.TemporaryDirectory() as folder:
        config = bench.config.model_copy(
            update={
                "objective": bench.spec,
                "budget": bench.config.budget.model_copy(update={"evaluations": evaluations}),
                "seed": seed,
                "out": str(Path(folder) / "run"),
            }
        )
        compose.start(config, Silent())
        with StoredRun.read(Path(config.out)) as run:
            return [named.recipe for named in run.store.entries("front")]


def found_by(bench: Bench, method: str, evaluations: int, seed: int) -> list[Recipe]:
    """Return what a method scored on all search items."""
    if method == "ours":
        return ours(bench, evaluations, seed)
    if method == "nsga2":
        return bench.search("nsga2", evaluations, seed, None)
    return [
        recipe
        for i, share in enumerate(SHARES)
        for recipe in bench.search(
            "cma_es",
            evaluations // len(SHARES),
            1000 * seed + i,
            lambda both, share=share: share * both[:, 0] + (1 - share) * both[:, 1],
        )
    ]


def measured(bench: Bench, method: str, evaluations: int, seed: int) -> dict[str, float]:
    """Return what a method covers with a seed."""
    started = time.perf_counter()
    recipes = found_by(bench, method, evaluations, seed)
    losses = bench.losses(recipes, "search")
    search, test, size = bench.covered(recipes, losses)
    return {
        "search": search,
        "test": test,
        "front": size,
        "best_alone": float(-losses[:, 0].min()),
        "best_others": float(-losses[:, 1].min()),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["ours:48", "nsga2:480", "sums:480"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="of the models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--finalists", type=int, default=20, help="of each front, scored on test")
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    config = RunConfig.load(options.config, out=str(options.results / "unused"))
    executor = config.executor.model_copy(update={"workers": options.workers})
    bench: Bench | None = None
    print("| method | seed | front | hypervolume, search | hypervolume, test | seconds |")
    print("|---|---|---|---|---|---|")
    found: dict[str, list[dict[str, float]]] = {}
    for method in options.methods:
        for seed in options.seeds:
            path = options.results / f"{method.replace(':', '-')}-{seed}.json"
            if not path.exists():
                bench = bench or Bench(config.model_copy(update={"executor": executor}), options.finalists)
                name, _, evaluations = method.partition(":")
                path.write_text(json.dumps(measured(bench, name, int(evaluations), seed)))
            row = json.loads(path.read_text())
            found.setdefault(method, []).append(row)
            print(
                f"| {method} | {seed} | {row['front']} | {row['search']:.4f} | {row['test']:.4f} | "
                f"{row['seconds']:.0f} |",
                flush=True,
            )
    if bench is not None:
        bench.close()
    for method, rows in found.items():
        for split in ("search", "test"):
            values = [row[split] for row in rows]
            print(
                f"{method}: median {statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}] "
                f"on {split}"
            )


if __name__ == "__main__":
    main()
