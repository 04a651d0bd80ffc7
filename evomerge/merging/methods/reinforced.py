"""Reinforced agent merging: ram, ramplus_tl. Averages task vectors only where several of them changed.

Pure functions of float32 tensors, element by element, some at a time; `ramplus_tl` first counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.blend import SMALLEST_SHARE, without_tiny
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 18
"""Number of elements processed at a time, because there are several intermediate results per source."""
EPSILON = Parameter(
    name="epsilon", default=1e-5, low=0.0, high=1.0, help="size up to which an element counts as unchanged"
)
PAPER = "Reinforced Agent Merging (RAM), 2026, arXiv:2601.13572"


@method("ram", WEIGHT, EPSILON, LAMBDA, paper=PAPER, inputs="task_vectors", by_rows=True)
def ram(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    epsilon: float = 1e-5,
    lambda_: float = 1.0,
) -> Tensor:
    """Keep what only one source changed, average what several changed.

    An element counts as changed by a source where its task vector is larger than `epsilon`. Where one
    source changed it, the merge moves by that source's task vector; where several did, by the mean of theirs.

    Deviations: the paper has no weights. Here each task vector is multiplied by its weight, and the mean
    takes the sizes of the weights as shares, so a source of weight 0 is left out. Weights of 1 are the paper.

    >>> import torch
    >>> vectors = [torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0])]
    >>> ram(torch.zeros(2), vectors, weight=(1.0, 1.0))
    tensor([3., 3.])
    """
    return _reinforced(base, tensors, weight, epsilon, lambda_, (1.0,) * len(weight))


@method(
    "ramplus_tl",
    WEIGHT,
    EPSILON,
    Parameter(name="r", default=0.1, low=0.0, high=100.0, help="strength of the amplification"),
    Parameter(
        name="alpha", default=0.2, low=0.0, high=100.0, help="largest ratio of shared to unique elements used"
    ),
    LAMBDA,
    paper=PAPER,
    inputs="task_vectors",
)
def ramplus_tl(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    lambda_: float = 1.0,
) -> Tensor:
    """Merge as ram does, and amplify what only one source changed.

    The unique part of a source is multiplied by 1 + r * min(shared / unique, alpha), to make up for what
    averaging takes from its shared part. shared and unique count, in this tensor, the elements that the
    source changed together with others and alone.

    Deviations: weights as in `ram`; a source of weight 0 counts as unchanged everywhere.

    >>> import torch
    >>> vectors = [torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0])]
    >>> ramplus_tl(torch.zeros(2), vectors, weight=(1.0, 1.0), r=0.5, alpha=1.0)
    tensor([3.0000, 4.5000])
    """
    shared, unique = [0] * len(weight), [0] * len(weight)
    for piece in _pieces(base):
        changed = _changed(tensors, piece, weight, epsilon)
        several = sum(changed[1:], changed[0]) > 1.0
        for index, mask in enumerate(changed):
            both = int((mask * several).sum().item()) if mask.numel() else 0
            shared[index] += both
            unique[index] += int(mask.sum().item()) - both
    ratios = [s / u if u else 0.0 for s, u in zip(shared, unique, strict=True)]
    factors = tuple(1.0 + r * min(ratio, alpha) for ratio in ratios)
    return _reinforced(base, tensors, weight, epsilon, lambda_, factors)


def _pieces(tensor: Tensor) -> list[slice]:
    return [slice(start, start + PIECE) for start in range(0, tensor.numel(), PIECE)]


def _changed(
    tensors: Sequence[Tensor], piece: slice, weight: Sequence[float], epsilon: float
) -> list[Tensor]:
    """Return a mask of 0 and 1 per source: the elements of a piece that it changed."""
    masks = [(tensor.reshape(-1)[piece].abs() > epsilon).to(tensor.dtype) for tensor in tensors]
    return [mask if w else mask.zero_() for mask, w in zip(masks, weight, strict=True)]


def _reinforced(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    epsilon: float,
    scale: float,
    factors: Sequence[float],
) -> Tensor:
    """Return base + scale * the mean of the changes; unique ones are multiplied by their source's factor."""
    largest = max(map(abs, weight))
    if largest == 0.0:
        return base.clone()
    shares = without_tiny([abs(w) / largest for w in weight], SMALLEST_SHARE)
    mix = base.clone().view(-1)
    for piece in _pieces(base):
        changed = _changed(tensors, piece, shares, epsilon)
        count = sum(changed[1:], changed[0])
        total = changed[0] * shares[0]
        for mask, share in zip(changed[1:], shares[1:], strict=True):
            total += mask * share
        total += total == 0.0
        moved = total * 0.0
        for tensor, mask, w, share, factor in zip(tensors, changed, weight, shares, factors, strict=True):
            part = tensor.reshape(-1)[piece] * (w * share) * mask
            moved += part if factor == 1.0 else part * (1.0 + (factor - 1.0) * (count == 1.0))
        moved /= total
        mix[piece] += moved * scale
    return mix.view(base.shape)
