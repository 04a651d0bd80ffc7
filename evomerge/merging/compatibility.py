"""Check from headers and JSON files, before weights are read, whether a recipe can merge its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging import methods
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources import measured_files
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.beside import unwrapped
from evomerge.merging.sources.checkpoint import HEADS
from evomerge.merging.sources.experts import Matched
from evomerge.merging.sources.model_config import COUNTS, text_part
from evomerge.merging.sources.pieces import KINDS, other_tokens
from evomerge.merging.sources.source import Source, Wrapped, same_base
from evomerge.merging.sources.tensorfile import Header
from evomerge.merging.sources.vocabulary import Aligned
from evomerge.merging.stacking import output_headers, stacked_config
from evomerge.merging.tensors.application import apply, arguments

FLOATS = ("F64", "F32", "BF16", "F16")
SAME = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "num_experts_per_tok",
)
"""Config entries that change what the same weights compute; merged models must have equal ones."""
NOTED = ("rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "sliding_window", "bos_token_id")
"""Config entries that fine-tunes sometimes change; the result has those of the tokenizer's model."""


def check(recipe: Recipe, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Check everything that can be known before the first weight is read.

    Args:
        recipe: the recipe to check.
        sources: opened models by name, at least those that the recipe uses.

    Returns:
        Notes for the user, e.g. that the models are stored in different types.

    Raises:
        ModelError: the models do not fit each other.
        ConfigError: the recipe does not fit the models.
    """
    names = tuple(dict.fromkeys((recipe.pattern, *recipe.used_models())))
    for name in names:
        if name not in sources:
            raise ConfigError(f"recipe: model {name!r} was not opened", fix=nearest(name, sources))
    check_fingerprints(recipe, {name: sources[name] for name in names})
    notes = check_models({name: sources[name] for name in names}, stacked=recipe.stacked)
    _check_groups(recipe, sources)
    for kind in FILES:
        if any(isinstance(sources[name], Matched) for name in recipe.used_files(kind)):
            raise ConfigError(
                f"recipe: {kind} files can't be used for models whose experts are matched",
                expected="experts in one order, because these files keep their model's order",
                fix="use another method, or `experts: stored`",
            )
    if any(isinstance(sources[name], Aligned) for name in recipe.used_files("fisher")):
        raise ConfigError(
            "recipe: method fisher can't merge models whose embedding rows are matched by token",
            expected="sources with the same vocabulary, because Fisher files keep their model's rows",
            got="sources with different vocabularies",
            fix="use another method, or merge models that share a tokenizer",
        )
    prints = {name: sources[name].fingerprint for kind in FILES for name in recipe.used_files(kind)}
    measured_files.check(recipe, sources[recipe.pattern].headers, prints)
    return notes


def check_fingerprints(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Refuse models whose files are not those the recipe was written for, if it has their fingerprints.

    Args:
        recipe: with or without `fingerprints`.
        sources: opened models by name.

    Raises:
        ModelError: it names the models and the location of each.
    """
    changed = [
        name
        for name, fingerprint in recipe.fingerprints.items()
        if name in sources and sources[name].fingerprint != fingerprint
    ]
    if changed:
        raise ModelError(
            "model files changed since the recipe was written, so the merge would have other weights",
            expected="the files whose `fingerprints` the recipe holds",
            got="; ".join(f"{name}: {sources[name].location}" for name in changed),
            fix="restore these files, or delete `fingerprints` from the recipe to merge the present ones",
        )


def with_fingerprints(recipe: Recipe, sources: Mapping[str, Source]) -> Recipe:
    """Return the recipe with the fingerprints of the models it reads."""
    names = dict.fromkeys((*recipe.used_models(), recipe.pattern))
    return replace(recipe, fingerprints={name: sources[name].fingerprint for name in names})


def check_models(sources: Mapping[str, Source], *, stacked: bool = False) -> tuple[str, ...]:
    """Check that models have the same architecture, tensors and vocabulary; return notes for the user.

    All models are compared with the first.

    Args:
        sources: opened models by name.
        stacked: whether layers are combined freely. Then models may have different layers, and
            `stacking.output_headers` checks those that are combined.

    Raises:
        ModelError: the models do not fit each other.
    """
    pattern_name, pattern = next(iter(sources.items()))
    notes: list[str] = []
    pattern_config = _entries(pattern)
    for name, source in sources.items():
        pair = (name, source, pattern_name, pattern)
        _check_types(name, source)
        _check_architecture(*pair, stacked)
        _check_tensors(*pair, stacked)
        _check_vocabulary(*pair)
        _check_shapes(*pair, stacked)
        notes += _tokenizer_notes(*pair)
        notes += _copied_notes(*pair)
        notes += _wrapper_notes(source)
        notes += [
            f"{key} differs: {name} has {config[key]!r}, {pattern_name} {pattern_config[key]!r}"
            for config in [_entries(source)]
            for key in NOTED
            if key in config and key in pattern_config and config[key] != pattern_config[key]
        ]
    types = {name: "/".join(sorted({h.dtype for h in s.headers.values()})) for name, s in sources.items()}
    if len(set(types.values())) > 1:
        shown = ", ".join(f"{name} {dtype}" for name, dtype in types.items())
        notes.append(f"stored types differ ({shown}); merging computes in float32")
    return tuple(notes)


def _entries(source: Source) -> dict[str, Any]:
    """Return the entries of a config, those of the text decoder's part before others of the same key."""
    return {**source.config, **text_part(source.config)} | {
        key: source.config[key] for key in ("architectures", "model_type") if key in source.config
    }


def _check_types(name: str, source: Source) -> None:
    if "quantization_config" in source.config:
        raise ModelError(
            f"model {name!r} is quantised and can't be merged",
            expected="float weights",
            got=str(source.config["quantization_config"])[:100],
            fix=f"write it as float weights: evomerge import {source.location} OUT",
        )
    for tensor, header in source.headers.items():
        if header.dtype not in FLOATS:
            raise ModelError(
                f"model {name!r}: tensor {tensor!r} has a type that can't be merged",
                expected=", ".join(FLOATS),
                got=header.dtype,
                fix=f"write it as float weights: evomerge import {source.location} OUT",
            )


def _check_architecture(name: str, source: Source, pattern_name: str, pattern: Source, stacked: bool) -> None:
    config, pattern_config = _entries(source), _entries(pattern)
    keys = [k for k in SAME if k in config and k in pattern_config and not (stacked and k in COUNTS)]
    if config.get("architectures") and pattern_config.get("architectures"):
        keys.insert(0, "architectures")
    for key in keys:
        if config[key] != pattern_config[key]:
            raise ModelError(
                f"model {name!r} does not fit {pattern_name!r}: {key} differs",
                expected=f"{_shown(pattern_config[key])} as in {pattern_name} ({pattern.location})",
                got=f"{_shown(config[key])} in {name} ({source.location})",
                fix="merge models that were fine-tuned from the same base",
            )
    if source.tied != pattern.tied:
        tied, untied = (name, pattern_name) if source.tied else (pattern_name, name)
        if not any(tensor.endswith(HEADS) for tensor in (pattern if source.tied else source).headers):
            raise ModelError(
                f"model {untied!r} has no head",
                expected="one in its files, because its config.json says tie_word_embeddings: false",
                got=f"no tensor whose name ends in {' or '.join(HEADS)}",
                fix="download it again, or say true there if its head is its embeddings",
            )
        raise ModelError(
            f"model {name!r} does not fit {pattern_name!r}: only {tied} has its head tied to the embeddings",
            expected="all tied or all untied (tie_word_embeddings)",
            got=f"{untied} has a separate head",
            fix=f"save {tied} again with tie_word_embeddings=False and the head stored",
        )


def _check_tensors(name: str, source: Source, pattern_name: str, pattern: Source, stacked: bool) -> None:
    expected, names = (
        [tensor for tensor in model.headers if not stacked or layer_of(tensor) is None]
        for model in (pattern, source)
    )
    missing = [tensor for tensor in expected if tensor not in source.headers]
    extra = [tensor for tensor in names if tensor not in pattern.headers]
    if missing or extra:
        heads = any(tensor.endswith(HEADS) for tensor in missing + extra)
        raise ModelError(
            f"models {name!r} and {pattern_name!r} do not have the same tensors",
            expected=f"the {len(pattern.headers)} tensors of {pattern_name} ({pattern.location})",
            got="; ".join(
                f"{name} {verb} {_some(tensors)}"
                for verb, tensors in (("lacks", missing), ("also has", extra))
                if tensors
            ),
            fix="set tie_word_embeddings in the config of the model whose head is missing" if heads else None,
        )


def _check_shapes(name: str, source: Source, pattern_name: str, pattern: Source, stacked: bool) -> None:
    for tensor, header in source.headers.items():
        if stacked and layer_of(tensor) is not None:
            continue  # output_headers compares the layers that are combined
        if header.shape != pattern.headers[tensor].shape:
            raise ModelError(
                f"tensor {tensor!r} has another shape in {name!r} than in {pattern_name!r}",
                expected=f"{list(pattern.headers[tensor].shape)} as in {pattern_name} ({pattern.location})",
                got=f"{list(header.shape)} in {name} ({source.location})",
                fix="merge models that were fine-tuned from the same base",
            )


def _check_vocabulary(name: str, source: Source, pattern_name: str, pattern: Source) -> None:
    pair = source.vocabulary, pattern.vocabulary
    fix = "set the result's vocabulary: `tokenizer: base`, `tokenizer: union` or a model's name"
    if unwrapped(source).vocabulary is None or unwrapped(pattern).vocabulary is None:
        theirs, ours = other_tokens(source), other_tokens(pattern)
        kind = next((kind for kind in KINDS if kind in theirs and kind in ours), None)
        if kind is None:
            return  # `_tokenizer_notes` says so
        pair = theirs[kind][1], ours[kind][1]
        fix = "save both models' tokenizers as tokenizer.json (with transformers), then set `tokenizer`"
    rows, pattern_rows = pair
    if rows is None or pattern_rows is None or rows == pattern_rows:
        return
    differing = [token for token in pattern_rows if rows.get(token) != pattern_rows[token]]
    differing += [token for token in rows if token not in pattern_rows]
    shown = ", ".join(
        f"{token!r} is {_row(rows, token)} in {name} and {_row(pattern_rows, token)} in {pattern_name}"
        for token in differing[:3]
    )
    raise ModelError(
        f"models {name!r} and {pattern_name!r} have different vocabularies",
        expected="the same token for every row of the embeddings",
        got=f"{len(differing)} tokens differ: {shown}",
        fix=fix,
    )


def _tokenizer_notes(name: str, source: Source, pattern_name: str, pattern: Source) -> list[str]:
    """Say that two models' tokens can't be compared, where their tokenizers are of different kinds."""
    if unwrapped(source).vocabulary is not None and unwrapped(pattern).vocabulary is not None:
        return []
    files = [_tokenizer_files(model) for model in (source, pattern)]
    if not all(files) or other_tokens(source).keys() & other_tokens(pattern).keys():
        return []
    return [
        f"tokens can't be compared: {name} has {files[0]}, {pattern_name} {files[1]}; the merge takes "
        "embedding rows as they are"
    ]


def _wrapper_notes(source: Source | None) -> list[str]:
    """Return what is said of a model with other rows, another order of experts, or a head of its own."""
    notes: list[str] = []
    while isinstance(source, Wrapped):
        notes.append(source.note)
        source = source.source
    return notes


def _copied_notes(name: str, source: Source, pattern_name: str, pattern: Source) -> list[str]:
    """Say where two models have other whole numbers, which a merge takes from one of them."""
    if source is pattern:
        return []
    differing = [
        tensor
        for tensor in pattern.copied
        if tensor not in source.copied or not numpy.array_equal(source.array(tensor), pattern.array(tensor))
    ]
    if not differing:
        return []
    return [
        f"whole numbers differ between {name} and {pattern_name}, in {_some(differing)}; they are copied "
        f"from one model, here {pattern_name}, and not merged"
    ]


def _tokenizer_files(source: Source) -> str:
    known = ["tokenizer.json"] if unwrapped(source).vocabulary is not None else []
    return ", ".join([*known, *(file for file, _ in other_tokens(source).values())])


def _check_groups(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    pattern = sources[recipe.pattern]
    count = pattern.num_layers if recipe.num_layers is None else recipe.num_layers
    for group in recipe.groups:
        _check_layers(group, count)
    headers = output_headers(recipe, sources)
    for tensor in headers:
        recipe.group_for(tensor)
    for group in recipe.groups:
        _check_reach(group, pattern, headers)
        if methods.get(group.method).factored:
            _check_adapters(recipe, group, sources)
        _try(group)
    stacked_config(recipe, sources)


def _check_layers(group: TensorGroup, count: int) -> None:
    wrong = [layer for layer in group.layers or () if layer >= count]
    if wrong:
        raise ConfigError(
            f"recipe: group {group.label()!r} names layers the model does not have",
            expected=f"layers 0 to {count - 1}",
            got=", ".join(map(str, wrong)),
        )


def _check_reach(group: TensorGroup, pattern: Source, headers: Mapping[str, Header]) -> None:
    """Raise ConfigError for a group that matches no tensor, so that misspelt names are noticed."""
    reached = [part for part in group.match if any(part in tensor for tensor in headers)]
    heads = pattern.tied and any(part in head for part in group.match for head in HEADS)
    if group.match and not reached and not heads:
        raise ConfigError(
            f"recipe: group {group.label()!r} matches no tensor",
            fix=nearest(group.match[0], (*pattern.layout.modules, *pattern.layout.outside)),
        )


def _check_adapters(recipe: Recipe, group: TensorGroup, sources: Mapping[str, Source]) -> None:
    """Refuse sources of a method on low-rank updates that are not LoRA adapters on its base."""
    base = recipe.base_of(group)
    assert base is not None  # a recipe without the base it needs is refused
    for name in group.sources:
        source = sources[name]
        if not isinstance(source, AdaptedCheckpoint) or not same_base(source, sources[base]):
            raise ConfigError(
                f"recipe: {group.method} merges LoRA adapters on the base, and {name!r} is none",
                expected=f"{sources[base].location}+ADAPTER",
                got=source.location,
                fix="use another method, such as ties",
            )
    if isinstance(sources[base], AdaptedCheckpoint):
        raise ConfigError(
            f"recipe: {group.method} needs a whole model as its base",
            got=sources[base].location,
            fix="use another method, such as ties",
        )
    if any(shift != group.base_shift for shift in group.shifts):
        raise ConfigError(
            f"recipe: {group.method} adds updates to the layers that they were made for",
            expected=f"the shift of the base, {group.base_shift}, for all sources",
            got=", ".join(map(str, group.shifts)),
        )


def _try(group: TensorGroup) -> None:
    """Run the method on single numbers, so that it raises its errors for bad parameters now."""
    method = methods.get(group.method)
    settings = arguments(group, seed=0, tensor="")
    if method.blend is not None and method.blend(_Ones(len(group.sources)), **settings) is not None:
        return
    import torch

    ones = [torch.ones(1) for _ in group.sources]
    apply(group, torch.ones(1), ones, seed=0, tensor="", files=ones)


class _Ones:
    """Statistics of inputs that are all the number 1."""

    size = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def gram(self) -> list[list[float]]:
        return [[1.0] * self.count for _ in range(self.count)]


def _row(vocabulary: Mapping[str, int], token: str) -> str:
    return f"row {vocabulary[token]}" if token in vocabulary else "absent"


def _some(tensors: list[str]) -> str:
    return ", ".join(map(repr, tensors[:3])) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
