"""Write a recipe as mergekit YAML, or say why it can't be said there.

One method for all groups; runs of layers with equal groups become slices, names become filters, and the
tensors outside the layers are filtered by their full names. What is written is read back and compared
tensor by tensor, so nothing wrong is ever written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from evomerge.errors import ConfigError
from evomerge.merging import mergekit, methods
from evomerge.merging.recipe import Recipe, Setting, TensorGroup, layer_of
from evomerge.merging.source import open_source

Branch = tuple[str | None, TensorGroup]
"""A filter (None: everything else) and the group it leads to."""


def write(recipe: Recipe, tensors: Iterable[str] | None = None) -> str:
    """Return mergekit YAML that makes the same model, or raise ConfigError.

    tensors: names of the model's tensors; where a recipe has more than one group and they are not given,
    they are read from the headers of the tokenizer's model. Left out, because mergekit takes them from
    elsewhere: the seed of random masks (its command line).
    """
    used = {group.method for group in recipe.groups}
    if len(used) > 1:
        raise _inexpressible("one file has one merge method", f"methods {', '.join(sorted(used))}")
    if ours := used & set(mergekit.OURS):
        raise _inexpressible("a method of mergekit's", ", ".join(sorted(ours)))
    if len(recipe.groups) == 1 and recipe.groups[0].layers is None and not recipe.groups[0].match:
        names: tuple[str, ...] = ()
        data = _head(recipe) | {"models": _models(recipe, [(None, recipe.groups[0])])}
        data["parameters"] = _shared([(None, recipe.groups[0])])
    else:
        below = recipe.models[recipe.base] if recipe.base else None
        opened = tensors or open_source(recipe.models[recipe.tokenizer], base=below).headers
        names = tuple(opened)
        data = _head(recipe) | {"slices": _slices(recipe, names)}
    text = yaml.safe_dump(
        {key: value for key, value in data.items() if value}, sort_keys=False, default_flow_style=None
    )
    _verify(recipe, text, names)
    return text


def _head(recipe: Recipe) -> dict[str, Any]:
    method = recipe.groups[0].method
    data: dict[str, Any] = {"merge_method": method}
    firsts = {group.sources[0] for group in recipe.groups}
    if method == "slerp":
        if len(firsts) > 1:
            raise _inexpressible("slerp has one base_model, its t = 0", f"{' and '.join(sorted(firsts))}")
        data["base_model"] = recipe.models[firsts.pop()]
    elif recipe.base and methods.get(method).uses_base(recipe.base):
        data["base_model"] = recipe.models[recipe.base]
    default = data.get("base_model") or recipe.models[recipe.groups[0].sources[0]]
    if recipe.models[recipe.tokenizer] != default:
        data["tokenizer_source"] = recipe.models[recipe.tokenizer]
    # Merging computes in float32 here; mergekit computes in `dtype`, so both are written.
    return data | {"dtype": "float32", "out_dtype": recipe.dtype if recipe.dtype != "float32" else None}


def _slices(recipe: Recipe, names: Sequence[str]) -> list[dict[str, Any]]:
    count = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    by_layer: dict[int | None, list[str]] = {layer: [] for layer in (None, *range(count))}
    for name in names:
        by_layer[layer_of(name)].append(name)
    outside: list[Branch] = [(name, recipe.group_for(name)) for name in by_layer.pop(None)]
    runs: list[tuple[int, int, list[Branch]]] = []
    for layer, members in sorted((layer, found) for layer, found in by_layer.items() if layer is not None):
        branches = _branches(recipe, members)
        if runs and runs[-1][2] == branches:
            runs[-1] = (runs[-1][0], layer + 1, branches)
        else:
            runs.append((layer, layer + 1, branches))
    if not runs:
        raise _inexpressible("slices of layers", "a model without layers")
    written = []
    for index, (start, end, inner) in enumerate(runs):
        branches = inner
        if index in (0, len(runs) - 1):
            branches = [*(each for each in outside if _falls_elsewhere(each, inner)), *inner]
        part: dict[str, Any] = {"sources": _models(recipe, branches, layers=(start, end))}
        if shared := _shared(branches):
            part["parameters"] = shared
        written.append(part)
    return written


def _branches(recipe: Recipe, members: Sequence[str]) -> list[Branch]:
    """Return the filters that lead the tensors of one layer to their groups, first match first."""
    reached = {id(recipe.group_for(name)) for name in members}
    branches: list[Branch] = []
    for group in recipe.groups:
        if id(group) in reached:
            branches += [(part, group) for part in group.match] or [(None, group)]
    return branches


def _falls_elsewhere(branch: Branch, branches: Sequence[Branch]) -> bool:
    """Say whether a tensor outside the layers would get other parameters from a layer's branches."""
    name, group = branch
    found = (g for part, g in branches if part is None or part in (name or ""))
    other = next(found, None)
    return other is None or (other.sources, other.parameters) != (group.sources, group.parameters)


def _models(
    recipe: Recipe, branches: Sequence[Branch], layers: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    sources = {group.sources for _, group in branches}
    if len(sources) > 1:
        raise _inexpressible(
            "the same sources for all tensors of a slice", f"{len(sources)} lists of sources"
        )
    names = sources.pop()
    if len({recipe.models[name] for name in names}) < len(names):
        raise _inexpressible("each source once", f"sources {', '.join(names)}")
    declared = methods.get(recipe.groups[0].method).parameters.values()
    per_source = [parameter.name for parameter in declared if parameter.per_source]
    entries = []
    for index, name in enumerate(names):
        entry: dict[str, Any] = {"model": recipe.models[name]}
        if layers is not None:
            entry["layer_range"] = list(layers)
        if per_source:
            entry["parameters"] = {
                p: _setting([(part, group.per_source(p)[index]) for part, group in branches])
                for p in per_source
            }
        entries.append(entry)
    return entries


def _shared(branches: Sequence[Branch]) -> dict[str, Any]:
    declared = methods.get(branches[0][1].method).parameters.values()
    return {
        p.name: _setting([(part, group.parameters[p.name]) for part, group in branches])
        for p in declared
        if not p.per_source
    }


def _setting(values: Sequence[tuple[str | None, Setting]]) -> Any:
    if len({value for _, value in values}) == 1:
        return values[0][1]
    return [{"value": value} if part is None else {"filter": part, "value": value} for part, value in values]


def _verify(recipe: Recipe, text: str, names: Sequence[str]) -> None:
    """Read the text back and compare what every tensor is made of."""
    again = mergekit.read(text, seed=recipe.seed, tensors=names or None)
    for name in names or ("",):
        ours, theirs = (_made_of(each, name) for each in (recipe, again))
        if ours != theirs:
            raise _inexpressible(f"{name or 'all tensors'} made by {ours}", f"{theirs} when read back")


def _made_of(recipe: Recipe, name: str) -> tuple[Any, ...]:
    group = recipe.group_for(name)
    base = recipe.base if methods.get(group.method).uses_base(recipe.base) else None
    locations = [recipe.models[each] for each in group.sources]
    parameters: Mapping[str, Setting] = dict(group.parameters)
    return group.method, locations, base and recipe.models[base], parameters, recipe.dtype


def _inexpressible(expected: str, got: str) -> ConfigError:
    return ConfigError(
        "this recipe can't be written as mergekit YAML",
        expected=expected,
        got=got,
        fix="use recipe.yaml: `evomerge merge recipe.yaml OUT`",
    )
