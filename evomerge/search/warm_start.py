"""Warm start: begin the search from recipes that are already good, and from gradients.

Gradients: one backward pass of a smooth loss gives its derivative with respect to all continuous parameters
of a recipe at once (see `evomerge.merging.tensors.derivatives`); the derivative of `decode` carries it to the
coordinates of the genome, and Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1) follows it inside the
unit cube:

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = clip(u - rate_t m' / sqrt(v'), 0, 1)

with m', v' corrected for their start at 0, and a rate that falls to 0 along half a cosine. Steps take a
seeded draw of the search items. Discrete coordinates stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evomerge.evaluation.scores import Failure
from evomerge.evaluation.smooth_loss import PASSES, Gradient, SmoothLoss
from evomerge.merging import methods
from evomerge.merging.recipe import Recipe
from evomerge.schema import Strict
from evomerge.search.ports import GradientSource, Named
from evomerge.search.spaces.space import Genome, Space

FIRST, SECOND = 0.9, 0.99
"""Adam's decay rates b1 and b2; the second shorter than its usual 0.999, for the steps are few."""
STEP = 1e-3
"""Half the distance between the two points of a central difference of `decode`."""
LINEAR = 1e-4
"""Relative error up to which a Jacobian that predicts the parameters elsewhere is used there, too."""
AVERAGED = 0.25
"""Share of the last iterates that are averaged."""


class GradientSpec(Strict):
    """The `gradients` part of a warm start: Adam on the continuous parameters, before the search.

    A step costs as much as scoring three times its items, which counts towards `budget.evaluations`: the
    default costs as much as 39 candidates.
    """

    steps: int = Field(default=64, ge=1, le=100_000)
    """Steps of Adam."""
    rate: float = Field(default=0.05, gt=0, le=1)
    """First step size, in the unit cube."""
    share: float = Field(default=0.2, gt=0, le=1)
    """Share of each task's `search` items in a step, drawn anew for each step."""
    softness: float = Field(default=0.5, gt=0, le=1000)
    """Width, in nats, of the zone around the border between wrong and right in which an item has a
    gradient."""


class WarmStartSpec(Strict):
    """The `warm_start` part of a run config: what is scored beside the baselines and may seed the search."""

    run: str | None = None
    """The folder of another run on models with the same names, finished or not. Its winner and best
    candidates are taken where the space can express them."""
    recipes: tuple[str, ...] = ()
    """recipe.yaml or mergekit YAML files over this run's models. A recipe that the space can't express is
    scored and may win, but does not seed the search."""
    gradients: GradientSpec | Literal["off"] = "off"
    """Gradient steps from the best known point before the search. `on` takes the defaults below."""

    @field_validator("gradients", mode="before")
    @classmethod
    def _switched(cls, value: object) -> object:
        """YAML reads `on` and `off` as true and false."""
        return {"True": {}, "False": "off", "on": {}}.get(str(value), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """What a search starts from besides its baselines. gradients: None where none are followed."""

    recipes: tuple[Named, ...] = ()
    gradients: GradientSpec | None = None


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
) -> Descent:
    """Follow the gradient from a genome with Adam.

    A step that fails (for example with non-finite weights) ends the descent at the last good point.

    Args:
        space: Maps genomes to recipes; discrete coordinates stay as they are.
        start: Shape (dimension,), values in [0, 1].
        spec: Number of steps, rate and share of items per step.
        loss_of: Returns the loss of a step, numbered from 0.
        slopes: Computes gradients with respect to a recipe's parameters.

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
        gradient = slopes.gradient(recipe, loss, step=step, steps=spec.steps)
        items += PASSES * loss.items
        if isinstance(gradient, Failure):
            return Descent(last=good, mean=good, items=items, losses=tuple(losses), failure=gradient)
        good = u
        losses.append(gradient.loss)
        slope = chain.carried(u, recipe, gradient)
        first = FIRST * first + (1 - FIRST) * slope
        second = SECOND * second + (1 - SECOND) * slope**2
        mean, square = first / (1 - FIRST ** (step + 1)), second / (1 - SECOND ** (step + 1))
        rate = spec.rate * (1 + np.cos(np.pi * step / spec.steps)) / 2
        u = np.clip(u - rate * mean / (np.sqrt(square) + 1e-12), 0.0, 1.0)
        path.append(u)
    last = path[-max(1, round(AVERAGED * len(path))) :]
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


def distinct(named: Sequence[Named]) -> list[Named]:
    """Return the entries without those whose recipe an earlier one has."""
    by_hash: dict[str, Named] = {}
    for entry in named:
        by_hash.setdefault(entry.recipe.hash, entry)
    return list(by_hash.values())
