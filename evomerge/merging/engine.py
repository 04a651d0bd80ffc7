"""The engine: one function makes one output tensor; `write` streams a whole merged model to disk.

`merge_tensor` is the only place where a recipe meets weights. The writer and the workbench both call it,
and that is why what was scored is what is exported, bit for bit.
"""

from __future__ import annotations

import ctypes
import glob
import json
import math
import os
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import DiskError, NonFiniteError
from evomerge.merging import kernels, methods
from evomerge.merging.application import arguments
from evomerge.merging.checkpoint import INDEX, SINGLE
from evomerge.merging.compatibility import check
from evomerge.merging.inputs import Difference, FileInputs, Inputs
from evomerge.merging.kernels import Operand
from evomerge.merging.live_weights import Place
from evomerge.merging.methods import blend
from evomerge.merging.methods.declaration import Method
from evomerge.merging.methods.reduction import as_rows, gram
from evomerge.merging.methods.selection import EVERYTHING, NOTHING, Boundary
from evomerge.merging.recipe import Recipe, TensorGroup, shifted
from evomerge.merging.source import Source, open_used
from evomerge.merging.stacking import output_headers, stacked_config
from evomerge.merging.tensorfile import CODES, ITEM_SIZES, Header, ShardWriter, sync
from evomerge.merging.vocabulary import Aligned, open_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5_000_000_000
MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20
"""mallopt's parameter (malloc.h) for the size from which blocks are mapped one by one, and that size."""
ROWS_AT_ONCE = 1 << 18
"""Elements that methods working row by row are given at a time."""
DISK_MARGIN = 64_000_000
"""Bytes kept free beside the weights: tokenizer, config, and the file system's own."""
COPIED = (
    "generation_config.json",  # the only one that is not the tokenizer's
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


def merge_tensor(recipe: Recipe, tensor: str, inputs: Inputs, *, out: Place | None = None) -> Tensor:
    """Return one output tensor of a recipe, rounded to the recipe's dtype.

    The method computes in float32; rounding is to nearest, ties to even. Raises NonFiniteWeights.

    out: where the tensor lies in a live model, to be written into; it may have another type than the
        recipe's, and then holds the rounded values.
    """
    import torch

    group = recipe.group_for(tensor)
    method = methods.get(group.method)
    base, at_base = recipe.base_of(group), shifted(tensor, group.base_shift)
    subtracted = None if base is None or not method.uses_task_vectors(base) else (base, at_base)
    reads = group.reads(tensor)
    operands = [inputs.operand(*read, subtracted) for read in reads]
    origin = None if base is None else inputs.operand(base, at_base, None).tensor
    settings = arguments(group, seed=recipe.seed, tensor=tensor)
    if method.fisher:
        settings["fishers"] = [inputs.fisher(recipe.fisher[source], name) for source, name in reads]
    measure = _Measure(inputs, [(read, subtracted) for read in reads], operands, origin)
    plan = None if method.blend is None else method.blend(measure, **settings)
    dtype = getattr(torch, recipe.dtype)
    if plan is None:
        bases = [] if origin is None else [origin]
        del origin, measure
        merged = _by_function(method, bases, operands, settings, dtype)
        return _delivered(merged, out, tensor, group)
    if not kernels.available():
        full = None if origin is None else origin.to(torch.float32)
        merged = blend.run(plan, full, [_alone(each, origin) for each in operands])
        return _delivered(merged.to(dtype), out, tensor, group)
    computed = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    space = torch.empty(operands[0].tensor.shape, dtype=computed) if not _direct(out, dtype) else out
    assert isinstance(space, torch.Tensor)
    rounded = recipe.dtype == "bfloat16"
    finite = kernels.blend(
        plan, origin, operands, measure.boundary, space, add_base=subtracted is not None, rounded=rounded
    )
    if not finite:
        raise _not_finite(tensor, recipe.dtype, group)
    return space if space is out else _delivered(space.to(dtype), out, tensor, group)


def _by_function(
    method: Method, bases: list[Tensor], operands: list[Operand], settings: dict[str, Any], dtype: Any
) -> Tensor:
    """Call a method that is no blend, some rows at a time where it lets us, and round the result.

    bases: the base's tensor, or none. Both lists are used up: what is widened need not stay as stored.
    """
    import torch

    shape = operands[0].tensor.shape
    if not method.by_rows or len(shape) < 2:
        full = bases.pop().to(torch.float32) if bases else None
        inputs = [_alone(operands.pop(0), full) for _ in range(len(operands))]
        return method.function(full, inputs, **settings).to(dtype)
    rows = [as_rows(each.tensor) for each in operands]
    count, columns = rows[0].shape
    step = max(1, ROWS_AT_ONCE // max(columns, 1))
    merged = torch.empty((count, columns), dtype=dtype)
    for start in range(0, count, step):
        here = slice(start, start + step)
        origin = as_rows(bases[0])[here] if bases else None
        inputs = [
            _alone(Operand(matrix[here], each.minus_base), origin)
            for matrix, each in zip(rows, operands, strict=True)
        ]
        full = None if origin is None else origin.to(torch.float32)
        first = {"first": start * columns} if method.random else {}
        merged[here] = method.function(full, inputs, **settings, **first).to(dtype)
    return merged.view(shape)


def _alone(operand: Operand, base: Tensor | None) -> Tensor:
    """Return an operand as a method takes it: float32, its base subtracted."""
    import torch

    tensor = operand.tensor.to(torch.float32)
    if not operand.minus_base:
        return tensor
    assert base is not None
    return tensor - base.to(torch.float32)


def _direct(out: Place | None, dtype: torch.dtype) -> bool:
    """Say whether a kernel can write a tensor of that type straight into its place."""
    import torch

    if not isinstance(out, torch.Tensor) or not kernels.fits(out):
        return False
    return out.dtype == dtype or (out.dtype == torch.float32 and dtype == torch.bfloat16)


def _delivered(merged: Tensor, out: Place | None, tensor: str, group: TensorGroup) -> Tensor:
    """Check a merged tensor, and put it into its place if it has one."""
    checked(merged, tensor, group)
    if out is not None:
        out.copy_(merged)
    return merged


def checked(merged: Tensor, tensor: str, group: TensorGroup | None = None) -> Tensor:
    """Return a tensor as it is, or raise NonFiniteWeights naming it and who made it."""
    import torch

    if merged.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(merged)).tolist())):
        raise _not_finite(tensor, str(merged.dtype).removeprefix("torch."), group)
    return merged


def _not_finite(tensor: str, dtype: str, group: TensorGroup | None) -> NonFiniteWeights:
    made = "" if group is None else f" made by group {group.label()!r} ({group.method})"
    return NonFiniteWeights(
        f"the merged tensor {tensor!r} is not finite",
        expected=f"finite {dtype} numbers",
        got=f"NaN or infinite elements{made}",
        fix="use smaller weights or lambda, and check that the sources themselves are finite",
    )


class _Measure:
    """What a method may ask about the inputs of one tensor, answered by `Inputs` if it has been before."""

    def __init__(
        self,
        inputs: Inputs,
        places: list[Difference],
        operands: list[Operand],
        origin: Tensor | None,
    ) -> None:
        self._inputs, self._operands, self._origin = inputs, operands, origin
        self._places = places
        self.count, self.size = len(operands), operands[0].tensor.numel()

    def gram(self) -> list[list[float]]:
        def compute() -> list[list[float]]:
            if kernels.available():
                return kernels.gram(self._origin, self._operands)
            return gram([_alone(each, self._origin) for each in self._operands])

        return self._inputs.gram(tuple(self._places), compute)

    def boundary(self, index: int, rank: int) -> Boundary:
        """Return the boundary above which `rank` elements of an operand are."""
        if rank <= 0:
            return NOTHING
        if rank >= self.size:
            return EVERYTHING
        operand = self._operands[index]
        return self._inputs.boundary(
            self._places[index], rank, lambda: kernels.magnitudes(operand, self._origin)
        )


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
    out = new_folder(out)
    sources = open_used(recipe) if sources is None else sources
    check(recipe, sources)
    _return_memory()
    pattern = sources[recipe.pattern]
    shards = plan_shards(output_headers(recipe, sources), recipe.dtype, max_shard_bytes)
    extended = isinstance(pattern, Aligned) and pattern.additions
    tokenizer = open_tokenizer(pattern) if extended else None  # now: it may refuse
    check_space(out, shards)
    with staged(out) as folder:
        _write_weights(recipe, FileInputs(sources), shards, folder)
        _write_rest(recipe, pattern, tokenizer, stacked_config(recipe, sources), folder)
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


def new_folder(out: str | Path) -> Path:
    """Return the path of a folder to write, or raise DiskError where something is there already."""
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
    merged = _in_order(recipe, inputs, [each for headers in shards.values() for each in headers.items()])
    for file, headers in shards.items():
        with ShardWriter(folder / file, headers) as writer:
            for name in headers:
                writer.add(name, next(merged))
    if len(shards) > 1:
        size = sum(h.count * ITEM_SIZES[h.dtype] for shard in shards.values() for h in shard.values())
        where = {name: file for file, headers in shards.items() for name in headers}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def pool() -> ThreadPoolExecutor:
    """Return as many threads as torch has, to merge one tensor on each."""
    import torch

    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))


def _in_order(recipe: Recipe, inputs: Inputs, tensors: Sequence[tuple[str, Header]]) -> Iterator[Tensor]:
    """Yield merged tensors in order, merging ahead on torch's number of threads.

    No more elements are under way at a time than the largest tensor has, so memory stays that of one.
    """
    most = max((header.count for _, header in tensors), default=0)
    with pool() as threads:
        ahead: deque[tuple[int, Future[Tensor]]] = deque()
        try:
            for name, header in tensors:
                while ahead and sum(count for count, _ in ahead) + header.count > most:
                    yield ahead.popleft()[1].result()
                ahead.append((header.count, threads.submit(merge_tensor, recipe, name, inputs)))
            while ahead:
                yield ahead.popleft()[1].result()
        finally:
            for _, future in ahead:
                future.cancel()


def _write_rest(
    recipe: Recipe,
    pattern: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    config: dict[str, Any],
    folder: Path,
) -> None:
    for name in COPIED if tokenizer is None else COPIED[:1]:
        if (pattern.folder / name).is_file():
            shutil.copyfile(pattern.folder / name, folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config.pop("torch_dtype", None)  # the older name of `dtype`; both at once would contradict each other
    _write_json(folder / "config.json", config | {"dtype": recipe.dtype})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _return_memory() -> None:
    """Have the C library hand large blocks back to the system when they are freed, where it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def check_space(out: Path, shards: Mapping[str, Mapping[str, Header]]) -> None:
    """Raise DiskError where there is no room for these files; shards: file name -> headers."""
    parent = _existing_parent(out)
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
def staged(out: Path) -> Iterator[Path]:
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
