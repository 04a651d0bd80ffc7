"""Methods that solve a least-squares problem for each weight matrix: wudi, regmean.

They say something of weight matrices only; `wudi` merges all other tensors by task arithmetic (see
`spectral`), `regmean` averages them. Normal matrices are in float64, and everything runs on one thread, so a
merge has the same bits for any number of threads.

A matrix m x n (outputs x inputs) of K sources makes a normal matrix of size N = min(n, K m), which takes
about 2 m n N + N^3 / 3 multiplications and 16 N^2 bytes: 5 s for two sources of 2048 x 2048, but minutes and
gigabytes for the wide projections of a 7B model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.errors import ModelError
from evomerge.merging.methods.averaging import SHARE
from evomerge.merging.methods.blend import Blend, run, weighted_sum
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.reduction import one_thread
from evomerge.merging.methods.spectral import weighted
from evomerge.merging.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6
"""What is added to the diagonal of Gram matrices, as a share of the sum of their mean diagonal elements."""


@method(
    "wudi",
    WEIGHT,
    Parameter(
        name="ridge",
        default=1e-6,
        low=1e-6,
        high=1.0,
        help="added to the normal matrix, as a share of its mean diagonal element",
    ),
    LAMBDA,
    paper="Cheng et al. 2025, WUDI-Merging, arXiv:2503.08099",
    inputs="task_vectors",
    matrices=True,
)
def wudi(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    ridge: float = 1e-6,
    lambda_: float = 1.0,
    inside: bool,
) -> Tensor:
    """Find the task vector that differs least from each source's in the directions that the source uses.

    The minimum of sum_k |(d - d_k) d_k'|^2 / |d_k|^2 over d: with C_k = d_k' d_k / |d_k|^2 it is
    (sum d_k C_k) (sum C_k)^-1. Task vectors stand in for the inputs of the layer, whose directions they span.

    Deviations: the paper descends the gradient from the sum of the task vectors for a few hundred steps; this
    is the minimum itself, with a small ridge. Task vectors have weights; a source of weight 0, or one that
    leaves the tensor as it is, is left out. One source alone is merged exactly. Layers that store their
    weights inputs first (Conv1D of GPT-2) are taken as stored.

    >>> import torch
    >>> vectors = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])]
    >>> wudi(torch.zeros(2, 2), vectors, weight=(1.0, 1.0), inside=True)
    tensor([[2.0000, 0.0000],
            [0.0000, 3.0000]])
    """
    import torch

    parts = [vector * w for vector, w in weighted(tensors, weight)] if inside else []
    if len(parts) < 2:
        return run(Blend(weights=weight, scale=lambda_), base, tensors)
    rows, columns = base.shape
    with one_thread():
        if len(parts) * rows < columns:
            return base + _by_outputs(parts, ridge).mul_(lambda_)
        normal = torch.zeros(columns, columns, dtype=torch.float64)
        wanted = torch.zeros(rows, columns, dtype=torch.float64)
        while parts:
            vector = parts.pop(0).double()
            products = (vector.T @ vector).div_(vector.square().sum())
            normal += products
            wanted += vector @ products
            del products
        return base + solved(wanted, normal, ridge * float(normal.trace()) / columns).float().mul_(lambda_)


def _by_outputs(parts: list[Tensor], ridge: float) -> Tensor:
    """Return the same minimum for wide matrices, from the products of rows instead of columns.

    With E the stack of all d_k / |d_k|, sum C_k = E' E, and (E' E + r)^-1 E' = E' (E E' + r)^-1.
    """
    import torch

    columns, count = parts[0].shape[1], len(parts)
    units = [part.double() / part.double().norm() for part in parts]
    wanted = torch.cat(
        [part.double() @ unit.T for part, unit in zip(parts, units, strict=True)], dim=1
    )  # the merge is this times (E E' + r)^-1 E
    stack = torch.cat(units)
    del units
    return (solved(wanted, stack @ stack.T, ridge * count / columns) @ stack).to(torch.float32)


@method(
    "regmean",
    SHARE,
    Parameter(
        name="alpha",
        default=0.9,
        low=0.0,
        high=1.0,
        help="factor of the products of different inputs; 0 weighs each input by its own size only",
    ),
    paper="Jin et al. 2023, Dataless knowledge fusion by merging weights (RegMean), arXiv:2212.09849",
    inputs="models",
    file="gram",
)
def regmean(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    alpha: float = 0.9,
    grams: Sequence[Tensor | None],
) -> Tensor:
    """Find the weights whose outputs differ least from each source's on that source's own inputs.

    With G_k = X_k' X_k the Gram matrix of the layer's inputs on text of source k, its off-diagonal elements
    times `alpha`, the merge is (sum w W_k G_k) (sum w G_k)^-1. A tensor without Gram matrices, which is all
    but the weights of linear layers, is the weighted mean. Weights that are all 0 count as equal.

    Deviations: the Gram matrices are means over tokens, so the length of a text has no effect, and sources
    have weights. One part in a million of the mean square of an input is added to the diagonals, so an input
    that no text uses gets the weighted mean.

    >>> import torch
    >>> grams = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))]
    >>> regmean(None, [torch.ones(1, 2), torch.zeros(1, 2)], weight=(1.0, 1.0), grams=grams)
    tensor([[0.7500, 0.5000]])
    """
    import torch

    whole = math.fsum(weight)
    shares = [w / whole if whole > 0.0 else 1.0 / len(weight) for w in weight]
    known = [gram for gram in grams if gram is not None]
    if len(known) < len(tensors) or tensors[0].dim() != 2 or not tensors[0].numel():
        return weighted_sum(tensors, shares)
    size = math.fsum(float(gram.diagonal().double().mean()) for gram in known)
    if size == 0.0:
        return weighted_sum(tensors, shares)
    rows, columns = tensors[0].shape
    with one_thread():
        normal = torch.zeros(columns, columns, dtype=torch.float64)
        wanted = torch.zeros(rows, columns, dtype=torch.float64)
        for tensor, gram, share in zip(tensors, known, shares, strict=True):
            products = gram.double() * alpha
            products.diagonal().add_((1.0 - alpha) * gram.diagonal() + FLOOR * size)
            products *= share
            normal += products
            wanted += tensor.double() @ products
        return solved(wanted, normal, 0.0).float()


def solved(wanted: Tensor, normal: Tensor, ridge: float) -> Tensor:
    """Return wanted (normal + ridge)^-1. Changes `normal`.

    Raises ModelError if `normal` is no sum of matrices X' X, which only a damaged Gram file can cause.
    """
    import torch

    normal.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(normal)
    if failed:
        raise ModelError(
            "a Gram matrix is not one of inputs",
            expected="a positive definite matrix",
            fix="measure it again: evomerge gram MODEL TEXT OUT",
        )
    return torch.cholesky_solve(wanted.T, lower).T
