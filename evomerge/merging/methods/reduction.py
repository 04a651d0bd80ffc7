"""Sums over whole tensors that have the same bits for any number of threads.

Torch splits a reduction of more than 32768 elements among its threads, so the last bits depend on their
number. Here a tensor is reduced in fixed blocks below that size, in float64, and the block sums are added
exactly. So a model that one process scores can be exported by another bit for bit. Products and factors of
matrices come from libraries, on one thread.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from threadpoolctl import ThreadpoolController

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16_384
LANES = 16
SHORTEST = 1e-16
"""Product of two lengths below which the angle between the tensors is undefined."""


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the inner products of all pairs of tensors of equal shape, as Python floats.

    Products of float32 are exact in float64. They are summed in `LANES` interleaved sums per block, then
    over the lanes in order, then exactly over the blocks. Compiled kernels use the same order.

    >>> import torch
    >>> gram([torch.ones(3), torch.tensor([1.0, 2.0, 3.0])])
    [[3.0, 6.0], [6.0, 14.0]]
    """
    import numpy

    pairs = pairs_of(len(tensors))
    flat = [tensor.detach().cpu().numpy().reshape(-1) for tensor in tensors]
    sums: list[list[float]] = []
    for start in range(0, flat[0].size, BLOCK):
        block = [tensor[start : start + BLOCK].astype(numpy.float64) for tensor in flat]
        pad = -len(block[0]) % LANES
        rows = [numpy.pad(values, (0, pad)).reshape(-1, LANES) for values in block]
        lanes = [numpy.add.reduce(rows[i] * rows[j], axis=0).tolist() for i, j in pairs]
        sums.append([functools.reduce(operator.add, lane) for lane in lanes])
    return symmetric(sums, len(tensors))


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Return the pairs of a Gram matrix's lower triangle, row by row."""
    return [(i, j) for i in range(count) for j in range(i + 1)]


def symmetric(sums: Sequence[Sequence[float]], count: int) -> list[list[float]]:
    """Return the Gram matrix from the sums of each block, (blocks, pairs), added exactly."""
    products = [[0.0] * count for _ in range(count)]
    for (i, j), column in zip(pairs_of(count), zip(*sums, strict=True), strict=False):
        products[i][j] = products[j][i] = math.fsum(column)
    return products


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm of all elements, as a Python float.

    >>> import torch
    >>> norm(torch.tensor([[3.0], [4.0]]))
    5.0
    """
    return math.sqrt(gram([tensor])[0][0])


def cosines(products: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the cosines of a Gram matrix, 0 for a tensor of length (nearly) 0."""
    lengths = [math.sqrt(products[i][i]) for i in range(len(products))]
    return [
        [
            max(-1.0, min(1.0, product / (a * b))) if a * b > SHORTEST else 0.0
            for b, product in zip(lengths, row, strict=True)
        ]
        for a, row in zip(lengths, products, strict=True)
    ]


def as_rows(tensor: Tensor) -> Tensor:
    """Return a view as a matrix whose rows are the last dimension; one or no dimension is one row."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(1, -1)


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of the rows of two matrices of equal shape, as a float64 vector.

    >>> import torch
    >>> row_products(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
    tensor([6., 1.], dtype=torch.float64)
    """
    import torch

    rows, columns = first.shape
    products = torch.zeros(rows, dtype=torch.float64, device=first.device)
    step = max(1, BLOCK // max(columns, 1))
    for row in range(0, rows, step):
        for column in range(0, columns, BLOCK):
            place = slice(row, row + step), slice(column, column + BLOCK)
            block = first[place].to(torch.float64) * second[place].to(torch.float64)
            products[row : row + step] += block.sum(-1)
    return products


def row_cosines(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean cosine of all pairs of tensors for each row, as a float64 vector.

    A pair with a row of length (nearly) 0 counts as 0.
    """
    import torch

    matrices = [as_rows(tensor) for tensor in tensors]
    lengths = [row_products(matrix, matrix).sqrt() for matrix in matrices]
    total = torch.zeros_like(lengths[0])
    count = len(tensors)
    for i in range(count):
        for j in range(i):
            size = lengths[i] * lengths[j]
            cos = row_products(matrices[i], matrices[j]) / size.clamp(min=SHORTEST)
            total += torch.where(size > SHORTEST, cos.clamp(-1.0, 1.0), 0.0)
    return total / (count * (count - 1) / 2)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Multiply and factor matrices on one thread, because splitting the work may change the bits."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _OneBlasThread:
    """Counts the threads that ask for it, because the limit is one of the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._limits = _libraries().limit(limits=1, user_api="blas")
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._limits.restore_original_limits()


@functools.cache
def _libraries() -> ThreadpoolController:
    """Return the BLAS of numpy and scipy; finding them takes milliseconds."""
    return ThreadpoolController()


_BLAS = _OneBlasThread()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep numpy's and scipy's BLAS to one thread, as `one_thread` keeps torch's; threads may nest it."""
    _BLAS.enter()
    try:
        yield
    finally:
        _BLAS.leave()
