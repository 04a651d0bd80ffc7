"""adapter_config.json of a LoRA: its entries, what is not supported, and the scale of each module."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator

from evomerge.errors import ModelError
from evomerge.schema import load_json, parse

BARE = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "peft_version",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "eva_config",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "modules_to_save",
        "bias",
        "lora_bias",
        "use_dora",
        "trainable_token_indices",
        "corda_config",
        "lora_ga_config",
    }
)
"""Keys of an adapter config that are supported here, or do not change what the adapter computes."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights: the adapter then does not fit the original base."""
COMPUTED = ("pissa", "olora")
"""Those of them whose change can be computed again from the base."""
CONVERT = "save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
UNMERGEABLE = "merge the adapter into its base with peft (merge_and_unload) and give that folder"
PATIENCE = 0.5
"""Seconds that all patterns of an adapter may take; a nested repetition could take years."""

Rank = Annotated[int, Field(ge=1, le=2**20)]
Token = Annotated[int, Field(ge=0, le=2**31)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
"""Published adapters have less than 10,000."""


class AdapterConfig(BaseModel):
    """The entries of an adapter_config.json that decide what the adapter computes."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = None
    use_dora: bool | None = None
    trainable_token_indices: list[Token] | dict[str, list[Token]] | None = None

    @property
    def start(self) -> str | None:
        """`pissa` or `olora` if the base was changed in that way before training."""
        given = self.init_lora_weights
        return given.lower() if isinstance(given, str) and given.lower() in COMPUTED else None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _compiled(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        if len(patterns or ()) > 10_000:
            raise ValueError("more than 10,000 patterns")
        for pattern in patterns or ():
            try:
                if len(pattern) > 1000:
                    raise ValueError("longer than 1,000 characters")
                regex.compile(pattern)
            except (regex.error, ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern[:40]!r} is no regular expression: {error}") from None
        return patterns

    @classmethod
    def read(cls, path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
        """Return an adapter config and its plain data, or raise ModelError that lists every wrong entry."""
        data = load_json(path)
        return parse(cls, data, str(path), error=ModelError), data


def refuse_unsupported(config: AdapterConfig, data: Mapping[str, Any], location: str) -> None:
    """Raise ModelError for an adapter that is no LoRA, or has properties that are not supported."""
    if config.peft_type != "LORA":
        raise ModelError(f"{location}: unsupported adapter type {config.peft_type!r}", expected="LORA")
    for key, value in data.items():
        if key not in BARE and value:
            raise ModelError(
                f"{location}: the adapter uses {key}, which is not supported",
                expected="LoRA or DoRA (alpha, rsLoRA, rank and alpha patterns, modules_to_save, bias)",
                got=f"{key}: {json.dumps(value)[:80]}",
                fix=UNMERGEABLE,
            )
    start = config.init_lora_weights
    if config.start is None and isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise ModelError(
            f"{location}: init_lora_weights: {start} changed the base, so the adapter fits other weights",
            fix=f"{CONVERT}, or {UNMERGEABLE}",
        )
    if config.use_dora and config.start is not None:
        raise ModelError(f"{location}: the adapter uses DoRA and {start} together", fix=UNMERGEABLE)


class Scales:
    """The scale of every module of an adapter: alpha / r, or alpha / sqrt(r) for rsLoRA.

    rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    def __init__(self, config: AdapterConfig, location: str) -> None:
        self._config, self._location = config, location
        self._left = PATIENCE

    def of(self, module: str, rank: int) -> float:
        """Return the scale of a module whose factors have this rank, or raise ModelError."""
        config = self._config
        alpha = self._by_pattern(config.alpha_pattern, module, config.lora_alpha)
        declared = self._by_pattern(config.rank_pattern, module, config.r)
        if declared != rank:
            raise ModelError(
                f"adapter: rank of {module!r}", expected=f"{declared:g}, as in its config", got=str(rank)
            )
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank

    def _by_pattern(self, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
        """Return the value of the first pattern that matches the end of a module's name, as peft does."""
        started = time.monotonic()
        try:
            for pattern, value in (patterns or {}).items():
                left = self._left - (time.monotonic() - started)
                if left <= 0:
                    raise TimeoutError
                if regex.fullmatch(rf"(.*\.)?({pattern})", module, timeout=left):
                    return float(value)
        except (TimeoutError, MemoryError):
            raise ModelError(
                f"{self._location}: the patterns of rank_pattern and alpha_pattern take too long to match",
                expected=f"at most {PATIENCE:g} second for all modules",
                got=f"{pattern[:80]!r} at module {module!r}",
                fix="write the names of the modules instead",
            ) from None
        self._left -= time.monotonic() - started
        return float(default)
