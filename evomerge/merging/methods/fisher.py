"""Fisher-weighted averaging: each element is averaged with the sources' Fisher information as weights.

The Fisher tensors come from files that a recipe names. `evomerge fisher` writes them, and
`sources.measured_files` reads them; here they are a second list of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.averaging import SHARE
from evomerge.merging.methods.blend import SMALLEST, weighted_sum
from evomerge.merging.methods.declaration import Parameter, method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "fisher",
    SHARE,
    Parameter(
        name="floor",
        default=1e-6,
        low=1e-12,
        high=1.0,
        help="smallest Fisher that counts, as a share of the largest of the tensor in any source",
    ),
    paper="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832",
    inputs="models",
    file="fisher",
)
def fisher(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    floor: float = 1e-6,
    fishers: Sequence[Tensor],
) -> Tensor:
    """Average the models, each element weighted by its Fisher information: sum(w F x) / sum(w F).

    The paper's closed form for diagonal Fishers F, one non-negative tensor of x's shape per source;
    `weight` is its lambda. Equal Fishers make it `linear`. Weights that are all 0 count as equal.

    Deviations: the paper's lower bound on a Fisher value is relative here. Values below `floor` times the
    largest value of this tensor in any source count as that bound, so an element with a small Fisher in all
    sources becomes the plain weighted mean. A factor common to all Fishers has no effect, but Fishers that
    are all below 2^-126 (subnormal in float32) count as 0. The Fishers are not normalised against each other:
    a source with larger values counts more, as in the paper.

    >>> import torch
    >>> sure = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]
    >>> fisher(None, [torch.ones(2), torch.zeros(2)], weight=(1.0, 1.0), fishers=sure)
    tensor([0.7500, 0.5000])
    """
    import torch

    whole = math.fsum(weight)
    shares = [w / whole if whole > 0.0 else 1.0 / len(weight) for w in weight]
    largest = max((float(f.max()) for f in fishers if f.numel()), default=0.0)
    if largest < SMALLEST:  # a GPU multiplies with the reciprocal, which may be infinite
        return weighted_sum(tensors, shares)
    mix, total = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor, information, share in zip(tensors, fishers, shares, strict=True):
        part = (information / largest).clamp_(min=floor) * share
        total += part
        mix += part * tensor
    return mix.div_(total)
