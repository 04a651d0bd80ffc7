"""Cuts a model into the tensor groups of a search space: runs of layers, by module filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import OUTSIDE, TensorGroup
from evomerge.search.spaces.preset import SpaceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One group of tensors.

    run: what its layers are called. module: the name of its filter; `alone` where there is no other.
    layers, match: as of a TensorGroup. tensors: the names of its tensors, at least one.
    """

    run: str
    module: str
    alone: bool
    layers: tuple[int, ...]
    match: tuple[str, ...]
    tensors: tuple[str, ...]


def cut(spec: SpaceSpec, tensors: Sequence[str]) -> tuple[Region, ...]:
    """Return the groups that hold tensors, layers first; raise ConfigError where some are in none."""
    where = f"search space {spec.name}"
    layers = sorted({layer for t in tensors if (layer := layer_of(t)) is not None})
    left = set(tensors)
    places = []
    for run in (*_runs(spec, layers, where), OUTSIDE):
        filters = spec.modules if run else spec.outside
        label = _probe(run).label()
        for module, match in filters.items():
            group = _probe(run, match)
            mine = tuple(t for t in tensors if t in left and group.matches(t))
            left.difference_update(mine)
            if mine:
                places.append(
                    Region(
                        run=label,
                        module=module,
                        alone=len(filters) == 1,
                        layers=run,
                        match=match,
                        tensors=mine,
                    )
                )
    if left:
        raise ConfigError(
            f"{where}: no group holds {min(left)!r}", fix="end `modules` and `outside` with an empty filter"
        )
    return tuple(places)


def _probe(run: tuple[int, ...], match: tuple[str, ...] = ()) -> TensorGroup:
    return TensorGroup(method="linear", sources=("any",), layers=run, match=match)


def _runs(spec: SpaceSpec, layers: Sequence[int], where: str) -> list[tuple[int, ...]]:
    if isinstance(spec.layers, tuple):
        runs = [tuple(range(first, last + 1)) for first, last in spec.layers]
        listed, there = {n for run in runs for n in run}, set(layers)
        for layer in sorted(listed ^ there)[:1]:
            there_is = f"layers {layers[0]} to {layers[-1]}" if layers else "none"
            raise ConfigError(
                f"{where}: layer {layer} is "
                + ("in no range of `layers`" if layer in there else "no layer of the model"),
                expected=f"ranges that hold every layer of the model: {there_is}",
                fix="change the ranges, or write a number of layers, which suits any model",
            )
        return runs
    size = len(layers) if spec.layers == "all" else spec.layers
    return [tuple(layers[i : i + size]) for i in range(0, len(layers), max(size, 1))]
