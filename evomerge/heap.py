"""The heap: memory that was freed, but that the C library keeps for later, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

WORTH_TRIMMING = 10_000_000
"""Parameters of a model from which freed memory is given back: a tenth of a second, for up to half of what a
process holds."""


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def give_back(model: Any) -> None:
    """Trim where a model's merges or batches leave enough behind; call it when they are let go of."""
    if sum(parameter.numel() for parameter in model.parameters()) >= WORTH_TRIMMING:
        trim()
