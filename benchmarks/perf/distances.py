"""How genes should count in the surrogate's distances: stored generations predicted from earlier ones.

    python benchmarks/perf/search.py run --space benchmarks/perf/fine_layers.yaml --methods ours-nogradients \
        --seeds 0 --evaluations 60 --keep runs/kept
    python benchmarks/perf/distances.py runs/kept/ours-nogradients-60-0

For every way of counting: the mean rank correlation of predicted with measured mean scores over the
generations, the root mean square error in points, and the marginal likelihood of all items (minus twice its
logarithm per item; lower is better). On the two item blocks with most candidates; length and noise are chosen
for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.delivery.course import Course
from evomerge.delivery.predict import scored
from evomerge.delivery.summary import Summary
from evomerge.merging.analysis.norms import tensor_norms
from evomerge.prepare import Prepared, prepare
from evomerge.running.store import BASE
from evomerge.search.spaces import movement
from evomerge.search.spaces.merge_space import SearchSpace
from evomerge.search.surrogate.guide import Observed
from evomerge.search.surrogate.margins import CLIP, ENOUGH, SOFTNESS, Outputs, _Kernel
from evomerge.stored import StoredRun

Matrix = NDArray[np.float64]
LENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
NOISES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A stored run: genomes with their columns by block, by generation; baselines come first."""

    generations: list[list[tuple[Matrix, dict[int, Matrix]]]]
    outputs: tuple[Outputs, ...]
    zero: Matrix
    headroom: Matrix
    ways: dict[str, Matrix]

    def mean(self, values: Matrix, block: int) -> float:
        """The mean normalised score of a block's columns."""
        outputs = self.outputs[block]
        soft = np.where(outputs.margins, scipy.special.ndtr(values / SOFTNESS), values)
        count = len(self.zero)
        means = np.bincount(outputs.task, weights=soft, minlength=count) / np.bincount(
            outputs.task, minlength=count
        )
        return float(((means - self.zero) / self.headroom).mean())

    def columns(self, values: Matrix, block: int) -> Matrix:
        return np.where(self.outputs[block].margins, np.clip(values, -CLIP, CLIP), values)


def read(folder: Path) -> Run:
    """Read a run of an ordinary search space."""
    with StoredRun.read(folder) as stored:
        summary = Summary(stored)
        prepared, course = prepare(stored.config()), Course(summary)
        examples = scored(summary, course, prepared)
        skills = summary.normaliser("search").skills  # type: ignore[union-attr]
        base = course.parts(summary.parents[0].recipe.hash)
        asked = [[genome.tobytes() for genome in each.genomes] for each in stored.store.generations()]
    observed = Observed([skill.task for skill in skills], base)
    known = {
        example.genome.tobytes(): (
            example.genome,
            {b: observed.columns(s)[b] for b, s in example.parts.items()},
        )
        for example in examples
    }
    later = {key for generation in asked for key in generation}
    generations = [[entry for key, entry in known.items() if key not in later]]
    seen: set[bytes] = set()
    for generation in asked:
        new = [key for key in dict.fromkeys(generation) if key in known and key not in seen]
        seen.update(new)
        generations.append([known[key] for key in new])
    return Run(
        generations=generations,
        outputs=observed.outputs,
        zero=np.array([skill.zero for skill in skills]),
        headroom=np.array([skill.headroom for skill in skills]),
        ways=dict(ways(prepared)),
    )


def ways(prepared: Prepared) -> Iterator[tuple[str, Matrix]]:
    """Yield names and matrices that take genomes to points in which distances are measured."""
    space = prepared.space
    assert isinstance(space, SearchSpace)
    norms = tensor_norms(prepared.config.locations, BASE)
    alike = np.eye(space.dimension)
    yield "alike", alike
    for power in (0.5, 0.75, 1.0):
        movement.DAMPED = power
        moved = movement.movements(space, norms)
        assert moved is not None
        yield f"movements to the power of {power:g}", np.diag(moved)
        if power == 0.5:
            root = np.diag(moved)
    weights = [gene.parameter == "weight" for gene in space.genes]
    yield "other genes a quarter of weights", np.diag(np.where(weights, 1.0, 0.25))
    for name, part in (("source", 0), ("source and layer", 1), ("source and module", 2)):
        sums = _sums([_place(gene)[:1] + _place(gene)[part : part + 1] for gene in space.genes])
        yield f"alike, and the mean of each {name}", np.vstack([alike, sums])
    yield (
        "power 0.5, and the mean of each source",
        np.vstack([root, _sums([_place(gene)[:1] for gene in space.genes]) @ root]),
    )


def _place(gene: Any) -> tuple[str, str, str]:
    layer, _, module = (gene.group or "").rpartition(" ")
    return f"{gene.parameter} {gene.source}", layer, module


def _sums(keys: list[tuple[str, ...]]) -> Matrix:
    """One row per group: its mean, as far away as all of its genes together."""
    rows = [[float(key == group) for key in keys] for group in dict.fromkeys(keys)]
    return np.array([np.array(row) / np.sqrt(sum(row)) for row in rows])


def tuned(points: Matrix, values: Matrix) -> tuple[float, _Kernel]:
    """Return the best marginal likelihood and its kernel."""
    centred = values - values.mean(axis=0)
    scale = centred.std(axis=0)
    scaled = centred[:, scale > 0] / scale[scale > 0]
    energy, (count, columns) = scaled @ scaled.T, scaled.shape
    found = []
    for length in LENGTHS:
        eigenvalues, vectors = np.linalg.eigh(_Kernel(length=length, noise=0.0)(points, points))
        along = ((energy @ vectors) * vectors).sum(axis=0)
        for noise in NOISES:
            lifted = np.maximum(eigenvalues, 0.0) + noise
            variance = float((along / lifted).sum()) / (columns * count)
            loss = count * np.log(max(variance, 1e-300)) + float(np.log(lifted).sum())
            found.append((loss, length, noise))
    loss, length, noise = min(found)
    return loss, _Kernel(length=length, noise=noise)


def judged(run: Run, way: Matrix, block: int) -> tuple[float, float, float]:
    """Return (rank correlation, error in points, likelihood) of a way of counting on a block."""
    ranks, errors = [], []
    known: list[tuple[Matrix, Matrix]] = []
    for number, generation in enumerate(run.generations):
        new = [(way @ g, run.columns(parts[block], block)) for g, parts in generation if block in parts]
        if number > 2 and len(known) >= ENOUGH and len(new) >= 3:
            points, values = (np.array(part) for part in zip(*known, strict=True))
            there, truth = (np.array(part) for part in zip(*new, strict=True))
            _, kernel = tuned(points, values)
            gram = kernel(points, points) + (kernel.noise + 1e-10) * np.eye(len(points))
            mean = values.mean(axis=0)
            guess = mean + kernel(there, points) @ np.linalg.solve(gram, values - mean)
            a, b = ([run.mean(row, block) for row in rows] for rows in (guess, truth))
            ranks.append(0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else scipy.stats.spearmanr(a, b).statistic)
            errors += list(np.array(a) - np.array(b))
        known += new
    likelihood, _ = tuned(*(np.array(part) for part in zip(*known, strict=True)))  # type: ignore[arg-type]
    return float(np.mean(ranks)), 100 * float(np.sqrt(np.mean(np.square(errors)))), likelihood


def main() -> None:
    """Read the command line, and print a table per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    for folder in parser.parse_args().runs:
        run = read(folder)
        entries = [parts for generation in run.generations for _, parts in generation]
        blocks = sorted(range(len(run.outputs)), key=lambda b: -sum(b in parts for parts in entries))[:2]
        print(f"{folder}: {len(entries)} genomes\n\n| genes count | rank correlation | error | likelihood |")
        print("|---|---|---|---|")
        for name, way in run.ways.items():
            rank, error, likelihood = np.mean([judged(run, way, block) for block in blocks], axis=0)
            print(f"| {name} | {rank:.2f} | {error:.1f} | {likelihood:.0f} |", flush=True)


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
