"""Statistics: intervals and paired tests over per-item scores, stratified by task.

A suite's score is a weighted mean of task means, so items are resampled within their task only. Two models
are compared on the same items, so the two scores of an item stay together. All functions are deterministic
for a given seed and use no global generator.

Sources: Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), ch. 8 (several samples), 13
(percentile interval), 15 (permutation tests); Wilson (1927) for a proportion; Phipson & Smyth (2010) for the
+1 in a sampled permutation p-value; McNemar (1947), Holm (1979), James & Stein (1961) below. Not covered: the
sampling error of a normalised score's references (base and specialist means), which count as fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from evomerge.evaluation.scores import Array

RESAMPLES = 10_000
"""Bootstrap resamples (and sign flips) if items have few distinct values, as accuracies do."""

RESAMPLES_CONTINUOUS = 4_000
"""Bootstrap resamples otherwise, where drawing takes 10 times as long. The Monte-Carlo error of an interval's
limit is then 0.04 standard errors of the estimate (0.03 with 10,000)."""

LUCK_RESAMPLES = 2_000
"""Bootstrap resamples for `expected_luck`, whose Monte-Carlo error is 2 % of one model's standard error."""

WINDOW = 8
"""Smallest number of models whose values are shrunk together; smaller groups include the nearest others."""

LEVEL = 0.95

_FEW = 32
_CHUNK = 2**16  # numbers drawn at a time, so that they fit into the cache
_SIGNS = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # (256, 8)

SeedLike = int | np.random.SeedSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval, in the units of the samples."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """A mean difference of two models on the same items, its 95 % interval, and a two-sided p-value.

    p: in (0, 1]; how often randomly swapping the two models within items gives a difference as large.
    """

    estimate: float
    low: float
    high: float
    p: float


def proportion_interval(successes: int, total: int) -> Interval:
    """Return a proportion with its 95 % Wilson interval, which also has a width at 0 and 1.

    Args:
        successes: number of successes, 0 to `total`.
        total: number of trials, 1 or more.

    >>> proportion_interval(10, 10).low < 0.8
    True
    """
    assert 0 <= successes <= total, (successes, total)
    assert total > 0, "no items"
    bounds = scipy.stats.binomtest(successes, total).proportion_ci(LEVEL, method="wilson")
    return Interval(estimate=successes / total, low=float(bounds.low), high=float(bounds.high))


def interval(samples: Sequence[Array], weights: Sequence[float] | Array, *, seed: SeedLike) -> Interval:
    """Return the weighted mean of task means with its 95 % percentile-bootstrap interval.

    A single task of zeros and ones gets the Wilson interval. A task whose items all have the same score adds
    no width, so the interval of a model that solves every item is too narrow.

    Args:
        samples: for each task (n,) per-item scores.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        seed: of the bootstrap.

    >>> mean = interval([np.array([0.0, 1.0] * 50), np.array([0.2, 0.4] * 50)], [1, 1], seed=0)
    >>> round(mean.estimate, 3), mean.low < 0.4 < mean.high
    (0.4, True)
    """
    shares = _shares(samples, weights)
    if len(samples) == 1 and np.isin(samples[0], (0.0, 1.0)).all():
        return proportion_interval(int(samples[0].sum()), len(samples[0]))
    return _bootstrap(samples, shares, np.random.default_rng(seed))


def paired_difference(
    a: Sequence[Array], b: Sequence[Array], weights: Sequence[float] | Array, *, seed: SeedLike
) -> PairedTest:
    """Compare two models on the same items: the weighted mean of task means of a - b.

    The interval is a stratified percentile bootstrap of the pairs. The p-value comes from a stratified
    sign-flip permutation test: if the two models are equally good (the null hypothesis), each item's
    difference is equally likely to have the opposite sign.

    Args:
        a, b: for each task (n,) per-item scores of the two models, items in the same order.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        seed: of the bootstrap and the permutations.

    >>> same = [np.array([0.0, 1.0, 1.0])]
    >>> paired_difference(same, same, [1.0], seed=0)
    PairedTest(estimate=0.0, low=0.0, high=0.0, p=1.0)
    """
    assert [x.shape for x in a] == [x.shape for x in b], "the two models were scored on different items"
    differences = [x - y for x, y in zip(a, b, strict=True)]
    shares = _shares(differences, weights)
    # Two streams of one seed, so that the p-value does not depend on the interval's draws.
    sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    first, second = (
        np.random.default_rng(np.random.SeedSequence(sequence.entropy, spawn_key=(*sequence.spawn_key, key)))
        for key in (0, 1)
    )
    mean = _bootstrap(differences, shares, first)
    p = _sign_flip(differences, shares, second)
    return PairedTest(estimate=mean.estimate, low=mean.low, high=mean.high, p=p)


def mcnemar(a: Array, b: Array) -> float:
    """Return the two-sided p-value of McNemar's exact test of two models' zeros and ones on the same items.

    Only items count that exactly one of the models solved. Under the null hypothesis each of them is equally
    likely to be either model's (McNemar 1947).

    a, b: (n,) zeros and ones.

    >>> mcnemar(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    0.0625
    """
    assert a.shape == b.shape, "the two models were scored on different items"
    wins, discordant = int((a > b).sum()), int((a != b).sum())
    return float(scipy.stats.binomtest(wins, discordant).pvalue) if discordant else 1.0


def paired_items(a: Array, b: Array, *, seed: SeedLike) -> PairedTest:
    """Compare two models on the items of one task: the mean of a - b.

    Like `paired_difference`, but for zeros and ones the p-value is McNemar's exact one, which the sign flips
    approximate.

    Args:
        a, b: (n,) per-item scores of the two models, items in the same order.
        seed: of the bootstrap and the permutations.
    """
    test = paired_difference([a], [b], [1.0], seed=seed)
    return replace(test, p=mcnemar(a, b)) if np.isin([a, b], (0.0, 1.0)).all() else test


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values of several claims, adjusted for their number (Holm 1979).

    If every claim with an adjusted p-value up to 0.05 is made, the probability that any of them is false is
    at most 5 %, for any dependence between them.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def shrunk(values: Array, errors: Array, groups: Array | None = None) -> Array:
    """Return shrunken estimates of the true values behind noisy measurements, shape (k,).

    Within a group, values are shrunk towards its mean by the positive-part estimator of James & Stein (1961;
    Efron & Morris 1975, JASA 70) with the factor 1 - (k - 3) noise / sum of squares. For a group of fewer
    than WINDOW models, mean and factor come from the nearest models too. The noise is that of differences
    between models: errors that all models share don't change their order and don't count.

    Args:
        values: (k,) measurements, in groups with similar true values.
        errors: (k, m) deviations of each value in m resamplings of the items, which are the same for all
            values, scaled so that the squares of a row sum to its variance.
        groups: (k,) numbers; similar ones mean similar models. By default all are one group.

    >>> shrunk(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.sqrt(2.0) * np.eye(5)).tolist()
    [1.8, 2.4, 3.0, 3.6, 4.2]
    """
    groups = np.zeros(len(values)) if groups is None else groups
    result = np.array(values, dtype=np.float64)
    for group in np.unique(groups):
        distance = np.abs(groups - group)
        near = distance <= np.sort(distance)[min(WINDOW, len(values)) - 1]
        count = int(near.sum())
        centre = float(values[near].mean())
        squares = float(((values[near] - centre) ** 2).sum())
        if count <= 3 or squares == 0.0:
            continue
        deviations = errors[near] - errors[near].mean(axis=0)
        noise = float((deviations**2).sum()) / (count - 1)
        factor = max(0.0, 1.0 - (count - 3) * noise / squares)
        result[groups == group] = centre + factor * (values[groups == group] - centre)
    return result


def expected_luck(
    samples: Sequence[Array], weights: Sequence[float] | Array, groups: Array | None = None, *, seed: SeedLike
) -> float:
    """Return by how much the best of several models is expected to look better than it is.

    Items are resampled for all models together, so shared errors stay shared. The errors of the means are
    added to estimates of the true means, and the error of the model with the largest sum is averaged. The
    estimates are means shrunk by `shrunk`, because with raw means past luck would count as ability, and the
    luck would be underestimated. For equally good models the result is the expected maximum of their errors;
    for a model far ahead of the others it is near 0.

    Args:
        samples: for each task (models, n) per-item scores of all models on the same items.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        groups: as in `shrunk`.
        seed: of the bootstrap.
    """
    assert len({len(sample) for sample in samples}) == 1, "every task needs the same models"
    shares = _shares(samples, weights)
    rng = np.random.default_rng(seed)
    means = np.zeros(len(samples[0]))
    errors = np.zeros((LUCK_RESAMPLES, len(samples[0])))
    for sample, share in zip(samples, shares, strict=True):
        n = sample.shape[1]
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=LUCK_RESAMPLES) / n
        centred = sample - sample.mean(axis=1, keepdims=True)
        errors += share * (drawn @ centred.T)
        means += share * sample.mean(axis=1)
    errors -= errors.mean(axis=1, keepdims=True)  # errors that all models share don't count as luck
    likely = shrunk(means, errors.T / np.sqrt(LUCK_RESAMPLES), groups)
    best = (likely + errors).argmax(axis=1)
    return float(errors[np.arange(LUCK_RESAMPLES), best].mean())


def _shares(samples: Sequence[Array], weights: Sequence[float] | Array) -> Array:
    shares = np.asarray(weights, dtype=np.float64)
    assert len(samples) == len(shares) > 0, "one weight per task"
    assert all(len(sample) for sample in samples), "a task without items"
    assert (shares >= 0).all(), "negative weights"
    assert shares.sum() > 0, "no weight at all"
    scaled: Array = shares / shares.sum()
    return scaled


def _bootstrap(samples: Sequence[Array], shares: Array, rng: np.random.Generator) -> Interval:
    values = [np.unique(sample, return_counts=True) for sample in samples]
    few = all(len(distinct) <= _FEW for distinct, _ in values)
    means = np.zeros(RESAMPLES if few else RESAMPLES_CONTINUOUS)
    for sample, (distinct, counts), share in zip(samples, values, shares, strict=True):
        means += share * _resampled_means(sample, distinct, counts, len(means), rng)
    estimate = float(sum(share * sample.mean() for share, sample in zip(shares, samples, strict=True)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(estimate=estimate, low=float(low), high=float(high))


def _resampled_means(
    sample: Array, distinct: Array, counts: np.ndarray[tuple[int], np.dtype[np.intp]], resamples: int,
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """Return (resamples,) means of samples drawn with replacement.

    The number of draws of each distinct value is multinomial, which has the same distribution as drawing
    items and is much faster for few values.
    """
    n = len(sample)
    means: Array
    if len(distinct) <= _FEW:
        means = rng.multinomial(n, counts / n, size=resamples) @ distinct / n
        return means
    means = np.empty(resamples)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, n, size=(stop - start, n))
        means[start:stop] = sample[drawn].mean(axis=1)
    return means


def _sign_flip(differences: Sequence[Array], shares: Array, rng: np.random.Generator) -> float:
    """Return the two-sided p-value; items without a difference don't change any sum and are left out."""
    parts = [share / len(d) * d for share, d in zip(shares, differences, strict=True)]
    contributions = np.concatenate(parts)
    contributions = contributions[contributions != 0]
    if not len(contributions):
        return 1.0
    observed = abs(contributions.sum())
    tolerance = 1e-12 * float(np.abs(contributions).sum())  # sums in another order round differently
    # A random byte gives eight signs: sums[group, byte] is the sum of that group of eight items.
    groups = -(-len(contributions) // 8)
    sums = np.pad(contributions, (0, 8 * groups - len(contributions))).reshape(groups, 8) @ _SIGNS.T
    offsets = 256 * np.arange(groups)
    flips = RESAMPLES - 1
    extreme = 0
    rows = max(1, _CHUNK // groups)
    for start in range(0, flips, rows):
        count = min(rows, flips - start)
        drawn = np.frombuffer(rng.bytes(count * groups), dtype=np.uint8).reshape(count, groups)
        flipped = sums.ravel()[drawn + offsets].sum(axis=1)
        extreme += int((np.abs(flipped) >= observed - tolerance).sum())
    return (extreme + 1) / (flips + 1)
