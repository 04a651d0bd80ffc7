"""Recipes as mergekit YAML, both ways.

Reading understands the configuration grammar for the methods we have: `models`, `slices` or one module;
parameters as numbers, gradients over the layers, or ordered filters, looked up from the source over its
slice and module to the whole file; `base_model` per slice; `dtype` and `out_dtype`; `path+adapter`.
Writing puts every run of layers with equal parameters into a slice and the rest into filters, then reads
the result back and compares: what can't be said exactly is refused.

Deviations from mergekit: we compute in float32 whatever `dtype` says (it writes `out_dtype`, else
`dtype`, else the stored type, and so do we); DARE rescales by 1/density; misspelt keys are errors.
Not covered yet: slices that stack, skip or shift layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from evomerge.errors import ConfigError, nearest
from evomerge.merging import methods
from evomerge.merging.checkpoint import Layout
from evomerge.merging.methods import Method
from evomerge.merging.recipe import DTYPES, OUTSIDE, Recipe, Setting, TensorGroup
from evomerge.merging.source import Source, open_source
from evomerge.schema import parse_yaml

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
SUMMING = (
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
)
"""mergekit's generalised task arithmetic: its parameter list holds for all of them."""
UNUSED = dict.fromkeys(SUMMING, ("int8_mask",)) | {
    "task_arithmetic": ("density", "rescale", "int8_mask"),
    "sce": ("int8_mask",),
}
"""Parameters mergekit accepts for a method although they do not change what it computes."""
NEUTRAL = {
    "ties": {"rescale": False},
    "breadcrumbs": {"rescale": False},
    "breadcrumbs_ties": {"rescale": False},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True},
}
"""Parameters we understand only at the value that changes nothing; any other is refused by name."""
OURS = ("chained_slerp", "fisher")
"""Methods mergekit does not have."""
EMBEDDINGS = ("embed", "wte", "wpe")
"""Parts of the names of tensors before the first layer; mergekit gives them the first slice's parameters."""
STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Condition = tuple[str | None, tuple[Any, ...]]
"""A filter (None: always) and its value: one number, or a gradient over the slice's layers."""
Rule = tuple[tuple[str, ...], tuple[tuple[str, Setting], ...]]
"""Substrings of tensor names and the parameters of the tensors that contain one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """Consecutive layers [start, end) of the same models; end None: all layers of the model."""

    start: int
    end: int | None
    sources: tuple[str, ...]
    conditions: Mapping[str, tuple[tuple[Condition, ...], ...]]
    """Parameter -> for each source (one entry for parameters of the group) its ordered conditions."""

    @property
    def graded(self) -> bool:
        return any(len(values) > 1 for chains in self.conditions.values() for c in chains for _, values in c)


class _Model:
    """Facts about the first model that a file leaves open, read from its headers when first needed."""

    def __init__(self, location: str, tensors: Iterable[str] | None) -> None:
        self._location = location
        self._tensors = None if tensors is None else tuple(tensors)

    @functools.cached_property
    def _source(self) -> Source:
        return open_source(self._location)

    @functools.cached_property
    def layout(self) -> Layout:
        return self._source.layout if self._tensors is None else Layout.of(self._tensors)

    @property
    def dtype(self) -> str:
        return STORED[next(iter(self._source.headers.values())).dtype]


def read(
    text: str, *, root: str | Path | None = None, seed: int = 0, tensors: Iterable[str] | None = None
) -> Recipe:
    """Return the recipe that a mergekit YAML describes.

    root: folder where relative model paths start (default: the current one). seed: owner of random
    masks, which mergekit takes from its command line. tensors: names of the model's tensors. Without
    them, the headers of the first model are read where the file needs them: for gradients over `models`,
    filters that overlap, or slices that end in different parameters.

    Raises ConfigError, naming the nearest valid key for an unknown one.
    """
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError("mergekit file: not valid YAML", got=" ".join(str(error).split())) from None
    data = _checked(data, KEYS, "mergekit file")
    if "merge_method" not in data:
        raise ConfigError("mergekit file: missing key 'merge_method'")
    method = methods.get(str(data["merge_method"]))
    if method.name in OURS:
        raise ConfigError(
            f"mergekit file: {method.name} is not one of its methods", fix="write a recipe.yaml"
        )
    slices = _slices(data, method)
    base = data.get("base_model")
    tokenizer = _tokenizer(data)
    sources = [source for part in slices for source in part.sources]
    locations = [each for each in (base, *sources, tokenizer) if each]
    names = _names(locations)
    model = _Model(resolved(locations[0], root), tensors)
    groups = [
        TensorGroup(
            method=method.name,
            sources=tuple(names[source] for source in sources),
            parameters=dict(parameters),
            layers=layers,
            match=match,
        )
        for layers, sources, rules in _places(slices, model)
        for match, parameters in rules
    ]
    return Recipe(
        models={name: resolved(location, root) for location, name in names.items()},
        base=names[base] if base else None,
        groups=tuple(groups),
        dtype=_dtype(data, model),
        tokenizer=names[tokenizer] if tokenizer else "",
        seed=seed,
    )


def _slices(data: Mapping[str, Any], method: Method) -> list[_Slice]:
    """Bring `models`, `slices` and `modules` to one form."""
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        raise ConfigError(
            "mergekit file: what to merge", expected="exactly one of models, slices, modules", got=str(given)
        )
    levels = [_parameters(data, method, "parameters")]
    content, where = data, ""
    if given == ["modules"]:
        if not isinstance(data["modules"], Mapping) or len(data["modules"]) != 1:
            raise ConfigError("mergekit file: modules", expected="one module", got=str(data["modules"])[:80])
        name, content = next(iter(data["modules"].items()))
        where = f"modules.{name}."
        content = _checked(content, ("models", "slices", "parameters"), f"mergekit file: modules.{name}")
        levels.insert(0, _parameters(content, method, f"{where}parameters"))
    if content.get("models"):
        entries = _list(content["models"], f"{where}models")
        return [_slice(entries, data.get("base_model"), method, levels, f"{where}models", ranged=False)]
    slices = []
    for index, entry in enumerate(_list(content.get("slices"), f"{where}slices")):
        place = f"{where}slices[{index}]"
        part = _checked(entry, ("sources", "parameters", "base_model"), f"mergekit file: {place}")
        entries = _list(part.get("sources"), f"{place}.sources")
        base = part.get("base_model") or data.get("base_model")
        if method.uses_base(base) and base != data.get("base_model"):
            raise ConfigError(f"mergekit file: {place}: another base_model than the file's is not supported")
        inner = [_parameters(part, method, f"{place}.parameters"), *levels]
        slices.append(_slice(entries, base, method, inner, f"{place}.sources", ranged=True))
    _check_consecutive(slices)
    return slices


def _slice(
    entries: Sequence[Any],
    base: str | None,
    method: Method,
    levels: Sequence[Mapping[str, tuple[Condition, ...]]],
    where: str,
    *,
    ranged: bool,
) -> _Slice:
    valid = ("model", "parameters", *(("layer_range",) if ranged else ()))
    own: list[tuple[str, Mapping[str, tuple[Condition, ...]]]] = []
    ranges = []
    for index, given in enumerate(entries):
        entry = _checked(given, valid, f"mergekit file: {where}[{index}]")
        if not isinstance(entry.get("model"), str):
            raise ConfigError(f"mergekit file: {where}[{index}]: model", expected="a path or hub id")
        own.append((entry["model"], _parameters(entry, method, f"{where}[{index}].parameters", source=True)))
        ranges.append(_layer_range(entry, f"{where}[{index}]") if ranged else (0, None))
    if len(set(ranges)) > 1:
        raise ConfigError(
            f"mergekit file: {where}: shifted slices are not supported",
            expected="one layer_range for all sources of a slice",
            got=", ".join(map(str, ranges)),
        )
    own = _ordered(own, base, method, where)
    conditions = {}
    for name, parameter in method.parameters.items():
        chains = [settings.get(name, ()) for _, settings in own] if parameter.per_source else [()]
        outer = tuple(c for level in levels for c in level.get(name, ()))
        conditions[name] = tuple((*chain, *outer, (None, (parameter.default,))) for chain in chains)
    start, end = ranges[0]
    return _Slice(start=start, end=end, sources=tuple(model for model, _ in own), conditions=conditions)


def _ordered(
    own: list[tuple[str, Mapping[str, tuple[Condition, ...]]]], base: str | None, method: Method, where: str
) -> list[tuple[str, Mapping[str, tuple[Condition, ...]]]]:
    """Give the base model its role: it is no task vector of its own, and it is slerp's t = 0."""
    if method.uses_base(base):
        return [entry for entry in own if entry[0] != base]
    if method.name == "slerp":
        if base is None:
            raise ConfigError(f"mergekit file: {where}: slerp needs base_model, the model at t = 0")
        return [(base, {}), *(entry for entry in own if entry[0] != base)]
    return own


def _check_consecutive(slices: Sequence[_Slice]) -> None:
    expected = 0
    for index, part in enumerate(slices):
        if part.start != expected:
            raise ConfigError(
                f"mergekit file: slices[{index}]: stacked or skipped layers are not supported",
                expected=f"a layer_range that starts at {expected}",
                got=f"[{part.start}, {part.end}]",
            )
        assert part.end is not None
        expected = part.end


def _parameters(
    data: Mapping[str, Any], method: Method, where: str, *, source: bool = False
) -> dict[str, tuple[Condition, ...]]:
    """Return parameter -> ordered conditions of one level of the file."""
    found: dict[str, tuple[Condition, ...]] = {}
    where = f"mergekit file: {where}"
    for name, setting in _mapping(data.get("parameters") or {}, where).items():
        neutral = NEUTRAL.get(method.name, {})
        if name in UNUSED.get(method.name, ()) or (name in neutral and setting == neutral[name]):
            continue
        declared = method.parameter(str(name), where)
        if source and not declared.per_source:
            raise ConfigError(
                f"{where}: {name} holds for all sources of a tensor", fix="move it out of the source"
            )
        found[name] = _conditions(setting, f"{where}.{name}")
    return found


def _conditions(setting: object, where: str) -> tuple[Condition, ...]:
    if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
        found: list[Condition] = []
        for given in setting:
            item = _checked(given, ("filter", "value"), where)
            if "value" not in item:
                raise ConfigError(f"{where}: a filter without value")
            part = item.get("filter")
            found.append((None if part in (None, "*") else str(part), _values(item["value"], where)))
        return tuple(found)
    return ((None, _values(setting, where)),)


def _values(value: object, where: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else [value]
    numbers = all(isinstance(v, int | float) for v in values)
    if not values or not numbers or (len(values) > 1 and any(isinstance(v, bool) for v in values)):
        raise ConfigError(f"{where}", expected="a number, a list of numbers, or filters", got=repr(value))
    return tuple(values)


def _places(
    slices: Sequence[_Slice], model: _Model
) -> list[tuple[tuple[int, ...] | None, tuple[str, ...], list[Rule]]]:
    """Return the recipe's groups: (layers, sources, rules), one place for each run of equal layers."""
    if len(slices) == 1 and slices[0].end is None and not slices[0].graded:
        return [(None, slices[0].sources, _rules(slices[0], 0.0, model, "all"))]
    by_layer: list[tuple[tuple[str, ...], list[Rule]]] = []
    for part in slices:
        count = (model.layout.num_layers if part.end is None else part.end) - part.start
        for index in range(count):
            position = index / (count - 1) if count > 1 else 1.0
            by_layer.append((part.sources, _rules(part, position, model, "layer")))
    runs: list[tuple[list[int], tuple[str, ...], list[Rule]]] = []
    for layer, (sources, rules) in enumerate(by_layer):
        if runs and runs[-1][1:] == (sources, rules):
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], sources, rules))
    first, last = (_rules(part, 0.0, model, "outside") for part in (slices[0], slices[-1]))
    places = [(tuple(layers), sources, rules) for layers, sources, rules in runs]
    if (first, slices[0].sources) != (last, slices[-1].sources):
        names = [name for name in model.layout.outside if any(part in name for part in EMBEDDINGS)]
        places.append((OUTSIDE, slices[0].sources, _exact_rules(slices[0], 0.0, names)))
    return [*places, (OUTSIDE, slices[-1].sources, last)]


def _rules(
    part: _Slice, position: float, model: _Model, scope: Literal["all", "layer", "outside"]
) -> list[Rule]:
    """Return ordered rules for all tensors, for those of a layer, or for those outside the layers."""
    chains = [chain for chains in part.conditions.values() for chain in chains]
    orders = {order for chain in chains if (order := _filters(chain))}
    if len(orders) <= 1:
        order = next(iter(orders), ())
        named: list[Rule] = [((each,), _resolve(part, position, each)) for each in order]
        return _joined([*named, ((), _resolve(part, position, ""))])
    # Filters of several parameters overlap in their own ways: ask the tensors themselves.
    outside = model.layout.outside if scope != "layer" else ()
    inside = [f".{module}" for module in model.layout.modules] if scope != "outside" else ()
    rules = _exact_rules(part, position, (*outside, *inside))
    return [((), rules[0][1])] if len(rules) == 1 else rules


def _exact_rules(part: _Slice, position: float, names: Sequence[str]) -> list[Rule]:
    """Return rules by full names, one for each set of equal parameters."""
    by_setting: dict[tuple[tuple[str, Setting], ...], list[str]] = {}
    for name in names:
        by_setting.setdefault(_resolve(part, position, name), []).append(name)
    return [(tuple(found), settings) for settings, found in by_setting.items()]


def _joined(rules: list[Rule]) -> list[Rule]:
    """Join neighbouring rules with equal parameters, and drop what the default says anyway."""
    joined: list[Rule] = []
    for match, settings in rules:
        if joined and joined[-1][1] == settings:
            joined[-1] = ((*joined[-1][0], *match) if match else (), settings)
        else:
            joined.append((match, settings))
    return joined


def _filters(chain: Sequence[Condition]) -> tuple[str, ...]:
    """Return the filters of a chain up to its first unconditional value."""
    found: dict[str, None] = {}
    for part, _ in chain:
        if part is None:
            break
        found[part] = None
    return tuple(found)


def _resolve(part: _Slice, position: float, name: str) -> tuple[tuple[str, Setting], ...]:
    """Return the parameters of a tensor by name, in the method's order."""
    settings: list[tuple[str, Setting]] = []
    for parameter, chains in part.conditions.items():
        values = tuple(_value(chain, position, name) for chain in chains)
        settings.append((parameter, values[0] if len(values) == 1 else values))
    return tuple(settings)


def _value(chain: Sequence[Condition], position: float, name: str) -> float | int | bool:
    values = next(values for part, values in chain if part is None or part in name)
    if len(values) == 1:
        return values[0]  # type: ignore[no-any-return]
    place = position * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    share = place - left
    return float(values[left] * (1.0 - share) + values[left + 1] * share)


def _layer_range(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    given = entry.get("layer_range")
    whole = isinstance(given, list) and len(given) == 2 and all(type(v) is int for v in given)
    if not whole or not 0 <= given[0] < given[1]:  # type: ignore[index]
        raise ConfigError(
            f"mergekit file: {where}: layer_range", expected="[first, end), end above first", got=repr(given)
        )
    return given[0], given[1]  # type: ignore[index]


def _names(locations: Iterable[str]) -> dict[str, str]:
    """Return location -> a short name: its last part, numbered where two are the same."""
    names: dict[str, str] = {}
    for location in dict.fromkeys(locations):
        stem = Path(location.rpartition("+")[2]).name or location
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[location] = name
    return names


def resolved(location: str, root: str | Path | None) -> str:
    """Return a location whose parts start at `root` where they exist there."""
    parts = location.split("+")
    if root is not None:
        parts = [str(Path(root) / part) if (Path(root) / part).exists() else part for part in parts]
    return "+".join(parts)


def _dtype(data: Mapping[str, Any], model: _Model) -> str:
    for key in ("dtype", "out_dtype"):
        if data.get(key) is not None and data[key] not in DTYPES:
            raise ConfigError(f"mergekit file: {key}: {data[key]!r}", fix=nearest(str(data[key]), DTYPES))
    given = data.get("out_dtype") or data.get("dtype")
    return str(given) if given else model.dtype


def _tokenizer(data: Mapping[str, Any]) -> str | None:
    """Return the location of the tokenizer's model; None is the recipe's default (base, else first)."""
    if data.get("chat_template") not in (None, "auto"):
        raise ConfigError("mergekit file: chat_template is not supported", fix="set it in the result")
    given = data.get("tokenizer_source")
    if data.get("tokenizer") is not None:
        given = _checked(data["tokenizer"], ("source",), "mergekit file: tokenizer").get("source")
    # Models with different vocabularies are refused, so the union of them is that of the base.
    if given in (None, "base", "union"):
        return None
    if not isinstance(given, str):
        raise ConfigError(
            "mergekit file: tokenizer_source", expected="base, union, or a model", got=repr(given)
        )
    return given


def _checked(data: object, valid: Sequence[str], where: str) -> dict[str, Any]:
    for key in (found := _mapping(data, where)):
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}", fix=nearest(str(key), valid))
    return found


def _mapping(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(where, expected="a mapping", got=type(data).__name__)
    return data


def _list(data: object, where: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise ConfigError(f"mergekit file: {where}", expected="a list", got=repr(data)[:80])
    return data
