"""Gradients that follow gold answers, specialists' right answers, or specialists' distributions; and none.

    python benchmarks/perf/unlabelled.py [--config ZOO/run.yaml] --seeds 0

The skills of a zoo are asked as questions that the models answer in writing (see `generation_search`), scored
by exact match. Every way starts from the best of all hand-made merges and takes 64 steps on a tenth of the
items (at least 8), as much as 20 to 30 evaluations; `none` is CMA-ES on the exact scores of 24 evaluations.
Both ends are judged on `test`, in points: 0 is the base, 100 the specialists; in brackets the weakest task.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from generation_search import GOLD, write_suite

from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation.asking import DISTRIBUTION
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores
from evomerge.evaluation.smooth_loss import SmoothLoss
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import own_answers
from evomerge.running.store import BASE
from evomerge.running.worker import GradientJob, Job, Worker
from evomerge.search import baselines, optimizers
from evomerge.search.companions import taught
from evomerge.search.descent import StepLosses, descend
from evomerge.search.objective import Objective
from evomerge.search.warm_start import GradientSpec

STEPS = 64
EVALUATIONS = 24


class Bench:
    """A zoo on its written suite, in one process."""

    def __init__(self, config: Path, companion: str, items: int, judged: int, folder: Path) -> None:
        loaded = RunConfig.load(config, seed=0, out=str(folder / "run"))
        suite = write_suite(loaded, folder / "suite", companion, GOLD, items, judged)
        executor = loaded.executor.model_copy(update={"name": "inline", "threads": 1, "batch_size": 64})
        racing = loaded.racing.model_copy(update={"blocks": 1})
        changes: dict[str, Any] = {"suite": str(suite), "executor": executor, "racing": racing}
        self.prepared = prepare(loaded.model_copy(update=changes))
        prepared, names = self.prepared, self.prepared.space.sources
        self.parents = baselines.parents(prepared.template, names)
        recipes = {named.name: named.recipe for named in self.parents[1:]}
        answers, expected = {}, {}
        if own_answers.followed(prepared.suite):
            answers = own_answers.generate(prepared.worker, executor, recipes)
        if own_answers.followed(prepared.suite, DISTRIBUTION):
            expected = own_answers.expect(prepared.worker, executor, recipes)
        self.worker = Worker(replace(prepared.worker, answers=answers, distributions=expected))
        norms = task_vector_norms(prepared.config.locations, BASE)
        rows = baselines.hand_made(prepared.template, names, norms)
        self.rows = [row for row in rows if prepared.space.encode(row.recipe) is not None]
        self.reference = self.normaliser("search")
        scored = [(self.score(row.recipe, "search"), row) for row in self.rows]
        self.best, self.start = max(scored, key=lambda pair: self.reference.mean(pair[0]))
        self.judge = self.normaliser("test")

    def normaliser(self, split: str) -> Normaliser:
        """Return the scale of a split."""
        base, *others = (self.score(parent.recipe, split) for parent in self.parents)
        by_name = {parent.name: scores for parent, scores in zip(self.parents[1:], others, strict=True)}
        return Normaliser(self.prepared.suite, base=base, parents=by_name)

    def score(self, recipe: Recipe, split: str) -> Scores:
        """Score a recipe on a split."""
        outcome = self.worker.run(Job(recipe=recipe, split=split)).outcome
        assert isinstance(outcome, Scores), outcome
        return outcome

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Any:
        """Differentiate a loss."""
        return self.worker.run(GradientJob(recipe=recipe, loss=loss)).outcome

    def judged(self, recipe: Recipe) -> str:
        """Say what a recipe scores on `test`."""
        scores = self.judge.task(self.score(recipe, "test"))
        values = [100 * scores[task] for task in self.judge.counted]
        return f"{np.mean(values):.1f} ({min(values):.0f})"

    def descent(self, seed: int, share: float) -> str:
        """Follow gradients; return what their ends score."""
        objective = Objective(self.prepared.config.objective, self.reference)
        objective = objective.above(self.start.name, self.best)
        spec, base = GradientSpec(steps=STEPS, share=share), self.score(self.parents[0].recipe, "search")
        losses = StepLosses(
            objective,
            base=base,
            start=self.best,
            spec=spec,
            price=self.prepared.config.objective.retention,
            seeds=np.random.SeedSequence(seed).spawn(spec.steps),
            taught=taught(self.prepared.suite, base, self.reference.counted),
        )
        space = self.prepared.space
        start = space.encode(self.start.recipe)
        assert start is not None
        found = descend(space, start, spec, losses, self, losses.learn)
        assert found.failure is None, found.failure
        ends = [self.judged(space.decode(u)) for u in (found.last, found.mean)]
        return f"{' / '.join(ends)} after {found.items / self.best.items:.0f} evaluations"

    def evolution(self, seed: int) -> str:
        """Follow exact scores; return what the best of them scores."""
        space = self.prepared.space
        start = space.encode(self.start.recipe)
        spec = optimizers.OptimizerSpec(name="cma_es", population=8)
        search = optimizers.create(
            spec, coordinates=space.coordinates, starts=[start], seed=np.random.SeedSequence(seed)
        )
        objective = Objective(self.prepared.config.objective, self.reference).above(
            self.start.name, self.best
        )
        best = (np.inf, self.start.recipe)
        for _ in range(EVALUATIONS // 8):
            recipes = [space.decode(u) for u in search.ask()]
            scores = [self.score(recipe, "search") for recipe in recipes]
            losses = objective.scalar_losses(scores, recipes)
            search.tell(np.array(losses)[:, None])
            best = min([best, *zip(losses, recipes, strict=True)], key=lambda pair: pair[0])
        return f"{self.judged(best[1])} after {EVALUATIONS} evaluations"


def main() -> None:
    """Run the chosen ways and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG)
    parser.add_argument("--ways", default="none,auto,specialist,distribution")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--items", type=int, default=80, help="of each task on `search`")
    parser.add_argument("--judged", type=int, default=200, help="of each task on `test`")
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    for way in options.ways.split(","):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            companion = "off" if way == "none" else way
            bench = Bench(options.config, companion, options.items, options.judged, Path(folder))
            print(f"{way}: start {bench.start.name} {bench.judged(bench.start.recipe)}", flush=True)
            for seed in map(int, options.seeds.split(",")):
                found = bench.evolution(seed) if way == "none" else bench.descent(seed, options.share)
                print(
                    f"{way}, seed {seed}: {found}; {time.process_time() - began:.0f} CPU seconds", flush=True
                )


if __name__ == "__main__":
    main()
