"""Methods that choose element by element how far to leave the base: sce, nearswap, arcee_fusion.

Pure functions of float32 tensors. Sums over rows and whole tensors are taken in fixed blocks (see
`reduction`), so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.averaging import WEIGHT_LIMIT
from evomerge.merging.methods.blend import reaches, weighted_sum, without_tiny
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.reduction import BLOCK, as_rows, norm
from evomerge.merging.methods.selection import boundary

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 18
"""Number of elements processed at a time where there are several intermediate results."""
QUARTILES = (0.25, 0.5, 0.75)
OUTLYING = 1.5
"""Interquartile ranges above the median from which an importance stands out."""


@method(
    "sce",
    Parameter(
        name="select_topk",
        default=1.0,
        low=0.0,
        high=1.0,
        help="share of the elements kept, among those in which the models differ: the most varied ones",
    ),
    paper="Wan et al. 2024, FuseChat, arXiv:2408.07990",
    inputs="task_vectors",
)
def sce(base: Tensor, tensors: Sequence[Tensor], *, select_topk: float = 1.0) -> Tensor:
    """Select varied elements, calculate weights from energies, erase minority signs.

    Section 3.2 of the paper: keep the elements whose variance across the task vectors is largest; weigh
    each task vector by its mean square over them; per element, average those that have the sign of the
    sum of all (a sum of 0 elects plus). Weights are per tensor.

    Deviations: with `select_topk` below 1 the share is of the elements with a variance above 0, as in
    mergekit, so that untouched ones do not count; equal variances are ranked by lowest index; where all
    energies are 0 the base is returned; weights that are subnormal in float32 count as 0.

    >>> import torch
    >>> sce(torch.zeros(2), [torch.tensor([2.0, 1.5]), torch.tensor([-1.0, 1.0])], select_topk=0.5)
    tensor([2., 0.])
    """
    import torch

    vectors = [tensor.reshape(-1) for tensor in tensors]
    pieces = [slice(start, start + PIECE) for start in range(0, base.numel(), PIECE)]
    mask: Tensor | None = None
    if select_topk < 1.0:
        variance = torch.empty_like(base).view(-1)
        for piece in pieces:
            variance[piece] = _variance([vector[piece] for vector in vectors])
        varied = int(select_topk * int(torch.count_nonzero(variance)))
        mask = reaches(variance, boundary(variance.cpu().numpy(), varied)).logical_and_(variance > 0.0)
        del variance

    def selected(piece: slice) -> list[Tensor]:
        return [vector[piece] if mask is None else vector[piece] * mask[piece] for vector in vectors]

    squares = [[norm(vector) ** 2 for vector in selected(piece)] for piece in pieces]
    energy = [math.fsum(column) for column in zip(*squares, strict=True)]
    total = math.fsum(energy)
    if total == 0.0:
        return base.clone()
    shares = without_tiny([part / total for part in energy])
    mix = base.clone().view(-1)
    for piece in pieces:
        mix[piece] += _by_majority(selected(piece), shares)
    return mix.view(base.shape)


def _variance(vectors: Sequence[Tensor]) -> Tensor:
    """Return the variance of each element across some vectors."""
    even = (1.0 / len(vectors),) * len(vectors)
    mean = weighted_sum(vectors, even)
    return weighted_sum([(d - mean).square() for d in vectors], even)


def _by_majority(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted mean, per element, of those that have the sign of the sum of all."""
    import torch

    sign = torch.copysign(torch.ones_like(vectors[0]), weighted_sum(vectors, (1.0,) * len(vectors)) + 0.0)
    mix, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, share in zip(vectors, shares, strict=True):
        agreeing = vector * sign
        divisor += (agreeing > 0.0) * share
        mix += agreeing.clamp_(min=0.0).mul_(share)
    mix /= divisor + (divisor == 0.0)
    mix *= sign
    return mix


@method(
    "nearswap",
    Parameter(name="t", default=1e-4, low=0.0, high=WEIGHT_LIMIT, help="farthest an element may move"),
    paper="none; Alchemonaut 2024, QuartetAnemoi-70B model card; mergekit's nearswap",
    inputs="task_vectors",
    sources=(1, 1),
    by_rows=True,
)
def nearswap(base: Tensor, tensors: Sequence[Tensor], *, t: float) -> Tensor:
    """Move each element of the base towards the source by at most t.

    mergekit interpolates with weight min(t / |d|, 1) on the source, d its task vector, so elements
    nearer than t are swapped and the others move by t: base + clamp(d, -t, t).

    Deviation: mergekit takes |d| as at least 1e-6, so a t below that moves the nearest elements less
    than this does, by no more than 1e-6.

    >>> import torch
    >>> nearswap(torch.ones(3), [torch.tensor([-2.0, 0.25, 2.0])], t=0.5)
    tensor([0.5000, 1.2500, 1.5000])
    """
    mix = tensors[0].clamp(-t, t)
    mix += base
    return mix


@method(
    "arcee_fusion",
    paper="none; Arcee 2024, Arcee Fusion in mergekit",
    inputs="models",
    needs_base=True,
    sources=(1, 1),
)
def arcee_fusion(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Take from the source only the elements whose change stands out.

    The importance of an element is |x - base| times the Kullback-Leibler divergence of its row's softmax
    from the base's; elements above median + 1.5 interquartile ranges of the tensor's importances are the
    source's, all others the base's. Quantiles are the elements at int(q (n - 1)) in ascending
    order. A tensor of one dimension is one row.

    Deviations from mergekit: divergences are computed in float64; its float32 ones are off by up to one
    part in a thousand, differently on each processor, so elements that close to the threshold may be
    chosen differently. Its quantiles of tensors above a million elements are those of a random sample;
    ours are exact.

    >>> import torch
    >>> arcee_fusion(torch.zeros(1, 5), [torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0]])])
    tensor([[0., 0., 0., 0., 9.]])
    """
    source = tensors[0]
    if not base.numel():
        return base.clone()
    rows, origin = as_rows(source), as_rows(base)
    divergence = _divergence(rows, origin).to(base.dtype)[:, None]
    low, middle, high = _quartiles((rows - origin).abs_().mul_(divergence))
    limit = middle + OUTLYING * (high - low)
    merged = origin.clone()
    step = max(1, PIECE // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):  # importances are computed again piece by piece to save memory
        here = slice(start, start + step)
        outlying = (rows[here] - origin[here]).abs_().mul_(divergence[here]) > limit
        merged[here] = rows[here].where(outlying, origin[here])
    return merged.view(base.shape)


def _divergence(rows: Tensor, origin: Tensor) -> Tensor:
    """Return KL(softmax(row) || softmax(origin row)) of each row, as a float64 vector."""
    import torch

    count, columns = rows.shape
    divergence = torch.zeros(count, dtype=torch.float64, device=rows.device)
    step = max(1, BLOCK // columns)
    for start in range(0, count, step):
        here = slice(start, start + step)
        size, size_origin = _log_total(rows[here]), _log_total(origin[here])
        for column in range(0, columns, BLOCK):
            place = here, slice(column, column + BLOCK)
            log_p = rows[place].to(torch.float64) - size
            log_q = origin[place].to(torch.float64) - size_origin
            divergence[here] += (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.clamp_(min=0.0)


def _log_total(rows: Tensor) -> Tensor:
    """Return log(sum(exp(row))) of each row as a float64 column."""
    import torch

    top = rows.amax(-1, keepdim=True).to(torch.float64)
    total = torch.zeros_like(top)
    for column in range(0, rows.shape[1], BLOCK):
        total += (rows[:, column : column + BLOCK].to(torch.float64) - top).exp().sum(-1, keepdim=True)
    return top + total.log()


def _quartiles(values: Tensor) -> list[float]:
    """Return the elements at a quarter, half and three quarters of the ascending order; reorders them."""
    ranks = [int(share * (values.numel() - 1)) for share in QUARTILES]
    ordered = values.detach().cpu().numpy().reshape(-1)
    ordered.partition(ranks)
    return [float(ordered[rank]) for rank in ranks]
