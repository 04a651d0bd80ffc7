"""Write a recipe as mergekit YAML, or raise an error that says what the format can't express.

A file has one method. Runs of layers with equal groups become slices, in which the base and every source
have a layer range. Name patterns become filters. Tensors outside the layers are filtered by their full
names, in the first slice (embeddings) and in the last. The text is read back and compared with the recipe
tensor by tensor, so a file that means something else is never returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.mergekit import reader
from evomerge.merging.mergekit.ignored import UNWEIGHTED
from evomerge.merging.mergekit.slices import compressed, is_before_layers
from evomerge.merging.methods import Parameter
from evomerge.merging.modules import TEXT, beside_text, layer_of, module_of, shifted
from evomerge.merging.recipe import STORED, Recipe, Setting, TensorGroup
from evomerge.merging.recipe_data import TokenRow
from evomerge.merging.sources.chat import chat_of
from evomerge.merging.sources.opening import open_used, with_chat_models
from evomerge.merging.stacking import output_names

Branch = tuple[str | None, TensorGroup]
"""A filter (None: everything else) and the group it leads to."""


def write(recipe: Recipe, tensors: Iterable[str] | None = None) -> str:
    """Return mergekit YAML that makes the same model.

    The seed of random masks is left out: mergekit takes it from its command line.

    Args:
        recipe: the recipe to write.
        tensors: names of the model's tensors, needed for recipes of several groups. By default they are
            read from the headers of the recipe's models.

    Returns:
        The text of a mergekit configuration.

    Raises:
        ConfigError: mergekit's format can't express the recipe.
        ModelError: the models can't be opened, where their tensor names are needed.
    """
    original, recipe = recipe, _with_plain_copies(recipe)
    used = {group.method for group in recipe.groups if group.copied_source is None}
    used = used or {group.method for group in recipe.groups}
    if len(used) > 1:
        raise _inexpressible("one merge method per file", f"methods {', '.join(sorted(used))}")
    if missing := used & set(reader.OURS):
        raise _inexpressible("a method that mergekit has", ", ".join(sorted(missing)))
    if recipe.experts != STORED:
        raise _inexpressible("experts in the order of the files", f"experts: {recipe.experts}")
    (method,) = used
    if method in UNWEIGHTED and not all(_plain(group) for group in recipe.groups):
        raise _inexpressible("weights and lambda of 1, because mergekit has none for this method", method)
    data = _head(recipe, method)
    names: tuple[str, ...] = ()
    source_names: tuple[str, ...] = ()
    whole_model = len(recipe.groups) == 1 and recipe.groups[0].layers is None and not recipe.groups[0].match
    if not whole_model or recipe.stacked:
        names, source_names = _names(original, tensors)
        decoder = [name for name in names if module_of(name) == TEXT]
        parts: dict[str, Any] = {"slices": _slices(recipe, method, decoder, data.get("base_model"))}
        if others := beside_text(names):
            written = {TEXT: parts}
            for module in others:
                inside = [name for name in names if module_of(name) == module]
                written[module] = _module(recipe, method, inside)
            parts = {"modules": written}
        data |= parts
        if method == "slerp" and any(group.copied_source is not None for group in recipe.groups):
            data["parameters"] = {"t": 0.0}  # mergekit requires one even where it copies
    else:
        data |= {"models": _models(recipe, method, [(None, recipe.groups[0])])}
        data["parameters"] = _shared([(None, recipe.groups[0])])
    text = yaml.safe_dump(
        {key: value for key, value in data.items() if value}, sort_keys=False, default_flow_style=None
    )
    _verify(recipe, text, names, source_names)
    return text


def _names(recipe: Recipe, tensors: Iterable[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the result's tensors, and those of the tokenizer's model."""
    if tensors is None:
        opened = {name: tuple(source.headers) for name, source in open_used(recipe).items()}
    else:
        opened = dict.fromkeys(recipe.models, tuple(tensors))
    source_names = opened[recipe.pattern]
    if not recipe.stacked:
        return source_names, source_names
    num_layers = recipe.num_layers or _num_layers(source_names)
    return tuple(output_names(recipe, opened, num_layers)), source_names


def _plain(group: TensorGroup) -> bool:
    """Say whether a group has no weights and no lambda other than 1."""
    weights = group.parameters.get("weight", ())
    return (
        set(weights if isinstance(weights, tuple) else ()) <= {1.0}
        and group.parameters.get("lambda", 1.0) == 1.0
    )


def _with_plain_copies(recipe: Recipe) -> Recipe:
    """Return the recipe with its copies written as `passthrough`, where its groups use several methods.

    In a file of another method, mergekit and the reader take a slice of one source as a copy; in one of
    `linear`, as its mean.
    """
    if len({group.method for group in recipe.groups}) == 1:
        return recipe
    merged = {group.method for group in recipe.groups if group.copied_source is None}
    copy: dict[str, Any] = {"method": "passthrough", "parameters": {}}
    if merged == {"linear"}:
        copy = {"method": "linear", "parameters": {"weight": 1.0}}
    groups = [group if group.copied_source is None else replace(group, **copy) for group in recipe.groups]
    return recipe.with_groups(groups, num_layers=recipe.num_layers)


def _head(recipe: Recipe, method: str) -> dict[str, Any]:
    data: dict[str, Any] = {"merge_method": method}
    bases = [_base(recipe, group) for group in recipe.groups if group.method == method]
    if bases[0] is not None and None not in bases:  # slices with another one name it themselves
        data["base_model"] = recipe.models[bases[0]]
    default = data.get("base_model") or recipe.models[recipe.groups[0].sources[0]]
    if recipe.tokenizer not in recipe.models:
        data["tokenizer_source"] = recipe.tokenizer
    elif recipe.models[recipe.tokenizer] != default:
        data["tokenizer_source"] = recipe.models[recipe.tokenizer]
    if template := _chat_template(recipe):
        data["chat_template"] = template
    if recipe.pad_rows or recipe.tokens:
        source = data.pop("tokenizer_source", default)
        tokens = {token: _token(row, recipe.models) for token, row in recipe.tokens.items()}
        settings = {"source": source, "pad_to_multiple_of": recipe.pad_rows, "tokens": tokens}
        data["tokenizer"] = {key: value for key, value in settings.items() if value}
    # evomerge merges in float32 and mergekit in `dtype`, so both types are written.
    return data | {"dtype": "float32", "out_dtype": recipe.dtype if recipe.dtype != "float32" else None}


def _token(row: TokenRow, models: Mapping[str, str]) -> dict[str, Any]:
    """Return mergekit's entry for the row of a token."""
    source: Any = {"kind": "zero"}
    if row.model is not None and row.token is None and row.row is None:
        source = models[row.model]
    elif row.model is not None:
        named = {"token_id": row.row} if row.token is None else {"token": row.token}
        source = {"kind": "model_token", "model": models[row.model], **named}
    return {"source": source, **({"force": True} if row.force else {})}


def _chat_template(recipe: Recipe) -> str | None:
    """Return mergekit's `chat_template`; of a model the default template's text, as it names no models."""
    if recipe.chat_template not in recipe.models:
        return recipe.chat_template or None
    return chat_of(with_chat_models(recipe, {})[recipe.chat_template]).templates.get("default")


def _module(recipe: Recipe, method: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the entry of a module beside the text decoder, whose layers are never moved."""
    branches: list[Branch] = [
        (part, group)
        for parts, group in compressed({name: recipe.group_for(name) for name in names})
        for part in parts
    ]
    if len({id(group) for _, group in branches}) == 1:
        branches = [(None, branches[0][1])]
    entry: dict[str, Any] = {"models": _models(recipe, method, branches)}
    if branches[0][1].method == method and (shared := _shared(branches)):
        entry["parameters"] = shared
    return entry


def _slices(
    recipe: Recipe, method: str, names: Sequence[str], base_model: str | None
) -> list[dict[str, Any]]:
    by_layer: dict[int | None, list[str]] = {layer: [] for layer in (None, *range(_num_layers(names)))}
    for name in names:
        by_layer[layer_of(name)].append(name)
    outside: list[Branch] = [(name, recipe.group_for(name)) for name in by_layer.pop(None)]
    runs: list[tuple[int, int, list[Branch]]] = []
    for layer, members in sorted(
        (layer, members) for layer, members in by_layer.items() if layer is not None
    ):
        branches = _branches(recipe, members)
        if runs and runs[-1][2] == branches:
            runs[-1] = (runs[-1][0], layer + 1, branches)
        else:
            runs.append((layer, layer + 1, branches))
    if not runs:
        raise _inexpressible("slices of layers", "a model without layers")
    written = []
    for index, (start, end, inner) in enumerate(runs):
        ends = [
            branch
            for branch in outside
            if is_before_layers(branch[0] or "") is (index == 0) or len(runs) == 1
        ]
        ends = ends if index in (0, len(runs) - 1) else []
        branches = [*(branch for branch in ends if _falls_elsewhere(branch, inner)), *inner]
        shifts = {(group.shifts, group.base_shift) for _, group in inner}
        if len(shifts) > 1:
            raise _inexpressible("one shift for all tensors of a layer", f"several in layer {start}")
        part: dict[str, Any] = {
            "sources": _models(recipe, method, branches, layers=(start, end), shift=shifts.pop())
        }
        if (base := _base(recipe, inner[0][1])) and recipe.models[base] != base_model:
            part["base_model"] = recipe.models[base]
        if shared := _shared(branches):
            part["parameters"] = shared
        written.append(part)
    first, last = (len(written[end]["sources"]) for end in (0, -1))
    if first < last:  # mergekit would silently leave them out of the final norm and the head
        raise _inexpressible("no more sources in the last slice than in the first", f"{last} after {first}")
    return written


def _base(recipe: Recipe, group: TensorGroup) -> str | None:
    """Return mergekit's base_model of a group: the base its method reads, or slerp's model at t = 0."""
    return group.sources[0] if group.method == "slerp" else recipe.base_of(group)


def _branches(recipe: Recipe, members: Sequence[str]) -> list[Branch]:
    """Return (filter, group) pairs for the tensors of one layer; the first match counts."""
    reached = {id(recipe.group_for(name)) for name in members}
    branches: list[Branch] = []
    for group in recipe.groups_at(layer_of(members[0])):
        if id(group) in reached:
            branches += [(part, group) for part in group.match] or [(None, group)]
    return branches


def _falls_elsewhere(branch: Branch, branches: Sequence[Branch]) -> bool:
    """Say whether a layer's branches would give a tensor outside the layers other parameters."""
    name, group = branch
    matching = (g for part, g in branches if part is None or part in (name or ""))
    other = next(matching, None)
    return other is None or (other.sources, other.parameters) != (group.sources, group.parameters)


def _models(
    recipe: Recipe,
    method: str,
    branches: Sequence[Branch],
    layers: tuple[int, int] | None = None,
    shift: tuple[tuple[int, ...], int] = ((), 0),
) -> list[dict[str, Any]]:
    sources = {(group.sources, _base(recipe, group)) for _, group in branches}
    if len(sources) > 1:
        raise _inexpressible(
            "the same sources for all tensors of a slice", f"{len(sources)} lists of sources"
        )
    names, base = sources.pop()
    if len({recipe.models[name] for name in names}) < len(names):
        raise _inexpressible("each source once", f"sources {', '.join(names)}")
    copied = branches[-1][1].method != method  # groups of another method than the file's are copies
    declared = () if copied else methods.get(method).parameters.values()
    per_source = [parameter.name for parameter in declared if parameter.per_source]
    entries = []
    for index, name in enumerate(names):
        entry: dict[str, Any] = {"model": recipe.models[name]}
        if layers is not None:
            entry["layer_range"] = [end + shift[0][index] for end in layers]
        if per_source:
            entry["parameters"] = {
                p: _setting([(part, group.per_source(p)[index]) for part, group in branches])
                for p in per_source
            }
        entries.append(entry)
    if layers is not None and base is not None and base not in names:
        ranged = [end + shift[1] for end in layers]
        entries.insert(0, {"model": recipe.models[base], "layer_range": ranged})
    return entries


def _shared(branches: Sequence[Branch]) -> dict[str, Any]:
    declared = methods.get(branches[0][1].method).parameters.values()
    return {
        p.name: _setting([(part, group.parameters[p.name]) for part, group in branches])
        for p in declared
        if not p.per_source and not _left_out(p, branches)
    }


def _left_out(parameter: Parameter, branches: Sequence[Branch]) -> bool:
    """Say whether a parameter has its default in all branches and is left out of recipes then."""
    values = {group.parameters[parameter.name] for _, group in branches}
    return parameter.omitted and values == {parameter.default}


def _setting(values: Sequence[tuple[str | None, Setting]]) -> Any:
    if len({value for _, value in values}) == 1:
        return values[0][1]
    return [{"value": value} if part is None else {"filter": part, "value": value} for part, value in values]


def _verify(recipe: Recipe, text: str, names: Sequence[str], tensors: Sequence[str]) -> None:
    """Read the text back and compare the sources and parameters of every tensor."""
    try:
        again = reader.read(text, seed=recipe.seed, tensors=tensors or None)
    except ConfigError as error:
        raise _inexpressible("a file that can be read back", error.what) from None
    if _num_layers(names) != (again.num_layers or _num_layers(tensors)):
        raise _inexpressible(f"{_num_layers(names)} layers", f"{again.num_layers} when read back")
    for name in names or ("",):
        written, read_back = (_made_of(source, name) for source in (recipe, again))
        if written != read_back:
            raise _inexpressible(f"{name or 'all tensors'} made by {written}", f"{read_back} when read back")


def _num_layers(names: Iterable[str]) -> int:
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def _made_of(recipe: Recipe, name: str) -> tuple[Any, ...]:
    group = recipe.group_for(name)
    base = recipe.base_of(group)
    reads = [(recipe.models[source], tensor) for source, tensor in group.reads(name)]
    below = None if base is None else (recipe.models[base], shifted(name, group.base_shift))
    return group.method, reads, below, dict(group.parameters), recipe.dtype


def _inexpressible(expected: str, got: str) -> ConfigError:
    return ConfigError(
        "this recipe can't be written as mergekit YAML",
        expected=expected,
        got=got,
        fix="use recipe.yaml: `evomerge merge recipe.yaml OUT`",
    )
