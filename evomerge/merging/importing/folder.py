"""`import_model`: a quantised, pickled or GGUF model becomes a safetensors folder that can be merged.

Formats whose tensors can be computed one by one are streamed: pickled weights (in a child process that only
loads tensors), 8-bit weights with scales (FP8 in blocks, rows or whole, int8), and MXFP4. transformers loads
and dequantises all others, which needs the memory of the whole model, and for some formats a package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.files import drafted_folder, expanded
from evomerge.merging.export.folder import copy_beside, readable, write_json
from evomerge.merging.export.writer import MAX_SHARD_BYTES, check_space, new_folder, plan_shards
from evomerge.merging.importing import packed, pickled, whole
from evomerge.merging.sources.arrays import is_finite, of_tensor
from evomerge.merging.sources.beside import beside_in
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.hub import INDEX, SINGLE
from evomerge.merging.sources.model_config import read_config
from evomerge.merging.sources.tensorfile import NAMES, Header, ShardWriter, read_header
from evomerge.schema import load_json

if TYPE_CHECKING:
    from torch import Tensor

PICKLED = ("*.bin", "*.pt", "*.pth")
STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""Starts of the names of pickled files of a training that hold no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was imported. form: in which form the weights were; streamed: whether tensor by tensor."""

    folder: Path
    form: str
    dtype: str
    streamed: bool


def import_model(location: str, out: Path, *, dtype: str | None = None) -> Imported:
    """Write a model that can't be merged as it is as a folder that can.

    Args:
        location: a folder with quantised or pickled weights, or a GGUF file.
        out: the folder to write, new or empty.
        dtype: of the written weights. Default: bfloat16, and for pickled weights the stored types.

    Raises:
        ModelError: the model is missing or damaged, nothing has to be imported, or a package is missing.
        DiskError: `out` has files in it, or there is not enough room.
    """
    out, path = new_folder(out), expanded(location)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{location}: not a model", expected="a model folder or a .gguf file", got=path.suffix
            )
        return _by_transformers(path.parent, out, dtype or "bfloat16", gguf=path.name)
    if not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf")) if path.is_dir() else []
        raise ModelError(
            f"{location}: no config.json in the folder" if path.is_dir() else f"{location}: no such folder",
            expected="a model folder or a .gguf file",
            fix=f"evomerge import {gguf[0]} {out}" if gguf else "download the model first",
        )
    quantised = read_config(path / "config.json").get("quantization_config")
    shards = _safetensors(path)
    if quantised is None and shards:
        raise ModelError(f"{location}: its weights are ordinary safetensors already", fix="merge it as it is")
    if quantised is None:
        return _stream_pickled(path, location, out, dtype)
    form = packed.form_of(
        quantised, {name: header for file in shards for name, header in read_header(file).items()}
    )
    if form is None:
        return _by_transformers(path, out, dtype or "bfloat16", form=str(quantised.get("quant_method")))
    return _stream_packed(path, shards, out, dtype or "bfloat16", form)


def _safetensors(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, by its index if there is one."""
    if (folder / INDEX).is_file():
        names = set(dict(load_json(folder / INDEX).get("weight_map") or {}).values())
        return sorted(folder / Path(str(name)).name for name in names)
    single = folder / SINGLE
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _pickled(folder: Path) -> list[Path]:
    """Return the pickled weight files of a folder, by its index if there is one."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        names = set(dict(load_json(index).get("weight_map") or {}).values())
        return sorted(folder / Path(str(name)).name for name in names)
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    found = sorted(file for pattern in PICKLED for file in folder.glob(pattern))
    return [file for file in found if not file.name.startswith(STATES)]


def _stream_packed(folder: Path, shards: list[Path], out: Path, dtype: str, form: packed.Form) -> Imported:
    from safetensors import safe_open

    where = {name: file for file in shards for name in read_header(file)}
    headers = {name: header for file in shards for name, header in read_header(file).items()}
    with drafted_folder(out) as draft:
        opened = {file: safe_open(file, framework="pt", device="cpu") for file in shards}

        def stored(name: str) -> Tensor:
            file: Any = opened[where[name]]
            return file.get_tensor(name)  # type: ignore[no-any-return]

        made = packed.outputs(headers, form)
        _write(
            draft,
            out,
            {name: Header(shape=o.shape, dtype=o.dtype) for name, o in made.items()},
            dtype,
            ((name, o.compute(stored)) for name, o in made.items()),
        )
        _finish(folder, draft, dtype)
    return Imported(folder=out, form=form.name, dtype=dtype, streamed=True)


def _stream_pickled(folder: Path, location: str, out: Path, dtype: str | None) -> Imported:
    files = _pickled(folder)
    if not files:
        raise ModelError(
            f"{location}: no weights in the folder", expected=", ".join(("*.safetensors", *PICKLED))
        )
    with drafted_folder(out) as draft:
        names: dict[str, str] = {}
        for number, file in enumerate(files, start=1):
            target = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            pickled.convert(file, draft / target, dtype)
            names |= dict.fromkeys(read_header(draft / target), target)
        if len(files) > 1:
            size = sum((draft / target).stat().st_size for target in set(names.values()))
            write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": names})
        codes = {
            header.dtype for target in set(names.values()) for header in read_header(draft / target).values()
        }
        main = dtype or next((NAMES[code] for code in ("BF16", "F16", "F32") if code in codes), "float32")
        _finish(folder, draft, main)
    return Imported(folder=out, form="pickled", dtype=main, streamed=True)


def _by_transformers(folder: Path, out: Path, dtype: str, *, gguf: str = "", form: str = "") -> Imported:
    with drafted_folder(out) as draft:
        whole.convert(folder, draft, dtype, gguf=gguf)
        if not gguf:
            copy_beside(beside_in(folder), draft, None)
        _check(draft)
    return Imported(folder=out, form="gguf" if gguf else form, dtype=dtype, streamed=False)


def _write(
    draft: Path, out: Path, headers: Mapping[str, Header], dtype: str, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write tensors as shards, one by one."""
    import torch

    shards = plan_shards(headers, dtype, MAX_SHARD_BYTES)
    check_space(out, shards)
    for file, part in shards.items():
        with ShardWriter(draft / file, part) as writer:
            for expected in part:
                name, tensor = next(tensors)
                assert name == expected, (name, expected)
                kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
                writer.add(name, of_tensor(tensor.to(kind).contiguous()))
    if len(shards) > 1:
        where = {name: file for file, part in shards.items() for name in part}
        size = sum((draft / file).stat().st_size for file in shards)
        write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _finish(folder: Path, draft: Path, dtype: str) -> None:
    """Write config.json without its quantisation, copy the other files, and open the result."""
    config = read_config(folder / "config.json")
    config.pop("quantization_config", None)
    write_json(draft / "config.json", readable(config, dtype))
    copy_beside(beside_in(folder), draft, None)
    _check(draft)


def _check(draft: Path) -> None:
    """Open what was written, and refuse weights that are not finite."""
    checkpoint = Checkpoint.open(str(draft))
    for name in checkpoint.headers:
        if not is_finite(checkpoint.array(name)):
            raise ModelError(f"imported tensor {name!r} has elements that are not finite")
