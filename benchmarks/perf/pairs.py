"""What two specialists gain by a merge, predicted before it: gradients at each along the other's task vector.

    python benchmarks/perf/pairs.py demo zoo/run.yaml other/run.yaml

Every pair of the sources of each config is merged over a small grid (task arithmetic with weights .4, .7
and 1, TIES with .8). The best on three blocks of `search` is scored on `test`: its gain is the mean
normalised score of the two skills less the better parent's. Measured zoos are kept in runs/bench-pairs.

The predictors, means over both directions of a pair, from 64 `search` items per skill:

    cosine        of the task vectors, from the files
    interference  log mean square of the slope of a specialist's margins along the other's task vector
    slack         log mean square of its margins less that, as `evomerge analyze --gain` takes it

Pairs with a specialist that gains less than 10 points over the base on its metric are left out: a gain in
units of such a headroom is noise. `fit`: a straight line of the gain over the slack, through the pairs of the
other zoos; the line through all pairs is what `analyze` has.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from evomerge import pair_gains
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Array, Scores, Split
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss, SmoothTask
from evomerge.merging.analysis.interference import measure
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.store import BASE
from evomerge.running.worker import GradientJob, Job
from evomerge.search import baselines

RESULTS = Path("runs/bench-pairs")
WEIGHTS = (0.4, 0.7, 1.0)
BLOCKS = 3
LINEAR = pair_gains.LINEAR
PREDICTORS = ("cosine", "interference", "slack")


class Zoo:
    """The models of a config, and what merges of two of them score."""

    def __init__(self, source: Path) -> None:
        config = RunConfig.load(source, seed=0, out=str(RESULTS / "none"))
        inline = config.executor.model_copy(update={"name": "inline", "threads": 1})
        prepared = prepare(config.model_copy(update={"executor": inline}))
        self.locations, self._template = config.locations, prepared.template
        self.names = tuple(prepared.space.sources)
        self._blocks = prepared.worker.blocks_of
        self._executor = executors.build(prepared.config.executor, prepared.worker)
        self._tasks = {
            spec.specialist: spec.task
            for spec in prepared.suite.tasks
            if spec.specialist is not None and spec.counted and spec.role == "skill"
        }
        self._known: dict[tuple[str, Split], Scores] = {}
        base, *parents = baselines.parents(self._template, self.names)
        self.parents = {parent.name: parent.recipe for parent in parents}
        splits: tuple[Split, ...] = ("search", "test")
        self._scales = {
            split: Normaliser(
                prepared.suite,
                base=self._scores(base.recipe, split),
                parents={name: self._scores(recipe, split) for name, recipe in self.parents.items()},
            )
            for split in splits
        }

    def _scores(self, recipe: Recipe, split: Split) -> Scores:
        if (recipe.hash, split) not in self._known:
            job = Job(recipe=recipe, split=split, blocks=self._blocks(split)[:BLOCKS])
            (result,) = self._executor.run([job])
            assert isinstance(result.outcome, Scores), result.outcome
            self._known[recipe.hash, split] = result.outcome
        return self._known[recipe.hash, split]

    def score(self, recipe: Recipe, split: Split, pair: tuple[str, str]) -> float:
        """Return the mean normalised score of two skills."""
        found = self._scales[split].task(self._scores(recipe, split))
        return float(np.mean([found[self._tasks[name]] for name in pair]))

    def gain(self, pair: tuple[str, str]) -> float:
        """Return what the best merge of a pair gains over the better of the two on `test`."""
        grid = [("task_arithmetic", weights) for weights in itertools.product(WEIGHTS, WEIGHTS)]
        grid.append(("ties", (0.8, 0.8)))
        recipes = [
            self._template.with_groups([TensorGroup(method=m, sources=pair, parameters={"weight": w})])
            for m, w in grid
        ]
        best = max(recipes, key=lambda recipe: self.score(recipe, "search", pair))
        return self.score(best, "test", pair) - max(
            self.score(self.parents[name], "test", pair) for name in pair
        )

    def headroom(self, name: str) -> float:
        """Return what a specialist gains over the base on `test`, on its metric's scale."""
        task = self._tasks[name]
        base, *_ = baselines.parents(self._template, self.names)
        own, zero = (self._scores(r, "test")[task].mean for r in (self.parents[name], base.recipe))
        return own - zero

    def slopes(self, name: str) -> Array:
        """Return (items, 1 + sources): a specialist's margins on its skill, and their slopes by source."""
        weights = tuple(float(other == name) for other in self.names)
        group = TensorGroup(method="task_arithmetic", sources=self.names, parameters={"weight": weights})
        recipe, task, rows = self._template.with_groups([group]), self._tasks[name], []
        for item in range(pair_gains.ITEMS):
            part = SmoothTask(task=task, gain=-1.0, items=(item,))
            loss = SmoothLoss(tasks=(part,), price=0.0, softness=LINEAR)
            (result,) = self._executor.run([GradientJob(recipe=recipe, loss=loss)])
            assert isinstance(result.outcome, Gradient), result.outcome
            share = result.outcome.values[task]
            scale = LINEAR / (share * (1 - share))
            slopes = np.array(result.outcome.groups[0]["weight"]) * scale
            rows.append([LINEAR * np.log(share / (1 - share)), *slopes])
        return np.array(rows)


def measured(source: Path) -> list[dict[str, Any]]:
    """Return the predictors and the gain of every pair of a config's sources."""
    zoo = Zoo(source)
    slopes = {name: zoo.slopes(name) for name in zoo.names}
    files = measure(zoo.locations, BASE)
    found = []
    for i, j in itertools.combinations(range(len(zoo.names)), 2):
        pair = zoo.names[i], zoo.names[j]
        ways = [(slopes[pair[0]], 1 + j), (slopes[pair[1]], 1 + i)]
        squares = [float((rows[:, at] ** 2).mean()) for rows, at in ways]
        (slack,) = pair_gains.ranked(zoo.names, {name: slopes[name] for name in pair})
        a, b = (files.models.index(name) for name in pair)
        found.append(
            {
                "pair": list(pair),
                "gain": zoo.gain(pair),
                "cosine": float(files.total.cosine[a, b]),
                "interference": float(np.mean(np.log(squares))),
                "slack": slack.slack,
                "headroom": min(zoo.headroom(name) for name in pair),
            }
        )
        print(found[-1], flush=True)
    return found


def fitted(zoos: list[list[dict[str, Any]]], left: int) -> Array:
    """Return the predicted gains of a zoo's pairs, by a straight line through those of the other zoos."""
    known = [pair for number, zoo in enumerate(zoos) if number != left for pair in zoo]
    line = np.polyfit([pair["slack"] for pair in known], [pair["gain"] for pair in known], 1)
    return np.polyval(line, [pair["slack"] for pair in zoos[left]])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="`demo`, or run configs of other models")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    zoos = []
    for config in options.configs:
        source = DEMO_CONFIG if config == "demo" else Path(config)
        name = config if config == "demo" else source.resolve().parent.name
        path = RESULTS / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(measured(source), indent=1))
        pairs = json.loads(path.read_text())
        zoos.append([pair for pair in pairs if pair["headroom"] >= pair_gains.LEAST_GAIN])
    gains = np.concatenate([[pair["gain"] for pair in zoo] for zoo in zoos])
    columns = {name: np.concatenate([[pair[name] for pair in zoo] for zoo in zoos]) for name in PREDICTORS}
    if len(zoos) > 1:
        columns["fit"] = np.concatenate([fitted(zoos, number) for number in range(len(zoos))])
    print(f"{len(gains)} pairs; rank correlation with the gain [95 % interval, bootstrap over pairs]")
    draws = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    for name, column in columns.items():
        ranks = scipy.stats.spearmanr(column, gains).statistic
        low, high = np.nanpercentile(
            [scipy.stats.spearmanr(column[d], gains[d]).statistic for d in draws], [2.5, 97.5]
        )
        print(f"{name}: {ranks:.2f} [{low:.2f}, {high:.2f}]")
    if "fit" in columns:
        errors = 100 * (gains - columns["fit"])
        spread = 100 * gains.std()
        print(f"error of the fit: {np.sqrt((errors**2).mean()):.1f} points; the gains spread by {spread:.1f}")
        slope, offset = np.polyfit(columns["slack"], gains, 1)
        print(f"line through all pairs: {offset:.3f} + {slope:.3f} slack")


if __name__ == "__main__":
    main()
