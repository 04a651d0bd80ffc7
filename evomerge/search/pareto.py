"""Pareto fronts: non-dominated candidates, hypervolume, representatives, and the knee.

Losses have shape (n, objectives), lower is better. A point dominates another if it is nowhere worse and
somewhere better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.merging.recipe import Recipe
from evomerge.search.selection import Candidate

Losses = NDArray[np.float64]


def front(losses: Losses) -> list[int]:
    """Return the rows that no other row dominates, in order; of equal rows the first.

    Args:
        losses: Shape (n, objectives), lower is better.

    >>> front(np.array([[0.0, 2.0], [1.0, 1.0], [1.0, 2.0], [2.0, 0.0], [1.0, 1.0]]))
    [0, 1, 3]
    """
    kept: list[int] = []
    for row in range(len(losses)):
        others = losses[:row]
        dominated = (losses <= losses[row]).all(axis=1) & (losses < losses[row]).any(axis=1)
        if not dominated.any() and not (others == losses[row]).all(axis=1).any():
            kept.append(row)
    return kept


def hypervolume(losses: Losses, reference: Losses) -> float:
    """Return the volume between a set of points and the reference point that the points dominate.

    Exact for any number of objectives (Zitzler and Thiele 1999; moocore's implementation). Points that
    are not better than the reference everywhere add nothing.

    Args:
        losses: Shape (n, objectives), lower is better.
        reference: Shape (objectives,), the corner up to which volume counts.

    Returns:
        The volume, in the product of the objectives' units; 0 without points.

    >>> hypervolume(np.array([[0.0, 0.5], [0.5, 0.0], [2.0, 2.0]]), np.array([1.0, 1.0]))
    0.75
    """
    import moocore

    inside = losses[(losses < reference).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


def knee(losses: Losses) -> int:
    """Return the row of the best compromise: nearest to the ideal point, each objective scaled to [0, 1].

    The ideal is the best of each objective on the front, the unit the distance to the worst there
    (compromise programming, Zeleny 1973). Unlike the largest bulge beyond the line through the extremes
    (Das 1999) it is a compromise on fronts of any shape.

    >>> knee(np.array([[0.0, 1.0], [0.2, 0.2], [1.0, 0.0], [0.9, 0.9]]))
    1
    """
    rows = front(losses)
    return rows[int(np.argmin(np.linalg.norm(_scaled(losses[rows]), axis=1)))]


def spread(losses: Losses, count: int) -> list[int]:
    """Return at most `count` rows of the front that stand for all of it, in order of choice.

    The knee, the best of each objective, then always the one farthest from those chosen (Gonzalez
    1985), distances in objectives scaled to [0, 1].
    """
    rows = front(losses)
    scaled = _scaled(losses[rows])
    chosen: list[int] = []
    for first in (rows.index(knee(losses)), *(int(i) for i in np.argmin(scaled, axis=0))):
        if first not in chosen:
            chosen.append(first)
    while len(chosen) < min(count, len(rows)):
        gaps = np.linalg.norm(scaled[:, None] - scaled[chosen], axis=2).min(axis=1)
        chosen.append(int(np.argmax(gaps)))
    return [rows[i] for i in chosen[:count]]


def heaviest(values: Sequence[Mapping[str, float]], weights: Mapping[str, float]) -> int:
    """Return the row whose weighted sum of values (higher is better) is largest; the first of equals."""
    sums = [sum(weight * row[name] for name, weight in weights.items()) for row in values]
    return int(np.argmax(sums))


def _scaled(losses: Losses) -> Losses:
    low, width = losses.min(axis=0), np.ptp(losses, axis=0)
    scaled: Losses = (losses - low) / np.where(width > 0, width, 1.0)
    return scaled


class Archive:
    """The front of all candidates of a run so far.

    reference: (objectives,) up to where hypervolume counts.
    """

    def __init__(self, reference: Losses) -> None:
        self.reference = reference
        self.members: list[Candidate] = []
        self._losses = np.empty((0, len(reference)))

    def add(self, candidates: Sequence[Candidate], losses: Losses) -> None:
        """Take in candidates with their losses, shape (n, objectives); a known recipe changes nothing."""
        members, every = [*self.members, *candidates], np.concatenate([self._losses, losses])
        rows = front(every)
        self.members, self._losses = [members[i] for i in rows], every[rows]

    @property
    def hypervolume(self) -> float:
        """The hypervolume of the front."""
        return hypervolume(self._losses, self.reference)

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes of the front, in the order of the first objective's loss."""
        order = np.argsort(self._losses[:, 0], kind="stable")
        return [self.members[i].recipe for i in order]

    def finalists(self, count: int) -> list[Candidate]:
        """Return candidates that stand for the front, the knee first."""
        return [self.members[i] for i in spread(self._losses, count)] if self.members else []
