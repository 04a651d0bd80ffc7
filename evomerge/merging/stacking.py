"""The tensors that a recipe makes, and the config of the resulting model, also for stacked layers.

A group's layers may be other layers of its sources (`shift`), and a recipe may have more or fewer layers
than its sources (`num_layers`). Tensor names and the config's lists say which layers there are.

A list of kinds that the config leaves to its class is written out. Not covered: kinds that transformers
computes from a layer's number alone (`first_k_dense_replace`); a stack that breaks them is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.modules import decoders, layer_of, shifted
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import natural_order
from evomerge.merging.sources.model_config import COUNTS, completed, text_part, with_text_part
from evomerge.merging.sources.source import Source, copied_place
from evomerge.merging.sources.tensorfile import Header

NOT_PER_LAYER = ("architectures", "_token_id", "_token_ids", "_section")
"""Endings of config keys whose lists are not per layer, even if their length is the number of layers."""

INDICES = ("mlp_only_layers", "hybrid_layer_ids", "attn_layer_indices")
"""Config keys that list the indices of the layers of one kind."""

PER_LAYER = "per_layer"
"""In the names of tensors outside the layers that have a part for each layer, as in Gemma 3n and Gemma 4."""

BY_LAYER = ("per_layer_config",)
"""Config keys that map the indices of some layers to their entries."""


def output_headers(recipe: Recipe, sources: Mapping[str, Source]) -> dict[str, Header]:
    """Return the headers of the tensors a recipe makes: output name -> shape and type as in a source.

    A layer has the tensors of the first source of its groups, renamed, so layers may have different modules.

    Raises:
        ConfigError: no group makes a layer or a tensor, or a source lacks a layer that is read.
        ModelError: tensors of different shapes would be merged.
    """
    pattern = sources[recipe.pattern]
    if not recipe.stacked:
        copies = {name: _copied(recipe, name, sources, pattern.copied[name]) for name in pattern.copied}
        made = {**pattern.headers, **copies}
        return {name: made[name] for name in sorted(made, key=natural_order)} if copies else made
    for model, opened in sources.items():
        if len(starts := decoders(opened.headers)) > 1:
            raise ModelError(
                f"the layers of {model!r} can't be stacked or shifted",
                expected="one list of layers in its text decoder",
                got=", ".join(starts),
            )
        if parts := [name for name in opened.headers if layer_of(name) is None and PER_LAYER in name]:
            raise ModelError(
                f"the layers of {model!r} can't be stacked or shifted",
                expected="no tensor outside the layers with a part for each of them",
                got=", ".join(parts),
            )
    count = pattern.num_layers if recipe.num_layers is None else recipe.num_layers
    every = {name: {**source.headers, **source.copied} for name, source in sources.items()}
    names = output_names(recipe, every, count)
    headers = {}
    for name in names:
        group = recipe.group_for(name)
        if (place := copied_place(recipe, name, sources)) is not None:
            headers[name] = every[place[0]][place[1]]
            continue
        reads = list(group.reads(name))
        if (base := recipe.base_of(group)) is not None:
            reads.append((base, shifted(name, group.base_shift)))
        for (source, tensor), shift in zip(reads, (*group.shifts, group.base_shift), strict=False):
            if tensor not in sources[source].headers:
                raise _missing(name, source, shift, sources[source].num_layers)
        first, tensor = reads[0]
        headers[name] = sources[first].headers[tensor]
        for source, other in reads[1:]:
            shape = sources[source].headers[other].shape
            if shape != headers[name].shape:
                raise ModelError(
                    f"tensor {name!r} of the result would merge tensors of different shapes",
                    expected=f"{list(headers[name].shape)} as {tensor!r} of {first}",
                    got=f"{list(shape)}, {other!r} of {source}",
                )
    return headers


def _copied(recipe: Recipe, name: str, sources: Mapping[str, Source], header: Header) -> Header:
    place = copied_place(recipe, name, sources)
    return header if place is None else sources[place[0]].copied[place[1]]


def output_names(recipe: Recipe, names: Mapping[str, Iterable[str]], num_layers: int) -> list[str]:
    """Return the names of the tensors of the result, in natural order.

    names: for each model, the names of its tensors. Raises ConfigError for a layer without tensors, and
    for a tensor that no group makes.
    """
    by_layer: dict[str, dict[int | None, list[str]]] = {}
    for model, tensors in names.items():
        layers = by_layer.setdefault(model, {})
        for name in tensors:
            layers.setdefault(layer_of(name), []).append(name)
    made = list(by_layer[recipe.pattern].get(None, ()))
    for name in made:
        recipe.group_for(name)
    for layer in range(num_layers):
        inside: dict[str, None] = {}
        for group in _makers(recipe, layer):
            shift = group.shifts[0]
            for tensor in by_layer[group.sources[0]].get(layer + shift, ()):
                name = shifted(tensor, -shift)
                if recipe.group_for(name) is group:
                    inside[name] = None
        if not inside:
            raise _no_maker(
                recipe, layer, {model: max(filter(None, n), default=0) for model, n in by_layer.items()}
            )
        made += inside
    return sorted(made, key=natural_order)


def stacked_config(recipe: Recipe, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return the config.json of the result: that of the tokenizer's model, with its layers remapped.

    The number of layers becomes the recipe's. A list with one entry per layer takes each entry from the
    first source of the group that makes the layer's first tensor, and so do lists of layer indices. These are
    entries of the text decoder's part of the config.
    """
    config = dict(sources[recipe.pattern].config)
    if not recipe.stacked:
        return config
    origins: dict[int, tuple[str, int]] = {}
    for name in output_headers(recipe, sources):
        layer = layer_of(name)
        if layer is not None and layer not in origins:
            group = recipe.group_for(name)
            origins[layer] = (group.sources[0], layer + group.shifts[0])
    taken = [origins[layer] for layer in sorted(origins)]
    config = completed(config)
    text = text_part(config)
    if not any(key in text for key in COUNTS):
        raise ModelError(
            f"{sources[recipe.pattern].location}: config.json does not say how many layers the model has",
            expected=" or ".join(COUNTS),
            fix="layers of such a model can't be stacked or shifted",
        )
    parts = {name: text_part(completed(source.config)) for name, source in sources.items()}
    return with_text_part(config, _remapped(text, parts, taken))


def _remapped(
    config: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], taken: list[tuple[str, int]]
) -> dict[str, Any]:
    """Return a config with the layers `taken`, pairs of a source and its layer."""
    new = dict(config)
    num_layers = _count(config)
    for key, value in config.items():
        if key in COUNTS:
            new[key] = len(taken)
        elif key in INDICES and isinstance(value, list):
            new[key] = [i for i, (source, at) in enumerate(taken) if at in (configs[source].get(key) or ())]
        elif key in BY_LAYER and isinstance(value, Mapping):
            own = {i: (configs[source].get(key) or {}).get(str(at)) for i, (source, at) in enumerate(taken)}
            new[key] = {str(i): entries for i, entries in own.items() if entries is not None}
        elif isinstance(value, list) and len(value) == num_layers and not key.endswith(NOT_PER_LAYER):
            lists = {
                source: entries if isinstance(entries := configs[source].get(key), list) else value
                for source, _ in taken
            }
            if all(layer < len(lists[source]) for source, layer in taken):
                new[key] = [lists[source][layer] for source, layer in taken]
    return new


def _count(config: Mapping[str, Any]) -> int:
    return next(int(config[key]) for key in COUNTS if key in config)


def _makers(recipe: Recipe, layer: int) -> list[TensorGroup]:
    """Return the groups that may make a tensor of a layer; the last one takes all remaining tensors."""
    makers = []
    for group in recipe.groups_at(layer):
        makers.append(group)
        if not group.match:
            break
    return makers


def _missing(name: str, source: str, shift: int, num_layers: int) -> ConfigError:
    layer = layer_of(name)
    if layer is not None and not 0 <= layer + shift < num_layers:
        return ConfigError(
            f"recipe: layer {layer} of the result takes layer {layer + shift} of {source}",
            expected=f"a layer from 0 to {num_layers - 1}, which {source} has",
            got=str(layer + shift),
        )
    return ConfigError(
        f"recipe: {name!r} of the result takes {shifted(name, shift)!r} of {source}",
        got="no such tensor there",
    )


def _no_maker(recipe: Recipe, layer: int, last: Mapping[str, int]) -> ConfigError:
    makers = _makers(recipe, layer)
    reach = [(group.sources[0], layer + group.shifts[0]) for group in makers]
    return ConfigError(
        f"recipe: no group makes layer {layer} of the result",
        expected="a group whose layers include it, and whose first source has the layer that is read",
        got=", ".join(f"layer {at} of {name}, which has layers 0 to {last[name]}" for name, at in reach)
        or f"no group for layer {layer}",
        fix="add the layer to a group, or set num_layers",
    )
