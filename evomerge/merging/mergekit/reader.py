"""Read mergekit YAML as a recipe.

Covered, for the methods that evomerge has: `models`, `slices` or `modules`; slices that stack, skip, repeat
and shift layers; parameters as numbers, gradients over the layers, or ordered filters, looked up in the
source, its slice, its module and the whole file, in this order; `base_model` per slice, with a `layer_range`;
`dtype` and `out_dtype`; `path+adapter`. `slices.py` turns slices into tensor groups.

Deviations from mergekit: merging computes in float32 for every `dtype` (the result is stored in `out_dtype`,
else `dtype`, else the stored type, as in mergekit); DARE rescales by 1/density; misspelt keys are errors, and
keys that mergekit ignores are noted (see `ignored`); a model that appears twice in a slice stays two sources;
a base that slices do not list is read at the layers of their sources; `weight` may be left out; the final
norm and the head are made of all sources of the last slice (mergekit takes no more sources than the first
slice has).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging import methods
from evomerge.merging.chat_templates import with_text
from evomerge.merging.mergekit.ignored import ENTRIES, without_ignored
from evomerge.merging.mergekit.slices import (
    REST,
    Condition,
    Headers,
    Made,
    Slice,
    check_ranges,
    groups,
    placed,
)
from evomerge.merging.methods import Method
from evomerge.merging.modules import TEXT, beside_text, decoders, module_of
from evomerge.merging.recipe import DTYPES, UNION, Recipe
from evomerge.merging.recipe_data import LAYERS, TokenRow, token_rows
from evomerge.merging.sources.hub import is_local, split_id
from evomerge.schema import parse_yaml

TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
OURS = ("chained_slerp", "core_space", "fisher", "iso_c", "iso_cts", "regmean", "tsv", "wudi")
"""Methods that mergekit does not have, or not in this form."""
TEXT_NAMES = ("default", "language_model", "text_model", "model")
"""Other names of the text decoder among `modules`."""
COPYING = ("slerp", "arcee_fusion")
"""Methods with which mergekit copies the only source of a slice."""
Conditions = Mapping[str, tuple[Condition, ...]]
"""Parameter -> ordered conditions, from one level of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One source of a slice: its location, its own parameters, and the first of its layers."""

    model: str
    parameters: Conditions
    start: int = 0


def read(
    text: str, *, root: str | Path | None = None, seed: int = 0, tensors: Iterable[str] | None = None
) -> Recipe:
    """Return the recipe that a mergekit configuration describes.

    Args:
        text: the YAML.
        root: the folder where relative model paths start; None means the current folder.
        seed: of random masks, which mergekit takes from its command line.
        tensors: names of the model's tensors. By default the models' headers are read, if the file needs
            them: for slices, gradients over `models` and filters that overlap.

    Raises:
        ConfigError: keys or values that aren't valid, or that evomerge doesn't support.
        ModelError: the models can't be opened, where their headers are needed.
    """
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError("mergekit file: not valid YAML", got=" ".join(str(error).split())) from None
    return from_data(data, root=root, seed=seed, tensors=tensors)


def from_data(
    data: object,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    tensors: Iterable[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """Return the same as `read`, from parsed YAML. say: called with each note for the user."""
    data, by_name = _checked_data(data, say)
    every = [part for slices in by_name.values() for part in slices]
    base = _base(data, "mergekit file")
    tokenizer = _tokenizer(data)
    used = [location for part in every for location in (part.made.base, *part.made.sources)]
    if tokenizer == "base":
        tokenizer = base or every[0].made.sources[0]
    tokens = _tokens(data)
    named = (base, *used, tokenizer, *(row.model for row in tokens.values()))
    locations = list(dict.fromkeys(location for location in named if location and location != UNION))
    places = {location: resolved(location, root) for location in locations}
    names = _names(places)
    headers = Headers(places, tensors, base)
    parts = _by_module(by_name, headers, locations[0])
    slices = parts[TEXT]
    pattern_location = locations[0] if tokenizer is None or tokenizer == UNION else tokenizer
    num_layers = _num_layers(slices, headers, pattern_location)
    pattern = tokenizer or base
    chat_template = _chat_template(data, names, base, root)
    if any(methods.get(part.made.method).uses_base(base) and part.made.base is None for part in every):
        base = None  # groups without a base then have none, and the others name their own
    return Recipe(
        models={names[location]: place for location, place in places.items()},
        base=names[base] if base else None,
        groups=groups(parts, names, base, headers),
        dtype=_dtype(data, headers, locations[0]),
        tokenizer=names.get(pattern, UNION) if pattern and (tokenizer or base is None) else "",
        chat_template=chat_template,
        seed=seed,
        num_layers=num_layers,
        pad_rows=_pad_rows(data),
        tokens={
            token: replace(row, model=names[row.model] if row.model else None)
            for token, row in tokens.items()
        },
    )


def check(data: object) -> None:
    """Raise ConfigError for what is wrong in parsed YAML, as far as the models are not needed to see it."""
    checked, _ = _checked_data(data, lambda _: None)
    _tokenizer(checked)
    _pad_rows(checked)
    _tokens(checked)
    _check_dtypes(checked)


def _checked_data(
    data: object, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Sequence[Slice]]]:
    """Return a file's data without ignored keys, and module -> slices."""
    data = _mapping(data, "mergekit file")
    if "merge_method" not in data:
        _checked(data, ENTRIES["file"], "mergekit file")
        raise ConfigError("mergekit file: missing key 'merge_method'")
    method = methods.get(str(data["merge_method"]))
    data, ignored = without_ignored(data, method)
    for note in ignored:
        say(note)
    _checked(data, ENTRIES["file"], "mergekit file")
    if method.name in OURS:
        raise ConfigError(f"mergekit file: mergekit has no method {method.name}", fix="write a recipe.yaml")
    return data, {name: placed(slices) for name, slices in _slices(data, method).items()}


def _num_layers(slices: Sequence[Slice], headers: Headers, pattern_location: str) -> int | None:
    """Return the number of layers of the result, or None if it is that of the tokenizer's model."""
    if slices[0].length is None:
        return None
    num_layers = slices[-1].start + (slices[-1].length or 0)
    if num_layers == 0:
        raise ConfigError("mergekit file: no layers in any slice", expected="a slice with layers")
    if num_layers > LAYERS:
        raise ConfigError(
            "mergekit file: too many layers", expected=f"at most {LAYERS} in all slices", got=str(num_layers)
        )
    try:
        check_ranges(slices, headers)
        if num_layers == headers.layout(pattern_location).num_layers:
            return None
    except ModelError:
        pass  # the models are not on this machine; merging checks the layers again
    return num_layers


def _by_module(
    by_name: Mapping[str, Sequence[Slice]], headers: Headers, location: str
) -> dict[str, Sequence[Slice]]:
    """Return module -> slices, from the names in the file; "" (a file without modules) is the text decoder.

    mergekit calls modules as its definition of an architecture does, or, without a definition, by the start
    of their layers' names, and `default` (`REST`) the rest.
    """
    if len(by_name) == 1 and "" in by_name:
        return {TEXT: by_name[""]}
    tensors = headers.names(location)
    there = (TEXT, *beside_text(tensors))
    if len(by_name) == len(there) == 1:
        return {TEXT: next(iter(by_name.values()))}
    starts = [name for name in by_name if any(tensor.startswith(f"{name}.") for tensor in tensors)]
    if REST in by_name and starts and len(starts) + 1 == len(by_name):
        text = [name for name in starts if f"{name}." in decoders(tensors)]
        return {TEXT: by_name[text[0] if text else REST], **by_name}
    found: dict[str, Sequence[Slice]] = {}
    for name, slices in by_name.items():
        inside = next((module_of(tensor) for tensor in tensors if tensor.startswith(f"{name}.")), None)
        module = name if name in there else TEXT if name in TEXT_NAMES else inside
        if module is None or module in found:
            raise ConfigError(
                f"mergekit file: modules.{name} is "
                + ("no module of the model" if module is None else f"{module}, as another entry is"),
                fix=nearest(name, there),
            )
        found[module] = slices
    if missing := [module for module in there if module not in found]:
        raise ConfigError(
            "mergekit file: modules does not say how every module is made",
            expected=", ".join(there),
            got=f"nothing for {', '.join(missing)}",
            fix=f"add {missing[0]}, e.g. with the base as its only model",
        )
    return found


def _slices(data: Mapping[str, Any], method: Method) -> dict[str, list[Slice]]:
    """Return module ("" without modules) -> slices whose shifts are still the sources' first layers."""
    keys = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(keys) != 1:
        raise ConfigError(
            "mergekit file: nothing to merge, or several lists",
            expected="exactly one of models, slices, modules",
            got=", ".join(keys) or "none of them",
        )
    levels = [_parameters(data, method, "parameters")]
    if keys != ["modules"]:
        return {"": _module(data, _base(data, "mergekit file"), method, levels, "")}
    if not isinstance(data["modules"], Mapping):
        raise ConfigError(
            "mergekit file: modules", expected="module: models or slices", got=str(data["modules"])[:80]
        )
    parts = {}
    for name, module in data["modules"].items():
        where = f"modules.{name}."
        content = _checked(module, ENTRIES["module"], f"mergekit file: modules.{name}")
        inner = [_parameters(content, method, f"{where}parameters"), *levels]
        parts[str(name)] = _module(content, _base(data, "mergekit file"), method, inner, where)
    return parts


def _module(
    content: Mapping[str, Any], base: str | None, method: Method, levels: Sequence[Conditions], where: str
) -> list[Slice]:
    """Return the slices of a module, or of the whole file. where: the module's place with a dot, or ""."""
    if content.get("models"):
        entries = _list(content["models"], f"{where}models")
        return [_slice(entries, base, method, levels, f"{where}models", ranged=False, alone=bool(where))]
    slices = []
    for index, entry in enumerate(_list(content.get("slices"), f"{where}slices")):
        place = f"{where}slices[{index}]"
        part = _checked(entry, ENTRIES["slice"], f"mergekit file: {place}")
        entries = _list(part.get("sources"), f"{place}.sources")
        slice_base = _base(part, f"mergekit file: {place}") or base
        inner = [_parameters(part, method, f"{place}.parameters"), *levels]
        slices.append(_slice(entries, slice_base, method, inner, f"{place}.sources", ranged=True))
    return slices


def _slice(
    listed: Sequence[Any],
    base: str | None,
    method: Method,
    levels: Sequence[Conditions],
    where: str,
    *,
    ranged: bool,
    alone: bool = False,
) -> Slice:
    """Return one slice. ranged: whether its sources have a layer_range. alone: whether mergekit copies the
    only model of a list."""
    valid = ENTRIES["source" if ranged else "model"]
    entries, lengths = [], []
    for index, source in enumerate(listed):
        place = f"{where}[{index}]"
        entry = _checked(source, valid, f"mergekit file: {place}")
        model = _location(entry.get("model"), f"mergekit file: {place}: model")
        parameters = _parameters(entry, method, f"{place}.parameters")
        start, end = _layer_range(entry, place) if ranged else (0, None)
        entries.append(_Entry(model=model, parameters=parameters, start=start))
        lengths.append(None if end is None else end - start)
    if len(set(lengths)) > 1:
        ranges = [
            f"{e.model} [{e.start}, {e.start + (n or 0)}]" for e, n in zip(entries, lengths, strict=True)
        ]
        raise ConfigError(
            f"mergekit file: {where}: the sources of a slice have different numbers of layers",
            expected="layer_ranges of the same length",
            got=", ".join(ranges),
        )
    if (ranged or alone) and _copies_its_source(method, entries, base):
        made = Made(method="passthrough", sources=(entries[0].model,), shift=(entries[0].start,), base=None)
        return Slice(length=lengths[0], made=made, conditions={"scale": (((None, (1.0,)),),)})
    made, entries = _roles(method, entries, base, levels, where, ranged=ranged)
    conditions = {}
    for name, parameter in method.parameters.items():
        chains = [entry.parameters.get(name, ()) for entry in entries] if parameter.per_source else [()]
        outer = tuple(c for level in levels for c in level.get(name, ()))
        conditions[name] = tuple((*chain, *outer, (None, (parameter.default,))) for chain in chains)
    return Slice(length=lengths[0], made=made, conditions=conditions)


def _copies_its_source(method: Method, entries: Sequence[_Entry], base: str | None) -> bool:
    """Say whether mergekit copies a slice's only source, which is read as a `passthrough` group.

    This is mergekit's grammar. For tensor groups see `TensorGroup.copied_source`.
    """
    if len(entries) != 1:
        return False
    return method.name in COPYING or (method.uses_base(base) and entries[0].model == base)


def _roles(
    method: Method,
    entries: list[_Entry],
    base: str | None,
    levels: Sequence[Conditions],
    where: str,
    *,
    ranged: bool,
) -> tuple[Made, list[_Entry]]:
    """Separate the base model from the sources, or make it slerp's first source (t = 0).

    mergekit adds a base that is not listed to `models`, where methods that need no base average it like any
    other model, but not to the sources of slices.
    """
    where = f"mergekit file: {where}"
    listed = [entry for entry in entries if entry.model == base]
    group_base, base_start = base if method.uses_base(base) else None, 0
    if (
        group_base is not None
        and ranged
        and not listed
        and not method.needs_base
        and method.name != "nuslerp"
    ):
        group_base = None
    if group_base is not None:
        entries = [entry for entry in entries if entry.model != base]
        starts = {entry.start for entry in listed or entries}
        if len(listed) > 1 or len(starts) > 1:
            raise ConfigError(
                f"{where}: the layers at which the base {base} is read are not clear",
                expected="the base listed once among the sources, with its layer_range",
                got=f"listed {len(listed)} times",
            )
        base_start = starts.pop() if starts else 0
    elif method.name == "slerp":
        if base is None:
            raise ConfigError(f"{where}: slerp needs base_model, the model at t = 0")
        first = listed[0] if listed else _Entry(model=base, parameters={})
        entries = [first, *(entry for entry in entries if entry is not first)]
    elif base is not None and not ranged and not listed and method.max_sources != len(entries):
        if "weight" in method.parameters and not any("weight" in level for level in levels):
            raise ConfigError(
                f"{where}: {method.name} averages base_model with the models, but base_model has no weight",
                expected=f"{base} among the models with a weight, or no base_model",
            )
        entries = [*entries, _Entry(model=base, parameters={})]
    made = Made(
        method=method.name,
        sources=tuple(entry.model for entry in entries),
        shift=tuple(entry.start for entry in entries),
        base=group_base,
        base_shift=base_start,
    )
    return made, entries


def _parameters(data: Mapping[str, Any], method: Method, where: str) -> dict[str, tuple[Condition, ...]]:
    """Return parameter -> ordered conditions of one level of the file."""
    conditions: dict[str, tuple[Condition, ...]] = {}
    where = f"mergekit file: {where}"
    for name, setting in _mapping(data.get("parameters"), where).items():
        declared = method.parameter(str(name), where)
        conditions[name] = _conditions(setting, f"{where}.{name}")
        if declared.kind == "flag":  # mergekit takes 0 and 1 as well
            conditions[name] = tuple(
                (p, tuple(bool(v) if v in (0, 1) else v for v in vs)) for p, vs in conditions[name]
            )
    return conditions


def _conditions(setting: object, where: str) -> tuple[Condition, ...]:
    if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
        conditions: list[Condition] = []
        for entry in setting:
            item = _checked(entry, ("filter", "value"), where)
            if "value" not in item:
                raise ConfigError(f"{where}: a filter without value")
            part = item.get("filter")
            conditions.append((None if part in (None, "*") else str(part), _values(item["value"], where)))
        return tuple(conditions)
    return ((None, _values(setting, where)),)


def _values(value: object, where: str) -> tuple[Any, ...]:
    values = [_number(number) for number in (value if isinstance(value, list) else [value])]
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not values or not numbers or (len(values) > 1 and any(isinstance(v, bool) for v in values)):
        raise ConfigError(where, expected="a number, a list of numbers, or filters", got=repr(value)[:200])
    return tuple(values)


def _number(value: object) -> object:
    """Return a text like `1e-5`, which YAML 1.1 doesn't read as a number, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _layer_range(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    bounds = entry.get("layer_range")
    whole = isinstance(bounds, list) and len(bounds) == 2 and all(type(v) is int for v in bounds)
    if not whole or not 0 <= bounds[0] <= bounds[1] <= LAYERS:  # type: ignore[index]
        raise ConfigError(
            f"mergekit file: {where}: layer_range",
            expected=f"[first, end] with 0 <= first <= end <= {LAYERS}",
            got=repr(bounds)[:80],
        )
    return bounds[0], bounds[1]  # type: ignore[index]


def _names(places: Mapping[str, str]) -> dict[str, str]:
    """Return location -> a short name: its last part, with a number if it is taken or is `union`.

    places: location -> the same where it exists on the disk. A hub id's revision is no part of its name.
    """
    names: dict[str, str] = {}
    taken = {UNION}
    numbers: dict[str, int] = {}
    for location, place in places.items():
        last = location.rpartition("+")[2]
        found = None if is_local(place.rpartition("+")[2]) else split_id(last)
        stem = Path(found[0] if found else last).name or location
        name, number = stem, numbers.get(stem, 2)
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        names[location], numbers[stem] = name, number
        taken.add(name)
    return names


def resolved(location: str, root: str | Path | None) -> str:
    """Return a location with those of its parts that exist below `root` as paths from there."""
    parts = location.split("+")
    if root is not None:
        parts = [str(Path(root) / part) if (Path(root) / part).exists() else part for part in parts]
    return "+".join(parts)


def _base(data: Mapping[str, Any], where: str) -> str | None:
    location = data.get("base_model")
    return None if location is None else _location(location, f"{where}: base_model")


def _location(location: object, where: str) -> str:
    """Return a model's location, written as text or as mergekit's mapping of `model` and `lora`."""
    if isinstance(location, dict) and "model" in location:
        parts = _checked(location, ("model", "lora"), where)
        return "+".join(_location(parts[key], where) for key in ("model", "lora") if parts.get(key))
    if isinstance(location, dict) and "path" in location:
        parts = _checked(location, ("path", "revision"), where)
        place, revision = _location(parts["path"], where), parts.get("revision")
        return place if revision is None else f"{place}@{_location(revision, f'{where}: revision')}"
    if not isinstance(location, str) or not location:
        raise ConfigError(where, expected="a path or hub id", got=repr(location)[:80])
    return location


def _check_dtypes(data: Mapping[str, Any]) -> None:
    for key in ("dtype", "out_dtype"):
        if data.get(key) is not None and data[key] not in DTYPES:
            raise ConfigError(f"mergekit file: {key}: {data[key]!r}", fix=nearest(str(data[key]), DTYPES))


def _dtype(data: Mapping[str, Any], headers: Headers, location: str) -> str:
    _check_dtypes(data)
    dtype = data.get("out_dtype") or data.get("dtype")
    return str(dtype) if dtype else headers.dtype(location)


def _tokenizer(data: Mapping[str, Any]) -> str | None:
    """Return `base`, `union` or the location of the tokenizer's model; None if the file has no such key."""
    source = data.get("tokenizer_source")
    if data.get("tokenizer") is not None:
        tokenizer = _checked(data["tokenizer"], TOKENIZER, "mergekit file: tokenizer")
        source = tokenizer.get("source")
    if source is not None and not isinstance(source, str):
        raise ConfigError(
            "mergekit file: tokenizer_source", expected="base, union, or a model", got=repr(source)
        )
    return source


def _tokens(data: Mapping[str, Any]) -> dict[str, TokenRow]:
    """Return token -> where its row comes from, models by location."""
    tokenizer = data.get("tokenizer")
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, Mapping) else None
    rows: dict[str, TokenRow] = {}
    for token, listed in _mapping(tokens or {}, "mergekit file: tokenizer.tokens").items():
        place = f"mergekit file: tokenizer.tokens[{token!r}]"
        entry = _checked(listed, ("source", "force"), place)
        source, force = entry.get("source"), entry.get("force", False)
        fields: dict[str, Any] = {"model": source}
        if isinstance(source, Mapping):
            fields = _token_source(source, f"{place}.source")
        elif source is None:
            raise ConfigError(
                f"{place}: no source", expected="a model, {kind: zero}, or {kind: model_token, ...}"
            )
        given = {key: value for key, value in fields.items() if value is not None}
        rows |= token_rows({str(token): given | {"force": force}}, "mergekit file: tokenizer.tokens")
    return rows


def _token_source(source: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = source.get("kind")
    if kind == "zero":
        _checked(source, ("kind",), place)
        return {}
    if kind != "model_token":
        raise ConfigError(f"{place}: kind", expected="zero or model_token", got=repr(kind)[:80])
    _checked(source, ("kind", "model", "token", "token_id"), place)
    token, row = source.get("token"), source.get("token_id")
    if not source.get("model") or (token is None) == (row is None):
        raise ConfigError(
            place, expected="model, and one of token and token_id", got=repr(dict(source))[:120]
        )
    return {"model": source["model"], "token": token, "row": row}


def _chat_template(
    data: Mapping[str, Any], names: Mapping[str, str], base: str | None, root: str | Path | None
) -> str:
    """Return a recipe's `chat_template`; models are named by location or by name."""
    choice = data.get("chat_template")
    if choice is not None and not isinstance(choice, str):
        raise ConfigError(
            "mergekit file: chat_template",
            expected="base, a model, auto, a built-in template or a .jinja file",
            got=repr(choice)[:80],
        )
    if not choice or choice in names:
        return names.get(choice or "", "")
    if choice == "base" and base is not None:
        return names[base]
    return with_text(choice, Path(root or "."), names.values())


def _pad_rows(data: Mapping[str, Any]) -> int:
    """Return the multiple to which embedding rows are padded, 0 without one."""
    tokenizer = data.get("tokenizer")
    pad = tokenizer.get("pad_to_multiple_of") if isinstance(tokenizer, Mapping) else None
    if pad is not None and (type(pad) is not int or not 1 <= pad <= 2**20):
        raise ConfigError(
            "mergekit file: tokenizer.pad_to_multiple_of",
            expected="a whole number from 1 to 1048576",
            got=repr(pad)[:80],
        )
    return pad or 0


def _checked(data: object, valid: Sequence[str], where: str) -> dict[str, Any]:
    for key in (checked := _mapping(data, where)):
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}", fix=nearest(str(key), valid))
    return checked


def _mapping(data: object, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(where, expected="a mapping", got=type(data).__name__)
    return data


def _list(data: object, where: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise ConfigError(f"mergekit file: {where}", expected="a list", got=repr(data)[:80])
    return data
