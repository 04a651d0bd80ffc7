"""Statistics: intervals and paired tests over per-item scores, stratified by task.

A suite's score is a weighted mean of task means, so items are resampled within their task only. Two models
are compared on the same items, so the two scores of an item stay together. All functions are deterministic
for a given seed and use no global generator.

Intervals are Student intervals with a few pseudo-observations at both ends of the metric's range, so that
they have a width also where all items have the same score. How often they cover the truth: docs/results.md.

Sources: Price & Bonett (2004, Comput. Stat. Data Anal. 45) and Bonett & Price (2012, J. Educ. Behav. Stat.
37) for the pseudo-observations; Wilson (1927) for a proportion; Welch (1947) for the degrees of freedom;
Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), ch. 15 (permutation tests); Phipson & Smyth
(2010) for the +1 in a sampled permutation p-value; McNemar (1947), Holm (1979), James & Stein (1961) below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from evomerge.evaluation.scores import Array

FLIPS = 10_000
"""Sign flips of a permutation test."""

MULTIPLIERS = 4_000
"""Draws of a multiplier bootstrap."""

PSEUDO = 2.0
"""Pseudo-observations of a mean over tasks, shared equally by the tasks; half of them lie at each end of the
metric's range. Chosen by simulation: with 1, intervals of five tasks with 10 items near 0 cover 92 %; with 4,
paired intervals of one task are too wide."""

LEVEL = 0.95

ONE_SIDED = 1.645
"""Standard errors above which 5 % of a normal distribution lie."""

CLEAR = 0.9
"""One-sided p-value above which a claim is clearly false. A smaller number finds less where all claims are in
doubt, a larger one where few are."""

CORRELATION = 0.5
"""Of two models' right answers, item by item, where a test is planned; merges of the same parents have about
this."""

POWER = 0.8
"""The probability with which a planned test should show a difference."""

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


Span = tuple[float, float]
"""The range of a metric, in the units of the samples."""


def span(*samples: Array) -> Span:
    """Return the range of a metric: 0 to 1; where samples lie outside, from their mean to the farthest one.

    The range is then unknown, so it is symmetric: pseudo-observations at its ends don't move the mean.

    >>> span(np.array([0.2, 1.0])), span(np.array([-3.0, -1.0, -2.0])), span(np.array([7.0]))
    ((0.0, 1.0), (-3.0, -1.0), (6.0, 8.0))
    """
    values = np.concatenate(samples)
    if ((values >= 0.0) & (values <= 1.0)).all():
        return 0.0, 1.0
    centre = float(values.mean())
    reach = float(np.abs(values - centre).max()) or 1.0
    return centre - reach, centre + reach


def interval(
    samples: Sequence[Array], weights: Sequence[float] | Array, *, spans: Sequence[Span] | None = None
) -> Interval:
    """Return the weighted mean of task means with its 95 % interval.

    A single task of zeros and ones gets the Wilson interval, everything else a Student interval with
    pseudo-observations (see PSEUDO).

    Args:
        samples: for each task (n,) per-item scores.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        spans: for each task the range of its metric; by default that of `span`.

    >>> mean = interval([np.array([0.0, 1.0] * 50), np.array([0.2, 0.4] * 50)], [1, 1])
    >>> round(mean.estimate, 3), mean.low < 0.4 < mean.high
    (0.4, True)
    """
    shares = _shares(samples, weights)
    if spans is None and len(samples) == 1 and np.isin(samples[0], (0.0, 1.0)).all():
        return proportion_interval(int(samples[0].sum()), len(samples[0]))
    ends = [span(sample) for sample in samples] if spans is None else spans
    return _smoothed(samples, shares, ends).interval()


def paired_difference(
    a: Sequence[Array],
    b: Sequence[Array],
    weights: Sequence[float] | Array,
    *,
    seed: SeedLike,
    spans: Sequence[Span] | None = None,
    units: Sequence[Array] | None = None,
) -> PairedTest:
    """Compare two models on the same items: the weighted mean of task means of a - b.

    The interval is a Student interval of the pairs with pseudo-observations (see PSEUDO), half of which
    differ
    by the metric's whole range in favour of either model. So it has a width also where the two models never
    differ. The p-value comes from a stratified sign-flip permutation test: if the two models are equally good
    (the null hypothesis), each item's difference is equally likely to have the opposite sign.

    Args:
        a, b: for each task (n,) per-item scores of the two models, items in the same order.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        seed: of the permutations.
        spans: for each task the range of its metric; by default that of `span`.
        units: for each task (n,) the unit of its scale, measured item by item, with mean 1. Its sampling
            error is then part of the interval (the delta method for a ratio); by default units are exact.

    >>> same = [np.ones(20)]
    >>> test = paired_difference(same, same, [1.0], seed=0)
    >>> test.estimate, round(test.high, 2), test.p
    (0.0, 0.13, 1.0)
    """
    assert [x.shape for x in a] == [x.shape for x in b], "the two models were scored on different items"
    differences = [x - y for x, y in zip(a, b, strict=True)]
    shares = _shares(differences, weights)
    ends = [span(x, y) for x, y in zip(a, b, strict=True)] if spans is None else spans
    p = _sign_flip(differences, shares, np.random.default_rng(seed))
    if units is not None:
        differences = [d - d.mean() * (unit - 1.0) for d, unit in zip(differences, units, strict=True)]
    mean = _smoothed(differences, shares, [(low - high, high - low) for low, high in ends]).interval()
    return PairedTest(estimate=mean.estimate, low=mean.low, high=mean.high, p=p)


def standard_error(sample: Array) -> float:
    """Return the standard error of a sample's mean; 0 for a single item."""
    return float(sample.std(ddof=1)) / math.sqrt(len(sample)) if len(sample) > 1 else 0.0


def smallest_difference(counts: Sequence[int], weights: Sequence[float] | Array) -> float:
    """Return the smallest difference that a paired test at 5 % shows with a probability of 80 %.

    For accuracies near one half, where they vary most, of two models whose answers have the correlation
    CORRELATION: each item's difference then has the variance (1 - CORRELATION) / 2.

    Args:
        counts: items per task.
        weights: per task what a difference of 1 is worth; not scaled.

    >>> round(smallest_difference([500], [1.0]), 3), round(smallest_difference([20], [1.0]), 2)
    (0.063, 0.31)
    """
    shares, items = np.asarray(weights, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    variance = float((shares**2 * (1 - CORRELATION) / 2 / items).sum())
    quantiles = scipy.stats.norm.ppf([(1 + LEVEL) / 2, POWER])
    return float(quantiles.sum() * math.sqrt(variance))


def items_to_show(difference: float) -> int:
    """Return how many items of one task show a difference, as `smallest_difference` counts.

    >>> items_to_show(0.1)
    197
    """
    return math.ceil((smallest_difference([1], [1.0]) / difference) ** 2)


def p_below(
    samples: Sequence[Array], weights: Sequence[float] | Array, limit: float, *, spans: Sequence[Span]
) -> float:
    """Return the one-sided p-value of the weighted mean of task means being `limit` or more.

    Small where the data show that the mean is below the limit.

    >>> p_below([np.full(100, 0.5)], [1.0], 0.6, spans=[(0.0, 1.0)]) < 0.001
    True
    """
    mean = _smoothed(samples, _shares(samples, weights), spans)
    return float(scipy.stats.t.cdf((mean.centre - limit) / mean.error, mean.freedom))


def across_runs(
    items: Sequence[Array],
    runs: Sequence[Array],
    weights: Sequence[float] | Array,
    *,
    seed: SeedLike,
    spans: Sequence[Span],
) -> PairedTest:
    """Test a mean over items and over runs with several seeds: a multiplier bootstrap over both.

    Items and runs are crossed, so each gets its own random multipliers (Owen & Eckles 2012, Ann. Appl. Stat.
    6). Multipliers are exponential, less 1; the error of an average of few runs is widened as Student's t is.
    What
    items and runs have in common counts twice, so the interval is rather too wide. A single run adds no error
    of its own: the result is then about that run.

    Args:
        items: for each task (n,) the items' differences, averaged over the runs.
        runs: for each of one or two configs (r,) the runs' mean differences.
        weights: (tasks,) not negative; they are scaled to sum to 1.
        seed: of the multipliers.
        spans: for each task the range of the differences.
    """
    rng = np.random.default_rng(seed)
    mean = _smoothed(items, _shares(items, weights), spans)
    error = mean.deviations @ (rng.exponential(size=(len(mean.deviations), MULTIPLIERS)) - 1.0)
    variances, freedoms = [mean.error**2], [mean.freedom]
    for means in runs:
        if len(means) > 1:
            deviations = (means - means.mean()) / math.sqrt(len(means) * (len(means) - 1))
            error += deviations @ (rng.exponential(size=(len(means), MULTIPLIERS)) - 1.0)
            variances.append(float((deviations**2).sum()))
            freedoms.append(len(means) - 1.0)
    squares = np.array(variances)
    freedom = squares.sum() ** 2 / (squares**2 / np.array(freedoms)).sum()
    tail = (1 + LEVEL) / 2
    error *= scipy.stats.t.ppf(tail, freedom) / scipy.stats.norm.ppf(tail)
    low, high = mean.centre + np.quantile(error, [1 - tail, tail])
    extreme = int((np.abs(error) >= abs(mean.estimate)).sum())
    return PairedTest(
        estimate=mean.estimate,
        low=float(min(mean.estimate, low)),
        high=float(max(mean.estimate, high)),
        p=(extreme + 1) / (MULTIPLIERS + 1),
    )


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
        seed: of the permutations.
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


def holm_of_doubtful(p: Sequence[float]) -> list[float]:
    """Return one-sided p-values, adjusted for the number of claims that the data leave open.

    What the data clearly deny (p above CLEAR) needs no correction: its adjusted p-value is 1. The others are
    divided by CLEAR, the probability of being among them, and adjusted by Holm's method. The probability of a
    false claim stays below 5 % where tests are independent and one-sided (Zhao, Small & Su 2019, JASA 114,
    conditional p-values), and in simulations where they are positively dependent. With a single claim nothing
    changes.

    >>> [round(p, 3) for p in holm_of_doubtful([0.009, 0.95, 0.97])]
    [0.01, 1.0, 1.0]
    """
    if len(p) < 2:
        return list(p)
    doubtful = [index for index, value in enumerate(p) if value <= CLEAR]
    adjusted = [1.0] * len(p)
    for index, value in zip(doubtful, holm([p[index] / CLEAR for index in doubtful]), strict=True):
        adjusted[index] = value
    return adjusted


def _shares(samples: Sequence[Array], weights: Sequence[float] | Array) -> Array:
    shares = np.asarray(weights, dtype=np.float64)
    assert len(samples) == len(shares) > 0, "one weight per task"
    assert all(len(sample) for sample in samples), "a task without items"
    assert (shares >= 0).all(), "negative weights"
    assert shares.sum() > 0, "no weight at all"
    scaled: Array = shares / shares.sum()
    return scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Smoothed:
    """A weighted mean of task means with pseudo-observations.

    estimate: of the samples alone. centre: with the pseudo-observations. deviations: what each observation
    adds
    to the centre's error; the sum of their squares is its variance. freedom: degrees of freedom (Welch 1947).
    """

    estimate: float
    centre: float
    deviations: Array
    freedom: float

    @property
    def error(self) -> float:
        return float(np.sqrt((self.deviations**2).sum()))

    def interval(self) -> Interval:
        """Return the Student interval; it always contains the estimate."""
        half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error
        low, high = min(self.estimate, self.centre - half), max(self.estimate, self.centre + half)
        return Interval(estimate=self.estimate, low=float(low), high=float(high))


def _smoothed(samples: Sequence[Array], shares: Array, spans: Sequence[Span]) -> _Smoothed:
    added = PSEUDO / np.count_nonzero(shares)
    centre, parts, variances, freedoms = 0.0, [], [], []
    for sample, share, ends in zip(samples, shares.tolist(), spans, strict=True):
        total = len(sample) + added
        mean = (sample.sum() + added * sum(ends) / 2) / total
        both = math.sqrt(added / 2) * (np.array(ends) - mean)
        parts.append(share / total * np.concatenate([sample - mean, both]))
        centre += share * mean
        variances.append(float((parts[-1] ** 2).sum()))
        freedoms.append(total - 1)
    variance = np.array(variances)
    return _Smoothed(
        estimate=float(sum(share * sample.mean() for share, sample in zip(shares, samples, strict=True))),
        centre=float(centre),
        deviations=np.concatenate(parts),
        freedom=float(variance.sum() ** 2 / (variance**2 / np.array(freedoms)).sum()),
    )


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
    flips = FLIPS - 1
    extreme = 0
    rows = max(1, _CHUNK // groups)
    for start in range(0, flips, rows):
        count = min(rows, flips - start)
        drawn = np.frombuffer(rng.bytes(count * groups), dtype=np.uint8).reshape(count, groups)
        flipped = sums.ravel()[drawn + offsets].sum(axis=1)
        extreme += int((np.abs(flipped) >= observed - tolerance).sum())
    return (extreme + 1) / (flips + 1)
