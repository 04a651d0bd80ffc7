"""Gradient descent on the genome, before the search.

One backward pass of a smooth loss gives its derivative with respect to all continuous parameters of a recipe
at once (see `evomerge.merging.tensors.derivatives`); the derivative of `decode` carries it to the coordinates
of the genome, and Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1) follows it inside the unit cube:

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = clip(u - rate_t m' / sqrt(v'), 0, 1)

with m', v' corrected for their start at 0, and a rate that falls to 0 along half a cosine. Steps take a
seeded draw of the search items. Discrete coordinates stay as they are.

The objective may be no mean over items: below a floor a task counts more, and in `balanced` a weak one does.
So a step takes the objective's slope at the scores that the last steps had, see `StepLosses`. With floors the
first half of the steps follows `balanced`, from which the rest passes over to the floors: a floor alone acts
only when a skill is below it, and then a skill that is nearly lost has no slope left to come back by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import scipy.special
from numpy.typing import NDArray

from evomerge.evaluation.scores import Array, Failure, Scores
from evomerge.evaluation.smooth_loss import PASSES, Gradient, SmoothLoss, smooth_loss
from evomerge.merging import methods
from evomerge.merging.recipe import Recipe
from evomerge.search.objective import FLOOR, SHORT, Objective
from evomerge.search.ports import GradientSource, OutOfTime
from evomerge.search.spaces.space import Genome, Space
from evomerge.search.warm_start import GradientSpec

FIRST, SECOND = 0.9, 0.99
"""Adam's decay rates b1 and b2; the second shorter than its usual 0.999, for the steps are few."""
STEP = 1e-3
"""Half the distance between the two points of a central difference of `decode`."""
LINEAR = 1e-4
"""Relative error up to which a Jacobian that predicts the parameters elsewhere is used there, too."""
AVERAGED = 0.25
"""Share of the last iterates that are averaged."""
KEPT = 0.75
"""Share of the earlier steps in the running mean of the tasks' scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Where gradients led: the last point, the mean of the last ones, and the items that it cost.

    losses: of the steps, each on its own items. failure: what ended it before its time, if anything.
    """

    last: Genome
    mean: Genome
    items: int
    losses: tuple[float, ...]
    failure: Failure | None = None


def descend(
    space: Space,
    start: Genome,
    spec: GradientSpec,
    loss_of: Callable[[int], SmoothLoss],
    slopes: GradientSource,
    learn: Callable[[SmoothLoss, Gradient], None] = lambda loss, gradient: None,
) -> Descent:
    """Follow the gradient from a genome with Adam.

    A step that fails (for example with non-finite weights), or that there is no time for, ends the descent at
    the last good point.

    Args:
        space: Maps genomes to recipes; discrete coordinates stay as they are.
        start: Shape (dimension,), values in [0, 1].
        spec: Number of steps, rate and share of items per step.
        loss_of: Returns the loss of a step, numbered from 0.
        slopes: Computes gradients with respect to a recipe's parameters.
        learn: Receives what each step found, before the loss of the next one is asked for.

    Returns:
        The last point, the mean of the last ones, the losses, and the cost in items.
    """
    chain = Chain(space)
    u = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(u), np.zeros_like(u)
    good, items = u, 0
    path: list[Genome] = []
    losses: list[float] = []
    for step in range(spec.steps):
        loss, recipe = loss_of(step), space.decode(u)
        try:
            gradient = slopes.gradient(recipe, loss, step=step, steps=spec.steps)
        except OutOfTime:
            break
        items += PASSES * loss.items
        if isinstance(gradient, Failure):
            return Descent(last=good, mean=good, items=items, losses=tuple(losses), failure=gradient)
        good = u
        losses.append(gradient.loss)
        learn(loss, gradient)
        slope = chain.carried(u, recipe, gradient)
        first = FIRST * first + (1 - FIRST) * slope
        second = SECOND * second + (1 - SECOND) * slope**2
        mean, square = first / (1 - FIRST ** (step + 1)), second / (1 - SECOND ** (step + 1))
        rate = spec.rate * (1 + np.cos(np.pi * step / spec.steps)) / 2
        u = np.clip(u - rate * mean / (np.sqrt(square) + 1e-12), 0.0, 1.0)
        path.append(u)
    last = path[-max(1, round(AVERAGED * len(path))) :] or [u]
    return Descent(last=u, mean=np.mean(last, axis=0), items=items, losses=tuple(losses))


class Chain:
    """Carries derivatives by a recipe's parameters to the coordinates of the genome it was decoded from.

    The Jacobian of `decode` is found by central differences, which are exact where a gene is linear; it
    is used again as long as it predicts the parameters of the next genome.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._jacobian: NDArray[np.float64] | None = None
        self._at = self._values = np.zeros(0)

    def carried(self, genome: Genome, recipe: Recipe, gradient: Gradient) -> NDArray[np.float64]:
        """Return (dimension,) derivatives by the coordinates; 0 for discrete ones."""
        values = parameters(recipe)
        if self._jacobian is None or not self._predicts(genome, values):
            self._jacobian, self._at, self._values = self._differences(genome, len(values)), genome, values
        slopes: list[float] = []
        for group, found in zip(recipe.groups, gradient.groups, strict=True):
            for name in real(group.method):
                size = np.size(group.parameters[name])
                slopes += found.get(name, (0.0,) * size)
        return np.asarray((self._jacobian * slopes).sum(axis=1), dtype=np.float64)

    def _predicts(self, genome: Genome, values: NDArray[np.float64]) -> bool:
        assert self._jacobian is not None
        if len(values) != len(self._values):
            return False
        guess = self._values + ((genome - self._at)[:, None] * self._jacobian).sum(axis=0)
        return bool((np.abs(guess - values) <= LINEAR * (1.0 + np.abs(values))).all())

    def _differences(self, genome: Genome, count: int) -> NDArray[np.float64]:
        """Return (dimension, parameters) the Jacobian at a genome; 0 where the layout of groups changes."""
        jacobian = np.zeros((len(genome), count))
        for i, coordinate in enumerate(self._space.coordinates):
            if coordinate.levels is not None:
                continue
            low, high = genome.copy(), genome.copy()
            low[i], high[i] = max(genome[i] - STEP, 0.0), min(genome[i] + STEP, 1.0)
            below, above = (parameters(self._space.decode(u)) for u in (low, high))
            if len(below) == len(above) == count:
                jacobian[i] = (above - below) / (high[i] - low[i])
        return jacobian


def real(method: str) -> tuple[str, ...]:
    """Return the names of a method's real-valued parameters, in declared order."""
    declared = methods.get(method).parameters
    return tuple(name for name, parameter in declared.items() if parameter.kind == "real")


def parameters(recipe: Recipe) -> NDArray[np.float64]:
    """Return all real-valued parameters of a recipe: by group, by name, by source."""
    values = [np.ravel(group.parameters[name]) for group in recipe.groups for name in real(group.method)]
    return np.concatenate(values).astype(np.float64) if values else np.zeros(0)


class StepLosses:
    """The losses of a descent's steps: the slope of an objective at the scores of the steps before.

    A task's score is the mean of sigmoid(margin / softness), normalised by base and headroom. A step sees a
    draw of the items only, so it is compared with the start's scores on the same items, and a running mean
    of the differences is added to the start's score on all items.

    objective: on all `search` items. base, start: scores of the base and of the first point, on all items.
    price: the loss per unit of lost retention. least: the least retention that constraints allow. taught:
    tasks whose items count by the agreement with their specialist. How far it moved since the first step is
    added to the start's exact score, because the agreement of the start is no score that the run has.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        base: Scores,
        start: Scores,
        spec: GradientSpec,
        price: float,
        least: float | None = None,
        seeds: list[np.random.SeedSequence],
        taught: Collection[str] = (),
    ) -> None:
        normaliser = objective.normaliser
        self._normaliser, self._base, self._price = normaliser, base, price
        self._spec, self._seeds, self._taught = spec, seeds, taught
        self._agreed: dict[str, float] = {}
        self._limit = None if least is None else (least, SHORT)
        self._tasks = normaliser.counted
        self._headroom = np.array([skill.headroom for skill in normaliser.skills])
        # A whole agreement counts like a whole headroom: the specialist has both.
        self._units = np.where([task in taught for task in self._tasks], 1.0, self._headroom)
        self._start = [self._soft(start, task) for task in self._tasks]
        zero = np.array([self._soft(base, task).mean() for task in self._tasks])
        self._first: Array = (np.array([values.mean() for values in self._start]) - zero) / self._headroom
        self._moved, self._weight = np.zeros(len(self._tasks)), 0.0
        self._utility = objective.utility
        if objective.standard is not None:
            reached = np.array([self._soft(objective.standard.scores, task).mean() for task in self._tasks])
            slack = np.array([objective.standard.slack[task] for task in self._tasks])
            self._utility = self._utility.above((reached - zero) / self._headroom - slack, FLOOR)

    @property
    def scores(self) -> Array:
        """The tasks' normalised scores by the last steps, (tasks,)."""
        if not self._weight:
            return self._first
        scores: Array = self._first + self._moved / self._weight
        return scores

    def __call__(self, step: int) -> SmoothLoss:
        """Return the loss of a step, numbered from 0."""
        scores = self.scores
        _, slopes = self._utility(scores)
        if self._utility.floors and not self._utility.concave:
            ahead = min(1.0, 2 * (1 - step / self._spec.steps))
            _, balanced = replace(self._utility, concave=True, floors=())(scores)
            slopes = ahead * balanced + (1 - ahead) * slopes
        return smooth_loss(
            self._normaliser,
            self._base,
            gains=dict(zip(self._tasks, (slopes / self._units).tolist(), strict=True)),
            price=self._price,
            softness=self._spec.softness,
            share=self._spec.share,
            rng=np.random.default_rng(self._seeds[step]),
            limit=self._limit,
            taught=self._taught,
        )

    def learn(self, loss: SmoothLoss, gradient: Gradient) -> None:
        """Take in the scores that a step found on its items."""
        drawn = {part.task: list(part.items) for part in loss.tasks}
        moved = np.zeros(len(self._tasks))
        for index, task in enumerate(self._tasks):
            if task not in gradient.values:
                continue
            value = gradient.values[task]
            if task in self._taught:
                moved[index] = value - self._agreed.setdefault(task, value)
            else:
                moved[index] = value - self._start[index][drawn[task]].mean()
        self._moved = KEPT * self._moved + (1 - KEPT) * moved / self._units
        self._weight = KEPT * self._weight + (1 - KEPT)

    def _soft(self, scores: Scores, task: str) -> Array:
        """Return (items,) how right each answer is; the metric where answers have no likelihood."""
        found = scores[task]
        if found.margin is None:
            return found.metric
        return _sigmoid(found.margin / self._spec.softness)


def _sigmoid(x: Array) -> Array:
    y: Array = scipy.special.expit(x)
    return y
