"""LoRA adapters as sources: a checkpoint plus low-rank updates, read as if they were one model.

The tensor of an adapted model is the base's in float32 plus scale * B A, not rounded in between. Read
exactly: alpha, rsLoRA, rank and alpha patterns, fan_in_fan_out. Everything else that changes a model's
output (DoRA, biases, modules_to_save, new tokens, adapted embeddings, initialisations that change the
base) is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoint import Checkpoint, Layout, read_json, sample_hash
from evomerge.merging.tensorfile import Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
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
    }
)
"""Keys of an adapter config that are read here, or that do not change what the adapter computes."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract from the base: the adapter then belongs to other weights than the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """One update: names of A (r, in) and B (out, r) in the adapter file, and the factor of B A."""

    down: str
    up: str
    scale: float
    transposed: bool


class AdaptedCheckpoint:
    """A checkpoint with a LoRA adapter applied; reads like the checkpoint itself."""

    def __init__(self, base: Checkpoint, folder: Path, location: str) -> None:
        self.base, self.adapter, self.location = base, folder, location
        self.folder, self.config, self.headers = base.folder, base.config, base.headers
        self._settings = read_json(folder / CONFIG)
        self._kept: dict[str, Tensor] | None = None
        _refuse_unsupported(self._settings, location)
        if not (folder / WEIGHTS).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise ModelError(
                f"{location}: no {WEIGHTS} there",
                got="adapter_model.bin, which is pickled and not read" if pickled else None,
                fix="save the adapter again with safe_serialization=True" if pickled else None,
            )
        self.updates = _updates(folder, location, self._settings, base.headers)

    @property
    def tied(self) -> bool:
        return self.base.tied

    @property
    def layout(self) -> Layout:
        return self.base.layout

    @property
    def num_layers(self) -> int:
        return self.base.num_layers

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        return self.base.vocabulary

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base's fingerprint and the adapter's config and weights (sampled)."""
        parts = [self.base.fingerprint, self._settings, sample_hash(self.adapter / WEIGHTS)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def stored(self, name: str, *, mapped: bool = True) -> Tensor:
        """Return the tensor in float32 where the adapter changes it, else as stored."""
        return self.tensor(name) if name in self.updates else self.base.stored(name, mapped=mapped)

    def tensor(self, name: str) -> Tensor:
        """Return base + scale * B A in float32. It must not be modified."""
        base = self.base.tensor(name)
        update = self.updates.get(name)
        if update is None:
            return base
        up, down = self._factors(update)
        with _one_thread():
            product: Tensor = up @ down
        product = product.T if update.transposed else product
        return base + product * update.scale

    def _factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return B and A in float32; they stay in memory, being small."""
        import torch
        from safetensors import safe_open

        if self._kept is None:
            with safe_open(self.adapter / WEIGHTS, framework="pt", device="cpu") as file:
                self._kept = {part: file.get_tensor(part).to(torch.float32) for part in file.keys()}  # noqa: SIM118
        return self._kept[update.up], self._kept[update.down]


def split_location(location: str) -> tuple[str, str | None]:
    """Split `path+adapter`; a folder that really has a plus sign in its name stays whole.

    >>> split_location("models/base+adapters/maths")
    ('models/base', 'adapters/maths')
    """
    if "+" not in location or Path(location).expanduser().is_dir():
        return location, None
    for cut in (match.start() for match in re.finditer(r"\+", location)):
        if Path(location[:cut]).expanduser().is_dir():
            return location[:cut], location[cut + 1 :]
    model, _, adapter = location.partition("+")
    return model, adapter


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter and not a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def open_adapter(
    base: Checkpoint | None, folder: Path, location: str, *, fallback: str | None = None
) -> AdaptedCheckpoint:
    """Open an adapter on a base; without one, on the base its own config names, else on `fallback`.

    A relative `base_model_name_or_path` starts at the adapter's folder, else at the current folder.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{location}: {folder} is not an adapter",
            expected=f"a folder with {CONFIG}",
            got="no such folder" if not folder.is_dir() else "a folder without it",
        )
    if base is None:
        base = Checkpoint.open(_own_base(folder, location, fallback))
    return AdaptedCheckpoint(base, folder, location)


def _own_base(folder: Path, location: str, fallback: str | None) -> str:
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for path in (folder / Path(named).expanduser(), Path(named).expanduser()):
            if (path / "config.json").is_file():
                return str(path)
    if fallback is not None:
        return fallback
    if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) and named[0] != ".":
        return named
    raise ModelError(
        f"{location}: the adapter's base model is not there",
        got=f"base_model_name_or_path: {named!r}",
        fix="write the location as `base+adapter`",
    )


def _refuse_unsupported(settings: Mapping[str, Any], location: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{location}: unsupported adapter type {kind!r}", expected="LORA")
    for key, value in settings.items():
        if key not in BARE and value and not (key == "bias" and value == "none"):
            raise ModelError(
                f"{location}: the adapter uses {key}, which is not supported",
                expected="plain LoRA (alpha, rsLoRA, rank and alpha patterns)",
                got=f"{key}: {json.dumps(value)[:80]}",
                fix="merge the adapter into its base with peft (merge_and_unload) and give that folder",
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise ModelError(
            f"{location}: init_lora_weights: {start} changes the base, so the adapter alone is not the model",
            fix="merge the adapter into its base with peft (merge_and_unload) and give that folder",
        )


def _updates(
    folder: Path, location: str, settings: Mapping[str, Any], base: Mapping[str, Header]
) -> dict[str, LowRank]:
    """Return tensor name -> update for every adapted tensor of the base."""
    found = read_header(folder / WEIGHTS)
    updates: dict[str, LowRank] = {}
    for name in found:
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if not module or part not in ("A.weight", "B.weight"):
            raise ModelError(
                f"{location}: the adapter has an unsupported tensor {name!r}",
                expected="lora_A and lora_B weights of linear layers",
                fix="merge the adapter into its base with peft (merge_and_unload) and give that folder",
            )
        down, up = (f"{name[: -len(part)]}{side}.weight" for side in "AB")
        target = f"{module}.weight"
        if down not in found or up not in found:
            raise ModelError(f"{location}: the adapter has only one of lora_A and lora_B for {module!r}")
        if target not in base:
            raise ModelError(
                f"{location}: the adapter changes {target!r}, which its base does not have",
                expected="an adapter made for this base",
                fix="check which base the adapter was trained on",
            )
        flipped = bool(settings.get("fan_in_fan_out"))
        _check_shapes(location, target, base[target].shape[:: -1 if flipped else 1], found[down], found[up])
        scale = _scale(settings, module, found[down].shape[0])
        updates[target] = LowRank(down=down, up=up, scale=scale, transposed=flipped)
    return updates


def _check_shapes(location: str, target: str, shape: tuple[int, ...], down: Header, up: Header) -> None:
    fits = len(down.shape) == len(up.shape) == len(shape) == 2
    if not fits or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise ModelError(
            f"{location}: the adapter does not fit {target!r}",
            expected=f"B (out, r) and A (r, in) for a weight of shape {list(shape)}",
            got=f"B {list(up.shape)}, A {list(down.shape)}",
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    declared = _by_pattern(settings.get("rank_pattern"), module, settings.get("r", 8))
    if declared != rank:
        raise ModelError(
            f"adapter: rank of {module!r}", expected=f"{declared:g}, as its config says", got=str(rank)
        )
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as peft does."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(default)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Multiply matrices on one thread: how a product is split among threads may change its last bits."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
