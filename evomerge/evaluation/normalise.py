"""Normaliser: scale tasks so that their mean measures how much of the parents' skills a merge has.

On each skill task 0 is the base model and 1 the task's specialist (or the best parent, if the suite names no
specialist). A merge with a mean of 0.6 has six tenths of what the specialists learned; above 1 it is better
than they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation import statistics
from evomerge.evaluation.gains import specialist_of
from evomerge.evaluation.scores import Array, Scores, TaskScores, read_only
from evomerge.evaluation.suite import Suite, SuiteTask

HEADROOM_FLOOR = 0.05
"""Smallest headroom used as a divisor, of smooth companions and where no `trust` is given. With trust, by
which a scale that is not sure has little weight, it is 1 / items. With a specialist barely above the base the
scale would amplify noise without bound, and with one below the base it would be reversed. Where the error of
the headroom itself is larger (few items), its 90 % limit is the smallest divisor: more can't be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Where 0 and 1 lie on one task, in the metric's units."""

    zero: float
    headroom: float

    def __call__(self, value: float) -> float:
        return (value - self.zero) / self.headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScale:
    """One task's share and scale in the mean, the retention or the coherence.

    share: the task's weight relative to all such tasks, times the trust in its scale, see `gains.Gain`; the
    shares sum to 1 or less.
    zero: the base's mean, in the metric's units.
    headroom: the specialist's mean minus the base's (1 for retention and coherence).
    """

    task: str
    share: float
    zero: float
    headroom: float


def kept_share(gained: float) -> float:
    """Return what a model keeps of one retention task, in (0, 1].

    gained: its mean log-likelihood minus the base's.
    """
    return math.exp(min(gained, 0.0))


def check_specialists(suite: Suite, sources: Mapping[str, object]) -> None:
    """Check that every specialist of a suite is among the sources, which are the keys of a mapping.

    Raises:
        ConfigError: one is not.
    """
    for spec in suite.tasks:
        if spec.specialist is not None and spec.specialist not in sources:
            raise ConfigError(
                f"suite {suite.name!r}: task {spec.task!r} names the specialist {spec.specialist!r}, "
                "which is not among the sources",
                fix=nearest(spec.specialist, sources),
            )


class Normaliser:
    """Normalise scores of one split with the base's and the parents' scores on the same split.

    The references count as exact in the scores of `items`; `units` has their sampling error.

    Args:
        suite: the tasks with their roles, weights and specialists.
        base: the base model's scores; its means are 0 on the scale.
        parents: name -> scores of the models whose best, or the named specialist, is 1 on the scale.
        duds: tasks that are left out of the mean, see `gains.find_duds`; their scores are raw, relative to
            the base. Where that leaves no task, all of them count, raw.
        trust: task -> share of its weight with which it counts, see `gains.trusts`; of others 1.
        tokens_of: the parent whose answers have length 1, or the base.

    Attributes:
        split, blocks: of the scores that can be normalised.

    Raises:
        ConfigError: the suite names a specialist that is not among the parents.

    >>> import numpy as np
    >>> from evomerge.evaluation.scores import Scores, TaskScores
    >>> task = {"task": "t", "metric": "acc", "splits": {"search": "a", "select": "b", "test": "c"}}
    >>> suite = Suite.model_validate({"name": "s", "tasks": [task]})
    >>> low, mid, high = (
    ...     Scores(split="test", tasks=(TaskScores(task="t", metric=np.array(m)),))
    ...     for m in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1])
    ... )
    >>> Normaliser(suite, base=low, parents={"p": high}).mean(mid)
    0.5
    """

    def __init__(
        self,
        suite: Suite,
        *,
        base: Scores,
        parents: Mapping[str, Scores],
        duds: Collection[str] = (),
        trust: Mapping[str, float] | None = None,
        tokens_of: str = "base",
    ) -> None:
        assert parents, "no parent to compare with"
        places = {(scores.split, scores.blocks) for scores in (base, *parents.values())}
        assert len(places) == 1, f"scores of different items: {places}"
        check_specialists(suite, parents)
        self.split, self.blocks = base.split, base.blocks
        present = suite.of(base.split)
        skills = [spec for spec in present if spec.role == "skill"]
        counted = [spec for spec in skills if spec.counted]
        self._counted = [spec for spec in counted if spec.task not in duds] or counted
        self.duds = tuple(spec.task for spec in skills if spec.task in duds)
        """Skill tasks without a scale, because their specialist is not better than the base."""
        self._retention = [
            (spec, base[spec.task].mean) for spec in present if spec.role == "retention" and spec.counted
        ]
        self._coherence = [
            (spec, max(base[spec.task].mean, HEADROOM_FLOOR))
            for spec in present
            if spec.role == "coherence" and spec.counted
        ]
        self._generated = _generated(present, base)
        unit = _generated(present, parents.get(tokens_of, base))
        self._length = _total(unit) / _total(self._generated)
        total = math.fsum(spec.weight for spec in self._counted)
        self.weights = read_only([spec.weight / total for spec in self._counted])
        """(tasks,) shares of the tasks in the mean; they sum to 1, in the order of `items`."""
        self._trust = [(trust or {}).get(spec.task, 1.0) for spec in self._counted]
        self._scales: dict[str, tuple[_Scale, _Scale | None]] = {}
        self._units: dict[str, Array] = {}
        self._spans: dict[str, statistics.Span] = {}
        for spec in skills:
            low, high = base[spec.task], parents[specialist_of(spec, parents)][spec.task]
            floor = HEADROOM_FLOOR if trust is None else 1 / len(low.metric)
            self._scales[spec.task] = (
                _raw_scales(low, high) if spec.task in duds else _scales(low, high, floor)
            )
            headroom = high.metric - low.metric
            exact = spec.task in duds or headroom.mean() < self._scales[spec.task][0].headroom
            self._units[spec.task] = read_only(
                np.ones(len(headroom)) if exact else headroom / headroom.mean()
            )
            models = (low, *(parent[spec.task] for parent in parents.values()))
            self._spans[spec.task] = statistics.span(*(model.metric for model in models))
        self.counted = tuple(spec.task for spec in self._counted)
        """The skill tasks that count in the mean."""
        self._floored = trust is None

    @property
    def floored(self) -> tuple[str, ...]:
        """Tasks whose specialist is hardly better than the base, so their normalised scores mean little.

        None where a trust is given, which leaves little weight to such tasks.
        """
        scaled = [task for task in self.counted if self._floored and task not in self.duds]
        return tuple(task for task in scaled if self._scales[task][0].headroom <= HEADROOM_FLOOR)

    @property
    def shares(self) -> Array:
        """(tasks,) the weights of the counted tasks times the trust in their scales, as `mean` sums."""
        return read_only([w * trust for w, trust in zip(self.weights.tolist(), self._trust, strict=True)])

    def on(self, base: Scores) -> Normaliser:
        """Return this scale for scores on other item blocks: 0 is the base's mean there, the unit stays.

        The difference of two models' means is then an unbiased estimate of their difference on all blocks.

        base: the base model's scores on those blocks.
        """
        assert base.split == self.split, "scores of another split"
        moved = copy.copy(self)
        moved.blocks = base.blocks
        moved._retention = [(spec, base[spec.task].mean) for spec, _ in self._retention]
        moved._coherence = [(spec, max(base[spec.task].mean, HEADROOM_FLOOR)) for spec, _ in self._coherence]
        moved._generated = {name: _tokens(base[name]) for name in self._generated}
        moved._units = {}  # of other items
        moved._scales = {
            name: (
                replace(scale, zero=base[name].mean),
                None if smooth is None else replace(smooth, zero=_mean(base[name].smooth)),
            )
            for name, (scale, smooth) in self._scales.items()
        }
        return moved

    @property
    def skills(self) -> tuple[TaskScale, ...]:
        """The counted skill tasks: the mean is the sum of share * (task's mean - zero) / headroom."""
        return tuple(
            TaskScale(task=spec.task, share=share, zero=scale.zero, headroom=scale.headroom)
            for spec, share in zip(self._counted, self.shares.tolist(), strict=True)
            for scale in (self._scales[spec.task][0],)
        )

    @property
    def scales(self) -> tuple[TaskScale, ...]:
        """All skill tasks, also those that do not count in the mean; their share is 0."""
        shares = dict(zip(self.counted, self.shares.tolist(), strict=True))
        return tuple(
            TaskScale(task=task, share=shares.get(task, 0.0), zero=scale.zero, headroom=scale.headroom)
            for task, (scale, _) in self._scales.items()
        )

    @property
    def weakest(self) -> tuple[str, ...]:
        """The tasks among which the weakest is looked for: those that count and have a scale, if any do."""
        return tuple(task for task in self.counted if task not in self.duds) or self.counted

    @property
    def retained(self) -> tuple[TaskScale, ...]:
        """The retention tasks: retention is the sum of share * min(1, exp(task's mean - zero))."""
        shares = self.retention_shares()
        return tuple(
            TaskScale(task=spec.task, share=shares[spec.task], zero=mean, headroom=1.0)
            for spec, mean in self._retention
        )

    @property
    def coherent(self) -> tuple[TaskScale, ...]:
        """The coherence tasks: coherence is the sum of share * min(1, task's mean / zero)."""
        total = math.fsum(spec.weight for spec, _ in self._coherence)
        return tuple(
            TaskScale(task=spec.task, share=spec.weight / total, zero=mean, headroom=1.0)
            for spec, mean in self._coherence
        )

    def contributions(
        self, scores: Scores, *, smooth: float, retention: float, coherence: float
    ) -> list[Array]:
        """Return for each task (n,) the items' contributions to a loss, whose means sum to the loss.

        The loss is minus the mean score plus a price of lost retention and coherence, see
        `search.objective`. Retention and coherence are not means over items, so they are linearised around
        the model's mean (the delta method). That keeps the loss, and gives it the right sampling error.

        Args:
            scores: one model's scores on this split and these blocks.
            smooth: share of the smooth companion in a score, in [0, 1]; the rest is the metric.
            retention: the loss per unit of lost retention.
            coherence: the loss per unit of lost coherence.
        """
        self._check(scores)
        contributions = []
        for spec, weight in zip(self._counted, self.shares.tolist(), strict=True):
            task, (scale, smooth_scale) = scores[spec.task], self._scales[spec.task]
            values = (task.metric - scale.zero) / scale.headroom
            if smooth_scale is not None and task.smooth is not None:
                second = (task.smooth - smooth_scale.zero) / smooth_scale.headroom
                values = (1 - smooth) * values + smooth * second
            contributions.append(-weight * values)
        for part in self.retained:
            task = scores[part.task]
            kept = kept_share(task.mean - part.zero)
            slope = part.share * kept if kept < 1 else 0.0
            contributions.append(retention * (part.share * (1 - kept) - slope * (task.metric - task.mean)))
        for part in self.coherent:
            task = scores[part.task]
            kept = min(1.0, task.mean / part.zero)
            slope = part.share / part.zero if kept < 1 else 0.0
            contributions.append(coherence * (part.share * (1 - kept) - slope * (task.metric - task.mean)))
        return contributions

    def _check(self, scores: Scores) -> None:
        assert scores.split == self.split, "scores of another split"
        assert scores.blocks == self.blocks, f"scores on blocks {scores.blocks}, not on {self.blocks}"

    def task(self, scores: Scores) -> dict[str, float]:
        """Return skill task -> normalised mean, also for tasks of weight 0, in suite order."""
        self._check(scores)
        return {name: scale(scores[name].mean) for name, (scale, _) in self._scales.items()}

    def p_kept(self, scores: Scores, *, base: Scores, share: float) -> dict[str, float]:
        """Return counted task -> one-sided p of keeping a share of the specialist's gain over the base.

        Small where the data show that less is kept. All three models are compared on the same items, so the
        sampling error of base and specialist is part of the test.
        """
        self._check(scores)
        chances = {}
        for name in (name for name in self.counted if name not in self.duds):
            low, high = self._spans[name]
            demanded = share * self._scales[name][0].headroom * self._units[name]
            chances[name] = statistics.p_below(
                [scores[name].metric - base[name].metric - demanded],
                [1.0],
                0.0,
                spans=[(low - high, high - low)],
            )
        return chances

    def mean(self, scores: Scores) -> float:
        """Return the weighted mean of the normalised means of the skill tasks that count."""
        tasks = self.task(scores)
        return self._weighted([tasks[spec.task] for spec in self._counted])

    def smooth_task(self, scores: Scores) -> dict[str, float]:
        """Return the same as `task` for the smooth companions; for tasks without one, of the metric."""
        self._check(scores)
        values = {}
        for name, (scale, smooth_scale) in self._scales.items():
            task = scores[name]
            if smooth_scale is None or task.smooth is None:
                values[name] = scale(task.mean)
            else:
                values[name] = smooth_scale(float(task.smooth.mean()))
        return values

    def smooth_mean(self, scores: Scores) -> float:
        """Return the same as `mean` for the smooth companions; for tasks without one, of the metric."""
        tasks = self.smooth_task(scores)
        return self._weighted([tasks[spec.task] for spec in self._counted])

    def retention(self, scores: Scores) -> float | None:
        """Return how much of the base's abilities a model keeps, in (0, 1]; None without retention tasks.

        It is the weighted mean over the retention tasks of exp(mean log-likelihood - the base's), the ratio
        of perplexities base / model. A task counts 1 at most, so that more likelihood of one text (a
        specialist's style, say) never makes up for what is lost of another.
        """
        self._check(scores)
        if not self._retention:
            return None
        return math.fsum(
            part.share * kept_share(scores[part.task].mean - part.zero) for part in self.retained
        )

    def coherence(self, scores: Scores) -> float | None:
        """Return the coherence of a model's free generations relative to the base's, in [0, 1].

        It is the weighted mean over the coherence tasks, each of which counts 1 at most; None if there are
        none.
        """
        self._check(scores)
        if not self._coherence:
            return None
        return math.fsum(part.share * min(1.0, scores[part.task].mean / part.zero) for part in self.coherent)

    def tokens(self, scores: Scores) -> float | None:
        """Return the mean number of generated tokens per item, relative to the base's or a parent's.

        Over the skill and coherence tasks that count and generate; None if there are none. Relative to the
        base on the same items, times how that relates to the parent on all items.
        """
        self._check(scores)
        if not self._generated:
            return None
        total = math.fsum(_tokens(scores[name]) for name in self._generated)
        return total / _total(self._generated) / self._length

    def retention_shares(self) -> dict[str, float]:
        """Return retention task -> its share of the retention; the shares sum to 1."""
        total = math.fsum(spec.weight for spec, _ in self._retention)
        return {spec.task: spec.weight / total for spec, _ in self._retention}

    def items(self, scores: Scores) -> list[Array]:
        """Return for each counted skill task (n,) the normalised scores of its items, times its trust.

        With `weights` they are the arguments of `statistics`: the weighted mean of their means is
        `mean(scores)`.
        """
        self._check(scores)
        values = []
        for spec, trust in zip(self._counted, self._trust, strict=True):
            scale, _ = self._scales[spec.task]
            values.append(read_only((scores[spec.task].metric - scale.zero) / scale.headroom * trust))
        return values

    @property
    def units(self) -> list[Array]:
        """For each counted skill task (n,) the headroom item by item, relative to its mean.

        With it `statistics.paired_difference` includes the references' sampling error. Ones where the
        headroom is a constant.
        """
        return [self._units[spec.task] for spec in self._counted]

    @property
    def spans(self) -> list[statistics.Span]:
        """For each counted skill task the range of its values in `items`."""
        scales = [(self._scales[spec.task][0], self._spans[spec.task]) for spec in self._counted]
        return [
            (scale(low) * trust, scale(high) * trust)
            for (scale, (low, high)), trust in zip(scales, self._trust, strict=True)
        ]

    def interval(self, scores: Scores) -> statistics.Interval:
        """Return the mean with its 95 % interval; the references count as exact."""
        return statistics.interval(self.items(scores), self.weights, spans=self.spans)

    def compare(self, a: Scores, b: Scores, *, seed: int) -> statistics.PairedTest:
        """Test the difference of two models' means, paired; its interval has the references' error, too."""
        items = self.items(a), self.items(b)
        return statistics.paired_difference(
            *items, self.weights, seed=seed, spans=self.spans, units=self.units
        )

    def compare_with_best(
        self, winner: Scores, rivals: Mapping[str, Scores], *, fixed: str, seed: int
    ) -> tuple[str, statistics.PairedTest]:
        """Test a model against the best of several rivals, which is chosen on these very items.

        That choice favours the rivals, and the interval of the difference to the chosen one lies too low.
        The returned interval holds the difference to the truly best rival in at least 95 % of cases: its
        lower end is the lowest over the rivals, one of which is truly the best, and its upper end is that of
        a rival chosen on other items, which is truly no better than the best (as in Hsu 1984, multiple
        comparisons with the best, with a reference in place of simultaneous bounds).

        Args:
            winner: the scores of the model.
            rivals: name -> scores on the same items.
            fixed: the rival that is the best on other items.
            seed: of the p-value's random draws.

        Returns:
            The name of the best rival, and the test; estimate and p are of the difference to that rival.
        """
        best = max(rivals, key=lambda name: self.mean(rivals[name]))
        test = self.compare(winner, rivals[best], seed=seed)
        high = (
            test.high
            if fixed == best
            else max(test.high, self.compare(winner, rivals[fixed], seed=seed).high)
        )
        low = test.low
        for name, scores in rivals.items():
            # A rival far behind can't have the lowest end: intervals are no longer than twice the best's.
            if name != best and self.mean(winner) - self.mean(scores) < test.estimate + (
                test.high - test.low
            ):
                low = min(low, self.compare(winner, scores, seed=seed).low)
        return best, replace(test, low=low, high=high)

    def _weighted(self, values: list[float]) -> float:
        return math.fsum(share * value for share, value in zip(self.shares.tolist(), values, strict=True))


def _mean(values: Array | None) -> float:
    assert values is not None, "a task with a smooth companion on some blocks only"
    return float(values.mean())


def _generated(tasks: Sequence[SuiteTask], base: Scores) -> dict[str, float]:
    """Return counted task that generates -> tokens that the base generated."""
    counted = [spec.task for spec in tasks if spec.counted]
    return {name: _tokens(base[name]) for name in counted if base[name].tokens is not None}


def _total(generated: Mapping[str, float]) -> float:
    """Return the sum of tokens, at least 1, because it divides."""
    return max(math.fsum(generated.values()), 1.0)


def _tokens(scores: TaskScores) -> float:
    """Return how many tokens were generated on all items."""
    assert scores.tokens is not None, "a task that generates for some models only"
    return float(scores.tokens.sum())


def _scales(base: TaskScores, reference: TaskScores, floor: float) -> tuple[_Scale, _Scale | None]:
    error = statistics.standard_error(reference.metric - base.metric)
    least = max(floor, statistics.ONE_SIDED * error)
    metric = _Scale(zero=base.mean, headroom=max(reference.mean - base.mean, least))
    if base.smooth is None or reference.smooth is None:
        return metric, None
    zero, specialist = _mean(base.smooth), _mean(reference.smooth)
    return metric, _Scale(zero=zero, headroom=max(specialist - zero, HEADROOM_FLOOR))


def _raw_scales(base: TaskScores, reference: TaskScores) -> tuple[_Scale, _Scale | None]:
    metric = _Scale(zero=base.mean, headroom=1.0)
    if base.smooth is None or reference.smooth is None:
        return metric, None
    return metric, _Scale(zero=_mean(base.smooth), headroom=1.0)
