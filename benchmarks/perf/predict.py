"""How true `evomerge predict` is: the scores of merges that the run behind it has not seen.

    python benchmarks/perf/predict.py                                # the demo's models
    python benchmarks/perf/predict.py --config zoo/run.yaml          # those of any run config

One search per seed is made and stored (later calls find it). From every search alone are predicted:

    own      its own candidates, each left out
    other    candidates of the other seeds' searches
    between  these, a quarter of the way to a uniform point
    uniform  uniform points of the space

Each is then scored on all `search` items. Points are hundredths: 0 the base, 100 the specialists.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.delivery.course import Course
from evomerge.delivery.predict import scored
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import Scores
from evomerge.prepare import Prepared, prepare
from evomerge.running import executors
from evomerge.running.worker import Job
from evomerge.search.spaces.space import Genome
from evomerge.search.surrogate.prediction import Example, predict_score
from evomerge.stored import StoredRun

RESULTS = Path("runs/bench-predict")
KINDS = ("own", "other", "between", "uniform")
WAY = 0.25


class Run:
    """A stored search with what a prediction needs."""

    def __init__(self, source: Path, seed: int, evaluations: int, results: Path) -> None:
        config = RunConfig.load(
            source, seed=seed, out=str(results / f"{evaluations}-{seed}"), evaluations=evaluations
        )
        inline = config.executor.model_copy(update={"name": "inline", "threads": 1})
        self.prepared: Prepared = prepare(config.model_copy(update={"executor": inline}))
        if not (self.prepared.folder / "report.html").exists():
            compose.execute(self.prepared, Silent())
        with StoredRun.read(self.prepared.folder) as stored:
            summary = Summary(stored)
            course = Course(summary)
            self.examples: list[Example] = scored(summary, course, self.prepared)
            self.base = course.parts(summary.parents[0].recipe.hash)
            self.normaliser = summary.normaliser("search")
            found = [g for generation in stored.store.generations() for g in generation.genomes]
        self.candidates = list({g.tobytes(): g for g in found}.values())

    def drawn(self, count: int) -> list[Genome]:
        """Return some candidates, evenly from the first generation to the last."""
        at = np.linspace(0, len(self.candidates) - 1, count).round().astype(int)
        return [self.candidates[i] for i in at]


class Truth:
    """Measures genomes on all `search` items; what was measured is kept in a file."""

    def __init__(self, prepared: Prepared, path: Path) -> None:
        self._space, self._path = prepared.space, path
        self._blocks = prepared.worker.blocks_of("search")
        self._executor = executors.build(prepared.config.executor, prepared.worker)
        self._known: dict[str, Scores] = pickle.loads(path.read_bytes()) if path.exists() else {}

    def __call__(self, genome: Genome) -> Scores:
        recipe = self._space.decode(genome)
        if recipe.hash not in self._known:
            (result,) = self._executor.run([Job(recipe=recipe, split="search", blocks=self._blocks)])
            assert isinstance(result.outcome, Scores), result.outcome
            self._known[recipe.hash] = result.outcome
        return self._known[recipe.hash]

    def close(self) -> None:
        self._path.write_bytes(pickle.dumps(self._known))
        self._executor.close()


def points(runs: list[Run], number: int, count: int) -> dict[str, list[Genome]]:
    """Return the genomes that are predicted from one of the runs."""
    generator = np.random.default_rng(1)
    dimension = runs[0].prepared.space.dimension
    others = [g for n, run in enumerate(runs) if n != number for g in run.drawn(count)]
    uniform = [generator.random(dimension) for _ in range(count)]
    between = [(1 - WAY) * g + WAY * uniform[n % count] for n, g in enumerate(others) if n % 2]
    return {"own": runs[number].drawn(count), "other": others, "between": between, "uniform": uniform}


def predictions(runs: list[Run], truth: Truth, count: int) -> dict[str, list[tuple[Any, float]]]:
    """Return by kind the forecasts with what was measured."""
    found: dict[str, list[tuple[Any, float]]] = {kind: [] for kind in KINDS}
    for number, run in enumerate(runs):
        assert run.normaliser is not None
        for kind, genomes in points(runs, number, count).items():
            for genome in genomes:
                known = [e for e in run.examples if e.genome.tobytes() != genome.tobytes()]
                forecast = predict_score(
                    genome,
                    known,
                    coordinates=run.prepared.space.coordinates,
                    normaliser=run.normaliser,
                    base=run.base,
                )
                found[kind].append((forecast, run.normaliser.mean(truth(genome))))
    return found


def table(found: dict[str, list[tuple[Any, float]]]) -> None:
    """Print a line per kind, of the forecasts with a score."""
    print(
        "| points | predicted | of them with a score | 95 % interval covers | half-width, median "
        "| largest | root mean square error | bias | rank correlation |"
    )
    print("|---" * 9 + "|")
    for kind, pairs in found.items():
        kept = [(f, m) for f, m in pairs if f.known]
        line = f"| {kind} | {len(pairs)} | {len(kept)} "
        if len(kept) > 1:
            half = np.array([100 * (f.high - f.low) / 2 for f, _ in kept])
            error = np.array([100 * (m - f.mean) for f, m in kept])
            inside = np.mean([f.low <= m <= f.high for f, m in kept])
            ranks = scipy.stats.spearmanr([f.mean for f, _ in kept], [m for _, m in kept]).statistic
            line += (
                f"| {inside:.0%} | {np.median(half):.1f} | {half.max():.1f} "
                f"| {np.sqrt((error**2).mean()):.1f} | {error.mean():+.1f} | {ranks:.2f} |"
            )
        else:
            line += "| - " * 6 + "|"
        print(line)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="a run config of other models")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--count", type=int, default=40, help="genomes of each kind")
    options = parser.parse_args()
    folder = "demo" if options.config == DEMO_CONFIG else options.config.resolve().parent.name
    results = RESULTS / folder
    results.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = [Run(options.config, seed, options.evaluations, results) for seed in seeds]
    truth = Truth(runs[0].prepared, results / "truth.pickle")
    try:
        table(predictions(runs, truth, options.count))
    finally:
        truth.close()


if __name__ == "__main__":
    main()
