"""The heap: what libraries keep for later of a process's memory, given back or bounded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

WORTH_TRIMMING = 10_000_000
"""Parameters of a model from which freed memory is given back: a tenth of a second, for up to half of what a
process holds."""

KERNELS = 64
"""Kernels that oneDNN keeps, one for each shape of inputs. Unasked it keeps 1024, and gradient steps have
inputs of ever other lengths: 0.4 GB more after 12 steps on a model of 135 million parameters."""


def bound_kernels() -> None:
    """Let oneDNN keep few kernels, unless the environment says how many; call it before a model is asked."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def give_back(model: Any) -> None:
    """Trim where a model's merges or batches leave enough behind; call it when they are let go of."""
    if sum(parameter.numel() for parameter in model.parameters()) >= WORTH_TRIMMING:
        trim()
