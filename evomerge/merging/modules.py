"""Modules of a model, and the layers of its text decoder, from the names of its tensors. No torch here.

A model has a text decoder, and may have other modules: towers that encode images or sound, projectors, heads
that predict further tokens. All of them can have numbered layers. The number of a *layer* is one of the text
decoder alone; the tensors of other modules are outside the layers, as embeddings are. `Checkpoint` compares
what the names say with the model's config.

>>> layer_of("model.language_model.layers.3.mlp.up_proj.weight"), module_of("model.norm.weight")
(3, 'text_decoder')
>>> layer_of("model.vision_tower.layers.3.mlp.fc1.weight"), module_of("visual.blocks.3.norm1.weight")
(None, 'vision_tower')
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable

TEXT, VISION, AUDIO, PROJECTOR = "text_decoder", "vision_tower", "audio_tower", "multi_modal_projector"
"""Names of modules; mergekit's, as far as it has such a module."""
NEXT_LAYERS = "nextn_layers"
"""How evomerge names layers that predict further tokens, if their files number them after the decoder's."""

_LIST = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,9})\.")
"""A numbered entry of a list of layers; the first one in a name counts."""
_NUMBERED = re.compile(r"\.(\d{1,9})\.")
_WORDS = (
    ("", "talker token2wav code2wav depth mtp nextn protein dit"),
    (PROJECTOR, "projector connector aligner merger mergers resampler perceiver qformer abstractor"),
    (VISION, "vision visual vit siglip clip sam image img video vq vqmodel vqgan"),
    (AUDIO, "audio speech asr sound acoustic semantic timestamp speaker spk codec wav"),
)
"""Words in the names of modules beside the text decoder; "": the module is called as in the file."""
_MODULES = {word: module for module, words in _WORDS for word in words.split()}
_ENCODERS = re.compile(r"(?:model\.)?encoder\.")
"""The start of the names of an encoder beside a text decoder (BERT-like decoders have a prefix before it)."""


@functools.cache
def layer_of(tensor: str) -> int | None:
    """Return the index of the text decoder's layer that a tensor belongs to, or None outside these layers.

    >>> layer_of("model.layers.11.mlp.down_proj.weight"), layer_of("model.norm.weight")
    (11, None)
    """
    match = _LIST.search(tensor)
    return int(match.group(1)) if match and _home(tensor) is None else None


@functools.cache
def module_of(tensor: str) -> str:
    """Return the name of the module a tensor belongs to; `text_decoder` for everything that is no other's.

    >>> module_of("lm_head.weight"), module_of("model.connector.proj.weight"), module_of("mtp.fc.weight")
    ('text_decoder', 'multi_modal_projector', 'mtp')
    """
    home = _home(tensor)
    return TEXT if home is None else home[0]


@functools.cache
def _home(tensor: str) -> tuple[str, str] | None:
    """Return (module, prefix of its tensors' names), or None for the text decoder."""
    if match := _ENCODERS.match(tensor):
        return "encoder", match.group()
    before = _NUMBERED.split(tensor, maxsplit=1)[0]  # parts of a layer are named like modules, too
    parts = before.split(".")
    ends = {
        _MODULES[word]: end
        for end in range(len(parts), 0, -1)
        for word in parts[end - 1].lower().split("_")
        if word in _MODULES
    }
    module = next((module for module, _ in _WORDS if module in ends), None)
    if module is None:
        return None
    end = ends[module]
    return module or "_".join(parts[:end]).removeprefix("model_"), ".".join(parts[:end]) + "."


def prefix_of(tensor: str) -> str:
    """Return the start that the names of a module's tensors share; "" for the text decoder's.

    >>> prefix_of("model.visual.blocks.3.norm1.weight"), prefix_of("lm_head.weight")
    ('model.visual.', '')
    """
    home = _home(tensor)
    return "" if home is None else home[1]


def own_layer(tensor: str) -> tuple[str, int] | None:
    """Return (start of the name with its dot, number) of a layer of the tensor's own module, or None.

    >>> own_layer("model.visual.blocks.3.norm1.weight")
    ('model.visual.blocks.', 3)
    """
    match = _LIST.search(tensor)
    return None if match is None else (tensor[: match.start(1)], int(match.group(1)))


def decoders(tensors: Iterable[str]) -> tuple[str, ...]:
    """Return the starts of names of all lists of layers that count as the text decoder's; models have one.

    >>> decoders(["model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.norm.weight"])
    ('model.layers.',)
    """
    found = dict.fromkeys(
        place[0] for name in tensors if layer_of(name) is not None and (place := own_layer(name))
    )
    return tuple(found)


def shifted(tensor: str, shift: int) -> str:
    """Return the name of the same tensor `shift` layers later; names outside the layers stay.

    >>> shifted("model.layers.3.mlp.up_proj.weight", -2)
    'model.layers.1.mlp.up_proj.weight'
    """
    layer = layer_of(tensor)
    if not shift or layer is None:
        return tensor
    start, end = _LIST.search(tensor).span(1)  # type: ignore[union-attr]  # as layer_of found it
    return f"{tensor[:start]}{layer + shift}{tensor[end:]}"


def next_layers(tensors: Iterable[str], num_layers: int) -> dict[str, str]:
    """Return tensor -> another name, for the tensors of layers that a file numbers after the decoder's.

    Such layers predict further tokens (multi-token prediction). The forward pass doesn't use them, and they
    stay the last ones if layers are stacked. `file_name` is the inverse.

    >>> next_layers(["model.layers.0.mlp.weight", "model.layers.1.eh_proj.weight"], 1)
    {'model.layers.1.eh_proj.weight': 'model.nextn_layers.0.eh_proj.weight'}
    """
    names = {}
    for tensor in tensors:
        layer = layer_of(tensor)
        if layer is not None and layer >= num_layers:
            start, end = _LIST.search(tensor).span()  # type: ignore[union-attr]  # as layer_of found it
            dot = "." if tensor[start] == "." else ""
            names[tensor] = f"{tensor[:start]}{dot}{NEXT_LAYERS}.{layer - num_layers}.{tensor[end:]}"
    return names


def file_name(tensor: str, num_layers: int) -> str:
    """Return the name that a tensor has in the files of a model of `num_layers` layers.

    >>> file_name("model.nextn_layers.0.eh_proj.weight", 61), file_name("model.norm.weight", 61)
    ('model.layers.61.eh_proj.weight', 'model.norm.weight')
    """
    before, found, after = tensor.partition(f"{NEXT_LAYERS}.")
    if not found:
        return tensor
    number, _, rest = after.partition(".")
    return f"{before}layers.{num_layers + int(number)}.{rest}"


def prefixes(tensors: Iterable[str], module: str) -> tuple[str, ...]:
    """Return the starts of the names of a module's tensors, by which a group can match them.

    >>> prefixes(["model.visual.norm.weight", "model.visual.merger.ln_q.weight"], "multi_modal_projector")
    ('model.visual.merger.',)
    """
    return tuple(dict.fromkeys(prefix_of(name) for name in tensors if module_of(name) == module))


def beside_text(tensors: Iterable[str]) -> tuple[str, ...]:
    """Return the modules beside the text decoder, those inside another one first.

    >>> beside_text(["model.visual.norm.weight", "model.visual.merger.ln_q.weight", "lm_head.weight"])
    ('multi_modal_projector', 'vision_tower')
    """
    depth: dict[str, int] = {}
    for name in tensors:
        if (module := module_of(name)) != TEXT:
            depth[module] = max(depth.get(module, 0), len(prefix_of(name)))
    return tuple(sorted(depth, key=lambda module: -depth[module]))


def counts(tensors: Iterable[str]) -> dict[str, int]:
    """Return module -> number of its tensors, the text decoder first.

    >>> counts(["visual.patch_embed.weight", "model.norm.weight"])
    {'text_decoder': 1, 'vision_tower': 1}
    """
    found = Counter(map(module_of, tensors))
    return dict(sorted(found.items(), key=lambda item: item[0] != TEXT))
