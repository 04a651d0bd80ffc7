"""Normaliser: put tasks on one scale, so that their mean says how much of the parents' skills a merge has.

On each skill task 0 is the base model and 1 the task's specialist (or, if the suite names none, the best
parent). A merge with 0.6 on average has six tenths of what the specialists learnt; above 1 it beats them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.scores import Array, Scores, TaskScores, read_only
from evomerge.evaluation.suite import Suite, SuiteTask

HEADROOM_FLOOR = 0.05
"""Smallest head-room divided by. A specialist barely above the base (or below it) would otherwise blow noise
up without bound, or turn the scale upside down; with the floor such a task counts in steps of 5 points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Where 0 and 1 lie on one task, in the metric's units."""

    zero: float
    headroom: float

    def __call__(self, value: float) -> float:
        return (value - self.zero) / self.headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScale:
    """One task's part of the mean, of the retention, or of the coherence.

    share: of all such tasks, summing to 1. zero: the base's mean, in the metric's units. headroom: from
    there to the specialist (1 for retention and coherence).
    """

    task: str
    share: float
    zero: float
    headroom: float


def check_specialists(suite: Suite, sources: Mapping[str, object]) -> None:
    """Check that every specialist the suite names is among the sources (a mapping with their names as keys).

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
    """Normalises scores of one split against the base and the parents on the same split.

    The references are taken as they are: their own sampling error is not part of any interval.

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

    def __init__(self, suite: Suite, *, base: Scores, parents: Mapping[str, Scores]) -> None:
        assert parents, "no parent to compare with"
        places = {(scores.split, scores.blocks) for scores in (base, *parents.values())}
        assert len(places) == 1, f"scores of different items: {places}"
        check_specialists(suite, parents)
        self.split, self.blocks = base.split, base.blocks
        present = suite.of(base.split)
        skills = [spec for spec in present if spec.role == "skill"]
        self._counted = [spec for spec in skills if spec.counted]
        self._retention = [
            (spec, base[spec.task].mean) for spec in present if spec.role == "retention" and spec.counted
        ]
        self._coherence = [
            (spec, max(base[spec.task].mean, HEADROOM_FLOOR))
            for spec in present
            if spec.role == "coherence" and spec.counted
        ]
        total = math.fsum(spec.weight for spec in self._counted)
        self.weights = read_only([spec.weight / total for spec in self._counted])
        """(tasks,) shares of the tasks in the mean, summing to 1; in the order of `items`."""
        self._scales: dict[str, tuple[_Scale, _Scale | None]] = {}
        for spec in skills:
            reference = _reference(spec, parents)
            self._scales[spec.task] = _scales(base[spec.task], reference)
        self.counted = tuple(spec.task for spec in self._counted)
        """The skill tasks of the mean."""
        self.floored = tuple(
            s.task for s in self._counted if self._scales[s.task][0].headroom <= HEADROOM_FLOOR
        )
        """Tasks whose specialist is hardly better than the base: their normalised scores mean little."""

    def on(self, base: Scores) -> Normaliser:
        """Return this scale for scores on other item blocks: 0 is the base there, the unit is the same.

        A difference of two models' means is then an unbiased estimate of their difference on all blocks.
        """
        assert base.split == self.split, "scores of another split"
        moved = copy.copy(self)
        moved.blocks = base.blocks
        moved._retention = [(spec, base[spec.task].mean) for spec, _ in self._retention]
        moved._coherence = [(spec, max(base[spec.task].mean, HEADROOM_FLOOR)) for spec, _ in self._coherence]
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
            for spec, share in zip(self._counted, self.weights.tolist(), strict=True)
            for scale in (self._scales[spec.task][0],)
        )

    @property
    def retained(self) -> tuple[TaskScale, ...]:
        """The retention tasks: retention is the sum of share * exp(task's mean - zero)."""
        shares = self.retention_shares()
        return tuple(
            TaskScale(task=spec.task, share=shares[spec.task], zero=mean, headroom=1.0)
            for spec, mean in self._retention
        )

    @property
    def coherent(self) -> tuple[TaskScale, ...]:
        """The coherence tasks: coherence is the sum of share * task's mean / zero."""
        total = math.fsum(spec.weight for spec, _ in self._coherence)
        return tuple(
            TaskScale(task=spec.task, share=spec.weight / total, zero=mean, headroom=1.0)
            for spec, mean in self._coherence
        )

    def contributions(
        self, scores: Scores, *, smooth: float, retention: float, coherence: float
    ) -> list[Array]:
        """Return per task what each item adds to a loss: their means over the items sum to the loss.

        The loss is minus the mean score, `smooth` of it the companion's, plus `retention` and `coherence`
        for each unit of them that is lost; see `search.objective`. These two are no means over items; they
        are linearised around the model's own mean (the delta method), which leaves the sum as it is and
        makes the spread over the items what decides the sum's error.
        """
        self._check(scores)
        contributions = []
        for spec, weight in zip(self._counted, self.weights.tolist(), strict=True):
            task, (scale, smooth_scale) = scores[spec.task], self._scales[spec.task]
            values = (task.metric - scale.zero) / scale.headroom
            if smooth_scale is not None and task.smooth is not None:
                second = (task.smooth - smooth_scale.zero) / smooth_scale.headroom
                values = (1 - smooth) * values + smooth * second
            contributions.append(-weight * values)
        retained, total = self.retention(scores), math.fsum(spec.weight for spec, _ in self._retention)
        for spec, base_mean in self._retention:
            assert retained is not None
            task, share = scores[spec.task], spec.weight / total
            slope = share * math.exp(task.mean - base_mean) if retained < 1 else 0.0
            lost = share * max(0.0, 1 - retained)
            contributions.append(retention * (lost - slope * (task.metric - task.mean)))
        coherent = self.coherence(scores)
        for part in self.coherent:
            assert coherent is not None
            task = scores[part.task]
            slope = part.share / part.zero if coherent < 1 else 0.0
            lost = part.share * max(0.0, 1 - coherent)
            contributions.append(coherence * (lost - slope * (task.metric - task.mean)))
        return contributions

    def _check(self, scores: Scores) -> None:
        assert scores.split == self.split, "scores of another split"
        assert scores.blocks == self.blocks, f"scores on blocks {scores.blocks}, not on {self.blocks}"

    def task(self, scores: Scores) -> dict[str, float]:
        """Return each skill task's normalised mean, those with weight 0 included, in suite order."""
        self._check(scores)
        return {name: scale(scores[name].mean) for name, (scale, _) in self._scales.items()}

    def mean(self, scores: Scores) -> float:
        """Return the weighted mean over the skill tasks that count."""
        tasks = self.task(scores)
        return self._weighted([tasks[spec.task] for spec in self._counted])

    def smooth_task(self, scores: Scores) -> dict[str, float]:
        """Return what `task` does, of the smooth companions; of the metric where a task has none."""
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
        """Return the same mean of the smooth companions; of the metric where a task has none."""
        tasks = self.smooth_task(scores)
        return self._weighted([tasks[spec.task] for spec in self._counted])

    def retention(self, scores: Scores) -> float | None:
        """Return how well the model keeps what the base could: exp of the difference in mean log-likelihood.

        1 is as good as the base, less is worse, more is better; averaged by weight over the retention
        tasks, None if there are none. For one task it is the ratio of the perplexities, base / model.
        """
        self._check(scores)
        if not self._retention:
            return None
        total = math.fsum(spec.weight for spec, _ in self._retention)
        return (
            math.fsum(
                spec.weight * math.exp(scores[spec.task].mean - base_mean)
                for spec, base_mean in self._retention
            )
            / total
        )

    def coherence(self, scores: Scores) -> float | None:
        """Return the coherence of the model's free generations relative to the base's.

        1 is as coherent as the base, less is worse; averaged by weight over the coherence tasks, None if
        there are none.
        """
        self._check(scores)
        if not self._coherence:
            return None
        total = math.fsum(spec.weight for spec, _ in self._coherence)
        shares = (spec.weight * scores[spec.task].mean / base_mean for spec, base_mean in self._coherence)
        return math.fsum(shares) / total

    def gains(self) -> dict[str, float]:
        """Return what the mean rises by for each unit of a counted task's own mean."""
        shares = zip(self._counted, self.weights.tolist(), strict=True)
        return {spec.task: share / self._scales[spec.task][0].headroom for spec, share in shares}

    def retention_shares(self) -> dict[str, float]:
        """Return each retention task's share of the retention, summing to 1; nothing where there is none."""
        total = math.fsum(spec.weight for spec, _ in self._retention)
        return {spec.task: spec.weight / total for spec, _ in self._retention}

    def items(self, scores: Scores) -> list[Array]:
        """Return each counted skill task's normalised items; with `weights`, what the statistics take.

        The weighted mean of their means is `mean(scores)`.
        """
        self._check(scores)
        values = []
        for spec in self._counted:
            scale, _ = self._scales[spec.task]
            values.append(read_only((scores[spec.task].metric - scale.zero) / scale.headroom))
        return values

    def _weighted(self, values: list[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(self.weights.tolist(), values, strict=True))


def _mean(values: Array | None) -> float:
    assert values is not None, "a task with a smooth companion on some blocks only"
    return float(values.mean())


def _reference(spec: SuiteTask, parents: Mapping[str, Scores]) -> TaskScores:
    if spec.specialist is not None:
        return parents[spec.specialist][spec.task]
    return max((parent[spec.task] for parent in parents.values()), key=lambda task: task.mean)


def _scales(base: TaskScores, reference: TaskScores) -> tuple[_Scale, _Scale | None]:
    metric = _Scale(zero=base.mean, headroom=max(reference.mean - base.mean, HEADROOM_FLOOR))
    if base.smooth is None or reference.smooth is None:
        return metric, None
    zero, specialist = _mean(base.smooth), _mean(reference.smooth)
    return metric, _Scale(zero=zero, headroom=max(specialist - zero, HEADROOM_FLOOR))
