"""Methods that solve a least-squares problem for each weight matrix: wudi.

They say something of the weight matrices of layers only; all other tensors are merged by task arithmetic (see
`spectral`). Normal matrices are in float64, and everything runs on one thread, so a merge has the same bits
for any number of threads.

A matrix m x n (outputs x inputs) of K sources makes a normal matrix of size N = min(n, K m), which takes
about 2 m n N + N^3 / 3 multiplications and 16 N^2 bytes: 5 s for two sources of 2048 x 2048, but minutes and
gigabytes for the wide projections of a 7B model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.blend import Blend, run
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.reduction import one_thread
from evomerge.merging.methods.spectral import weighted_matrices
from evomerge.merging.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


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
    paper="Cheng et al. 2025, Whoever started the interference should end it (WUDI), arXiv:2503.08099",
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

    parts = weighted_matrices(tensors, weight) if inside else []
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


def solved(wanted: Tensor, normal: Tensor, ridge: float) -> Tensor:
    """Return wanted (normal + ridge)^-1. Changes `normal`."""
    import torch

    normal.diagonal().add_(ridge)
    lower = torch.linalg.cholesky(normal)
    return torch.cholesky_solve(wanted.T, lower).T
