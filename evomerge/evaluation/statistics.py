"""Statistics: intervals and paired tests over per-item scores, stratified by task.

A suite's score is a weighted mean of task means, so items are only ever resampled within their task. Two
models are compared on the same items, so the pair of an item's two scores stays together. All functions are
deterministic given their seed and leave global generators alone.

Sources: Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), ch. 8 (several samples), 13
(percentile interval), 15 (permutation tests); Wilson (1927) for a proportion; Phipson & Smyth (2010) for the
+1 in a sampled permutation p-value. Not covered: the references of a normalised score (base and specialist
means), which are held fixed, and the luck of having picked the best of many, which held-out items are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from evomerge.evaluation.scores import Array

RESAMPLES = 10_000
"""Bootstrap resamples (and sign flips) where items take few values, as accuracies do."""

RESAMPLES_CONTINUOUS = 4_000
"""Bootstrap resamples otherwise, where drawing is 10 times dearer. The Monte-Carlo error of a limit is then
0.04 standard errors of the estimate (0.03 with 10,000)."""

LEVEL = 0.95

_FEW = 32
_CHUNK = 2**16  # numbers drawn at once: few enough to stay in the cache
_SIGNS = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # (256, 8)

Seed = int | np.random.SeedSequence


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
    found = scipy.stats.binomtest(successes, total).proportion_ci(LEVEL, method="wilson")
    return Interval(estimate=successes / total, low=float(found.low), high=float(found.high))


def interval(samples: Sequence[Array], weights: Sequence[float] | Array, *, seed: Seed) -> Interval:
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
    a: Sequence[Array], b: Sequence[Array], weights: Sequence[float] | Array, *, seed: Seed
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
    found = _bootstrap(differences, shares, first)
    p = _sign_flip(differences, shares, second)
    return PairedTest(estimate=found.estimate, low=found.low, high=found.high, p=p)


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
