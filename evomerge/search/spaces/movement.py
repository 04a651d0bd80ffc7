"""How far each coordinate of a genome moves the merged model: what the surrogate measures distances by.

A step of a gene moves the model by the step times the length of the task vector that the gene scales, in
the tensors of its group: a weight of attention in a layer that a fine-tune hardly changed does next to
nothing. With many genes most are of that kind, and distances that count all genes alike are mostly noise. So
coordinates are stretched by the square root of what they move, on average by 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search.spaces.space import Coordinate, Genome, Space

Norms = Mapping[str, Mapping[str, float]]
"""Source -> tensor -> length of the task vector there."""

SCALING = ("weight", "lambda", "t")
"""Parameters that scale a task vector as a whole."""
CUTTING = 0.25
"""What a step of another parameter moves, relative to one of those: a density takes away small elements, a
part of the task vector's length, times its weight."""
DAMPED = 0.5
"""Power of the movements that distances count: 0 would count all genes alike, 1 proportionally. Between them
lies what explains scored items best, on every zoo looked at."""
STEP = 1e-3
"""Half the distance between the two points of a central difference of `decode`."""


def movements(space: Space, norms: Norms) -> tuple[float, ...] | None:
    """Return for every coordinate how far it moves the model, damped; None where none moves anything.

    The root mean square of the continuous coordinates is 1; choices and whole numbers have 1. Layer paths
    move no weights.
    """
    continuous = np.array([c.levels is None for c in space.coordinates])
    if not continuous.any() or space.decode(_centre(space.coordinates, 0)).stacked:
        return None
    most = max((c.levels for c in space.coordinates if c.levels is not None), default=1)
    found = np.zeros(space.dimension)
    for level in range(most):
        found = np.maximum(found, _moved(space, _centre(space.coordinates, level), norms, continuous))
    found = found**DAMPED
    size = float(np.sqrt((found[continuous] ** 2).mean()))
    if size == 0:
        return None
    scaled = np.where(continuous, found / size, 1.0)
    return tuple(float(f"{value:.6g}") for value in scaled)


def stretched(coordinates: Sequence[Coordinate], moved: Sequence[float] | None) -> tuple[Coordinate, ...]:
    """Return coordinates with the lengths that distances between genomes count them by."""
    if moved is None:
        return tuple(coordinates)
    return tuple(replace(c, length=length) for c, length in zip(coordinates, moved, strict=True))


def _centre(coordinates: Sequence[Coordinate], level: int) -> Genome:
    """The middle of the space, every choice at a level, or at its last."""
    return np.array([0.5 if c.levels is None else c.middle(min(level, c.levels - 1)) for c in coordinates])


def _moved(space: Space, centre: Genome, norms: Norms, continuous: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (dimension,) the model's movement per unit of each coordinate, at a genome."""
    lengths = _lengths(space.decode(centre), norms)
    found = np.zeros(len(centre))
    for i in np.flatnonzero(continuous):
        low, high = centre.copy(), centre.copy()
        low[i], high[i] = centre[i] - STEP, centre[i] + STEP
        change = _values(space.decode(high)) - _values(space.decode(low))
        found[i] = np.linalg.norm(change * lengths) / (2 * STEP)
    return found


def _values(recipe: Recipe) -> NDArray[np.float64]:
    """The real parameters of a recipe's groups, in order."""
    values = [np.ravel(group.parameters[name]) for group in recipe.groups for name in _real(group)]
    return np.concatenate([np.zeros(0), *values]).astype(np.float64)


def _lengths(recipe: Recipe, norms: Norms) -> NDArray[np.float64]:
    """What a unit of each of those moves, in the order of `_values`."""
    squares = {id(group): dict.fromkeys(group.sources, 0.0) for group in recipe.groups}
    for source, by_tensor in norms.items():
        for tensor, norm in by_tensor.items():
            try:
                own = squares[id(recipe.group_for(tensor))]
            except ConfigError:
                continue  # not part of the merged model
            if source in own:
                own[source] += norm**2
    return np.array(list(_each(recipe, squares)))


def _each(recipe: Recipe, squares: Mapping[int, Mapping[str, float]]) -> Iterator[float]:
    for group in recipe.groups:
        own = [squares[id(group)][source] for source in group.sources]
        for name in _real(group):
            share = 1.0 if name in SCALING else CUTTING
            parts = own if isinstance(group.parameters[name], tuple) else [sum(own)]
            yield from (share * part**0.5 for part in parts)


def _real(group: TensorGroup) -> tuple[str, ...]:
    declared = methods.get(group.method).parameters
    return tuple(name for name, parameter in declared.items() if parameter.kind == "real")
