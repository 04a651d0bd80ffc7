"""The verdict: did the search help, on which tasks, what did it lose, and which config would forbid the loss.

Green only where the mean is better than the best baseline's and no task pays for it. Amber where a task is
significantly worse than the best baseline has it, or keeps significantly less of its specialist's gain than
the config's `verdict.kept`. Red where the search did not help.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from evomerge.delivery.style import bounds, difference, percent, short_task
from evomerge.evaluation import statistics
from evomerge.evaluation.statistics import PairedTest
from evomerge.evaluation.suite import Suite
from evomerge.search.objective import ConstraintsSpec

SIGNIFICANT = 0.05
"""Adjusted p up to which a task counts as better or worse."""

LISTED = 5
"""Tasks that a sentence names; the others are counted."""

SHOWN = 0.1
"""The difference that `test` should be able to show on every task: 10 points of raw score."""

Level = Literal["green", "amber", "red"]

STYLES: Mapping[Level, str] = {"green": "bold green", "amber": "bold yellow", "red": "bold red"}
"""How a terminal shows a verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The winner against the best baseline on one task.

    task, name: in full, and as tables show it. winner, rival: mean raw scores. test: of their difference.
    adjusted: its p after Holm's correction over the tasks. kept, held: normalised scores of winner and rival,
    None where the task has no scale or does not count. p_kept: one-sided, that the winner keeps the demanded
    share, after Holm's correction; None as `kept`. limited: whether a constraint can name the task.
    counted: whether it has a weight in the mean; others can only be lost, not won.
    """

    task: str
    name: str
    winner: float
    rival: float
    test: PairedTest
    adjusted: float
    kept: float | None
    held: float | None
    p_kept: float | None
    limited: bool
    counted: bool = True

    @property
    def better(self) -> bool:
        """Whether the winner is significantly better, on a task that counts."""
        return self.counted and self.adjusted <= SIGNIFICANT and self.test.estimate > 0

    @property
    def worse(self) -> bool:
        """Whether the winner is significantly worse."""
        return self.adjusted <= SIGNIFICANT and self.test.estimate < 0

    @property
    def short(self) -> bool:
        """Whether the winner keeps significantly less of the specialist's gain than demanded."""
        return self.p_kept is not None and self.p_kept <= SIGNIFICANT

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data: raw scores, differences in points of raw score."""
        return {
            "task": self.task,
            "result": "better" if self.better else "worse" if self.worse else "same",
            "winner": self.winner,
            "rival": self.rival,
            "points": 100 * self.test.estimate,
            "low": 100 * self.test.low,
            "high": 100 * self.test.high,
            "p": self.test.p,
            "p_holm": self.adjusted,
            "kept": self.kept,
            "p_kept": self.p_kept,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The paired test of the winner against the best baseline, on `test`, and what it hides.

    items: how many items the test compares. scaled: whether any task of the mean has a specialist better than
    the base. share: the least share of a specialist's gain that a task should keep. constraints: those of the
    run. counted: the tasks that a constraint for all tasks means.
    """

    rival: str
    test: PairedTest
    items: int
    tasks: tuple[TaskResult, ...]
    scaled: bool
    share: float
    constraints: ConstraintsSpec
    counted: tuple[str, ...]

    @property
    def helped(self) -> bool:
        """Whether the whole 95 % interval of the difference lies above zero."""
        return self.test.low > 0

    @property
    def level(self) -> Level:
        """Green, amber or red; see the module."""
        if not self.helped:
            return "red"
        return "amber" if self.lost or self.short or not self.scaled else "green"

    @property
    def lost(self) -> list[TaskResult]:
        """The tasks on which the winner is significantly worse, worst first."""
        return sorted((t for t in self.tasks if t.worse), key=lambda t: t.test.estimate)

    @property
    def short(self) -> list[TaskResult]:
        """The tasks of which the winner keeps too little, least first."""
        return sorted((t for t in self.tasks if t.short), key=lambda t: t.kept or 0.0)

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        head = "search helped" if self.helped else "search did not help"
        better = sum(t.better for t in self.tasks)
        gained = f"better on {_count(better)}"
        lost = "worse on none"
        if self.lost:
            pairs = [f"{t.name} {percent(t.winner)} against {percent(t.rival)}" for t in self.lost]
            lost = f"worse on {len(pairs)}: {_listed(pairs)}"
        return (
            f"{head}: {difference(self.test.estimate)} points {bounds(self.test.low, self.test.high)} "
            f"over the best baseline ({self.rival}); {gained}, {lost}"
        )

    @property
    def warning(self) -> str | None:
        """The tasks of which the winner keeps too little, in one line; None without any."""
        if not self.short:
            return None
        tasks = [f"{t.name} {percent(t.kept, 0)} %" for t in self.short]
        return (
            f"kept less than {percent(self.share, 0)} % of what the specialist gained over the base: "
            + _listed(tasks)
        )

    @property
    def forbidding(self) -> str | None:
        """The config line that forbids the losses; None without a loss that constraints can forbid.

        A task that got worse must score what the best baseline has (rounded down), one that only keeps too
        little the demanded share. What the run's constraints demanded stays.
        """
        before = self.constraints.tasks
        limits = dict(before) if isinstance(before, Mapping) else dict.fromkeys(self.counted, before or 0.0)
        if before is None:
            limits = {}
        wanted = {t.task: self.share for t in self.short if t.limited}
        wanted |= {
            t.task: math.floor(100 * t.held) / 100 for t in self.lost if t.limited and t.held is not None
        }
        if not wanted:
            return None
        limits |= {task: max(limit, limits.get(task, -math.inf)) for task, limit in wanted.items()}
        others = self.constraints.model_dump(exclude={"tasks"}, exclude_none=True)
        constraints = {"constraints": {"tasks": limits, **others}}
        dumped = yaml.safe_dump(constraints, default_flow_style=True, sort_keys=False, width=math.inf)
        return f"objective: {dumped.strip()}"

    @property
    def losses(self) -> list[str]:
        """What the mean hides, and the config line that forbids it: the lines below the sentence."""
        lines = [self.warning] if self.warning else []
        if self.forbidding:
            lines.append(f"to forbid it, in the config of a new run: {self.forbidding}")
        return lines

    def as_data(self) -> dict[str, Any]:
        """Return the verdict as plain data, differences in points."""
        return {
            "sentence": self.sentence,
            "level": self.level,
            "helped": self.helped,
            "best_baseline": self.rival,
            "points": 100 * self.test.estimate,
            "low": 100 * self.test.low,
            "high": 100 * self.test.high,
            "p": self.test.p,
            "better": [t.task for t in self.tasks if t.better],
            "worse": [t.task for t in self.lost],
            "below_share": [t.task for t in self.short],
            "share": self.share,
            "forbidding": self.forbidding,
            "tasks": [t.as_data() for t in self.tasks],
        }


def _count(number: int) -> str:
    return "no task" if number == 0 else "1 task" if number == 1 else f"{number} tasks"


def _listed(parts: Sequence[str] | Iterable[str]) -> str:
    """Return the first parts in one line, and how many there are more.

    >>> _listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    parts = list(parts)
    more = len(parts) - LISTED
    return ", ".join(parts[:LISTED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What `test` can show: the smallest raw differences that a paired test finds with a probability of 80 %.

    by_task: counted task -> the difference; mean: of the weighted mean over tasks.
    """

    by_task: dict[str, float]
    mean: float
    suite: str

    @property
    def sentence(self) -> str:
        """The differences in one line."""
        low, high = min(self.by_task.values()), max(self.by_task.values())
        tasks = percent(high, 0) if high - low < 0.005 else f"{percent(low, 0)} to {percent(high, 0)}"
        return (
            f"shows a difference of {tasks} points of raw score on a task, {percent(self.mean, 0)} in the "
            "mean (in 80 % of cases, at accuracies near 50 %)"
        )

    @property
    def notes(self) -> list[str]:
        """What to say where a task has too few items, one sentence or none."""
        coarse = {task: d for task, d in self.by_task.items() if d > SHOWN}
        if not coarse:
            return []
        tasks = _listed(
            f"{short_task(t, self.suite)} ({percent(d, 0) if d < 1 else 'none'})" for t, d in coarse.items()
        )
        return [
            f"too few `test` items to show a difference of {percent(SHOWN, 0)} points; the smallest: {tasks}"
            f". Give each of these tasks {statistics.items_to_show(SHOWN)} items or more"
        ]

    def as_data(self) -> dict[str, Any]:
        """Return the differences as plain data, in points."""
        return {
            "tasks": {task: 100 * d for task, d in self.by_task.items()},
            "mean": 100 * self.mean,
            "notes": self.notes,
        }


def resolution(suite: Suite, items: Mapping[str, int]) -> Resolution:
    """Return the smallest differences that `test` can show.

    Args:
        suite: the tasks and their weights.
        items: task -> number of `test` items.
    """
    skills = [task for task in suite.of("test") if task.role == "skill" and task.counted]
    total = math.fsum(task.weight for task in skills)
    return Resolution(
        by_task={task.task: statistics.smallest_difference([items[task.task]], [1.0]) for task in skills},
        mean=statistics.smallest_difference(
            [items[task.task] for task in skills], [task.weight / total for task in skills]
        ),
        suite=suite.name,
    )
