"""Random draws of DARE and DELLA: a hash of (key, index), so any order and any block gives the same bits.

A key depends on (recipe seed, tensor, source), and draw number i of a key depends on the key and i only. So
a compiled kernel can draw in any place, and other sources, threads and devices have no influence. The hash is
two multiply-xorshift rounds (constants: Wellons 2018, "lowbias32" family), with half of the key before and
half between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

CHUNK = 2048
"""Elements that share CHUNK / 2 hashes: the first half takes their low bits, the second their high ones."""
STEPS = 65_536
"""Resolution of a 16-bit draw: a probability is rounded to a multiple of its reciprocal."""


def keys(seed: int, tensor: str, sources: Sequence[str]) -> list[int]:
    """Return the key (64 bits) of each source for one tensor.

    A source that appears twice draws independently the second time.
    """
    made = []
    for position, source in enumerate(sources):
        occurrence = sources[:position].count(source)
        digest = hashlib.sha256(json.dumps([seed, tensor, source, occurrence]).encode()).digest()
        made.append(int.from_bytes(digest[:8], "little"))
    return made


def bits(key: int, count: int, first: int = 0) -> ndarray[Any, Any]:
    """Return independent draws of 32 bits, numbers `first` to `first + count - 1`, (count,) uint32."""
    import numpy

    x = numpy.arange(first, first + count, dtype=numpy.uint64).astype(numpy.uint32)
    x ^= numpy.uint32(key & 0xFFFFFFFF)
    x ^= x >> numpy.uint32(16)
    x *= numpy.uint32(0x21F0AAAD)
    x ^= x >> numpy.uint32(15)
    x += numpy.uint32(key >> 32)
    x *= numpy.uint32(0xD35A2D97)
    x ^= x >> numpy.uint32(15)
    return x


def short(key: int, count: int) -> ndarray[Any, Any]:
    """Return `count` draws of 16 bits, (count,) uint16, two from each hash.

    >>> (short(3, 5000) < STEPS // 4).mean().round(2).item()
    0.25
    """
    import numpy

    whole = -(-count // CHUNK)
    halves = bits(key, whole * CHUNK // 2).reshape(whole, 1, CHUNK // 2)
    both = numpy.concatenate([halves & numpy.uint32(0xFFFF), halves >> numpy.uint32(16)], axis=1)
    return both.astype(numpy.uint16).ravel()[:count]


def uniform(key: int, count: int, first: int = 0) -> ndarray[Any, Any]:
    """Return draws from [0, 1), multiples of 2 ** -24, (count,) float32, from number `first` on."""
    import numpy

    return (bits(key, count, first) >> numpy.uint32(8)).astype(numpy.float32) * numpy.float32(2.0**-24)
