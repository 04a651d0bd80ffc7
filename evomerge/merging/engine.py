"""The engine: one function makes one output tensor; `write` streams a whole merged model to disk.

`merge_tensor` is the only place where a recipe meets weights. The writer and the workbench both call it,
and that is why what was scored is what is exported, bit for bit.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import DiskError, NonFiniteError
from evomerge.merging import fisher, methods
from evomerge.merging.application import apply
from evomerge.merging.checkpoint import INDEX, SINGLE, read_json
from evomerge.merging.compatibility import check
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.source import Source, open_used
from evomerge.merging.tensorfile import CODES, ITEM_SIZES, Header, ShardWriter, sync

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
DISK_MARGIN = 64_000_000
"""Bytes kept free beside the weights: tokenizer, config, and the file system's own."""
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class NonFiniteWeights(NonFiniteError):  # noqa: N818  (named for what it reports)
    """A merged tensor has NaN or infinite elements: the recipe's parameters make no model."""


class Inputs(Protocol):
    """Where `merge_tensor` gets tensors from: files, or the workbench's caches. All float32."""

    def model(self, source: str, tensor: str) -> Tensor: ...
    def task_vector(self, source: str, base: str, tensor: str) -> Tensor: ...
    def fisher(self, file: str, tensor: str) -> Tensor: ...


class FileInputs:
    """Tensors straight from the sources; only those of the tensor being made are kept."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._current = ""
        self._kept: dict[str, Tensor] = {}

    def model(self, source: str, tensor: str) -> Tensor:
        if tensor != self._current:
            self._current, self._kept = tensor, {}
        if source not in self._kept:
            self._kept[source] = self._sources[source].tensor(tensor)
        return self._kept[source]

    def task_vector(self, source: str, base: str, tensor: str) -> Tensor:
        return self.model(source, tensor) - self.model(base, tensor)

    def fisher(self, file: str, tensor: str) -> Tensor:
        return fisher.tensor(file, tensor)


def merge_tensor(recipe: Recipe, tensor: str, inputs: Inputs) -> Tensor:
    """Return one output tensor of a recipe, rounded to the recipe's dtype.

    The method computes in float32; rounding is to nearest, ties to even. Raises NonFiniteWeights.
    """
    group = recipe.group_for(tensor)
    method = methods.get(group.method)
    base = inputs.model(recipe.base, tensor) if recipe.base and method.uses_base(recipe.base) else None
    if method.uses_task_vectors(recipe.base):
        assert recipe.base is not None
        tensors = [inputs.task_vector(source, recipe.base, tensor) for source in group.sources]
    else:
        tensors = [inputs.model(source, tensor) for source in group.sources]
    files = [recipe.fisher[source] for source in group.sources] if method.fisher else []
    fishers = [inputs.fisher(file, tensor) for file in files]
    merged = apply(group, base, tensors, seed=recipe.seed, tensor=tensor, fishers=fishers)
    return rounded(merged, recipe.dtype, tensor, group)


def rounded(merged: Tensor, dtype: str, tensor: str, group: TensorGroup | None = None) -> Tensor:
    """Round a tensor to a recipe's dtype, or raise NonFiniteWeights naming it."""
    import torch

    result = merged.to(getattr(torch, dtype))
    if result.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(result)).tolist())):
        made = "" if group is None else f" by group {group.label()!r} ({group.method})"
        raise NonFiniteWeights(
            f"the merged tensor {tensor!r} is not finite",
            expected=f"finite {dtype} numbers",
            got=f"NaN or infinite elements made{made}",
            fix="use smaller weights or lambda, and check that the sources themselves are finite",
        )
    return result


def write(
    recipe: Recipe,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sources: Mapping[str, Source] | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a merged model as a Hugging Face folder, tensor by tensor, and return the folder.

    Memory stays at a few times the largest tensor times the number of sources. Everything is written to
    a temporary folder beside `out` and renamed at the end: `out` is complete or not there. An existing
    folder with files in it is never touched.

    sources: already opened models by name (default: opened from the recipe's locations).
    extra: text files (name -> content) that belong into the folder, such as a model card.
    Raises ModelError and ConfigError where `check` does, DiskError, and NonFiniteWeights.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiskError(
            f"{out}: already exists and is not an empty folder",
            expected="a new folder",
            fix="choose another name or remove it yourself",
        )
    sources = open_used(recipe) if sources is None else sources
    check(recipe, sources)
    pattern = sources[recipe.tokenizer]
    shards = plan_shards(pattern.headers, recipe.dtype, max_shard_bytes)
    parent = _existing_parent(out)
    _check_space(parent, shards)
    with _staged(out) as folder:
        _write_weights(recipe, FileInputs(sources), shards, folder)
        _write_rest(recipe, pattern, folder)
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def plan_shards(
    headers: Mapping[str, Header], dtype: str, max_shard_bytes: int
) -> dict[str, dict[str, Header]]:
    """Return file name -> tensor headers, filling one shard after the other in the order of names."""
    code = CODES[dtype]
    filled: list[dict[str, Header]] = [{}]
    size = 0
    for name, header in headers.items():
        bytes_ = header.count * ITEM_SIZES[code]
        if filled[-1] and size + bytes_ > max_shard_bytes:
            filled.append({})
            size = 0
        filled[-1][name] = Header(shape=header.shape, dtype=code)
        size += bytes_
    if len(filled) == 1:
        return {SINGLE: filled[0]}
    total = len(filled)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": shard for i, shard in enumerate(filled, start=1)}


def _write_weights(
    recipe: Recipe, inputs: Inputs, shards: Mapping[str, Mapping[str, Header]], folder: Path
) -> None:
    for file, headers in shards.items():
        with ShardWriter(folder / file, headers) as writer:
            for name in headers:
                writer.add(name, merge_tensor(recipe, name, inputs))
    if len(shards) > 1:
        size = sum(h.count * ITEM_SIZES[h.dtype] for shard in shards.values() for h in shard.values())
        where = {name: file for file, headers in shards.items() for name in headers}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _write_rest(recipe: Recipe, pattern: Source, folder: Path) -> None:
    for name in COPIED:
        if (pattern.folder / name).is_file():
            shutil.copyfile(pattern.folder / name, folder / name)
    config = read_json(pattern.folder / "config.json")
    config.pop("torch_dtype", None)  # the older name of `dtype`; both at once would contradict each other
    _write_json(folder / "config.json", config | {"dtype": recipe.dtype})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _check_space(parent: Path, shards: Mapping[str, Mapping[str, Header]]) -> None:
    needed = sum(h.count * ITEM_SIZES[h.dtype] for shard in shards.values() for h in shard.values())
    free = shutil.disk_usage(parent).free
    if free < needed + DISK_MARGIN:
        raise DiskError(
            f"{parent}: not enough disk space for the merged model",
            expected=f"{(needed + DISK_MARGIN) / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="free some space or write to another disk",
        )


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes of this machine left of earlier attempts at the same folder."""
    for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*-{socket.gethostname()}-*"):
        pid = int(stale.name.split(".partial-")[1].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(stale, ignore_errors=True)
        except PermissionError:
            continue  # alive, and somebody else's


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` on success and disappears on failure."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        mark = f".{out.name}.partial-{os.getpid()}-{socket.gethostname()}-"
        folder = Path(tempfile.mkdtemp(prefix=mark, dir=out.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            sync([*folder.iterdir(), folder])
            folder.rename(out)  # replaces an empty folder, fails on any other
            sync([out.parent])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise DiskError(f"{out}: can't be written", got=error.strerror or str(error)) from None
