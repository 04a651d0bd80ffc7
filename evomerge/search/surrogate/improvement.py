"""Hypervolume that candidates would add to a front, in draws from what the surrogate believes of them.

`FrontLoss` turns tasks' values into the objectives' losses; `most_improving` picks the candidates whose draws
together cover most of what the front leaves open: expected hypervolume improvement of a batch (Daulton et al.
2020, arXiv:2006.05078), greedily, with volume counted on points. That takes any number of objectives, and a
candidate already picked counts as scored, draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Array
from evomerge.search.objective import INFEASIBLE, SHORT, ObjectiveSpec
from evomerge.search.utility import levels_of

POINTS = 2048
"""Points on which volume is counted."""
FAR = 0.02
"""Share of the draws, the best of each objective, that may lie beyond the box of these points."""


class FrontLoss:
    """The losses of several objectives, from tasks' values.

    tasks: the skills that an objective or a limit needs, then those of retention and of coherence.
    """

    def __init__(self, normaliser: Normaliser, spec: ObjectiveSpec) -> None:
        limits = spec.constraints
        limited = limits.tasks if isinstance(limits.tasks, Mapping) else {}
        named = {t for each in spec.several for t in ([each] if isinstance(each, str) else each)}
        needed = {*named, *limited, *normaliser.counted}
        skills = [scale for scale in normaliser.scales if scale.task in needed]
        kept, coherent = normaliser.retained, normaliser.coherent
        self.tasks = tuple(s.task for s in (*skills, *kept, *coherent))
        self.objectives = spec.names
        self._spec, self._skills = spec, [s.task for s in skills]
        self._zero = np.array([s.zero for s in skills])
        self._headroom = np.array([s.headroom for s in skills])
        self._kept_shares = np.array([k.share for k in kept])
        self._kept_base = np.array([k.zero for k in kept])
        self._coherence = np.array([c.share / c.zero for c in coherent])
        self._coherent_shares = np.array([c.share for c in coherent])
        self._mean = levels_of(self._skills, dict(zip(normaliser.counted, normaliser.shares, strict=True)))
        self._mean = np.where(np.isfinite(self._mean), self._mean, 0.0)
        self._weakest = np.flatnonzero([task in normaliser.weakest for task in self._skills])
        if not isinstance(limits.tasks, Mapping) and limits.tasks is not None:
            limited = dict.fromkeys(normaliser.counted, limits.tasks)
        self._limits = levels_of(
            self._skills, {t: least for t, least in limited.items() if t not in normaliser.duds}
        )

    def __call__(self, values: Array, depths: Array | float = 0.0) -> Array:
        """Return (..., objectives) the losses of values (..., tasks), limits as in `Objective.losses`.

        depths: (...) of the recipes, see `Objective.depth`.
        """
        flat = values.reshape(-1, values.shape[-1])
        points = self.slopes(flat)[0].reshape(*values.shape[:-1], -1)
        if "depth" in self.objectives:
            points[..., self.objectives.index("depth")] = depths
        if not self._spec.constraints:
            return points
        over = np.maximum(points, 0.0)
        short = self._short(flat)[0].reshape(values.shape[:-1])[..., None]
        return np.where(short > 0, INFEASIBLE + short, np.where(points > 0, over / (1 + over), points))

    def slopes(self, values: Array) -> tuple[Array, Array]:
        """Return (n, objectives) losses of values (n, tasks) without limits, and their (n, objectives, tasks)
        slopes."""
        count, skills = len(values), len(self._skills)
        scores = (values[:, :skills] - self._zero) / self._headroom
        kept, kept_slopes = self._retention(values)
        coherent, coherent_slopes = self._coherent(values)
        points = np.zeros((count, len(self.objectives)))
        slopes = np.zeros((count, len(self.objectives), len(self.tasks)))
        rows = np.arange(count)
        for at, each in enumerate(self._spec.several):
            if each == "worst":
                weakest = self._weakest[np.argmin(scores[:, self._weakest], axis=1)]
                points[:, at] = -scores[rows, weakest]
                slopes[rows, at, weakest] = -1.0 / self._headroom[weakest]
            elif each in ("retention", "coherence"):
                value, slope = (kept, kept_slopes) if each == "retention" else (coherent, coherent_slopes)
                points[:, at] = np.maximum(0.0, 1.0 - value)
                slopes[:, at] = np.where(value[:, None] < 1.0, -slope, 0.0)
            elif each != "depth":
                weights = self._weights(each)
                points[:, at] = -scores @ weights
                slopes[:, at, :skills] = -weights / self._headroom
        return points, slopes

    def scalar(self, weights: Array, ideal: Array, reference: Array) -> ScalarLoss:
        """Return one loss: the objectives' largest weighted distance from the ideal point."""
        return ScalarLoss(self, weights / np.maximum(reference - ideal, 1e-9), ideal)

    def _weights(self, objective: str | Mapping[str, float]) -> Array:
        if objective == "mean":
            return self._mean
        group = {objective: 1.0} if isinstance(objective, str) else objective
        total = sum(group.values())
        return np.array([group.get(task, 0.0) / total for task in self._skills])

    def _retention(self, values: Array) -> tuple[Array, Array]:
        """Return (n,) the retention, and its (n, tasks) slopes."""
        start, stop = len(self._skills), len(self._skills) + len(self._kept_shares)
        gained = values[:, start:stop] - self._kept_base
        ratios = self._kept_shares * np.exp(np.minimum(gained, 0.0))
        slopes = np.zeros_like(values)
        slopes[:, start:stop] = np.where(gained < 0.0, ratios, 0.0)
        return ratios.sum(axis=1), slopes

    def _coherent(self, values: Array) -> tuple[Array, Array]:
        """Return (n,) the coherence, and its (n, tasks) slopes."""
        start = len(self._skills) + len(self._kept_shares)
        slopes = np.zeros_like(values)
        parts = np.minimum(values[:, start:] * self._coherence, self._coherent_shares)
        slopes[:, start:] = np.where(parts < self._coherent_shares, self._coherence, 0.0)
        return parts.sum(axis=1), slopes

    def _short(self, values: Array) -> tuple[Array, Array]:
        """Return (n,) the sum of what values (n, tasks) are short of limits, and its (n, tasks) slopes."""
        skills = len(self._skills)
        scores = (values[:, :skills] - self._zero) / self._headroom
        missing = np.maximum(self._limits - scores, 0.0)
        short, slopes = missing.sum(axis=1), np.zeros_like(values)
        slopes[:, :skills] = np.where(missing > 0, -1.0 / self._headroom, 0.0)
        limits = self._spec.constraints
        for least, (kept, change) in (
            (limits.retention, self._retention(values)),
            (limits.coherence, self._coherent(values)),
        ):
            if least is not None:
                short = short + np.maximum(least - kept, 0.0)
                slopes -= np.where(kept[:, None] < least, change, 0.0)
        return short, slopes


class ScalarLoss:
    """The largest weighted distance from an ideal point, smoothly (augmented Chebyshev), and its slope.

    scales: (objectives,) weights per unit of each loss. Limits have a price.
    """

    SHARP, SUM = 20.0, 0.05

    def __init__(self, losses: FrontLoss, scales: Array, ideal: Array) -> None:
        self._losses, self._scales, self._ideal = losses, scales, ideal

    def __call__(self, values: Array) -> tuple[float, Array]:
        """Return the loss of values (tasks,) and its slope (tasks,)."""
        points, slopes = self._losses.slopes(values[None])
        value, by_point = self._of(points)
        slope = by_point[0] @ slopes[0]
        short, short_slopes = self._losses._short(values[None])
        return float(value[0] + SHORT * short[0]), slope + SHORT * short_slopes[0]

    def of_losses(self, losses: Array) -> Array:
        """Return (n,) the loss of candidates with losses (n, objectives)."""
        return self._of(losses)[0]

    def _of(self, points: Array) -> tuple[Array, Array]:
        distances = self._scales * (points - self._ideal)
        top = distances.max(axis=1, keepdims=True)
        parts = np.exp(self.SHARP * (distances - top))
        total = parts.sum(axis=1, keepdims=True)
        value = top[:, 0] + np.log(total[:, 0]) / self.SHARP + self.SUM * distances.sum(axis=1)
        return value, self._scales * (parts / total + self.SUM)


def undominated(losses: Array) -> NDArray[np.bool_]:
    """Return which rows of losses (n, objectives) no other row dominates; equal rows all stay."""
    better = np.asarray((losses[None] < losses[:, None]).any(axis=2))
    worse = np.asarray((losses[None] <= losses[:, None]).all(axis=2)) & better
    return np.asarray(~worse.any(axis=1), dtype=np.bool_)


def most_improving(draws: Array, front: Array, reference: Array, count: int) -> tuple[list[int], float]:
    """Return the candidates that together are expected to add most hypervolume, and how much.

    Args:
        draws: (draws, candidates, objectives) losses of each candidate, jointly drawn.
        front: (n, objectives) losses already reached.
        reference: (objectives,) the corner up to which volume counts.
        count: how many to pick. Of those that add nothing more, the lower sum of losses comes first.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    corner = np.minimum(np.quantile(flat, FAR, axis=0), reference)
    if len(front):
        corner = np.minimum(corner, front.min(axis=0))
    width = reference - corner
    points = corner + width * scipy.stats.qmc.Sobol(len(reference), seed=0).random(POINTS)
    if len(front):
        points = points[~(front[:, None] <= points).all(axis=2).any(axis=0)]
    hits = np.ones((*draws.shape[:2], len(points)), dtype=bool)
    for at in range(draws.shape[2]):
        hits &= draws[:, :, None, at] <= points[:, at]
    sums = draws.mean(axis=0).sum(axis=1)
    chosen: list[int] = []
    total = 0
    for _ in range(min(count, draws.shape[1])):
        gains = hits.sum(axis=(0, 2))
        left = [i for i in range(draws.shape[1]) if i not in chosen]
        best = max(left, key=lambda i: (int(gains[i]), -float(sums[i])))
        total += int(gains[best])
        chosen.append(best)
        if gains[best]:
            hits &= ~hits[:, best : best + 1].copy()
    return chosen, float(np.prod(width)) * total / (POINTS * len(draws))


def volume(front: Array, reference: Array) -> float:
    """Return the hypervolume of a front, exactly in two objectives, else counted on points."""
    inside = front[(front < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    corner = inside.min(axis=0)
    if inside.shape[1] == 2:
        order = inside[np.argsort(inside[:, 0], kind="stable")]
        lows = np.minimum.accumulate(order[:, 1])
        heights = np.concatenate([[reference[1]], lows[:-1]]) - lows
        return float(((reference[0] - order[:, 0]) * heights).sum())
    points = corner + (reference - corner) * scipy.stats.qmc.Sobol(len(reference), seed=0).random(POINTS)
    share = (inside[:, None] <= points).all(axis=2).any(axis=0).mean()
    return float(share * np.prod(reference - corner))


def spread_out(losses: Array, reference: Array, count: int) -> list[int]:
    """Return at most `count` undominated rows that together cover most hypervolume, the largest part first.

    losses: (n, objectives).
    """
    rows = [int(row) for row in np.flatnonzero(undominated(losses))]
    chosen, _ = most_improving(losses[None, rows], losses[:0], reference, count)
    return [rows[i] for i in chosen]
