"""One hash of all weights of a model, equal for a live model and for the files that hold the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.merging.sources.arrays import of_tensor, to_tensor
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.tensors.threads import pool

if TYPE_CHECKING:
    from torch import Tensor


def weights_digest(tensors: Mapping[str, Callable[[], Tensor]], dtype: str) -> str:
    """Return the type and a SHA-256 over names, shapes and elements of tensors, as "DTYPE HEXDIGITS".

    Tensors are read and hashed on as many threads as torch uses.

    Args:
        tensors: name -> function that returns the tensor, on the CPU.
        dtype: the type to which elements are rounded before they are hashed; whole numbers are not.
    """
    import torch

    def hashed(name: str) -> str:
        tensor = tensors[name]()
        if tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype)).contiguous()
        else:
            tensor = to_tensor(of_tensor(tensor.contiguous())).to(torch.int64)
        data = of_tensor(tensor).reshape(-1).view("uint8")
        return f"{name} {tuple(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}\n"

    with pool() as workers:
        lines = list(workers.map(hashed, sorted(tensors)))
    return f"{dtype} {hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def folder_digest(folder: Path, dtype: str) -> str:
    """Return the digest of the weights in a model folder; raise ModelError where it can't be read."""
    checkpoint = Checkpoint.open(str(folder))
    return weights_digest(
        {name: _reader(checkpoint, name) for name in (*checkpoint.headers, *checkpoint.copied)}, dtype
    )


def _reader(checkpoint: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.stored(name)


def exact_dtype(stored: str, computed: str) -> str:
    """Return the type in which a live model's weights can be compared with the stored ones.

    That is the stored type if the live model's type holds it exactly, else the live model's.

    Args:
        stored: the type of the weights on disk, to which they are rounded.
        computed: the type of the live model.

    >>> exact_dtype("bfloat16", "float32"), exact_dtype("float32", "bfloat16")
    ('bfloat16', 'bfloat16')
    """
    return stored if computed in (stored, "float32") else computed
