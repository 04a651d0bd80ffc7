"""Companions of generated answers: whether they rank models as the exact metric does; removed if not.

The likelihood of a right answer is worth following only if a model with more of it also writes more right
answers. That is measured once, on the models that are scored before the search.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from evomerge.evaluation.asking import DISTRIBUTION, OFF
from evomerge.evaluation.scores import Scores, TaskScores
from evomerge.evaluation.suite import Suite

LEAST = 0.3
"""Rank correlation with the exact metric below which a companion is not used."""
FEWEST = 6
"""Number of different values of the exact metric from which on the rank correlation decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """The companion of one task that generates.

    exists: whether the task has one. correlation: Spearman's, of its means with those of the exact metric;
    None while too few models differ. models: number that were compared.
    """

    task: str
    exists: bool
    correlation: float | None
    models: int

    @property
    def dropped(self) -> bool:
        """Whether the search does without it, because it ranks models differently."""
        return self.correlation is not None and self.correlation < LEAST

    @property
    def sentence(self) -> str:
        """What was found, in one line."""
        if not self.exists:
            return (
                f"{self.task}: the search has the exact metric alone, because not every gold answer is right "
                "by it as it stands, or models reason before they answer"
            )
        if self.correlation is None:
            return (
                f"{self.task}: the likelihood of the right answer is used unchecked, because fewer than "
                f"{FEWEST} of the first models differ in the exact metric"
            )
        found = (
            f"{self.task}: rank correlation of the right answer's likelihood with the exact metric "
            f"{self.correlation:.2f} ({self.models} models)"
        )
        return (
            f"{found}, below {LEAST:g}, so the search has the exact metric alone" if self.dropped else found
        )


def companions(suite: Suite, models: Sequence[Scores]) -> list[Companion]:
    """Return the companions of the counted tasks that generate, with their rank correlations.

    models: scores on all `search` items, the base's first; tasks with `companion: off` or
        `distribution` are left out.
    """
    rows = []
    for spec in suite.of("search"):
        tasks = [scores[spec.task] for scores in models]
        if spec.role != "skill" or not spec.counted:
            continue
        if suite.asking(spec.task).companion in (OFF, DISTRIBUTION):
            continue
        if tasks[0].tokens is not None:
            rows.append(_companion(spec.task, tasks))
    return rows


def _companion(task: str, tasks: Sequence[TaskScores]) -> Companion:
    both = [(t.mean, float(t.smooth.mean())) for t in tasks if t.smooth is not None]
    if not both or tasks[0].smooth is None:
        return Companion(task=task, exists=False, correlation=None, models=len(tasks))
    exact, smooth = np.array(both).T
    correlation = None
    if len(np.unique(exact)) >= FEWEST:
        correlation = float(scipy.stats.spearmanr(exact, smooth).statistic) if np.ptp(smooth) else 0.0
    return Companion(task=task, exists=True, correlation=correlation, models=len(both))


def taught(suite: Suite, base: Scores, tasks: Sequence[str]) -> list[str]:
    """Return those tasks whose gradients follow what their specialists expect, not a likelihood."""
    specialist_of = {spec.task: spec.specialist for spec in suite.of("search")}
    return [
        task
        for task in tasks
        if suite.asking(task).companion == DISTRIBUTION
        and specialist_of.get(task) is not None
        and base[task].tokens is not None
    ]


def without(scores: Scores, tasks: Collection[str]) -> Scores:
    """Return scores without the companions of some tasks."""
    if not tasks:
        return scores
    bare = (replace(t, smooth=None, margin=None) if t.task in tasks else t for t in scores)
    return replace(scores, tasks=tuple(bare))
