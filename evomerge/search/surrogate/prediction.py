"""What a recipe that was not scored would score: a surrogate's mean, and an interval that keeps its word.

A Gaussian process knows how far away it is, not how wrong it is. How wrong it is where it is that uncertain
is measured where the truth is known: every scored genome is predicted from those so far from it that they
leave it as uncertain, and compared with the metric itself. Leaving out one genome alone would measure errors
beside its neighbours, which are many and near. The same uncertainty of margins moves a score little where
most items are clearly right or wrong, and much where many are in doubt. So errors count in units of how far
the score moves with one standard deviation of the margins, all items of a task together: half the interval is
what 95 % of the errors stay below in those units, times the units of what is asked (split conformal
prediction with normalised residuals; Lei et al. 2018, arXiv:1604.04173).

Beyond an uncertainty of FAR, or where most scored genomes have hardly any others that far away, so that no
error was measured, nothing near what is asked was scored, and no score is predicted.

Candidates are often scored on some item blocks only. What their items say of all items is uncertain, too: the
spread of that difference over the recipes that were scored on everything is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from threadpoolctl import threadpool_limits

from evomerge.errors import UserError
from evomerge.evaluation.normalise import Normaliser, TaskScale, kept_share
from evomerge.evaluation.scores import Array, Scores, joined
from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.margins import ENOUGH, NEAREST, Outputs, Surrogate
from evomerge.search.surrogate.observed import Observed

LEVEL = 0.95
UNKNOWN = 0.02
"""In normalised scores: what errors are at least, whatever the model thinks."""
FAR = 0.8
"""Uncertainty above which the scored genomes explain little, 36 % of the variance, of what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A scored recipe: its genome, and its scores block by block."""

    recipe: str
    genome: Genome
    parts: Mapping[int, Scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedScore:
    """What is expected of a recipe on `search`, 0 the base and 1 the specialists.

    mean, low, high: the mean normalised score and its 95 % interval. tasks: the same per skill that counts.
    values: per task on its own scale. retention: ratio to the base, None without a task for it. learnt:
    number of recipes the model learnt from. blocks: the item blocks it learnt on. error: typical (root mean
    square) error of predictions that are as uncertain. correlation: their rank correlation with what was
    measured. uncertainty: 0 at a scored genome, 1 where nothing near is known. lowest, highest: the scores
    of the recipes it learnt from. known: whether anything near was scored; where not, mean and interval say
    nothing about this recipe.
    """

    mean: float
    low: float
    high: float
    tasks: dict[str, float]
    values: dict[str, float]
    retention: float | None
    learnt: int
    blocks: tuple[int, ...]
    error: float
    correlation: float
    uncertainty: float
    lowest: float
    highest: float
    known: bool


def predict_score(
    genome: Genome,
    examples: Sequence[Example],
    *,
    coordinates: Sequence[Coordinate],
    normaliser: Normaliser,
    base: Sequence[Scores],
) -> PredictedScore:
    """Predict the score of a genome from scored genomes.

    Args:
        genome: Shape (dimension,), values in [0, 1]; not one of the examples.
        examples: Scored genomes with their scores per item block.
        coordinates: The kind of every coordinate, in genome order.
        normaliser: The normalisation on all `search` items.
        base: The base's scores, block by block.

    Returns:
        The mean normalised score with a calibrated interval, and the score of every task.

    Raises:
        UserError: There are fewer than 8 scored genomes.
    """
    blocks = shared_blocks([set(example.parts) for example in examples])
    known = _nearest(genome, [e for e in examples if set(blocks) <= set(e.parts)])
    scale = normaliser.on(joined([base[block] for block in blocks]))
    skills, kept = scale.skills, scale.retained
    tasks = [share.task for share in (*skills, *kept)]
    surrogate = _fitted(known, blocks, tasks, coordinates=coordinates, base=base)
    with threadpool_limits(1):
        model = surrogate.fit(genome, [0])
        assert model is not None
        uncertainty = model.predict(genome).uncertainty
        expected = model.expected(genome)
        unit = _unit(model.deviations(genome, uncertainty), skills)
        left_out = model.left_out(uncertainty)
    guesses = np.array([_mean(values, skills) for values in left_out.values])
    measured = np.array([scale.mean(joined([e.parts[block] for block in blocks])) for e in known])
    errors = (measured - guesses) / [_unit(moved, skills) for moved in left_out.deviations] * unit
    half = float(np.hypot(_quantile(errors), _unseen(examples, blocks, normaliser, scale, count=len(base))))
    mean, values = _mean(expected, skills), dict(zip(tasks, expected.tolist(), strict=True))
    return PredictedScore(
        mean=mean,
        low=mean - half,
        high=mean + half,
        tasks={s.task: (values[s.task] - s.zero) / s.headroom for s in skills},
        values=values,
        retention=sum(k.share * kept_share(values[k.task] - k.zero) for k in kept) if kept else None,
        learnt=len(known),
        blocks=blocks,
        error=float(np.sqrt((errors**2).mean())),
        correlation=_rank_correlation(guesses, measured),
        uncertainty=uncertainty,
        lowest=float(measured.min()),
        highest=float(measured.max()),
        known=bool(uncertainty <= FAR and np.median(left_out.used) >= ENOUGH - 1),
    )


def _fitted(
    examples: Sequence[Example],
    blocks: Sequence[int],
    tasks: Sequence[str],
    *,
    coordinates: Sequence[Coordinate],
    base: Sequence[Scores],
) -> Surrogate:
    """Return a surrogate of the examples' items on some blocks, all of them taken as one block."""
    observed = Observed(tasks, base)
    parts = [observed.outputs[block] for block in blocks]
    outputs = Outputs(
        task=np.concatenate([part.task for part in parts]),
        margins=np.concatenate([part.margins for part in parts]),
    )
    surrogate = Surrogate(coordinates, [outputs], tasks=len(tasks))
    for example in examples:
        columns = [observed.columns(example.parts[block])[block] for block in blocks]
        surrogate.learn(example.genome, 0, np.concatenate(columns))
    return surrogate


def shared_blocks(sets: Sequence[set[int]], share: float = 0.5) -> tuple[int, ...]:
    """Return the most item blocks that at least a share of the recipes have all been scored on.

    >>> shared_blocks([{0, 3}, {0, 3}, {3}, {0, 1, 2, 3}])
    (0, 3)
    """
    most: set[int] = set()
    for candidate in sets:
        met = sum(candidate <= other for other in sets)
        if met >= share * len(sets) and (len(candidate), sorted(most)) > (len(most), sorted(candidate)):
            most = candidate
    return tuple(sorted(most))


def _nearest(genome: Genome, examples: Sequence[Example]) -> list[Example]:
    """Return the examples a model takes in, each genome once; UserError where they are too few."""
    distinct = list({e.genome.tobytes(): e for e in reversed(examples)}.values())[::-1]
    if len(distinct) < ENOUGH:
        raise UserError(
            "too little was scored to learn from",
            expected=f"{ENOUGH} recipes of the run's space scored on the same `search` items",
            got=str(len(distinct)),
            fix="resume the run, with a larger budget if it is finished",
        )
    order = np.argsort([float(((e.genome - genome) ** 2).sum()) for e in distinct], kind="stable")
    return [distinct[i] for i in sorted(int(i) for i in order[:NEAREST])]


def _mean(values: Array, skills: Sequence[TaskScale]) -> float:
    """The mean normalised score of tasks' values, the skills first."""
    return sum(s.share * (float(v) - s.zero) / s.headroom for s, v in zip(skills, values, strict=False))


def _unit(deviations: Array, skills: Sequence[TaskScale]) -> float:
    """Return how far the mean normalised score moves with one standard deviation; tasks err independently."""
    parts = [s.share * float(d) / s.headroom for s, d in zip(skills, deviations, strict=False)]
    return float(np.sqrt(np.square([UNKNOWN, *parts]).sum()))


def _quantile(errors: Array) -> float:
    """The size that the next error stays below with probability 0.95 at least."""
    rank = min(len(errors), int(np.ceil(LEVEL * (len(errors) + 1))))
    return float(np.sort(np.abs(errors))[rank - 1])


def _unseen(
    examples: Sequence[Example],
    blocks: Sequence[int],
    whole: Normaliser,
    part: Normaliser,
    *,
    count: int,
) -> float:
    """Half the 95 % interval of the mean on all items around that on some blocks."""
    if len(blocks) == count:
        return 0.0
    gaps = [
        whole.mean(joined(list(e.parts.values()))) - part.mean(joined([e.parts[b] for b in blocks]))
        for e in examples
        if len(e.parts) == count
    ]
    if len(gaps) < 2:
        return 0.0
    return float(scipy.stats.t.ppf(0.5 + LEVEL / 2, len(gaps) - 1) * np.sqrt(np.mean(np.square(gaps))))


def _rank_correlation(a: Array, b: Array) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(a, b).statistic)
