"""A SearchSpace: which parts of a merge may vary, as a box of genes in the unit cube.

A preset (YAML, in `search_spaces/`; docs/search_spaces.md) names a merge method or several to choose
from, cuts the model into tensor groups, and gives some of the methods' parameters a range. A genome is a
vector `u` in [0, 1]^dim; `decode` turns it into a Recipe and `encode` turns a Recipe that lies in the
space back into its genome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.merging import methods
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.search.spaces.domain import Choice, listed
from evomerge.search.spaces.grouping import Region, cut
from evomerge.search.spaces.layout import Gene, GeneLayout
from evomerge.search.spaces.preset import GeneSpec, SpaceSpec
from evomerge.search.spaces.resolve import SWITCH, Resolved, Varied, check_methods, redundancies, resolve
from evomerge.search.spaces.space import Coordinate, Genome, check_dimension

__all__ = ["Gene", "GeneSpec", "SearchSpace", "SpaceSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """A parameter of one method in one cell: the positions of its values, one per source or one."""

    parameter: str
    per_source: bool
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One tensor group of the space. Positions are those of the layout's table of values.

    method: of the method gene, None where there is none. switches: one per source, () where there are none.
    slots: per method, what of it varies.
    """

    place: Region
    method: int | None
    switches: tuple[int, ...]
    slots: Mapping[str, tuple[_Slot, ...]]


class SearchSpace:
    """The search space of one run: a preset applied to the models at hand.

    tensors: names of the model's output tensors, so that empty groups get no genes.
    template: a recipe with the run's models, base, dtype, tokenizer and seed; its groups are replaced.
    notes: in which ways different recipes of the space are one model, as sentences.
    Raises ConfigError where the preset and the methods or the models do not fit.
    """

    def __init__(
        self, spec: SpaceSpec, *, template: Recipe, sources: Sequence[str], tensors: Sequence[str]
    ) -> None:
        self.spec = spec
        self.sources = tuple(sources)
        self._template = template
        resolved = resolve(spec)
        check_methods(spec, template, self.sources)
        self.notes = redundancies(spec, resolved)
        self._fixed = resolved.fixed
        places = cut(spec, [t for t in tensors if not any(group.matches(t) for group in template.kept)])
        choices = [entry for entry in (resolved.method, resolved.switch) if entry is not None]
        layout = GeneLayout([*choices, *resolved.varied], self.sources, places)
        check_dimension(f"search space {spec.name}", len(layout.genes), "let more layers share a group")
        self._genes, self._curves = tuple(layout.genes), tuple(layout.curves)
        self._table_size = layout.size
        self._coordinates = tuple(gene.domain.coordinate for gene in self._genes)
        self._cells = tuple(_cell(place, layout, resolved) for place in places)
        self.decode(np.full(self.dimension, 0.5))  # what only a whole recipe can check

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, in genome order."""
        return self._genes

    @property
    def dimension(self) -> int:
        """Number of genes."""
        return len(self._genes)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """The kind of every coordinate, in genome order."""
        return self._coordinates

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome, shape (dimension,), values in [0, 1]."""
        u = np.asarray(genome, dtype=np.float64)
        if u.shape != (self.dimension,) or not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"a genome of this space has shape ({self.dimension},) and values in [0, 1]")
        values = [gene.domain.value(x) for gene, x in zip(self._genes, u.tolist(), strict=True)]
        for curve in self._curves:
            values += curve.values([float(values[position]) for position in curve.points])
        return self._template.with_groups(self._group(cell, values) for cell in self._cells)

    def encode(self, recipe: Recipe) -> Genome | None:
        """Return the canonical genome of a recipe, or None where this space can't express it.

        The recipe may cut the model into groups differently; what counts is what each tensor gets.
        Sources it leaves out are off, or without switches get weight 0.
        """
        if recipe.stacked or any(group.base is not None for group in recipe.groups):
            return None
        if recipe.groups[: len(self._template.kept)] != self._template.kept:
            return None  # the modules that this run keeps are made in another way
        template = self._template
        if any(recipe.used_files(kind) and recipe.files(kind) != template.files(kind) for kind in FILES):
            return None
        table: list[Choice | None] = [None] * self._table_size
        for cell, groups in zip(self._cells, self._groups_of(recipe), strict=True):
            for group in groups:
                same_base = recipe.base_of(group) == self._base_of(group.method)
                if not (same_base and self._read(cell, group, table)):
                    return None
        if not all(curve.solve_in(table) for curve in self._curves):
            return None
        u = np.full(self.dimension, 0.5)
        for position, gene in enumerate(self._genes):
            value = table[position]
            unit = 0.5 if value is None else gene.domain.unit(value)
            if unit is None:
                return None
            u[position] = unit
        return u

    def describe(self) -> str:
        """Return one line for people: methods, genes and groups."""
        kinds = dict.fromkeys(gene.parameter for gene in self._genes)
        return (
            f"{self.spec.name}: {self.dimension} genes ({', '.join(kinds)}) over {len(self._cells)} tensor "
            f"groups x {len(self.sources)} sources, {self.spec.method}"
        )

    def condition(self, gene: Gene) -> str:
        """Say when a gene has an effect, "" for always."""
        parts = []
        if gene.methods and len(gene.methods) < len(self.spec.method.choices):
            parts.append(f"method is {listed(gene.methods)}")
        if self.spec.subset is not None and gene.parameter != SWITCH:
            parts.append(f"{gene.source} is on" if gene.source else "any source is on")
        return ", ".join(parts)

    def _group(self, cell: _Cell, values: Sequence[Choice]) -> TensorGroup:
        sources, on = self.sources, tuple(range(len(self.sources)))
        if cell.switches:
            on = tuple(i for i in on if values[cell.switches[i]])
            sources = tuple(self.sources[i] for i in on)
            if not on:  # the base as it is
                base = self._template.base
                assert base is not None
                return TensorGroup(
                    method="linear", sources=(base,), layers=cell.place.layers, match=cell.place.match
                )
        method = self.spec.method.choices[0] if cell.method is None else str(values[cell.method])
        parameters: dict[str, Setting] = dict(self._fixed[method])
        for slot in cell.slots[method]:
            if slot.per_source:
                parameters[slot.parameter] = tuple(_number(values[slot.values[i]]) for i in on)
            else:
                parameters[slot.parameter] = _number(values[slot.values[0]])
        return TensorGroup(
            method=method,
            sources=sources,
            parameters=parameters,
            layers=cell.place.layers,
            match=cell.place.match,
        )

    def _groups_of(self, recipe: Recipe) -> list[tuple[TensorGroup, ...]]:
        """Return the groups that make the tensors of each cell."""
        groups, places = recipe.groups[len(self._template.kept) :], [cell.place for cell in self._cells]
        if [(g.layers, g.match) for g in groups] == [(p.layers, p.match) for p in places]:
            return [(group,) for group in groups]
        groups_by_cell = []
        for place in places:
            distinct = {id(group): group for group in map(recipe.group_for, place.tensors)}
            groups_by_cell.append(tuple(distinct.values()))
        return groups_by_cell

    def _base_of(self, method: str) -> str | None:
        base = self._template.base
        return base if methods.get(method).uses_base(base) else None

    def _read(self, cell: _Cell, group: TensorGroup, table: list[Choice | None]) -> bool:
        """Enter a group's values for a cell into the table; return whether the space can express them."""
        if cell.switches and group.copied_source == self._template.base:
            return all(_enter(table, position, False) for position in cell.switches)
        ours = [name for name in self.sources if name in group.sources]
        declared = methods.get(group.method)
        if len(ours) != len(group.sources) or (declared.ordered and tuple(ours) != group.sources):
            return False  # another model's, or one twice, or in an order that matters
        if group.method not in self.spec.method.choices:
            return False
        if cell.method is not None and not _enter(table, cell.method, group.method):
            return False
        if cell.switches:
            there = zip(self.sources, cell.switches, strict=True)
            if not all(_enter(table, position, source in ours) for source, position in there):
                return False
        elif len(ours) < len(self.sources) and "weight" not in declared.parameters:
            return False
        return all(self._read_parameter(cell, group, name, table) for name in declared.parameters)

    def _read_parameter(self, cell: _Cell, group: TensorGroup, name: str, table: list[Choice | None]) -> bool:
        slot = next((s for s in cell.slots[group.method] if s.parameter == name), None)
        default = methods.get(group.method).parameters[name].default
        settled = self._fixed[group.method].get(name, default)
        for i, value in enumerate(self._in_our_order(group, name, switched=bool(cell.switches))):
            if value is None:
                continue
            if not (value == settled if slot is None else _enter(table, slot.values[i], value)):
                return False
        return True

    def _in_our_order(
        self, group: TensorGroup, name: str, *, switched: bool
    ) -> list[float | int | bool | None]:
        """Return a parameter's values in the order of our sources, None where they have no effect.

        A source that is left out is off, or has weight 0: nothing else of it has an effect.
        """
        given = group.parameters[name]
        if not isinstance(given, tuple):
            return [given]
        by_source = dict(zip(group.sources, given, strict=True))
        left_out = None if switched or name != "weight" else 0.0
        return [by_source.get(source, left_out) for source in self.sources]


def _cell(place: Region, layout: GeneLayout, resolved: Resolved) -> _Cell:
    def slot(entry: Varied) -> _Slot:
        values = layout.positions(entry, place)
        return _Slot(parameter=entry.parameter, per_source=entry.per_source, values=values)

    return _Cell(
        place=place,
        method=None if resolved.method is None else layout.positions(resolved.method, place)[0],
        switches=() if resolved.switch is None else layout.positions(resolved.switch, place),
        slots={
            name: tuple(slot(entry) for entry in resolved.varied if name in entry.methods)
            for name in resolved.fixed
        },
    )


def _enter(table: list[Choice | None], position: int, value: Choice) -> bool:
    """Enter a value; return whether it agrees with the one already there."""
    if table[position] is None:
        table[position] = value
    return table[position] == value


def _number(value: Choice) -> float | int | bool:
    assert not isinstance(value, str)
    return value
