"""Methods that merge the singular directions of weight matrices: tsv, iso_c, iso_cts.

They say something of the weight matrices of layers only. All other tensors (embeddings and heads, vectors
such as norms and biases, tensors of three dimensions such as stacked experts, towers beside the text decoder)
are merged by task arithmetic.

Common deviations: the papers have no weights. Here the methods merge the weighted task vectors; a source of
weight 0, or one that leaves the tensor as it is, is left out and does not count as a task. Directions whose
singular value is at most `ABSENT` times the largest are rounding errors, of a low-rank fine-tune for example,
and are left out, too.

Everything runs on one thread, so a merge has the same bits for any number of threads. Time: about 3 seconds
per factorisation of a 2048 x 2048 matrix on an idle core, half a minute for 4096 x 4096, so these methods
suit single merges and small models rather than the search on a large one. Memory, measured with base and
sources: for two sources 9 (iso_c) to 11 (iso_cts) times the matrix in float32, 1 more per further source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.blend import Blend, run
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.draws import uniform
from evomerge.merging.methods.reduction import one_blas_thread, one_thread
from evomerge.merging.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor", "Tensor"]
"""U (m, r), S (r) and V' (r, n) of a matrix U S V'."""
ABSENT = 1e-5
"""Share of the largest singular value up to which a direction counts as absent."""
DEPENDENT = 1e-3
"""The same where directions of several sources are made orthogonal: they depend on each other."""
LARGE = 512
"""Smaller dimension from which a few directions are found by random projection."""
FEW = 4
"""Directions are few if this many times their number is no more than the smaller dimension."""
POWERS = 2
"""Rounds of subspace iteration of the random projection."""
ROWS = 256
"""Rows of a matrix that are in float64 at once."""


@method(
    "tsv",
    WEIGHT,
    LAMBDA,
    paper="Gargiulo et al. 2025, Task singular vectors (TSV-Merge), arXiv:2412.00081",
    inputs="task_vectors",
    matrices=True,
)
def tsv(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    lambda_: float = 1.0,
    inside: bool,
) -> Tensor:
    """Keep the top singular directions of each task vector and make those of different sources orthogonal.

    Each of K task vectors is cut to its top min(m, n) / K singular directions. The left directions of all
    sources are replaced by the nearest orthonormal ones, so are the right ones, and the result has the
    sources' own singular values.

    Deviations: those of all methods in `spectral`; directions that several sources have in common exactly
    stay common, where the nearest orthonormal ones are not unique. From K = 4 on, directions of matrices of
    at least 512 x 512 are found by random projection with two rounds of subspace iteration. Measured: what is
    kept of the length of a task vector is shorter than it could be by less than 1 % if the k-th singular
    value falls like 1 / sqrt(k), and by 1 to 7 % for noise, whose directions are all alike.

    >>> import torch
    >>> vectors = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])]
    >>> tsv(torch.zeros(2, 2), vectors, weight=(1.0, 1.0), inside=True)
    tensor([[2., 0.],
            [0., 3.]])
    """
    import torch

    parts = weighted(tensors, weight) if inside else []
    if len(parts) < 2:
        return run(Blend(weights=weight, scale=lambda_), base, tensors)
    with one_thread():
        rank = max(1, min(base.shape) // len(parts))
        found = [top(vector * w, rank) for vector, w in parts]
        values = torch.cat([s for _, s, _ in found])
        left, right = all_orthonormal(found)
        return (left.mul_(values) @ right.T).mul_(lambda_).add_(base)


@method(
    "iso_c",
    WEIGHT,
    LAMBDA,
    paper="Marczak et al. 2025, No task left behind: isotropic model merging, arXiv:2502.04959",
    inputs="task_vectors",
    matrices=True,
)
def iso_c(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    lambda_: float = 1.0,
    inside: bool,
) -> Tensor:
    """Add the weighted task vectors and give all singular directions of the sum the same strength.

    Section 4 of the paper: with sum(w d) = U S V', the merge moves by mean(S) U V'.

    Deviations: those of all methods in `spectral`; the mean is that of the directions present.

    >>> import torch
    >>> vectors = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])]
    >>> iso_c(torch.zeros(2, 2), vectors, weight=(1.0, 1.0), inside=True)
    tensor([[3., 0.],
            [0., 3.]])
    """
    parts = weighted(tensors, weight) if inside else []
    if not parts:
        return run(Blend(weights=weight, scale=lambda_), base, tensors)
    with one_thread():
        left, values, right = factors(total(parts))
        return (left @ right).mul_(mean(values) * lambda_).add_(base)


@method(
    "iso_cts",
    WEIGHT,
    Parameter(
        name="common",
        default=0.8,
        low=0.0,
        high=1.0,
        help="share of the directions that come from the sum; the rest are the sources' own",
    ),
    LAMBDA,
    paper="Marczak et al. 2025, No task left behind: isotropic model merging, arXiv:2502.04959",
    inputs="task_vectors",
    matrices=True,
)
def iso_cts(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    common: float = 0.8,
    lambda_: float = 1.0,
    inside: bool,
) -> Tensor:
    """Do as iso_c, with the weakest directions of the sum replaced by directions of single sources.

    Section 5 of the paper, with r = min(m, n) directions in all: the top `common` r of the sum, and for each
    of K sources the top (1 - `common`) r / K of its task vector, of which the common left directions are
    taken off first. Left and right directions are replaced by the nearest orthonormal ones and get the mean
    of all their singular values.

    Deviations: those of all methods in `spectral`; numbers of directions are rounded so that all sources have
    the same number; the mean is that of the directions present. Few directions of large matrices are found
    by random projection, as in `tsv`.

    >>> import torch
    >>> vectors = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])]
    >>> iso_cts(torch.zeros(2, 2), vectors, weight=(1.0, 1.0), common=1.0, inside=True)
    tensor([[3., 0.],
            [0., 3.]])
    """
    import torch

    parts = weighted(tensors, weight) if inside else []
    if not parts:
        return run(Blend(weights=weight, scale=lambda_), base, tensors)
    size, count = min(base.shape), len(parts)
    own = min(round((1.0 - common) * size / count), size // count)
    with one_thread():
        largest = max(float(vector.abs().max()) * abs(w) for vector, w in parts)
        shared = top(total(parts), size - count * own)
        largest = max([largest, *shared[1].tolist()[:1]])
        found = [present(shared, largest)]
        for vector, w in parts if own else ():
            rest = vector * w
            rest -= shared[0] @ (shared[0].T @ rest)
            found.append(present(top(rest, own), largest))
            del rest
        del shared
        strength = mean(torch.cat([s for _, s, _ in found]))
        left, right = all_orthonormal(found)
        return (left @ right.T).mul_(strength * lambda_).add_(base)


def weighted(tensors: Sequence[Tensor], weight: Sequence[float]) -> list[tuple[Tensor, float]]:
    """Return the task vectors with their weights, but those whose product is 0; none if they are no matrices.

    None also if one is not finite, so that plain task arithmetic shows it.
    """
    if tensors[0].dim() != 2 or not all(tensors[0].shape):
        return []
    sizes = [float((tensor * w).abs_().max()) for tensor, w in zip(tensors, weight, strict=True)]
    if not all(map(math.isfinite, sizes)):
        return []
    parts = zip(tensors, weight, strict=True)
    return [part for part, size in zip(parts, sizes, strict=True) if size > 0.0]


def total(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return the sum of weighted task vectors as a new tensor."""
    (first, w), *others = parts
    added = first * w
    for vector, w in others:
        added += vector * w
    return added


def factors(matrix: Tensor) -> Factors:
    """Return the singular value decomposition of a finite matrix, strongest first, without absent directions.

    From the eigenvectors of M'M (of MM' if M is wide) in float64. Squaring costs half of its 16 digits: a
    value at the limit `ABSENT` is exact to about 1e-5 of itself. Directions are orthonormal to float32's
    rounding.
    """
    import torch
    from scipy.linalg import eigh

    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = factors(matrix.T)
        return left.T, values, right.T
    width = matrix.shape[1]
    products = torch.zeros(width, width, dtype=torch.float64)
    for rows in torch.split(matrix, ROWS):
        wide = rows.double()
        products.addmm_(wide.T, wide)
    with one_blas_thread():
        squares, vectors = eigh(products.numpy(), overwrite_a=True, check_finite=False, driver="evd")
    del products
    values = torch.from_numpy(squares).clamp(min=0.0).sqrt().flip(0)
    values = values[: int((values > ABSENT * values[:1]).sum())]
    axes = torch.from_numpy(vectors)[:, width - len(values) :]  # weakest first
    left = torch.empty(len(matrix), len(values))
    for rows, place in zip(torch.split(matrix, ROWS), torch.split(left, ROWS), strict=True):
        place.copy_((rows.double() @ axes).flip(1).div_(values))
    right = axes.T.float()
    del vectors, axes
    return left, values.float(), right.flip(0)


def top(matrix: Tensor, count: int) -> Factors:
    """Return the `count` strongest singular directions: exactly, or by projection if few of a large matrix.

    The projection is a fixed random one (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), the same for all
    matrices of a width, so equal matrices have equal directions.
    """
    import torch

    size = min(matrix.shape)
    if size < LARGE or FEW * count > size:
        left, values, right = factors(matrix)
        return left[:, :count].clone(), values[:count], right[:count].clone()  # to free the other directions
    width = min(size, count + max(10, count // 4))
    draws = uniform(0, matrix.shape[1] * width) - 0.5
    basis = torch.linalg.qr(matrix @ torch.from_numpy(draws).view(-1, width)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = factors(basis.T @ matrix)
    return basis @ left[:, :count], values[:count], right[:count]


def present(found: Factors, largest: float) -> Factors:
    """Return the directions with a singular value above `ABSENT` times the largest."""
    left, values, right = found
    count = int((values > ABSENT * largest).sum())
    return left[:, :count], values[:count], right[:count]


def all_orthonormal(found: list[Factors]) -> tuple[Tensor, Tensor]:
    """Return the nearest orthonormal left and right directions of several matrices; empties the list."""
    import torch

    right = torch.cat([v for _, _, v in found]).T
    left = torch.cat([u for u, _, _ in found], dim=1)
    found.clear()
    left = nearest_orthonormal(left)
    return left, nearest_orthonormal(right)


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """Return the orthogonal polar factor of a matrix of unit columns; dependent directions add nothing.

    >>> import torch
    >>> nearest_orthonormal(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).mul(2**0.5)
    tensor([[1.0000, 1.0000],
            [0.0000, 0.0000]])
    """
    if not columns.shape[1]:
        return columns
    left, values, right = factors(columns)
    kept = int((values > DEPENDENT * values[0]).sum())
    return left[:, :kept] @ right[:kept]


def mean(values: Tensor) -> float:
    """Return the mean of a vector, added exactly; 0 if it is empty."""
    return math.fsum(values.tolist()) / max(1, len(values))
