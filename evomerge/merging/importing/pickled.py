"""Pickled weights (.bin, .pt): loaded as tensors only, in a child process, and written as safetensors.

    python -m evomerge.merging.importing.pickled FILE OUT [DTYPE]

`torch.load(weights_only=True)` builds nothing but tensors and plain containers. It runs in a child process,
so that a damaged file can't take this one along.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def convert(file: Path, out: Path, dtype: str | None) -> None:
    """Write a pickled file as a safetensors file, in the stored types unless `dtype` is given.

    Raises ModelError for a file that is no dictionary of tensors.
    """
    command = [sys.executable, "-m", __name__, str(file), str(out), *([dtype] if dtype else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ModelError(
            f"{file}: can't be read as weights",
            expected="a file of tensors that torch saved",
            got=(lines[-1] if lines else f"the process that read it ended with {done.returncode}")[:300],
            fix="download the file again, or take a safetensors version of the model",
        )


def main() -> None:
    """Convert one file; the exit code is 1 and the last line of stderr the reason where that fails."""
    import torch

    from evomerge.merging.sources.arrays import of_tensor
    from evomerge.merging.sources.tensorfile import CODES, Header, ShardWriter

    file, out, *rest = sys.argv[1:]
    chosen = {kind: CODES[rest[0]] if rest else code for kind, code in _codes().items()} | _whole_codes()
    kinds = {code: kind for kind, code in (_codes() | _whole_codes()).items()}
    try:
        tensors = _tensors(torch.load(file, map_location="cpu", weights_only=True, mmap=_mappable(file)))
        headers = {
            name: Header(
                shape=tuple(tensor.shape),
                dtype=chosen[tensor.dtype],
            )
            for name, tensor in sorted(tensors.items())
        }
        with ShardWriter(Path(out), headers) as writer:
            for name, header in headers.items():
                writer.add(name, of_tensor(tensors[name].to(kinds[header.dtype]).contiguous()))
    except Exception as error:  # whatever a damaged file makes torch raise
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise SystemExit(f"it holds {found[1]}, which is no tensor and can run code") from None
        reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the")[0] or str(error)
        raise SystemExit(f"{type(error).__name__}: {' '.join(reason.split())[:250]}") from None


def _codes() -> dict[Any, str]:
    import torch

    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _whole_codes() -> dict[Any, str]:
    import torch

    names = {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
    return {getattr(torch, name): code for name, code in names.items()}


def _mappable(file: str) -> bool:
    """Whether torch can map a file into memory: only those in its zip format."""
    with Path(file).open("rb") as opened:
        return opened.read(2) == b"PK"


def _tensors(loaded: object) -> dict[str, Tensor]:
    """Return name -> tensor; training checkpoints hold them under `state_dict` or `model`."""
    import torch

    from evomerge.merging.sources.tensorfile import Header, is_copied

    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"a {type(loaded).__name__} and no dictionary of tensors")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{others[0]!r} is no tensor")
    tensors = {str(name): tensor for name, tensor in loaded.items()}
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in _codes()}
    if not floats:
        raise ValueError("no tensors of floating point")
    codes = _whole_codes()
    whole = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype in codes
        and is_copied(name, Header(shape=tuple(tensor.shape), dtype=codes[tensor.dtype]))
    }
    return floats | whole


if __name__ == "__main__":
    main()
