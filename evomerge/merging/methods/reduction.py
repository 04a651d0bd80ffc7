"""Sums over whole tensors that have the same bits whatever the number of threads.

Torch splits a reduction of more than 32768 elements among its threads, so its last bits depend on how
many there are. Here a tensor is reduced in fixed blocks below that size, in float64, and the block sums
are added exactly. That is what lets a model scored in one process be exported bit for bit by another.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16_384


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two tensors of equal shape, as a Python float.

    >>> import torch
    >>> dot(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    6.0
    """
    import torch

    blocks = zip(torch.split(a.flatten(), BLOCK), torch.split(b.flatten(), BLOCK), strict=True)
    sums = [(x.to(torch.float64) * y.to(torch.float64)).sum() for x, y in blocks]
    return math.fsum(torch.stack(sums).tolist()) if sums else 0.0


def norm(a: Tensor) -> float:
    """Return the Euclidean norm of all elements, as a Python float."""
    return math.sqrt(dot(a, a))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two tensors read as vectors; 0 where one has no length."""
    lengths = norm(a) * norm(b)
    return max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths > 1e-16 else 0.0
