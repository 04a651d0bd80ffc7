"""Lays the genes of a space out: one coordinate per parameter, place and source, or shared among them.

Every genome has a table of values: first one per coordinate, then those of its curves, one per run of
layers. Positions in that table are all a tensor group needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.search.spaces.curve import Curve
from evomerge.search.spaces.domain import Continuous, Domain
from evomerge.search.spaces.grouping import Region
from evomerge.search.spaces.resolve import Varied

_Key = tuple[str, str | None, str | None, str | None]
"""What a value is known by: entry of the preset, run of layers, module, source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gene:
    """One coordinate of the genome.

    parameter: of a method; or "method", or "on" for a switch.
    source, group: where it applies; None is everywhere.
    methods: those it has an effect with; () is all of them.
    point: of a curve, which of how many control points, from 1.
    """

    name: str
    parameter: str
    domain: Domain
    source: str | None
    group: str | None
    methods: tuple[str, ...] = ()
    point: tuple[int, int] | None = None


class GeneLayout:
    """The coordinates and curves of a space.

    entries: what varies, in the order a group's genes have. Genes are numbered in the order in which the
    groups need them.
    """

    def __init__(self, entries: Sequence[Varied], sources: Sequence[str], places: Sequence[Region]) -> None:
        self.genes: list[Gene] = []
        self._sources, self._places = sources, places
        self._positions: dict[_Key, int] = {}
        drafts: list[tuple[Varied, range, tuple[_Key, ...]]] = []
        for place in places:
            for entry in entries:
                for source in self._owners(entry):
                    key = _key(entry, place, source)
                    if key in self._positions:
                        continue
                    if entry.curve is None or not place.layers:
                        self._positions[key] = len(self.genes)
                        self._add(entry, place, key)
                        continue
                    keys = self._along(entry, key, source)
                    self._positions.update(dict.fromkeys(keys, -1))  # until all coordinates are numbered
                    first, count = len(self.genes), min(entry.curve.points, len(keys))
                    for number in range(1, count + 1):
                        self._add(entry, place, key, (number, count))
                    drafts.append((entry, range(first, first + count), keys))
        self.curves: list[Curve] = []
        position = len(self.genes)
        for entry, points, keys in drafts:
            rows = range(position, position + len(keys))
            self._positions.update(zip(keys, rows, strict=True))
            position += len(keys)
            domain = self.genes[points[0]].domain
            assert entry.curve is not None
            assert isinstance(domain, Continuous)
            self.curves.append(Curve.through(domain, points, rows, entry.curve.kind))
        self.size = position

    def positions(self, entry: Varied, place: Region) -> tuple[int, ...]:
        """Return where the table holds an entry's values for a place: one per source, or one."""
        return tuple(self._positions[_key(entry, place, source)] for source in self._owners(entry))

    def _owners(self, entry: Varied) -> Sequence[str | None]:
        return self._sources if entry.per_source else (None,)

    def _along(self, entry: Varied, key: _Key, source: str | None) -> tuple[_Key, ...]:
        """Return the keys of a curve's values, in the order of the layers."""
        there = [p for p in self._places if p.layers and key[2] in (None, p.module)]
        return tuple(dict.fromkeys(_key(entry, place, source) for place in there))

    def _add(self, entry: Varied, place: Region, key: _Key, point: tuple[int, int] | None = None) -> None:
        _, run, module, source = key
        where = ("layers" if point else run, None if place.alone else module)
        group = " ".join(part for part in where if part) or None
        parts = (entry.label, source, group, f"point {point[0]}" if point else None)
        domain = entry.domain
        if point is not None:
            assert isinstance(domain, Continuous)
            domain = replace(domain, grid=True)
        self.genes.append(
            Gene(
                name=" ".join(part for part in parts if part),
                parameter=entry.parameter,
                domain=domain,
                source=source,
                group=group,
                methods=entry.methods,
                point=point,
            )
        )


def _key(entry: Varied, place: Region, source: str | None) -> _Key:
    return (
        entry.label,
        place.run if "layers" in entry.per else None,
        place.module if "modules" in entry.per else None,
        source if "source" in entry.per else None,
    )
