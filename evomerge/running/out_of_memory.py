"""Out of memory: which exceptions mean it, on any device, and what to do before the next attempt."""

from __future__ import annotations

import gc

_SAYINGS = (
    "out of memory",  # CUDA, ROCm, and "MPS backend out of memory"
    "can't allocate memory",  # torch's CPU allocator on Linux and macOS
    "not enough memory",  # the same on Windows
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""Texts of RuntimeErrors that mean lack of memory, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that a device, or this machine, has no memory left for a request.

    torch has a type for accelerators that use its caching allocator (`torch.OutOfMemoryError`); MPS, the CPU
    allocator and the CUDA libraries raise a plain RuntimeError, which only its text tells apart.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("MPS backend out of memory (...)"))
    (True, True)
    >>> is_out_of_memory(RuntimeError("shapes differ")), is_out_of_memory(ValueError("out of memory"))
    (False, False)
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAYINGS)


def release(device: str) -> None:
    """Free the memory that a failed attempt left cached on a device; call it after handling its exception."""
    import torch

    gc.collect()
    kind = device.partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif kind == "mps" and torch.backends.mps.is_available():
        torch.mps.empty_cache()
