"""Methods that sparsify task vectors by rank before adding them: della, breadcrumbs and their variants.

The pipeline after the mask is that of `task_vectors`. Masks of DELLA come from the given keys alone;
those of breadcrumbs keep an exact number of elements, equal magnitudes ranked by lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.blend import Blend, Ranks, Statistics, normalised, run
from evomerge.merging.methods.declaration import Parameter, blended, method
from evomerge.merging.methods.draws import uniform
from evomerge.merging.methods.reduction import as_rows
from evomerge.merging.methods.task_vectors import LAMBDA, RESCALE, WEIGHT, density_of, normalize_by

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DRAW = 2.0**-24
"""Resolution of a uniform draw: a probability below it keeps nothing."""
RANKED_DENSITY = density_of("mean probability of keeping an element; larger ones are likelier to stay")
EPSILON = Parameter(
    name="epsilon",
    default=0.15,
    low=0.0,
    high=1.0,
    per_source=True,
    help="how far a row's largest and smallest elements are above and below that probability",
)
MIDDLE_DENSITY = density_of("share of each task vector's elements kept")
GAMMA = Parameter(
    name="gamma",
    default=0.01,
    low=0.0,
    high=1.0,
    per_source=True,
    help="share of each task vector's elements dropped as outliers, the largest ones",
)


@method(
    "della",
    WEIGHT,
    RANKED_DENSITY,
    EPSILON,
    normalize_by(True),
    RESCALE,
    LAMBDA,
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    inputs="task_vectors",
    random=True,
    by_rows=True,
)
def della(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    keys: Sequence[int],
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    first: int = 0,
) -> Tensor:
    """Drop elements at random, small ones sooner; elect signs and merge as TIES does.

    MAGPRUNE (section 3.1 of the paper) on each row, see `keep_by_rank`, then elect and fuse (sections
    3.2 and 3.3). (mergekit rescales by the ratio of L1 norms instead of each element's probability.)

    >>> import torch
    >>> della(torch.zeros(2), [torch.ones(2)], weight=(0.5,), density=(1.0,), epsilon=(0.1,), keys=[1])
    tensor([1., 1.])
    """
    thinned = _keep_all(tensors, density, epsilon, keys, rescale, first)
    return run(Blend(weights=weight, elect=True, mean=normalize, scale=lambda_), base, thinned)


@method(
    "della_linear",
    WEIGHT,
    RANKED_DENSITY,
    EPSILON,
    normalize_by(False),
    RESCALE,
    LAMBDA,
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617, without its sign election",
    inputs="task_vectors",
    random=True,
    by_rows=True,
)
def della_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    keys: Sequence[int],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    first: int = 0,
) -> Tensor:
    """Drop elements at random, small ones sooner; rescale the rest, add them to the base.

    As `della` without electing signs: the mean over all masks is task arithmetic.

    >>> import torch
    >>> vectors = [torch.ones(2)]
    >>> della_linear(torch.zeros(2), vectors, weight=(0.5,), density=(1.0,), epsilon=(0.1,), keys=[1])
    tensor([0.5000, 0.5000])
    """
    thinned = _keep_all(tensors, density, epsilon, keys, rescale, first)
    return run(Blend(weights=normalised(weight, normalize), scale=lambda_), base, thinned)


@blended(
    "breadcrumbs",
    WEIGHT,
    MIDDLE_DENSITY,
    GAMMA,
    normalize_by(False),
    LAMBDA,
    paper="Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795",
    inputs="task_vectors",
)
def breadcrumbs(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Blend:
    """Keep the middle of each task vector, neither outliers nor small elements; add it to the base.

    Section 3 of the paper with its gamma counted from the top and beta = 1 - density - gamma; masks are
    per tensor, see `middle_ranks`.

    >>> import torch
    >>> vectors = [torch.tensor([9.0, 1.0, -3.0, 2.0])]
    >>> breadcrumbs(torch.zeros(4), vectors, weight=(1.0,), density=(0.5,), gamma=(0.25,))
    tensor([ 0.,  0., -3.,  2.])
    """
    middle = tuple(middle_ranks(tensors.size, p, g) for p, g in zip(density, gamma, strict=True))
    return Blend(weights=normalised(weight, normalize), masks=middle, scale=lambda_)


@blended(
    "breadcrumbs_ties",
    WEIGHT,
    MIDDLE_DENSITY,
    GAMMA,
    normalize_by(False),
    LAMBDA,
    paper="Davari and Belilovsky 2023, arXiv:2312.06795, with the sign election of arXiv:2306.01708",
    inputs="task_vectors",
)
def breadcrumbs_ties(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Blend:
    """Keep the middle of each task vector as breadcrumbs does, then elect signs and merge as TIES does.

    >>> import torch
    >>> vectors = [torch.tensor([9.0, 1.0, -3.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 9.0])]
    >>> both = {"weight": (1.0, 1.0), "density": (0.5, 1.0), "gamma": (0.25, 0.0)}
    >>> breadcrumbs_ties(torch.zeros(4), vectors, **both)
    tensor([ 1.,  1., -3., 11.])
    """
    middle = tuple(middle_ranks(tensors.size, p, g) for p, g in zip(density, gamma, strict=True))
    return Blend(weights=weight, masks=middle, elect=True, mean=normalize, scale=lambda_)


def middle_ranks(count: int, density: float, gamma: float) -> Ranks:
    """Return which of `count` magnitudes stay: all but the int(gamma * n) largest and the smallest ones.

    Exactly int(density * n) elements are kept. Where there are not that many below the outliers, fewer
    outliers are dropped; a density of 1 keeps all.

    >>> middle_ranks(4, 0.5, 0.25)
    Ranks(first=1, last=3)
    """
    middle = min(int(density * count), count)
    outliers = min(int(gamma * count), count - middle)
    return Ranks(first=outliers, last=middle + outliers)


def keep_by_rank(
    vector: Tensor, density: float, epsilon: float, key: int, rescale: bool, first: int = 0
) -> Tensor:
    """Keep each element with a probability that grows with its rank among the magnitudes of its row.

    With r = 0 for the smallest and 1 for the largest of a row (ties: the lowest index is the larger),
    the probability is density - epsilon + 2 epsilon r; what is kept is divided by it (`rescale`). The
    paper writes the width 2 epsilon as its epsilon. A tensor of one dimension is one row, and a row of
    one element has r = 1/2. The draw of an element depends on its index alone, which starts at `first`.

    Deviation: epsilon is lowered to min(density, 1 - density) where it is larger, so that probabilities
    stay between 0 and 1 and their mean stays the density; mergekit stops with an error there.
    """
    import torch

    if density >= 1.0:
        return vector
    if density < SMALLEST_DRAW:
        return torch.zeros_like(vector)
    epsilon = min(epsilon, density, 1.0 - density)
    chance = _ranks(vector)
    chance *= 2.0 * epsilon
    chance += density - epsilon
    draws = torch.from_numpy(uniform(key, vector.numel(), first)).view(vector.shape).to(vector.device)
    # A chance below the resolution of a draw keeps nothing, so that rescaling never divides by 0.
    thinned = vector * ((draws < chance) & (chance >= SMALLEST_DRAW))
    return thinned.div_(chance.clamp_(min=SMALLEST_DRAW)) if rescale else thinned


def _ranks(vector: Tensor) -> Tensor:
    """Return each element's rank by magnitude in its row, from 0 to 1."""
    import numpy
    import torch

    rows = as_rows(vector)
    last = rows.shape[1] - 1
    if last <= 0:
        return torch.full_like(vector, 0.5)
    # Magnitude and place in one whole number: sorting those is many times faster than a stable argsort.
    keys = rows.abs().cpu().numpy().view(numpy.uint32).astype(numpy.uint64) << numpy.uint64(32)
    keys |= numpy.arange(last, -1, -1, dtype=numpy.uint64)
    keys.sort(axis=1)
    places = last - (keys & numpy.uint64(0xFFFFFFFF)).astype(numpy.int64)
    steps = numpy.arange(last + 1, dtype=numpy.float32) / numpy.float32(last)
    ranks = numpy.empty(rows.shape, dtype=numpy.float32)
    numpy.put_along_axis(ranks, places, numpy.broadcast_to(steps, rows.shape), axis=1)
    return torch.from_numpy(ranks).view(vector.shape).to(vector.device)


def _keep_all(
    tensors: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    keys: Sequence[int],
    rescale: bool,
    first: int,
) -> list[Tensor]:
    settings = zip(tensors, density, epsilon, keys, strict=True)
    return [keep_by_rank(d, p, e, key, rescale, first) for d, p, e, key in settings]
