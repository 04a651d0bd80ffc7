"""config.json of a model: the entries that evomerge or transformers computes with, and their bounds."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import ModelError
from evomerge.merging.recipe_data import LAYERS
from evomerge.schema import load_json, parse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Width = Annotated[int, Field(ge=1, le=2**24)]
"""A number of elements, heads or rows; the widest models have less than 2 ** 20."""
Layers = Annotated[int, Field(ge=0, le=LAYERS)]
Experts = Annotated[int, Field(ge=0, le=100_000)]


class ModelConfig(BaseModel):
    """The known entries of a config.json; it may have any others. Bounds keep a damaged file from filling
    the memory when transformers builds the model."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model_type: str | None = None
    architectures: list[str] | None = None
    tie_word_embeddings: bool | None = None
    vocab_size: Width | None = None
    hidden_size: Width | None = None
    n_embd: Width | None = None
    intermediate_size: int | list[int] | None = None
    num_hidden_layers: Layers | None = None
    n_layer: Layers | None = None
    n_layers: Layers | None = None
    num_layers: Layers | None = None
    num_attention_heads: Width | list[int] | None = None
    num_key_value_heads: Width | list[int] | None = None
    head_dim: Width | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    n_routed_experts: Experts | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**40)] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: ModelConfig | None = None


TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which configs of models with several modules hold the text decoder's config."""
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of a config.json that hold the number of layers."""


def text_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that lead to the text decoder's part of a config; () is the whole.

    >>> text_path({"model_type": "gemma3", "text_config": {"num_hidden_layers": 26}})
    ('text_config',)
    """
    for key in TEXT_PARTS:
        part = config.get(key)
        if isinstance(part, Mapping) and part and (_counts(part) or not _counts(config)):
            return (key, *text_path(part))
    return ()


def _counts(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in COUNTS)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text decoder's part of a config, or the whole."""
    for key in text_path(config):
        config = config[key]
    return config


def with_text_part(config: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with another part for the text decoder.

    >>> with_text_part({"model_type": "llava", "text_config": {"vocab_size": 1}}, {"vocab_size": 2})
    {'model_type': 'llava', 'text_config': {'vocab_size': 2}}
    """
    path = text_path(config)
    if not path:
        return dict(part)
    return {**config, path[0]: with_text_part(config[path[0]], part)}


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json as plain data, or raise ModelError that lists every wrong entry.

    `Infinity` may occur, because configs of hybrid models have it (`time_step_limit`).
    """
    data = load_json(path, infinity=True)
    parse(ModelConfig, data, str(path), error=ModelError)
    return data


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a model's config with another number of embedding rows."""
    changed = with_text_part(config, {**text_part(config), "vocab_size": rows})
    return changed | ({"vocab_size": rows} if "vocab_size" in changed else {})


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose text decoder says its number of layers and the kind of each.

    Configs may leave both to their class, which computes kinds from the layers' numbers, e.g. every second
    one with a sliding window. Configs of unknown classes stay as they are.
    """
    text = text_part(config)
    return with_text_part(config, {**text, **_added(json.dumps(config, sort_keys=True))})


@functools.lru_cache(maxsize=64)
def _added(written: str) -> dict[str, Any]:
    """Return what a config's class adds to its text decoder's part; every candidate of stacked layers asks.

    written: the config as JSON. Don't modify the result.
    """
    config: dict[str, Any] = json.loads(written)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return {}
    kind = CONFIG_MAPPING[config["model_type"]]
    try:
        whole = kind.from_dict(kind._decode_special_floats(dict(config)))  # as when it reads the file
    except Exception as error:  # whatever its checks of the entries raise
        raise ModelError(
            f"transformers can't read the config.json of a {config['model_type']} model",
            got=" ".join(str(error).split())[:300],
            fix="check it, or download it again",
        ) from None
    text, full = text_part(config), whole.get_text_config(decoder=True).to_dict()
    count = next((full[key] for key in COUNTS if full.get(key)), None)
    return {
        key: value
        for key, value in full.items()
        if key not in text
        and ((key in COUNTS and not _counts(text)) or (isinstance(value, list) and len(value) == count))
        and not key.startswith("_")
    }


def model_class(config: PreTrainedConfig) -> Any:
    """Return the automatic class of transformers that builds a model which answers in text.

    That is the one with the architecture that the config names. Models with a vision or audio tower can have
    a class for their text decoder alone, which has other weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    named = set(config.architectures or ())
    for auto in fitting:
        built = auto._model_mapping[type(config)]
        if named & {c.__name__ for c in (built if isinstance(built, tuple) else (built,))}:
            return auto
    return fitting[0] if fitting else AutoModelForCausalLM


def tied_by_default(config: Mapping[str, Any]) -> bool:
    """Return whether a model is tied whose config.json does not say so: the default of its config's class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[config["model_type"]](), "tie_word_embeddings", False))
