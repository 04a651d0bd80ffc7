"""Methods that add task vectors to the base: task_arithmetic, ties, dare_linear, dare_ties.

All four, and those in `sparse`, are one pipeline: sparsify each task vector, weight it, keep the
elements that agree with the majority sign (the ties methods), sum, divide by the weights that took part
(`normalize`), scale by `lambda` and add the base. Pure functions of float32 tensors. Elementwise steps
are never fused multiply-adds, so results do not depend on the number of threads.

Guards: a divisor below 1/100 of the size of the weights that took part counts as 0, and a divisor of 0
means "do not divide". Without that, weights such as 0.5 and -0.4999 would blow the result up by 1e4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.averaging import WEIGHT_LIMIT, weighted_sum
from evomerge.merging.methods.declaration import Parameter, method

if TYPE_CHECKING:
    from torch import Generator, Tensor

CANCELLED = 0.01
SMALLEST_DRAW = 2.0**-24
"""Resolution of a float32 uniform draw: a density below it keeps nothing."""

WEIGHT = Parameter(
    name="weight",
    default=1.0,
    low=-WEIGHT_LIMIT,
    high=WEIGHT_LIMIT,
    per_source=True,
    help="factor of each task vector; negative ones subtract it",
)
LAMBDA = Parameter(
    name="lambda", default=1.0, low=-WEIGHT_LIMIT, high=WEIGHT_LIMIT, help="factor of the merged task vector"
)


def density_of(help: str) -> Parameter:
    return Parameter(name="density", default=1.0, low=0.0, high=1.0, per_source=True, help=help)


def normalize_by(default: bool) -> Parameter:
    return Parameter(
        name="normalize", default=default, kind="flag", help="divide by the weights that took part"
    )


TOP_DENSITY = density_of("share of each task vector's elements kept, the largest ones")
RANDOM_DENSITY = density_of("probability of keeping an element of a task vector")
RESCALE = Parameter(
    name="rescale", default=True, kind="flag", help="divide what is kept by the density (the mean stays)"
)


@method(
    "task_arithmetic",
    WEIGHT,
    normalize_by(False),
    LAMBDA,
    paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    inputs="task_vectors",
)
def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Add weighted task vectors to the base: base + lambda * sum(w d).

    Section 3 of the paper: one weight of 1 returns the model, a negative one forgets its task.

    >>> import torch
    >>> task_arithmetic(torch.ones(2), [torch.ones(2), torch.ones(2)], weight=(0.5, -2.0))
    tensor([-0.5000, -0.5000])
    """
    return plain_mix(base, tensors, weight, normalize, lambda_)


@method(
    "ties",
    WEIGHT,
    TOP_DENSITY,
    normalize_by(True),
    LAMBDA,
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    inputs="task_vectors",
)
def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Trim task vectors to their largest elements, elect a sign per element, average who agrees.

    Algorithm 1 of the paper: trim (see `keep_largest`), elect the sign of the sum of the weighted task
    vectors (a sum of 0 elects plus), then the mean over those whose weighted element has that sign;
    zeros never take part.

    Deviations: task vectors have weights, as in mergekit; the divisor is the sum of the weights that
    took part, guarded as the module's docstring says. With weights of one sign the guard never acts and
    no element exceeds lambda times the largest task vector element there.

    >>> import torch
    >>> vectors = [torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])]
    >>> ties(torch.zeros(2), vectors, weight=(1.0, 1.0), density=(1.0, 1.0))
    tensor([3., 3.])
    """
    trimmed = [keep_largest(d, share) for d, share in zip(tensors, density, strict=True)]
    return consensus_mix(base, trimmed, weight, normalize, lambda_)


@method(
    "dare_linear",
    WEIGHT,
    RANDOM_DENSITY,
    normalize_by(False),
    RESCALE,
    LAMBDA,
    paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099",
    inputs="task_vectors",
    random=True,
)
def dare_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    generators: Sequence[Generator],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop elements of the task vectors at random, rescale the rest, add them to the base.

    Section 3.1 of the paper, with density = 1 - p: what is kept is divided by the density, so the mean
    over all masks is task arithmetic. (mergekit rescales by the ratio of L1 norms instead.)

    >>> import torch
    >>> vectors, draws = [torch.ones(4)], [torch.Generator().manual_seed(1)]
    >>> sorted(dare_linear(torch.zeros(4), vectors, weight=(1.0,), density=(0.5,), generators=draws).tolist())
    [0.0, 0.0, 2.0, 2.0]
    """
    kept = _drop_all(tensors, density, generators, rescale)
    return plain_mix(base, kept, weight, normalize, lambda_)


@method(
    "dare_ties",
    WEIGHT,
    RANDOM_DENSITY,
    normalize_by(False),
    RESCALE,
    LAMBDA,
    paper="Yu et al. 2024, arXiv:2311.03099, with the sign election of arXiv:2306.01708",
    inputs="task_vectors",
    random=True,
)
def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    generators: Sequence[Generator],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop elements of the task vectors at random, then elect signs and merge as TIES does.

    >>> import torch
    >>> vectors, draws = [torch.ones(2)], [torch.Generator()]
    >>> dare_ties(torch.zeros(2), vectors, weight=(0.5,), density=(1.0,), generators=draws)
    tensor([0.5000, 0.5000])
    """
    kept = _drop_all(tensors, density, generators, rescale)
    return consensus_mix(base, kept, weight, normalize, lambda_)


def keep_largest(vector: Tensor, density: float) -> Tensor:
    """Return the vector with all but its int(density * n) largest magnitudes set to 0.

    Exactly that many are kept; among equal magnitudes at the threshold the lowest indices win. Where
    int(density * n) is 0, nothing is kept. May return the argument itself.

    >>> import torch
    >>> keep_largest(torch.tensor([1.0, -3.0, 1.0, 2.0]), 0.75)
    tensor([ 1., -3.,  0.,  2.])
    """
    return keep_count(vector, int(density * vector.numel()))


def keep_count(vector: Tensor, kept: int) -> Tensor:
    """Return the vector with all but its `kept` largest magnitudes set to 0, as `keep_largest` does."""
    import numpy
    import torch

    if kept >= vector.numel():
        return vector
    if kept == 0:
        return torch.zeros_like(vector)
    threshold, surplus = _select(vector.abs().flatten(), kept)
    if threshold == 0.0:  # only zeros are cut
        return vector
    # hardshrink keeps |x| > lambd in one pass; the next float32 below makes that |x| >= threshold.
    below = float(numpy.nextafter(numpy.float32(threshold), numpy.float32(0.0)))
    trimmed = torch.nn.functional.hardshrink(vector, below)
    if len(surplus):
        trimmed.view(-1)[surplus] = 0.0
    return trimmed


def _select(magnitudes: Tensor, kept: int) -> tuple[float, Tensor]:
    """Return the smallest magnitude kept, and the last indices that have it but are one too many."""
    import numpy
    import torch

    rank = magnitudes.numel() - kept
    if magnitudes.device.type == "cpu":  # numpy's vectorised selection is ten times faster than kthvalue
        values = magnitudes.numpy()
        ordered = numpy.partition(values, rank)
        threshold = ordered[rank]
        excess = int(numpy.count_nonzero(ordered[:rank] == threshold)) if threshold else 0
        equal = numpy.flatnonzero(values == threshold) if excess else numpy.empty(0, dtype=numpy.int64)
        return float(threshold), torch.from_numpy(equal[len(equal) - excess :])
    limit = torch.kthvalue(magnitudes, rank + 1).values
    excess = int((magnitudes >= limit).sum()) - kept if limit else 0
    indices = (magnitudes == limit).nonzero()[:, 0]
    return float(limit), indices[len(indices) - excess :]


def _drop_all(
    tensors: Sequence[Tensor], density: Sequence[float], generators: Sequence[Generator], rescale: bool
) -> list[Tensor]:
    return [_drop(d, p, g, rescale) for d, p, g in zip(tensors, density, generators, strict=True)]


def _drop(vector: Tensor, density: float, generator: Generator, rescale: bool) -> Tensor:
    """Keep each element with probability `density`; the draw of an element depends on its index alone."""
    import torch

    if density >= 1.0:
        return vector
    if density < SMALLEST_DRAW:
        return torch.zeros_like(vector)
    draws = torch.rand(vector.shape, generator=generator)
    mask = torch.lt(draws, density, out=draws).to(vector.device)
    if rescale:
        mask *= 1.0 / density
    return mask.mul_(vector)


def plain_mix(
    base: Tensor, vectors: Sequence[Tensor], weight: Sequence[float], normalize: bool, scale: float
) -> Tensor:
    """Return base + scale * sum(w v), divided by sum(w) if asked."""
    if normalize:
        total = math.fsum(weight)
        if abs(total) > CANCELLED * math.fsum(map(abs, weight)):
            weight = [w / total for w in weight]
    mix = weighted_sum(vectors, weight)
    if scale != 1.0:
        mix *= scale
    mix += base
    return mix


def consensus_mix(
    base: Tensor, vectors: Sequence[Tensor], weight: Sequence[float], normalize: bool, scale: float
) -> Tensor:
    """Return base + scale * the sum or mean of the weighted vectors that have the majority sign."""
    import torch

    weighted = [v * w for v, w in zip(vectors, weight, strict=True)]
    total = weighted[0].clone()
    for part in weighted[1:]:
        total += part
    # Masks are kept as floats 0 and 1: boolean tensors and `where` are many times slower on a CPU.
    sign = torch.copysign(torch.ones_like(total), total)
    mix, taking_part = torch.zeros_like(total), torch.empty_like(total)
    divisor, size = torch.zeros_like(total), torch.zeros_like(total)
    one_signed = min(weight) >= 0.0 or max(weight) <= 0.0
    for part, w in zip(weighted, weight, strict=True):
        agreeing = part.mul_(sign)
        if normalize:
            torch.gt(agreeing, 0.0, out=taking_part)
            divisor += taking_part * w
            if not one_signed:
                size += taking_part * abs(w)
        mix += agreeing.clamp_(min=0.0)
    mix *= sign
    if normalize:
        torch.le(divisor.abs(), size * CANCELLED, out=taking_part)
        divisor *= 1.0 - taking_part
        divisor += taking_part
        mix /= divisor
    if scale != 1.0:
        mix *= scale
    mix += base
    return mix
