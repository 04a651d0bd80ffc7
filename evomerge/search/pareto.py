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


def worth(losses: Losses, reference: Losses, units: Losses) -> Losses:
    """Return (n,) what each point gains on the reference point in the objective where it gains least.

    units: (objectives,) of the gains. Of equals the one that gains more on the whole is worth a little more.
    """
    gains = (reference - losses) / units
    return np.asarray(gains.min(axis=1) + 0.01 * gains.mean(axis=1))


def knee(losses: Losses, reference: Losses, units: Losses) -> int:
    """Return the row of the best compromise: whose least gain on the reference point is largest.

    The solution of Kalai and Smorodinsky (1975, Econometrica 43) of a bargain between the objectives, with
    units that no point of the front has a say in: its extremes don't move it. It is a compromise on fronts of
    any shape.

    >>> knee(np.array([[0.0, 0.9], [0.2, 0.2], [0.9, 0.0], [0.9, 0.9]]), np.ones(2), np.ones(2))
    1
    """
    return int(np.argmax(worth(losses, reference, units)))


def spread(losses: Losses, count: int, first: Sequence[int] = ()) -> list[int]:
    """Return at most `count` rows of the front that stand for all of it, in order of choice.

    Those named first, the best of each objective, then always the one farthest from those chosen (Gonzalez
    1985), distances in objectives scaled to [0, 1].
    """
    rows = front(losses)
    scaled = _scaled(losses[rows])
    chosen: list[int] = []
    for at in (*(rows.index(row) for row in first), *(int(i) for i in np.argmin(scaled, axis=0))):
        if at not in chosen:
            chosen.append(at)
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

    def clear(self) -> None:
        """Forget all candidates: those to come are measured on other items."""
        self.members, self._losses = [], self._losses[:0]

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

    def finalists(self, count: int, first: Sequence[int] = ()) -> list[Candidate]:
        """Return candidates that stand for the front, those at the places named first before others."""
        return [self.members[i] for i in spread(self._losses, count, first)] if self.members else []
