"""Winner selection: which candidates get a second look on items the search never saw, and which one wins.

The candidate with the best search score is partly the luckiest one. So candidates are ranked by an estimate
of their true loss, to which their neighbours in the space contribute. The best few, the greedy soup of them
and the optimizer's own favourite (the last two average luck away) are scored again on `select`. The winner
is the best by both splits together, each weighted by its items. `benchmarks/perf/selection.py` compares these
rules with others on searches whose truth is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.evaluation.scores import Array
from evomerge.merging.recipe import Recipe
from evomerge.search.spaces.space import Coordinate, Genome

MODELLED = 300
"""How many candidates, the best by loss, the estimates are fitted to: those a finalist can come from."""

FEWEST = 8
"""Candidates that it takes to fit anything."""

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths of the kernel that are tried, in units of the median distance between genomes."""

NOISES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0)
"""Variances of the noise that are tried, relative to the kernel's."""

SHARES = 4
"""No generation may take more than 1 / SHARES of the finalists' places while others have candidates left."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A searched recipe and its loss on `search`.

    genome: None where the recipe is not a point of the space. generation: when it was asked for. items: how
    many items the loss was measured on.
    """

    name: str
    recipe: Recipe
    loss: float
    genome: Genome | None = None
    generation: int = 0
    items: int = 0


def estimates(candidates: Sequence[Candidate]) -> Array:
    """Return the estimated true loss of every candidate, shape (n,).

    A Gaussian process over the genomes (squared-exponential kernel, constant mean; Rasmussen & Williams 2006,
    eq. 2.41), its length, strength and noise those of the highest likelihood on a small grid (eq. 2.30). Its
    posterior mean combines a candidate's loss with those of its neighbours, so luck that no neighbour shares
    is mostly removed.

    Fitted to the best MODELLED candidates of full item count; all others keep the loss as measured.
    """
    result = np.array([candidate.loss for candidate in candidates], dtype=np.float64)
    most = max((candidate.items for candidate in candidates), default=0)
    full = [i for i, c in enumerate(candidates) if c.genome is not None and c.items == most]
    full = sorted(full, key=lambda i: result[i])[:MODELLED]
    if len(full) < FEWEST:
        return result
    genomes = np.array([candidates[i].genome for i in full])
    with threadpool_limits(1):  # with more threads the last bits depend on the machine
        result[full] = _posterior_mean(genomes, result[full])
    return result


def _posterior_mean(genomes: Array, losses: Array) -> Array:
    count = len(losses)
    squares = np.zeros((count, count))
    for column in genomes.T:
        squares += (column[:, None] - column) ** 2
    typical = float(np.median(squares))
    best, mean = -np.inf, losses
    if typical == 0.0 or np.ptp(losses) == 0.0:
        return mean
    for length in LENGTHS:
        kernel = np.exp(squares / (-2.0 * length**2 * typical))
        for noise in NOISES:  # relative to the kernel's strength, whose best value has a closed form
            factor = np.linalg.cholesky(kernel + noise * np.eye(count))
            white = np.linalg.solve(factor, np.stack([losses, np.ones(count)], axis=1))
            centre = float(white[:, 0] @ white[:, 1] / (white[:, 1] @ white[:, 1]))
            left = white[:, 0] - centre * white[:, 1]
            strength = float(left @ left) / count
            likelihood = -0.5 * count * np.log(strength) - float(np.log(np.diag(factor)).sum())
            if likelihood > best:
                best = likelihood
                mean = centre + kernel @ np.linalg.solve(factor.T, left)
    return mean


def finalists(
    candidates: Sequence[Candidate], count: int, estimates: NDArray[np.float64] | None = None
) -> list[Candidate]:
    """Return the `count` best distinct recipes by estimated loss, best first; ties go to the earlier one.

    estimates: (n,) of the true losses; by default the losses as measured. Candidates that a race stopped,
    measured on fewer items than others, are left out: they were clearly worse, and other items are easier.

    Within a generation candidates differ by little more than noise, late in a search least of all, so no
    generation gets more than a quarter of the places (at least one) unless the others run out. That is
    coarser than a distance between genomes, but it needs no scale that would have to fit every space.
    """
    values = [c.loss for c in candidates] if estimates is None else estimates.tolist()
    assert len(values) == len(candidates), "one estimate per candidate"
    most = max((candidate.items for candidate in candidates), default=0)
    order = sorted((i for i, c in enumerate(candidates) if c.items == most), key=lambda i: values[i])
    distinct: dict[str, int] = {}
    for i in order:
        distinct.setdefault(candidates[i].recipe.hash, i)
    places = -(-count // SHARES)
    taken: list[int] = []
    left: list[int] = []
    used: dict[int, int] = {}
    for i in distinct.values():
        generation = candidates[i].generation
        free = len(taken) < count and used.get(generation, 0) < places
        (taken if free else left).append(i)
        used[generation] = used.get(generation, 0) + free
    chosen = sorted([*taken, *left[: count - len(taken)]], key=lambda i: values[i])
    return [candidates[i] for i in chosen]


def mean_genome(genomes: Sequence[Genome], coordinates: Sequence[Coordinate]) -> Genome:
    """Return the mean of genomes, shape (dimension,); names have no mean and are the first one's.

    >>> kinds = [Coordinate(), Coordinate(levels=3, ordered=False)]
    >>> mean_genome([np.array([0.2, 0.1]), np.array([0.4, 0.9])], kinds).round(3).tolist()
    [0.3, 0.1]
    """
    mean = np.clip(np.mean(genomes, axis=0), 0.0, 1.0)
    named = np.array([c.levels is not None and not c.ordered for c in coordinates], dtype=bool)
    return np.where(named, genomes[0], mean)


def greedy_soup(
    ranked: Sequence[Candidate],
    coordinates: Sequence[Coordinate],
    score: Callable[[Genome], Candidate | None],
) -> Candidate | None:
    """Return the greedy soup of candidates, best first, or None where the first one alone is best.

    score: makes a candidate of a genome and scores it on `search`; None where that failed.

    Each joins if the mean with it is no worse on `search` than without (Wortsman et al. 2022, algorithm 1).
    Genomes are averaged: where weights are affine in the genome (linear and task-arithmetic spaces of linear
    scale) that is the average of the models, elsewhere it is the merge in the middle.
    """
    ranked = [candidate for candidate in ranked if candidate.genome is not None]
    kept, best, soup = ranked[:1], ranked[0].loss if ranked else np.inf, None
    for member in ranked[1:]:
        genomes = [c.genome for c in (*kept, member) if c.genome is not None]
        made = score(mean_genome(genomes, coordinates))
        if made is not None and made.loss <= best:
            kept, best, soup = [*kept, member], made.loss, made
    return soup


def winner(estimates: NDArray[np.float64], select: NDArray[np.float64], *, items: tuple[int, int]) -> int:
    """Return the index of the finalist with the lowest pooled loss.

    Args:
        estimates: Shape (k,), estimated losses on `search`. NaN: not scored.
        select: Shape (k,), losses on `select`. NaN: not scored.
        items: Number of items behind the two, the weights of the pooled loss.
    """
    shares = np.array(items) / sum(items)
    pooled = shares[0] * estimates + shares[1] * select
    assert np.isfinite(pooled).any(), "no finalist was scored"
    return int(np.nanargmin(pooled))
