"""A SearchSpace: which parts of a merge may vary, as a box of genes in the unit cube.

A preset (YAML, in `search_spaces/`) names a merge method, cuts the model into tensor groups, and gives
some of the method's parameters a range. A genome is a vector `u` in [0, 1]^dim; `decode` turns it into
a Recipe and `encode` turns a Recipe that lies in the space back into its genome.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.methods import Parameter
from evomerge.merging.recipe import OUTSIDE, Recipe, Setting, TensorGroup, layer_of
from evomerge.schema import Strict
from evomerge.search.genes import Coordinate, Genome

Axis = Literal["source", "layers", "modules"]

DIGITS = 6
"""Significant decimal digits of a decoded value. Rounding makes recipes readable and `encode` an exact
inverse; a step of 1e-6 is far below what a 16-bit weight can show."""


class GeneSpec(Strict):
    """The range of one parameter, and along which axes it may differ.

    per: "source" (one value per source model), "layers" (per run of layers), "modules" (per module
    filter). Default: every axis the parameter and the space have.
    """

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    per: tuple[Axis, ...] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> GeneSpec:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} and high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"a log scale needs low > 0, got {self.low:g}")
        return self

    def value(self, u: float) -> float:
        """Map [0, 1] to [low, high]."""
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** u
        else:
            value = self.low + u * (self.high - self.low)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def unit(self, value: float) -> float:
        """Map [low, high] to [0, 1], the inverse of `value`."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class SpaceSpec(Strict):
    """A search-space preset as written.

    layers: how many successive layers share a group, or "all".
    modules, outside: names and tensor-name substrings that cut a run of layers, and the tensors outside
        all layers, into groups. The first filter that matches wins; an empty list matches the rest.
    """

    name: str
    about: str
    method: str
    layers: int | Literal["all"] = "all"
    modules: dict[str, tuple[str, ...]] = Field(default={"all": ()})
    outside: dict[str, tuple[str, ...]] = Field(default={"all": ()})
    genes: dict[str, GeneSpec]
    fixed: dict[str, float | int | bool] = Field(default={})

    @model_validator(mode="after")
    def _complete(self) -> SpaceSpec:
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers must be at least 1 or 'all', got {self.layers}")
        if not self.genes:
            raise ValueError("no genes: there is nothing to search")
        for where, filters in (("modules", self.modules), ("outside", self.outside)):
            if not filters or any(filters[name] == () for name in list(filters)[:-1]):
                raise ValueError(f"{where}: only the last filter may be empty, and there must be one")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Gene:
    """One coordinate of the genome."""

    name: str
    parameter: str
    spec: GeneSpec
    source: str | None
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One tensor group of the space, and for each parameter the positions of its genes."""

    group: TensorGroup
    tensors: tuple[str, ...]
    positions: Mapping[str, tuple[int, ...]]


class SearchSpace:
    """The search space of one run: a preset applied to the models at hand.

    tensors: names of the model's output tensors, so that empty groups get no genes.
    template: a recipe with the run's models, base, dtype, tokenizer and seed; its groups are replaced.
    Raises ConfigError where the preset and the method or the models do not fit.
    """

    def __init__(
        self, spec: SpaceSpec, *, template: Recipe, sources: Sequence[str], tensors: Sequence[str]
    ) -> None:
        self.spec = spec
        self.sources = tuple(sources)
        self._template = template
        self._genes: list[Gene] = []
        self._check_parameters()
        places: dict[tuple[str, str | None, str | None, str | None], int] = {}
        self._cells = tuple(
            self._cell(run, name, part, ts, places) for run, name, part, ts in self._cut(tensors)
        )
        self.decode(np.full(self.dimension, 0.5))  # the method's own checks: number of sources, base

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, in genome order."""
        return tuple(self._genes)

    @property
    def dimension(self) -> int:
        """Number of genes."""
        return len(self._genes)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """The kind of every coordinate: all continuous."""
        return (Coordinate(),) * self.dimension

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome, shape (dimension,), values in [0, 1]."""
        u = np.asarray(genome, dtype=np.float64)
        if u.shape != (self.dimension,) or not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"a genome of this space has shape ({self.dimension},) and values in [0, 1]")
        groups = tuple(
            TensorGroup(
                method=self.spec.method,
                sources=self.sources,
                parameters={**self.spec.fixed, **self._values(cell, u)},
                layers=cell.group.layers,
                match=cell.group.match,
            )
            for cell in self._cells
        )
        kept = self._template
        return Recipe(
            models=kept.models,
            groups=groups,
            base=kept.base,
            dtype=kept.dtype,
            tokenizer=kept.tokenizer,
            seed=kept.seed,
        )

    def encode(self, recipe: Recipe) -> Genome | None:
        """Return the genome of a recipe, or None where this space can't express it.

        The recipe may cut the model into groups differently; what counts is what each tensor gets.
        Sources it leaves out get weight 0.
        """
        if recipe.stacked or any(group.base is not None for group in recipe.groups):
            return None
        u = np.full(self.dimension, np.nan)
        for cell in self._cells:
            groups = {id(g): g for g in map(recipe.group_for, cell.tensors)}
            for group in groups.values():
                if not self._encode_group(cell, group, u):
                    return None
        assert not np.isnan(u).any()
        return u

    def describe(self) -> str:
        """Return one line for people: method, genes and groups."""
        parameters = ", ".join(self.spec.genes)
        return (
            f"{self.spec.name}: {self.dimension} genes ({parameters}) over {len(self._cells)} tensor "
            f"groups x {len(self.sources)} sources, method {self.spec.method}"
        )

    def _values(self, cell: _Cell, u: Genome) -> dict[str, Setting]:
        values: dict[str, Setting] = {}
        for parameter, positions in cell.positions.items():
            spec = self.spec.genes[parameter]
            decoded = tuple(spec.value(float(u[position])) for position in positions)
            values[parameter] = decoded if self._declared(parameter).per_source else decoded[0]
        return values

    def _encode_group(self, cell: _Cell, group: TensorGroup, u: Genome) -> bool:
        if group.method != self.spec.method or len(set(group.sources)) != len(group.sources):
            return False
        for name in methods.get(self.spec.method).parameters:
            given = self._in_our_order(group, name)
            if given is None:
                return False
            if name not in cell.positions:
                wanted = self._in_our_order(cell.group, name)
                if given != wanted:
                    return False
                continue
            spec = self.spec.genes[name]
            for position, value in zip(cell.positions[name], given, strict=True):
                if not spec.low <= value <= spec.high:
                    return False
                unit = min(max(spec.unit(value), 0.0), 1.0)
                if not (math.isnan(u[position]) or u[position] == unit):
                    return False
                u[position] = unit
        return True

    def _in_our_order(self, group: TensorGroup, name: str) -> tuple[float, ...] | None:
        """A parameter's values in the order of our sources; sources left out count as weight 0."""
        value = group.parameters[name]
        if not isinstance(value, tuple):
            return (float(value),)
        by_source = dict(zip(group.sources, value, strict=True))
        missing = [source for source in self.sources if source not in by_source]
        if not set(by_source) <= set(self.sources) or (missing and "weight" not in group.parameters):
            return None
        default = 0.0 if name == "weight" else float(self._declared(name).default)
        return tuple(float(by_source.get(source, default)) for source in self.sources)

    def _declared(self, parameter: str) -> Parameter:
        return methods.get(self.spec.method).parameter(parameter, f"search space {self.spec.name}")

    def _check_parameters(self) -> None:
        where = f"search space {self.spec.name}"
        for name, spec in self.spec.genes.items():
            declared = self._declared(name)
            if declared.kind != "real":
                raise ConfigError(
                    f"{where}: {name} is not a real number and can't be a gene", fix="move it to `fixed`"
                )
            declared.check(spec.low, f"{where}: genes.{name}.low")
            declared.check(spec.high, f"{where}: genes.{name}.high")
            if spec.per and "source" in spec.per and not declared.per_source:
                raise ConfigError(
                    f"{where}: {name} has one value for all sources", fix="leave `source` out of `per`"
                )
        for name, value in self.spec.fixed.items():
            self._declared(name).check(value, f"{where}: fixed")
            if name in self.spec.genes:
                raise ConfigError(f"{where}: {name} is both a gene and fixed", fix="keep one of them")

    def _cut(self, tensors: Sequence[str]) -> Iterator[tuple[str, str, TensorGroup, tuple[str, ...]]]:
        """Yield (run of layers, module name, empty group, its tensors), leaving out empty groups."""
        layers = sorted({layer for t in tensors if (layer := layer_of(t)) is not None})
        size = len(layers) if self.spec.layers == "all" else self.spec.layers
        runs = [tuple(layers[i : i + size]) for i in range(0, len(layers), max(size, 1))]
        left = set(tensors)
        for run in (*runs, OUTSIDE):
            for name, match in (self.spec.modules if run else self.spec.outside).items():
                group = TensorGroup(
                    method=self.spec.method,
                    sources=self.sources,
                    parameters=self.spec.fixed,
                    layers=run,
                    match=match,
                )
                mine = tuple(t for t in tensors if t in left and group.matches(t))
                left.difference_update(mine)
                if mine:
                    yield TensorGroup.label(replace(group, match=())), name, group, mine
        if left:
            raise ConfigError(
                f"search space {self.spec.name}: no group holds {min(left)!r}",
                fix="end `modules` and `outside` with an empty filter",
            )

    def _cell(
        self,
        run: str,
        module: str,
        group: TensorGroup,
        tensors: tuple[str, ...],
        places: dict[tuple[str, str | None, str | None, str | None], int],
    ) -> _Cell:
        positions: dict[str, tuple[int, ...]] = {}
        for name, spec in self.spec.genes.items():
            per_source = self._declared(name).per_source
            per = spec.per if spec.per is not None else ("source", "layers", "modules")
            found = []
            for source in self.sources if per_source else (None,):
                key = (
                    name,
                    run if "layers" in per else None,
                    module if "modules" in per else None,
                    source if "source" in per else None,
                )
                if key not in places:
                    places[key] = len(self._genes)
                    cut = self.spec.modules if group.layers else self.spec.outside
                    place = (
                        " ".join(part for part in (key[1], key[2] if len(cut) > 1 else None) if part) or None
                    )
                    label = " ".join(part for part in (name, key[3], place) if part)
                    self._genes.append(
                        Gene(name=label, parameter=name, spec=spec, source=key[3], group=place)
                    )
                found.append(places[key])
            positions[name] = tuple(found)
        return _Cell(group=group, tensors=tensors, positions=positions)
