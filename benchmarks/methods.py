"""All merge methods on the demo zoo: each at the best of a small grid, beside task arithmetic at its best.

    python benchmarks/methods.py

Every source has the same weight. The grid's best is chosen on `search` and compared on `test`, item by item,
with task arithmetic chosen in the same way. Prints a Markdown table. Not covered: methods for two models,
those that need files (`fisher`, `regmean`) or adapters only (`core_space`), weights per source or layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.statistics import PairedTest
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.prepare import prepare
from evomerge.running.worker import Job, Worker
from evomerge.search import baselines

WEIGHTS = (0.2, 0.35, 0.6, 1.0)
SMALL = (0.1, 0.2, 0.35, 0.6)
FACTORS = (0.5, 1.0, 1.5, 2.0)
GRID: dict[str, Sequence[dict[str, Setting]]] = {
    "linear": ({},),
    "task_arithmetic": [{"weight": w} for w in WEIGHTS],
    "ties": [{"weight": w, "density": p, "normalize": False} for w in (0.4, 0.8) for p in (0.2, 0.5)],
    "dare_linear": [{"weight": w, "density": 0.5} for w in WEIGHTS],
    "dare_ties": [{"weight": w, "density": 0.5} for w in WEIGHTS],
    "breadcrumbs": [{"weight": w, "density": 0.9, "gamma": 0.01} for w in WEIGHTS],
    "della": [{"weight": w, "density": 0.5, "epsilon": 0.2} for w in SMALL],
    "sce": [{"select_topk": share} for share in (0.1, 0.3, 0.6, 1.0)],
    "model_stock": ({}, {"filter_wise": True}),
    "karcher": ({},),
    "multislerp": ({},),
    "ram": [{"lambda": f} for f in FACTORS],
    "ramplus_tl": [{"lambda": f} for f in FACTORS],
    "tsv": [{"lambda": f} for f in SMALL],
    "iso_c": [{"weight": w} for w in WEIGHTS],
    "iso_cts": [{"weight": w} for w in WEIGHTS],
    "wudi": [{"lambda": f} for f in SMALL],
}
RIVAL = "task_arithmetic"


class Bench:
    """The demo zoo with its references on both splits."""

    def __init__(self, config: RunConfig) -> None:
        self._prepared = prepare(config)
        self._worker = Worker(self._prepared.worker)
        self.sources = self._prepared.space.sources
        parents = baselines.parents(self._prepared.template, self.sources)
        self._scales: dict[Split, Normaliser] = {}
        for split in ("search", "test"):
            base, *others = [self.scores(parent.recipe, split) for parent in parents]
            self._scales[split] = Normaliser(
                self._prepared.suite, base=base, parents=dict(zip(self.sources, others, strict=True))
            )

    def recipe(self, method: str, parameters: dict[str, Setting]) -> Recipe:
        group = TensorGroup(method=method, sources=self.sources, parameters=parameters)
        return self._prepared.template.with_groups([group])

    def scores(self, recipe: Recipe, split: Split) -> Scores:
        blocks = self._prepared.worker.blocks_of(split)
        outcome = self._worker.run(Job(recipe=recipe, split=split, blocks=blocks)).outcome
        assert not isinstance(outcome, Failure), outcome
        assert isinstance(outcome, Scores)
        return outcome

    def mean(self, recipe: Recipe, split: Split) -> float:
        return 100 * self._scales[split].mean(self.scores(recipe, split))

    def compare(self, first: Recipe, second: Recipe) -> PairedTest:
        both = [self.scores(recipe, "test") for recipe in (first, second)]
        return self._scales["test"].compare(*both, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()
    bench = Bench(RunConfig.load(DEMO_CONFIG))
    best: dict[str, tuple[Recipe, dict[str, Setting]]] = {}
    for method, grid in GRID.items():
        made = [(bench.recipe(method, parameters), parameters) for parameters in grid]
        best[method] = max(made, key=lambda one: bench.mean(one[0], "search"))
    print("| method | best of its grid | `test` | beside task arithmetic [95 % interval] |")
    print("|---|---|---|---|")
    rows = {method: bench.mean(recipe, "test") for method, (recipe, _) in best.items()}
    for method in sorted(rows, key=lambda method: -rows[method]):
        recipe, parameters = best[method]
        shown = ", ".join(f"{name} {str(value).lower()}" for name, value in parameters.items()) or "-"
        test = bench.compare(recipe, best[RIVAL][0])
        beside = f"{100 * test.estimate:+.1f} [{100 * test.low:.1f}, {100 * test.high:.1f}]"
        print(f"| `{method}` | {shown} | {rows[method]:.1f} | {'-' if method == RIVAL else beside} |")


if __name__ == "__main__":
    main()
