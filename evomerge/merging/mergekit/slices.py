"""Turn the slices of a mergekit file into tensor groups of a recipe: layers, sources and parameters.

`reader` reads the file into slices. This module resolves their parameters tensor by tensor and returns as
few groups as possible. Tensors before the first layer belong to the first slice and those after the last
layer to the last slice, both at position 0 of gradients. A layer's position is idx / (n - 1) inside its
slice. Filters of per-source parameters match the tensor's name in the source, filters of other parameters
its name in the result; the names differ where layers are shifted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from evomerge.errors import ConfigError, ModelError
from evomerge.merging import methods
from evomerge.merging.modules import TEXT, beside_text, layer_of, module_of, own_layer, prefix_of, shifted
from evomerge.merging.recipe import OUTSIDE, Setting, TensorGroup
from evomerge.merging.sources.checkpoint import HEADS, TensorNames
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.source import Source

EMBEDDINGS = ("embed", "wte", "wpe")
"""Parts of the names of tensors before the first layer, which are the first slice's."""
STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

T = TypeVar("T")
Condition = tuple[str | None, tuple[Any, ...]]
"""A filter (None: always) and its value: one number, or a gradient over the slice's layers."""
REST = "default"
"""What mergekit calls the tensors outside all lists of layers, in a model it has no definition of."""
FilterRule = tuple[tuple[str, ...], tuple[tuple[str, Setting], ...]]
"""Substrings of tensor names and the parameters of the tensors that contain one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A method, its sources (locations) and how far their layers are shifted."""

    method: str
    sources: tuple[str, ...]
    shift: tuple[int, ...]
    base: str | None
    base_shift: int = 0

    def outside(self) -> Made:
        """Return the same for tensors outside the layers, which are never shifted."""
        return replace(self, shift=(0,) * len(self.shift), base_shift=0)

    def further(self, by: int) -> Made:
        """Return the same with all shifts increased by `by`."""
        return replace(self, shift=tuple(s + by for s in self.shift), base_shift=self.base_shift + by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Consecutive layers of the result, from `start` on; length None means all layers of the models."""

    start: int = 0
    length: int | None
    made: Made
    conditions: Mapping[str, tuple[tuple[Condition, ...], ...]]
    """Parameter -> ordered conditions, one list per source (a single list for parameters of the group)."""

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same parameters: no gradients and no filters with layer numbers."""
        chains = [chain for chains in self.conditions.values() for chain in chains]
        return all(len(values) == 1 and not _numbered(part) for chain in chains for part, values in chain)


class Headers:
    """Facts about the models that are not in the file, read from the models' headers when first needed."""

    def __init__(self, places: Mapping[str, str], tensors: Iterable[str] | None, base: str | None) -> None:
        self._places, self._base = places, base
        self._tensors = None if tensors is None else tuple(tensors)
        self._opened: dict[str, Source] = {}
        self._layouts: dict[str, TensorNames] = {}

    def _source(self, location: str) -> Source:
        if location not in self._opened:
            below = self._places[self._base] if self._base else None
            self._opened[location] = open_source(self._places[location], base=below)
        return self._opened[location]

    def names(self, location: str) -> tuple[str, ...]:
        """Return the names of a model's tensors."""
        return tuple(self._source(location).headers) if self._tensors is None else self._tensors

    def names_if_known(self, location: str) -> tuple[str, ...]:
        """Return the same, or () if the model is not on this machine; merging checks the names again."""
        try:
            return self.names(location)
        except ModelError:
            return ()

    def layout(self, location: str) -> TensorNames:
        """Return how a model's tensors are named."""
        key = location if self._tensors is None else ""
        if key not in self._layouts:
            self._layouts[key] = TensorNames.of(self.names(location))
        return self._layouts[key]

    def dtype(self, location: str) -> str:
        """Return the type a model is stored in."""
        return STORED[next(iter(self._source(location).headers.values())).dtype]


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes before them, as embeddings do."""
    return any(part in name for part in EMBEDDINGS) and not name.endswith(HEADS)


def groups(
    parts: Mapping[str, Sequence[Slice]], names: Mapping[str, str], base: str | None, headers: Headers
) -> tuple[TensorGroup, ...]:
    """Return the tensor groups of slices.

    parts: module -> its slices. Missing modules are made like the text decoder's first slice. With `REST`,
    keys beside it and the text decoder are starts of tensor names. names: location -> name in the recipe.
    base: location of the recipe's base; groups with another base name it.
    """
    text, rest = parts[TEXT], parts.get(REST)
    places: list[tuple[tuple[int, ...] | None, Made, list[FilterRule]]] = []
    if len(parts) > 1 or len(text) > 1 or text[0].length is not None or not text[0].uniform:
        first = replace(text[0], start=0, length=None, made=text[0].made.outside())
        tensors = headers.names_if_known(text[0].made.sources[0])
        for module in beside_text(tensors):
            own = [name for name in tensors if module_of(name) == module]
            slices = {name: _part(parts, name) if rest else parts.get(module, [first]) for name in own}
            places += _module_places(slices, module)
    places += _places(text, headers, rest)
    return tuple(
        TensorGroup(
            method=made.method,
            sources=tuple(names[source] for source in made.sources),
            parameters=dict(parameters),
            layers=layers,
            match=match,
            shift=made.shift,
            base=names[made.base] if made.base is not None and made.base != base else None,
            base_shift=made.base_shift,
        )
        for layers, made, rules in places
        for match, parameters in rules
    )


def _part(parts: Mapping[str, Sequence[Slice]], tensor: str) -> Sequence[Slice]:
    """Return the slices of the longest start of a tensor's name, else `REST`."""
    starts = [start for start in parts if tensor.startswith(f"{start}.")]
    return parts[max(starts, key=len, default=REST)]


def _module_places(
    slices: Mapping[str, Sequence[Slice]], module: str
) -> list[tuple[tuple[int, ...] | None, Made, list[FilterRule]]]:
    """Return (outside the text decoder's layers, sources, rules) of a module beside the text decoder.

    slices: tensor -> the slices that make it. Positions of gradients count the module's own layers.
    """
    last = {place[0]: 0 for name in slices if (place := own_layer(name))}
    for name in slices:
        if place := own_layer(name):
            last[place[0]] = max(last[place[0]], place[1])
    for listed in slices.values():
        end = listed[-1].start + (listed[-1].length or 0)
        if last and end > max(last.values()) + 1:
            raise ConfigError(
                f"mergekit file: {module} has fewer layers than its layer_ranges need",
                expected=f"an end of at most {max(last.values()) + 1}",
                got=str(end),
            )
    settings: dict[str, tuple[Made, tuple[tuple[str, Setting], ...]]] = {}
    for name, listed in slices.items():
        start, layer = own_layer(name) or ("", 0)
        part = _slice_at(listed, layer if start else None, is_before_layers(name), module)
        first, count = part.start, part.length or last.get(start, 0) + 1
        position = 0.0 if not start else (layer - first) / (count - 1) if count > 1 else 1.0
        settings[name] = (part.made.outside(), _resolve(part, position, name))
    return [(OUTSIDE, made, [(match, rule)]) for match, (made, rule) in compressed(settings)]


def _slice_at(slices: Sequence[Slice], layer: int | None, before: bool, module: str) -> Slice:
    """Return the slice that makes a layer of a module (None: outside its layers). Raises ConfigError."""
    if any(part.made != part.made.outside() for part in slices):
        raise ConfigError(
            f"mergekit file: the layers of {module} can be merged, but not moved, repeated or left out",
            expected="layer_ranges that follow each other, the same for all sources",
        )
    if layer is None:
        return slices[0] if before else slices[-1]
    for part in slices:
        if part.length is None or part.start <= layer < part.start + part.length:
            return part
    raise ConfigError(f"mergekit file: no slice of {module} makes its layer {layer}")


def compressed(values: Mapping[str, T]) -> list[tuple[tuple[str, ...], T]]:
    """Return (parts of tensor names, value) so that every tensor of a module has its value.

    A part is the start of the module's names if all its tensors have one value, the start of a layer's names
    if its tensors have, else a full name.

    >>> compressed({"visual.blocks.0.a": 1, "visual.blocks.0.b": 1, "visual.blocks.1.a": 2})
    [(('visual.blocks.0.',), 1), (('visual.blocks.1.',), 2)]
    """

    def distinct(found: Iterable[T]) -> list[T]:
        seen: list[T] = []
        for value in found:
            if value not in seen:
                seen.append(value)
        return seen

    if len(distinct(values.values())) == 1:
        starts = tuple(dict.fromkeys(map(prefix_of, values)))
        return [(starts, next(iter(values.values())))]
    by_layer: dict[str, list[str]] = {}
    for name in values:
        place = own_layer(name)
        by_layer.setdefault(name if place is None else f"{place[0]}{place[1]}.", []).append(name)
    parts: list[tuple[str, T]] = []
    for start, members in by_layer.items():
        one = len(distinct(values[name] for name in members)) == 1
        parts += [(start, values[members[0]])] if one else [(name, values[name]) for name in members]
    return [
        (tuple(part for part, own in parts if own == value), value)
        for value in distinct(value for _, value in parts)
    ]


def _places(
    slices: Sequence[Slice], headers: Headers, rest: Sequence[Slice] | None
) -> list[tuple[tuple[int, ...] | None, Made, list[FilterRule]]]:
    """Return (layers, sources, rules), one for each run of layers that are made the same way.

    rest: the slices that make the tensors outside the layers; None: the first and the last of the layers'.
    """
    if rest is None and len(slices) == 1 and slices[0].length is None and slices[0].uniform:
        return [(None, slices[0].made, _rules(slices[0], 0.0, headers, "all"))]
    runs: list[tuple[list[int], Made, list[FilterRule]]] = []
    for part in slices:
        count = headers.layout(part.made.sources[0]).num_layers if part.length is None else part.length
        for index in range(count):
            position = index / (count - 1) if count > 1 else 1.0
            layer = part.start + index
            rules = _rules(part, position, headers, layer)
            if runs and runs[-1][1:] == (part.made, rules):
                runs[-1][0].append(layer)
            else:
                runs.append(([layer], part.made, rules))
    places: list[tuple[tuple[int, ...] | None, Made, list[FilterRule]]]
    places = [(tuple(layers), made, rules) for layers, made, rules in runs]
    outer = rest or slices
    first, last = (
        (part.made.outside(), _rules(part, 0.0, headers, "outside")) for part in (outer[0], outer[-1])
    )
    if first != last:
        outside = headers.layout(outer[0].made.sources[0]).outside
        names = [name for name in outside if is_before_layers(name) and module_of(name) == TEXT]
        places.append((OUTSIDE, first[0], _exact_rules(outer[0], 0.0, names)))
    return [*places, (OUTSIDE, *last)]


def _rules(
    part: Slice, position: float, headers: Headers, scope: int | Literal["all", "outside"]
) -> list[FilterRule]:
    """Return ordered rules for all tensors, for those of one layer, or for those outside the layers."""
    chains = [chain for chains in part.conditions.values() for chain in chains]
    orders = {order for chain in chains if (order := _filters(chain))}
    numbered = any(_numbered(part_filter) for order in orders for part_filter in order)
    if len(orders) <= 1 and not numbered:
        order = next(iter(orders), ())
        named: list[FilterRule] = [
            ((part_filter,), _resolve(part, position, part_filter)) for part_filter in order
        ]
        return _joined([*named, ((), _resolve(part, position, ""))])
    # Filters of several parameters may overlap, so they are resolved tensor by tensor.
    first = part.made.sources[0]
    if isinstance(scope, int):
        shift = part.made.shift[0]
        inside = [n for n in headers.names(first) if layer_of(n) == scope + shift]
        rules = _exact_rules(part, position, [shifted(name, -shift) for name in inside])
    else:
        modules = [f".{m}" for m in headers.layout(first).modules] if scope == "all" else []
        rules = _exact_rules(part, position, [*headers.layout(first).outside, *modules])
    return [((), rules[0][1])] if len(rules) == 1 else rules


def _exact_rules(part: Slice, position: float, names: Sequence[str]) -> list[FilterRule]:
    """Return rules by full names (inside a layer: after its number), one for each set of parameters."""
    by_setting: dict[tuple[tuple[str, Setting], ...], dict[str, None]] = {}
    for name in names:
        layer = layer_of(name)
        match = name if layer is None else f".{name.partition(f'.{layer}.')[2]}"
        by_setting.setdefault(_resolve(part, position, name), {})[match] = None
    return [(tuple(matches), settings) for settings, matches in by_setting.items()]


def _joined(rules: list[FilterRule]) -> list[FilterRule]:
    """Join neighbouring rules with equal parameters, and drop rules that equal the default."""
    joined: list[FilterRule] = []
    for match, settings in rules:
        if joined and joined[-1][1] == settings:
            joined[-1] = ((*joined[-1][0], *match) if match else (), settings)
        else:
            joined.append((match, settings))
    return joined


def _numbered(part: str | None) -> bool:
    """Whether a filter may tell one layer from another."""
    return part is not None and any(character.isdigit() for character in part)


def _filters(chain: Sequence[Condition]) -> tuple[str, ...]:
    """Return the filters of a chain up to its first unconditional value."""
    filters: dict[str, None] = {}
    for part, _ in chain:
        if part is None:
            break
        filters[part] = None
    return tuple(filters)


def _resolve(part: Slice, position: float, name: str) -> tuple[tuple[str, Setting], ...]:
    """Return the parameters of an output tensor by name, in the method's order."""
    settings: list[tuple[str, Setting]] = []
    for parameter, chains in part.conditions.items():
        if methods.get(part.made.method).parameters[parameter].per_source:
            shifted_chains = zip(chains, part.made.shift, strict=True)
            values = tuple(_value(chain, position, shifted(name, shift)) for chain, shift in shifted_chains)
            settings.append((parameter, values))
        else:
            settings.append((parameter, _value(chains[0], position, name)))
    return tuple(settings)


def _value(chain: Sequence[Condition], position: float, name: str) -> float | int | bool:
    values = next(values for part, values in chain if part is None or part in name)
    if len(values) == 1:
        return values[0]  # type: ignore[no-any-return]
    place = position * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    share = place - left
    return float(values[left] * (1.0 - share) + values[left + 1] * share)


def placed(slices: Sequence[Slice]) -> list[Slice]:
    """Return the slices placed one after the other in the result, with shifts relative to that."""
    start, result = 0, []
    for part in slices:
        result.append(replace(part, start=start, made=part.made.further(-start)))
        start += part.length or 0
    return result


def check_ranges(slices: Sequence[Slice], headers: Headers) -> None:
    """Raise ConfigError if a slice reads a layer that its model does not have."""
    for index, part in enumerate(slices):
        made = part.made
        reads = [*zip(made.sources, made.shift, strict=True)]
        reads += [(made.base, made.base_shift)] if made.base is not None else []
        for source, shift in reads:
            first = part.start + shift
            end, count = first + (part.length or 0), headers.layout(source).num_layers
            if end > count:
                raise ConfigError(
                    f"mergekit file: slices[{index}]: {source} has fewer layers than its layer_range needs",
                    expected=f"an end of at most {count}",
                    got=f"[{first}, {end}]",
                )
