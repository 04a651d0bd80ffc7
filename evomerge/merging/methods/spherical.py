"""Methods on the sphere: slerp, chained_slerp, nuslerp, multislerp, karcher.

The result of each method is a linear combination of its inputs whose coefficients depend only on lengths and
angles. Those come from one Gram matrix in float64, so only the last sum reads the tensors again. nuslerp can
also take the vectors of a matrix one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.averaging import SHARE, WEIGHT_LIMIT
from evomerge.merging.methods.blend import Blend, Statistics, TensorStatistics, run
from evomerge.merging.methods.declaration import Parameter, blended, method
from evomerge.merging.methods.reduction import SHORTEST, as_rows, cosines, row_cosines

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""Cosine beyond which slerp interpolates linearly: the angle's sine is too small to divide by."""
SMALLEST_SINE = 1e-8
SMALLEST_SUM = 1e-6
"""Size of a sum of weights of both signs below which they cancel."""
SHORTEST_LENGTH = 1e-30
"""Length at or below which a tensor counts as zeros, relative to the longest length if that is above 1. The
coefficient that such a tensor's direction needs is too large for float32."""
SHORTEST_MEAN = 1e-4
"""Length of a mean of unit vectors below which they cancel and their mean has no direction."""


@blended(
    "slerp",
    Parameter(
        name="t", default=0.5, low=0.0, high=1.0, help="0 is the first source, 1 the second, along the arc"
    ),
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    inputs="models",
    sources=(2, 2),
    ordered=True,
)
def slerp(
    tensors: Statistics,
    *,
    t: float,
) -> Blend:
    """Interpolate between two models along the arc between them.

    Shoemake's equation with the angle between the whole tensors read as vectors; lengths are not
    normalised, so both ends are the models themselves. Where |cosine| > 0.9995 the arc is replaced by
    the straight line, for parallel and for opposite tensors alike. A tensor of zeros counts as
    orthogonal to everything.

    >>> import torch
    >>> slerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], t=0.5)
    tensor([0.7071, 0.7071])
    """
    return Blend(weights=_arc(cosines(tensors.gram())[0][1], t))


@blended(
    "chained_slerp",
    SHARE,
    paper="Shoemake 1985, Animating rotation with quaternion curves, applied source by source",
    inputs="models",
    sources=(2, None),
    ordered=True,
)
def chained_slerp(tensors: Statistics, *, weight: tuple[float, ...]) -> Blend:
    """Interpolate along arcs source by source, in their order: slerp of slerps.

    Starts at the first source; the i-th moves the result so far towards itself, as slerp does, by
    t = w_i / (w_1 + ... + w_i). Equal weights, the default, give t = 1/i, as in a running mean. Two
    sources are slerp with t = w_2 / (w_1 + w_2). The order matters: arcs do not commute, so another chain
    ends elsewhere (multislerp and karcher have no order). A source of weight 0 is passed by; weights that
    are all 0 count as equal.

    The result so far is a combination of the sources, so its angles come from their Gram matrix.

    >>> import torch
    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> chained_slerp(None, [x, y, x], weight=(1.0, 1.0, 2.0))
    tensor([0.9239, 0.3827])
    """
    shares, products = _shares(weight), tensors.gram()
    point, passed = [1.0], shares[0]
    for i in range(1, len(shares)):
        passed += shares[i]
        t = shares[i] / passed if shares[i] > 0.0 else 0.0
        square = math.fsum(a * b * products[j][k] for j, a in enumerate(point) for k, b in enumerate(point))
        lengths = math.sqrt(max(square, 0.0)) * math.sqrt(products[i][i])
        inner = math.fsum(a * products[i][j] for j, a in enumerate(point))
        cos = max(-1.0, min(1.0, inner / lengths)) if lengths > SHORTEST else 0.0
        stay, move = _arc(cos, t)
        point = [*(stay * c for c in point), move]
    return Blend(weights=tuple(point))


def _arcs(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Blend | None:
    """Return the blend of nuslerp of whole tensors, or None with an arc for each row or column."""
    if not nuslerp_flatten:
        return None
    first, second = _signed_shares(weight)
    cos = cosines(tensors.gram())[0][1]
    angle = math.acos(cos)
    sine = math.sin(angle)
    if cos >= -NEARLY_PARALLEL and sine >= SMALLEST_SINE:
        first, second = math.sin(first * angle) / sine, math.sin(second * angle) / sine
    return Blend(weights=(first, second))


@method(
    "nuslerp",
    Parameter(
        name="weight",
        default=1.0,
        low=-WEIGHT_LIMIT,
        high=WEIGHT_LIMIT,
        per_source=True,
        help="share of each model",
    ),
    Parameter(
        name="nuslerp_flatten",
        default=True,
        kind="flag",
        omitted=True,
        help="one arc for the whole tensor; else one for each vector of a matrix",
    ),
    Parameter(
        name="nuslerp_row_wise",
        default=False,
        kind="flag",
        omitted=True,
        help="without nuslerp_flatten: vectors along the first dimension of a matrix, else along its last",
    ),
    paper="Shoemake 1985, Animating rotation with quaternion curves; mergekit's nuslerp",
    inputs="either",
    sources=(2, 2),
    blend=_arcs,
)
def nuslerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Interpolate along the arc by relative weights; between task vectors where there is a base.

    slerp with t = w2 / (w1 + w2); a negative weight goes beyond the other end of the arc. Weights that are
    all 0, or of two signs with a sum below 1e-6, count as equal. With a base, `tensors` are task vectors and
    the base is added to the result. Without `nuslerp_flatten`, each vector of a matrix has an angle of its
    own: as in mergekit, those along its first dimension with `nuslerp_row_wise`, else along its last. Tensors
    of one dimension are one vector.

    Deviation from mergekit: nearly opposite tensors (cosine below -0.9995) are interpolated along the
    straight line, because the arc's coefficients grow like 1 / sine.

    >>> import torch
    >>> nuslerp(torch.ones(2), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], weight=(1.0, 1.0))
    tensor([1.7071, 1.7071])
    """
    import torch

    shape = tensors[0].shape
    if nuslerp_flatten or len(shape) < 2:
        blend = _arcs(TensorStatistics(tensors), weight=weight)
        assert blend is not None
        return run(blend, base, tensors)
    along = 0 if nuslerp_row_wise else -1
    turned = [tensor.transpose(along, -1) for tensor in tensors]
    cos = row_cosines(turned)
    angle = torch.arccos(cos)
    sine = torch.sin(angle)
    on_arc = (cos >= -NEARLY_PARALLEL) & (sine >= SMALLEST_SINE)
    mix = torch.zeros_like(as_rows(turned[0]))
    for tensor, share in zip(turned, _signed_shares(weight), strict=True):
        arc = torch.sin(share * angle) / torch.where(on_arc, sine, 1.0)
        mix += as_rows(tensor) * torch.where(on_arc, arc, share).to(mix.dtype)[:, None]
    result = mix.view(turned[0].shape).transpose(along, -1).contiguous()
    return result if base is None else result.add_(base)


@blended(
    "multislerp",
    SHARE,
    paper="Goddard 2025, multislerp in mergekit; after Buss and Fillmore 2001, Spherical averages",
    inputs="either",
)
def multislerp(tensors: Statistics, *, weight: tuple[float, ...]) -> Blend:
    """Average directions on the sphere by weights, and give the mean the weighted mean length.

    The direction is that of m = sum(w u) over unit tensors u. A further step in the tangent space at
    that point, along the weighted sum of the projected u, has length 0: sum(w (u - <u, m'> m')) with
    m' = m / |m| is m - |m| m'. So this is the whole of mergekit's formula. Weights that are all 0 count
    as equal; a tensor of zeros has no direction but counts as a length of 0. With a base, `tensors` are
    task vectors and the base is added to the result.

    Deviation: where directions cancel (|m| < 1e-4) the tensors are averaged linearly.

    >>> import torch
    >>> multislerp(None, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])], weight=(1.0, 1.0))
    tensor([1.4142, 1.4142])
    """
    shares = _shares(weight)
    lengths, cos = _angles(tensors.gram())
    return Blend(weights=_pointed(shares, lengths, cos, shares))


@blended(
    "karcher",
    Parameter(
        name="max_iter", default=10, low=1, high=100, kind="integer", help="most steps towards the mean"
    ),
    Parameter(name="tol", default=1e-5, low=0.0, high=1.0, help="length of the step that ends the search"),
    paper="Karcher 1977, Riemannian center of mass and mollifier smoothing",
    inputs="models",
)
def karcher(tensors: Statistics, *, max_iter: int = 10, tol: float = 1e-5) -> Blend:
    """Find the Riemannian mean of the directions by iteration; give it the mean length.

    Gradient descent with step 1 on the sum of squared arcs: from the normalised mean of the unit tensors,
    follow the mean of their logarithms at the current point (Karcher's equation 1.2) until it is shorter
    than `tol`. The point stays in the span of the tensors, so it is kept as coefficients.

    Deviations: a tensor of zeros has no direction but counts as a length of 0; a direction opposite to
    the current point has no logarithm and is left out of that step; where directions cancel
    (|mean| < 1e-4) the tensors are averaged linearly.

    >>> import torch
    >>> karcher(None, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])])
    tensor([1.4142, 1.4142])
    """
    lengths, cos = _angles(tensors.gram())
    count = tensors.count
    pointing = [1.0 if length > 0.0 else 0.0 for length in lengths]
    point = [direction / max(math.fsum(pointing), 1.0) for direction in pointing]
    size = _length(point, cos)
    if size >= SHORTEST_MEAN:
        point = [c / size for c in point]
        for _ in range(max_iter):
            step = _mean_logarithm(point, cos, pointing)
            size = _length(step, cos)
            if size < max(tol, SMALLEST_SINE):
                break
            point = [math.cos(size) * c + math.sin(size) / size * s for c, s in zip(point, step, strict=True)]
            length = _length(point, cos)
            point = [c / length for c in point]
    return Blend(weights=_pointed((1.0 / count,) * count, lengths, cos, point))


def _mean_logarithm(
    point: Sequence[float], cos: Sequence[Sequence[float]], pointing: Sequence[float]
) -> list[float]:
    """Return the mean of the tangent vectors from the point to each direction, as coefficients."""
    step = [0.0] * len(point)
    share = 1.0 / math.fsum(pointing)
    for i, has_direction in enumerate(pointing):
        near = max(-1.0, min(1.0, math.fsum(c * row[i] for c, row in zip(point, cos, strict=True))))
        if not has_direction or near <= -1.0 + SMALLEST_SINE:
            continue
        angle = math.acos(near)
        stretch = share * (angle / math.sin(angle) if angle > SMALLEST_SINE else 1.0)
        step = [s - stretch * near * c for s, c in zip(step, point, strict=True)]
        step[i] += stretch
    return step


def _arc(cos: float, t: float) -> tuple[float, float]:
    """Return slerp's coefficients at t between two tensors of that cosine."""
    if abs(cos) > NEARLY_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cos)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def _shares(weight: Sequence[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum; equal ones where all are 0."""
    total = math.fsum(weight)
    return tuple(w / total for w in weight) if total > 0.0 else (1.0 / len(weight),) * len(weight)


def _signed_shares(weight: Sequence[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum; equal ones where they are all 0 or cancel."""
    total = math.fsum(weight)
    if min(weight) >= 0.0:
        return _shares(weight)
    return (
        tuple(w / total for w in weight) if abs(total) >= SMALLEST_SUM else (1.0 / len(weight),) * len(weight)
    )


def _angles(products: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Return the tensors' lengths and the inner products of their directions (0 without a length)."""
    lengths = [math.sqrt(products[i][i]) for i in range(len(products))]
    shortest = SHORTEST_LENGTH * max(1.0, *lengths)
    lengths = [length if length > shortest else 0.0 for length in lengths]
    cos = [
        [
            1.0 if i == j and a > 0.0 else product / a / b if a > 0.0 and b > 0.0 else 0.0
            for j, (b, product) in enumerate(zip(lengths, row, strict=True))
        ]
        for i, (a, row) in enumerate(zip(lengths, products, strict=True))
    ]
    return lengths, [[max(-1.0, min(1.0, cosine)) for cosine in row] for row in cos]


def _length(point: Sequence[float], cos: Sequence[Sequence[float]]) -> float:
    """Return the length of a combination of unit tensors."""
    square = math.fsum(a * b * cos[i][j] for i, a in enumerate(point) for j, b in enumerate(point))
    return math.sqrt(max(square, 0.0))


def _pointed(
    shares: Sequence[float],
    lengths: Sequence[float],
    cos: Sequence[Sequence[float]],
    point: Sequence[float],
) -> tuple[float, ...]:
    """Return the coefficients of the tensors for the direction of `point` at the mean length."""
    size = _length(point, cos)
    if size < SHORTEST_MEAN:
        return tuple(shares)
    scale = math.fsum(s * length for s, length in zip(shares, lengths, strict=True)) / size
    return tuple(scale * c / length if length else 0.0 for c, length in zip(point, lengths, strict=True))
