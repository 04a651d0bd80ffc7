"""How far merging can get on a run's models: coefficients tuned by gradient on all search items.

    python benchmarks/perf/ceiling.py CONFIG [--steps 400] [--rate 0.05] [--share 1.0] [--softness 0.5]
        [--seed 0] [--split select] [--out ceiling.json]

Starts at the best task-arithmetic baseline the config's space can express, follows the gradient for many
more steps than a warm start would, and prints the normalised mean on `search` and on a held-out split of
that point and of the start. The second is the C of "head-room closed": (winner - best baseline) / (C - best
baseline). A step costs three times its items; the sum is printed in full evaluations of `search`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import get_args

import numpy as np

from evomerge.config import RunConfig
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss, smooth_loss
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running.worker import GradientJob, Job, Worker
from evomerge.search import baselines
from evomerge.search.descent import descend
from evomerge.search.objective import Objective
from evomerge.search.warm_start import GradientSpec


class Bench:
    """One worker, and the references that everything is normalised by."""

    def __init__(self, config: RunConfig, held_out: Split) -> None:
        self.prepared = prepare(config)
        self.worker = Worker(self.prepared.worker)
        self.splits: tuple[Split, ...] = ("search", held_out)
        names = self.prepared.space.sources
        parents = baselines.parents(self.prepared.template, names)
        self.base: dict[Split, Scores] = {}
        self.normalisers: dict[Split, Normaliser] = {}
        for split in self.splits:
            base, *rest = [self.score(parent.recipe, split) for parent in parents]
            self.base[split] = base
            by_name = dict(zip(names, rest, strict=True))
            self.normalisers[split] = Normaliser(self.prepared.suite, base=base, parents=by_name)
        self.objective = Objective(config.objective, self.normalisers["search"])

    def score(self, recipe: Recipe, split: Split) -> Scores:
        outcome = self.worker.run(
            Job(recipe=recipe, split=split, blocks=self.prepared.worker.blocks_of(split))
        ).outcome
        assert isinstance(outcome, Scores), outcome
        return outcome

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
        outcome = self.worker.run(GradientJob(recipe=recipe, loss=loss)).outcome
        assert isinstance(outcome, Gradient | Failure)
        if isinstance(outcome, Gradient) and (step + 1) % max(1, steps // 8) == 0:
            print(f"  step {step + 1} of {steps}: loss {outcome.loss:.4f}", flush=True)
        return outcome

    def start(self) -> np.ndarray:
        """Return the genome of the task-arithmetic baseline with the least loss on `search`."""
        norms = dict.fromkeys(self.prepared.space.sources, 1.0)
        rows = baselines.hand_made(self.prepared.template, self.prepared.space.sources, norms)
        found = []
        for row in rows:
            genome = self.prepared.space.encode(row.recipe)
            if genome is not None:
                found.append((self.objective.loss(self.score(row.recipe, "search")), row.name, genome))
        _, name, genome = min(found, key=lambda each: each[0])
        print(f"start: {name}")
        return genome

    def points(self, genome: np.ndarray) -> dict[str, float]:
        recipe = self.prepared.space.decode(genome)
        return {s: 100 * self.normalisers[s].mean(self.score(recipe, s)) for s in self.splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--softness", type=float, default=0.5)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draws of items, where the share is below 1"
    )
    parser.add_argument("--split", choices=get_args(Split)[1:], default="select")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    spec = GradientSpec(steps=given.steps, rate=given.rate, share=given.share, softness=given.softness)
    bench = Bench(RunConfig.load(given.config), given.split)
    start = bench.start()
    seeds = np.random.SeedSequence(given.seed).spawn(spec.steps)

    def loss_of(step: int) -> SmoothLoss:
        return smooth_loss(
            bench.normalisers["search"],
            bench.base["search"],
            gains={s.task: s.share / s.headroom for s in bench.normalisers["search"].skills},
            price=bench.prepared.config.objective.retention,
            softness=spec.softness,
            share=spec.share,
            rng=np.random.default_rng(seeds[step]),
        )

    began = time.perf_counter()
    descent = descend(bench.prepared.space, start, spec, loss_of, bench)
    seconds = time.perf_counter() - began
    found = {
        "start": bench.points(start),
        "last": bench.points(descent.last),
        "mean of the last": bench.points(descent.mean),
        "seconds": round(seconds, 1),
        "evaluations": round(descent.items / bench.base["search"].items, 1),
        "settings": spec.model_dump() | {"seed": given.seed},
        "genome": descent.last.tolist(),
    }
    print(json.dumps({name: value for name, value in found.items() if name != "genome"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
