"""config.json of a model: the entries that evomerge or transformers computes with, and their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import ModelError
from evomerge.merging.recipe import LAYERS
from evomerge.schema import load_json, parse

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


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json as plain data, or raise ModelError that lists every wrong entry.

    `Infinity` may occur, because configs of hybrid models have it (`time_step_limit`).
    """
    data = load_json(path, infinity=True)
    parse(ModelConfig, data, str(path), error=ModelError)
    return data
