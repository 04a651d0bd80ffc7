"""Statistics: intervals and paired tests over per-item scores, stratified by task.

A suite's score is a weighted mean of task means, so items are only ever resampled within their task. Two
models are compared on the same items, so the pair of an item's two scores stays together. All functions are
deterministic given their seed and leave global generators alone.

Sources: Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), ch. 8 (several samples), 13
(percentile interval), 15 (permutation tests); Wilson (1927) for a proportion; Phipson & Smyth (2010) for the
+1 in a sampled permutation p-value; McNemar (1947), Holm (1979), James & Stein (1961) below. Not covered: the
references of a normalised score (base and specialist means), which are held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from evomerge.evaluation.scores import Array

RESAMPLES = 10_000
"""Bootstrap resamples (and sign flips) where items take few values, as accuracies do."""

RESAMPLES_CONTINUOUS = 4_000
"""Bootstrap resamples otherwise, where drawing is 10 times dearer. The Monte-Carlo error of a limit is then
0.04 standard errors of the estimate (0.03 with 10,000)."""

LUCK_RESAMPLES = 2_000
"""Bootstrap resamples of the luck of the best of many. Its sampling error is 2 % of one model's."""

WINDOW = 8
"""Models a group has at least when its values are shrunk; a smaller one borrows from the nearest."""

LEVEL = 0.95

_FEW = 32
_CHUNK = 2**16  # numbers drawn at once: few enough to stay in the cache
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
    """Return a proportion with its 95 % Wilson interval, which is honest at 0 and 1 too.

    >>> proportion_interval(10, 10).low < 0.8
    True
    """
    assert 0 <= successes <= total, (successes, total)
    assert total > 0, "no items"
    bounds = scipy.stats.binomtest(successes, total).proportion_ci(LEVEL, method="wilson")
    return Interval(estimate=successes / total, low=float(bounds.low), high=float(bounds.high))


def interval(samples: Sequence[Array], weights: Sequence[float] | Array, *, seed: SeedLike) -> Interval:
    """Return the weighted mean of task means with its 95 % percentile-bootstrap interval.

    samples: per task (n,) per-item scores. weights: (tasks,) not negative; they are scaled to sum to 1.

    A single task of zeros and ones gets the Wilson interval. A task whose items all scored the same
    contributes no width, so do not read much into the interval of a model that solves everything.

    >>> found = interval([np.array([0.0, 1.0] * 50), np.array([0.2, 0.4] * 50)], [1, 1], seed=0)
    >>> round(found.estimate, 3), found.low < 0.4 < found.high
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

    a, b: per task (n,) per-item scores, items in the same order. weights: as in `interval`.

    The interval is a stratified percentile bootstrap of the pairs. The p-value comes from a stratified
    sign-flip permutation test: under the null hypothesis that the two models are alike, each item's
    difference is as likely to have the opposite sign.

    >>> same = [np.array([0.0, 1.0, 1.0])]
    >>> paired_difference(same, same, [1.0], seed=0)
    PairedTest(estimate=0.0, low=0.0, high=0.0, p=1.0)
    """
    assert [x.shape for x in a] == [x.shape for x in b], "the two models met different items"
    differences = [x - y for x, y in zip(a, b, strict=True)]
    shares = _shares(differences, weights)
    # Two streams of one seed, so that the p-value does not depend on how the interval was drawn.
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

    a, b: (n,). Only items that one of them solved and the other did not count: under the null hypothesis each
    is as likely to go either way (McNemar 1947).

    >>> mcnemar(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    0.0625
    """
    assert a.shape == b.shape, "the two models met different items"
    wins, discordant = int((a > b).sum()), int((a != b).sum())
    return float(scipy.stats.binomtest(wins, discordant).pvalue) if discordant else 1.0


def paired_items(a: Array, b: Array, *, seed: SeedLike) -> PairedTest:
    """Compare two models on the items of one task, (n,) each: the mean of a - b.

    As `paired_difference`, but of zeros and ones the p-value is McNemar's, which is what the sign flips come
    down to there, without their sampling error.
    """
    test = paired_difference([a], [b], [1.0], seed=seed)
    return replace(test, p=mcnemar(a, b)) if np.isin([a, b], (0.0, 1.0)).all() else test


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values of several claims, adjusted so that all of them can be read together.

    If all claims up to 0.05 are made, the chance that any of them is false is at most 5 %, however they
    depend on each other (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def shrunk(values: Array, errors: Array, groups: Array | None = None) -> Array:
    """Return better estimates of the true values behind noisy measurements, shape (k,).

    values: (k,) measurements, in groups that have alike true values. errors: (k, m) how each would move in m
    resamplings of its items, the same for all of them, scaled so that a row's squares add up to its variance.
    groups: (k,) numbers in which near means alike; by default all are one group.

    Within a group, values are drawn to its mean by the positive-part estimator of James & Stein (1961; Efron
    & Morris 1975, JASA 70): the factor is 1 - (k - 3) noise / sum of squares. A group of fewer than WINDOW
    borrows from the nearest ones for mean and factor. The noise is that of differences: errors that all
    models share rank none of them, and count for nothing.

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

    samples: per task (models, n) per-item scores of all models on the same items. weights: as in `interval`.
    groups: as in `shrunk`.

    Items are resampled for all models together, which keeps what their errors share; the errors of their
    means are added to estimates of the true means; and the error of whichever then looks best is averaged.
    The estimates are the means as `shrunk` returns them: taken as they are, past luck would count as ability,
    and the luck would be understated. Among alike models it is the expected maximum of their errors; a model
    far ahead of the others needs no luck.
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
    errors -= errors.mean(axis=1, keepdims=True)  # shared errors move the best as they move all
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

    How often each distinct value is drawn is multinomial: the same distribution as drawing items, and
    much quicker where values are few.
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
    """Return the two-sided p-value. Items that don't differ can't change a sum, and are left out."""
    parts = [share / len(d) * d for share, d in zip(shares, differences, strict=True)]
    contributions = np.concatenate(parts)
    contributions = contributions[contributions != 0]
    if not len(contributions):
        return 1.0
    observed = abs(contributions.sum())
    tolerance = 1e-12 * float(np.abs(contributions).sum())  # sums of other orders round differently
    # A random byte decides eight signs at once: sums[group, byte] is what that group then adds up to.
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
