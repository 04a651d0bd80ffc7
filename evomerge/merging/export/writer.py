"""The engine: `write` streams a merged model to disk, tensor by tensor, completely or not at all."""

from __future__ import annotations

import ctypes
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import DiskError
from evomerge.files import drafted_folder
from evomerge.merging.compatibility import check, with_fingerprints
from evomerge.merging.export.folder import asked, copy_beside, readable, with_ends, write_json
from evomerge.merging.modules import file_name
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources import chat, model_files
from evomerge.merging.sources.arrays import WeightArray
from evomerge.merging.sources.beside import Beside, beside
from evomerge.merging.sources.chat import Chat
from evomerge.merging.sources.hub import INDEX, SINGLE
from evomerge.merging.sources.opening import open_used
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.tensorfile import CODES, COPIED, ITEM_SIZES, Header, ShardWriter
from evomerge.merging.sources.vocabulary import Aligned, open_tokenizer
from evomerge.merging.stacking import output_headers, stacked_config
from evomerge.merging.tensors.inputs import FileInputs, Inputs
from evomerge.merging.tensors.merge_tensor import merge_array
from evomerge.merging.tensors.threads import pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Finish = Callable[[Path], Mapping[str, str]]

MAX_SHARD_BYTES = 5_000_000_000
MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20
"""mallopt's parameter (malloc.h) for the size from which blocks are mapped separately, and that size."""
DISK_MARGIN = 64_000_000
"""Bytes needed beside the weights: tokenizer, config, and the file system's metadata."""


def write(
    recipe: Recipe,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sources: Mapping[str, Source] | None = None,
    finish: Finish | None = None,
) -> Path:
    """Write a merged model as a Hugging Face folder, tensor by tensor.

    Memory stays at a few times the largest tensor times the number of sources. Everything is written to a
    temporary folder beside `out` and renamed at the end, so `out` is complete or does not exist. An existing
    folder with files in it is never touched.

    Args:
        recipe: the merge to write; it is also saved in the folder, as recipe.yaml, with the fingerprints of
            its models.
        out: the folder to write, new or empty.
        max_shard_bytes: the largest size of one weight file, in bytes, unless a single tensor is larger.
        sources: already opened models by name. By default the recipe's models are opened.
        finish: called with the temporary folder when weights, config and tokenizer are in it; returns
            additional text files (name -> content), such as a model card. It raises to refuse the folder.

    Returns:
        The folder.

    Raises:
        ModelError, ConfigError: the models or the recipe do not fit, see `compatibility.check`, or files of
            the models changed while they were merged.
        DiskError: `out` has files in it, or there is not enough room.
        NonFiniteWeights: a merged tensor has NaN or infinite elements.
    """
    out = new_folder(out)
    sources = open_used(recipe) if sources is None else sources
    read = model_files.stats(sources.values())
    check(recipe, sources)
    _return_memory()
    pattern = sources[recipe.pattern]
    shards = plan_shards(output_headers(recipe, sources), recipe.dtype, max_shard_bytes)
    depth = pattern.num_layers if recipe.num_layers is None else recipe.num_layers
    asking = asked(recipe, sources)  # before the weights, because it may raise, as what follows
    taken = beside(pattern)
    extended = isinstance(pattern, Aligned) and pattern.additions
    tokenizer = open_tokenizer(pattern) if extended else None
    check_space(out, shards, taken.size)
    with drafted_folder(out) as folder:
        _write_weights(recipe, FileInputs(sources), shards, folder, depth)
        model_files.refuse_changed(read)
        merged = with_fingerprints(recipe, sources)
        config = readable(stacked_config(recipe, sources), recipe.dtype)
        _write_rest(merged, taken, tokenizer, asking, config, folder)
        for name, text in (finish(folder) if finish else {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def new_folder(out: str | Path) -> Path:
    """Return the path of a folder to write; raise DiskError if it has files in it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiskError(
            f"{out}: already exists and is not an empty folder",
            expected="a new folder",
            fix="choose another name or remove it yourself",
        )
    return out


def plan_shards(
    headers: Mapping[str, Header], dtype: str, max_shard_bytes: int
) -> dict[str, dict[str, Header]]:
    """Return file name -> tensor headers, filling one shard after the other in the order of names."""
    code = CODES[dtype]
    filled: list[dict[str, Header]] = [{}]
    size = 0
    for name, header in headers.items():
        stored = header.dtype if header.dtype in COPIED else code
        bytes_ = header.count * ITEM_SIZES[stored]
        if filled[-1] and size + bytes_ > max_shard_bytes:
            filled.append({})
            size = 0
        filled[-1][name] = Header(shape=header.shape, dtype=stored)
        size += bytes_
    if len(filled) == 1:
        return {SINGLE: filled[0]}
    total = len(filled)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": shard for i, shard in enumerate(filled, start=1)}


def _write_weights(
    recipe: Recipe, inputs: Inputs, shards: Mapping[str, Mapping[str, Header]], folder: Path, num_layers: int
) -> None:
    """Write the weight files. num_layers: of the result; layers that predict further tokens follow them."""
    merged = _in_order(recipe, inputs, [named for headers in shards.values() for named in headers.items()])
    for file, headers in shards.items():
        names = {file_name(name, num_layers): header for name, header in headers.items()}
        with ShardWriter(folder / file, names) as writer:
            for name in names:
                writer.add(name, next(merged))
    if len(shards) > 1:
        size = sum(h.count * ITEM_SIZES[h.dtype] for shard in shards.values() for h in shard.values())
        where = {file_name(name, num_layers): file for file, headers in shards.items() for name in headers}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _in_order(recipe: Recipe, inputs: Inputs, tensors: Sequence[tuple[str, Header]]) -> Iterator[WeightArray]:
    """Yield merged tensors in order, merging ahead on as many threads as torch uses.

    The tensors in progress never have more elements together than the largest tensor, to bound memory.
    """
    most = max((header.count for _, header in tensors), default=0)
    with pool() as workers:
        ahead: deque[tuple[int, Future[WeightArray]]] = deque()
        try:
            for name, header in tensors:
                while ahead and sum(count for count, _ in ahead) + header.count > most:
                    yield ahead.popleft()[1].result()
                ahead.append((header.count, workers.submit(merge_array, recipe, name, inputs)))
            while ahead:
                yield ahead.popleft()[1].result()
        finally:
            for _, future in ahead:
                future.cancel()


def _write_rest(
    recipe: Recipe,
    taken: Beside,
    tokenizer: PreTrainedTokenizerBase | None,
    asking: Chat | None,
    config: dict[str, Any],
    folder: Path,
) -> None:
    copy_beside(taken, folder, tokenizer)
    if asking is not None:
        chat.write(asking, folder)
    write_json(folder / "config.json", with_ends(config, asking))
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _return_memory() -> None:
    """Make the C library (glibc) return large blocks to the system when they are freed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def check_space(out: Path, shards: Mapping[str, Mapping[str, Header]], beside: int = 0) -> None:
    """Raise DiskError if there is no room for some files.

    shards: file name -> headers. beside: bytes of files that are copied.
    """
    parent = _existing_parent(out)
    needed = beside + sum(h.count * ITEM_SIZES[h.dtype] for shard in shards.values() for h in shard.values())
    free = shutil.disk_usage(parent).free
    if free < needed + DISK_MARGIN:
        raise DiskError(
            f"{parent}: not enough disk space for the merged model",
            expected=f"{(needed + DISK_MARGIN) / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="free some space or write to another disk",
        )
