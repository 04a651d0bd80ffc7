"""What the scores of the tasks are worth together: the skill part of an objective.

A sum over tasks, so that it has a value and a slope per task. With shares w and normalised scores s (0 the
base, 1 the specialist):

    mean       sum of w s
    balanced   sum of w u(s),   u(s) = log(1 + s / c) / log(1 + 1 / c), continued below 0 as a straight line

In `balanced` a skill that is nearly lost counts most. Below a floor, in either, each unit that a task is
short costs a price that no gain elsewhere can pay: an exact penalty (Nocedal and Wright 2006, section 17.2),
which has a slope where a ranking has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evomerge.evaluation.scores import Array

UtilityKind = Literal["floors", "mean", "balanced"]

BEND = 0.1
"""c in u(s): scores well above it count by their logarithm, scores well below it in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Scores below which tasks should not fall. levels: (tasks,), -inf for none. price: of a unit short."""

    levels: Array
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """The value of normalised scores. shares: (tasks,), they sum to 1."""

    shares: Array
    concave: bool = False
    floors: tuple[Floor, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether it is the mean, whatever the scores."""
        return not self.concave and not self.floors

    def above(self, levels: Array, price: float) -> Utility:
        """Return this utility with a floor; without levels, the same."""
        if not np.isfinite(levels).any():
            return self
        return replace(self, floors=(*self.floors, Floor(levels=levels, price=price)))

    def __call__(self, scores: Array) -> tuple[Array, Array]:
        """Return (tasks,) what each task adds, and (tasks,) its slope."""
        values, slopes = (self.shares * part for part in (_bent(scores) if self.concave else _flat(scores)))
        for floor in self.floors:
            short = scores < floor.levels
            values = values - np.where(short, floor.price * (floor.levels - scores), 0.0)
            slopes = slopes + np.where(short, floor.price, 0.0)
        return values, slopes


def levels_of(tasks: Sequence[str], limits: Mapping[str, float]) -> Array:
    """Return (tasks,) the limits of some tasks, -inf for those without."""
    return np.array([limits.get(task, -np.inf) for task in tasks])


def _flat(scores: Array) -> tuple[Array, Array]:
    return scores, np.ones_like(scores)


def _bent(scores: Array) -> tuple[Array, Array]:
    unit = np.log1p(1.0 / BEND)
    up = np.maximum(scores, 0.0)
    slope = 1.0 / (BEND + up) / unit
    return np.where(scores < 0.0, scores / BEND / unit, np.log1p(up / BEND) / unit), slope
