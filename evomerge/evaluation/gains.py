"""Gains: what specialists gain over the base, how sure that is, and whether a run can measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError
from evomerge.evaluation import statistics
from evomerge.evaluation.scores import Scores
from evomerge.evaluation.suite import Suite, SuiteTask

CONFIDENCE = 0.95
"""How sure it must be that a specialist is better than the base, or its task is left out of the mean."""

SURE = 6.0
"""How many standard errors a gain must have for the task's full weight in the mean. With fewer the weight is
smaller in proportion, so one standard error on a task is never more than a sixth of its weight. Well measured
gains have their full weight, and the mean has the same bits as without this rule."""

ERRORS = "errors"
"""The name of this rule, which is stored with runs. Runs begun before it have a floor of the gain alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a task's specialist gains over the base, which is the task's scale.

    base, score: means of base and specialist, in the metric's units. error: standard error of their
    difference. items: that were compared. shown: whether it is positive beyond sampling error; else the
    scale may be all noise.
    """

    task: str
    specialist: str
    base: float
    score: float
    error: float
    items: int
    shown: bool

    @property
    def trust(self) -> float:
        """The share of its weight with which the task counts in the mean, in (0, 1]."""
        gain = self.score - self.base
        return min(1.0, gain / (SURE * self.error)) if self.shown and self.error > 0 else 1.0

    @property
    def numbers(self) -> str:
        """The comparison in a few words."""
        return f"{self.specialist} {self.score:.3g} against {self.base:.3g} on {self.items} items"

    @property
    def sentence(self) -> str:
        """The comparison and its consequence, in one line."""
        if self.shown:
            return (
                f"{self.task}: the specialist's gain over the base on `search` ({self.numbers}) is known to "
                f"+-{1.96 * self.error:.2g} only, so the task counts with {self.trust:.0%} of its weight"
            )
        return (
            f"{self.task}: the specialist ({self.specialist}) is not shown to be better than the base on "
            f"`search` ({self.score:.3g} against {self.base:.3g} on {self.items} items), so the task is left "
            "out of the mean and of constraints"
        )


def find_gains(suite: Suite, *, base: Scores, parents: Mapping[str, Scores]) -> tuple[Gain, ...]:
    """Return for each counted task what its specialist gains over the base.

    Whether it is shown to be better is decided by a paired one-sided test at CONFIDENCE on the scores of one
    split; where the specialist is the best of several parents, corrected for their number. Decided once, on
    `search`, for all splits of a run.

    Args:
        suite: the tasks with their specialists.
        base: the base model's scores.
        parents: name -> scores, of the specialists.
    """
    gains = []
    for spec in suite.of(base.split):
        if spec.role != "skill" or not spec.counted:
            continue
        name = specialist_of(spec, parents)
        low, high = base[spec.task], parents[name][spec.task]
        test = statistics.paired_items(high.metric, low.metric, seed=0)
        one_sided = test.p / 2 * (1 if spec.specialist is not None else len(parents))
        gains.append(
            Gain(
                task=spec.task,
                specialist=name,
                base=low.mean,
                score=high.mean,
                error=statistics.standard_error(high.metric - low.metric),
                items=len(low.metric),
                shown=test.estimate > 0 and one_sided <= 1 - CONFIDENCE,
            )
        )
    return tuple(gains)


def find_duds(suite: Suite, *, base: Scores, parents: Mapping[str, Scores]) -> tuple[Gain, ...]:
    """Return the gains, as `find_gains`, of specialists that are not better beyond sampling error."""
    return tuple(gain for gain in find_gains(suite, base=base, parents=parents) if not gain.shown)


def trusts(gains: Sequence[Gain], rule: str | None) -> dict[str, float] | None:
    """Return task -> trust in its scale by the rule of a run; None in runs begun before there was one."""
    return {gain.task: gain.trust for gain in gains} if rule == ERRORS else None


def refuse_nothing(gains: Sequence[Gain]) -> None:
    """Raise ConfigError where the specialists of more than half of the counted tasks don't beat the base."""
    duds = [gain.task for gain in gains if not gain.shown]
    if 2 * len(duds) <= len(gains):
        return
    rows = [f"{gain.task}: {gain.numbers}{'' if gain.shown else ' (not better)'}" for gain in gains]
    raise ConfigError(
        f"the suite hardly measures what the sources have learned: on {len(duds)} of {len(gains)} tasks that "
        "count, the specialist is not shown to be better than the base on `search`",
        expected="a specialist that is better than the base on at least half of the tasks",
        got="; ".join(rows),
        fix="see whether models and prompts fit (`evomerge check` shows prompts), give the suite more items, "
        "name other specialists, or set `weight: 0` for tasks that nothing was trained for; "
        "`weak_specialists: allow` in the run config starts the run as it is",
    )


def dud_sentences(gains: Sequence[Gain]) -> list[str]:
    """Return what to say about gains that are not shown, one sentence each; one for all where none is."""
    duds = [gain for gain in gains if not gain.shown]
    if not duds or len(duds) < len(gains):
        return [dud.sentence for dud in duds]
    scores = ", ".join(f"{d.task} {d.score:.3g} against {d.base:.3g} on {d.items} items" for d in duds)
    return [
        f"no specialist is shown to be better than the base on `search` ({scores}), so there is no scale: "
        "points are hundredths of the raw score above the base, and most differences will be noise. "
        "Stop here and give the suite more items, or choose other specialists"
    ]


def specialist_of(spec: SuiteTask, parents: Mapping[str, Scores]) -> str:
    """Return the parent that is 1 on a task's scale: the named one, else the best, of equal ones the
    first."""
    return spec.specialist or max(parents, key=lambda name: parents[name][spec.task].mean)
