"""Sums over whole tensors that have the same bits whatever the number of threads.

Torch splits a reduction of more than 32768 elements among its threads, so its last bits depend on how
many there are. Here a tensor is reduced in fixed blocks below that size, in float64, and the block sums
are added exactly. That is what lets a model scored in one process be exported bit for bit by another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16_384
SHORTEST = 1e-16
"""Product of two lengths below which an angle between them means nothing."""


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the inner products of all pairs of tensors of equal shape, as Python floats.

    >>> import torch
    >>> gram([torch.ones(3), torch.tensor([1.0, 2.0, 3.0])])
    [[3.0, 6.0], [6.0, 14.0]]
    """
    import torch

    count = len(tensors)
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    flat = [tensor.flatten() for tensor in tensors]
    sums: list[Tensor] = []
    for start in range(0, flat[0].numel(), BLOCK):
        block = [tensor[start : start + BLOCK].to(torch.float64) for tensor in flat]
        sums += [(block[i] * block[j]).sum() for i, j in pairs]
    values = torch.stack(sums).tolist() if sums else [0.0] * len(pairs)
    products = [[0.0] * count for _ in range(count)]
    for index, (i, j) in enumerate(pairs):
        products[i][j] = products[j][i] = math.fsum(values[index :: len(pairs)])
    return products


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm of all elements, as a Python float.

    >>> import torch
    >>> norm(torch.tensor([[3.0], [4.0]]))
    5.0
    """
    return math.sqrt(gram([tensor])[0][0])


def cosines(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the cosines between all pairs of tensors; 0 with a tensor of (nearly) no length."""
    products = gram(tensors)
    lengths = [math.sqrt(products[i][i]) for i in range(len(tensors))]
    return [
        [
            max(-1.0, min(1.0, product / (a * b))) if a * b > SHORTEST else 0.0
            for b, product in zip(lengths, row, strict=True)
        ]
        for a, row in zip(lengths, products, strict=True)
    ]
