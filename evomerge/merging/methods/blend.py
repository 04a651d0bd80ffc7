"""The form that most methods share, as data: mask, weight, elect signs, add. Run by torch here.

A `Blend` holds the coefficient and the mask of each input. A method that returns one (declared with
`@blended`) computes nothing on tensors itself. `run` applies a blend to whole tensors on any device, and
`evomerge.merging.tensors.kernels` in one compiled pass over memory. Both give the same bits: the elementwise
steps are separate multiplications and additions in a fixed order, never fused, and nothing depends on the
number of threads.

Guards: a divisor below 1/100 of the size of the weights that took part counts as 0, and a divisor of 0
means "do not divide". Otherwise weights such as 0.5 and -0.4999 would multiply the result by 1e4. Where a
mean is taken, weights below 2^-119 count as 0: see `SMALLEST_SHARE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evomerge.merging.methods.draws import short
from evomerge.merging.methods.reduction import gram
from evomerge.merging.methods.selection import Boundary, boundary

if TYPE_CHECKING:
    from torch import Tensor

CANCELLED = 0.01
"""Weights cancel where |sum| is at most this share of the sum of their sizes."""
GUARD = 0.01
"""Share of the weights' size below which a per-element divisor counts as 0."""
SMALLEST = 2.0**-126
"""The smallest normal number of float32. Smaller ones are subnormal; their reciprocals may be infinite."""
SMALLEST_SHARE = 2.0**-119
"""Size below which a weight counts as 0 where a mean is taken. A sum of larger weights that passes the guard
is at least GUARD * SMALLEST_SHARE, which is above SMALLEST, so no divisor is subnormal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Keep the elements with ranks [first, last) by descending magnitude; ties rank by lowest index."""

    first: int = 0
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Keep elements at random: those whose 16-bit draw is below `share`, times `factor`."""

    key: int
    share: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A merge of one tensor's inputs: [base +] scale * sum(weight * masked input), or its elected mean.

    weights: one coefficient per input.
    masks: which elements of each input take part, all `Ranks` or all `Draws`; () keeps everything.
    elect: only elements whose weighted value has the sign of the weighted sum take part.
    mean: with `elect`, divide by the sum of the weights that took part.
    The base is added where the inputs are task vectors.
    """

    weights: tuple[float, ...]
    masks: tuple[Ranks | Draws, ...] = ()
    elect: bool = False
    mean: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.elect and self.mean:
            object.__setattr__(self, "weights", without_tiny(self.weights, SMALLEST_SHARE))

    @property
    def sizes(self) -> tuple[float, ...]:
        """What each weight adds to the size that guards the divisor: 0 if all weights have one sign."""
        one_signed = min(self.weights) >= 0.0 or max(self.weights) <= 0.0
        return tuple(0.0 if one_signed else abs(w) for w in self.weights)


class Statistics(Protocol):
    """Facts about the inputs of one tensor, from which a method computes its blend."""

    @property
    def count(self) -> int:
        """The number of inputs."""
        ...

    @property
    def size(self) -> int:
        """The number of elements of each input."""
        ...

    def gram(self) -> list[list[float]]:
        """Return the inner products of all pairs of inputs."""
        ...


class TensorStatistics:
    """Statistics of tensors in memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.count, self.size = len(tensors), tensors[0].numel()

    def gram(self) -> list[list[float]]:
        return gram(self._tensors)


def without_tiny(weights: Sequence[float], smallest: float = SMALLEST) -> tuple[float, ...]:
    """Return the weights with those below a size replaced by 0 of the same sign.

    >>> without_tiny((1.0, -1e-45, 0.5))
    (1.0, -0.0, 0.5)
    """
    return tuple(math.copysign(0.0, w) if abs(w) < smallest else w for w in weights)


def normalised(weight: Sequence[float], normalize: bool) -> tuple[float, ...]:
    """Return the weights, divided by their sum if `normalize` is set and the sum is not close to 0."""
    total = math.fsum(weight)
    if not normalize or abs(total) <= CANCELLED * math.fsum(map(abs, weight)):
        return tuple(weight)
    return tuple(w / total for w in weight)


def run(blend: Blend, base: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    """Return the blend of float32 tensors of equal shape; they are not modified.

    base: added to the result; None for methods on the models themselves.

    >>> import torch
    >>> run(Blend(weights=(0.5, 2.0)), None, [torch.ones(2), torch.ones(2)])
    tensor([2.5000, 2.5000])
    """
    vectors = list(inputs)
    if blend.masks:
        vectors = [keep(vector, rule) for vector, rule in zip(vectors, blend.masks, strict=True)]
    mix = elected(vectors, blend) if blend.elect else weighted_sum(vectors, blend.weights)
    if blend.scale != 1.0:
        mix *= blend.scale
    if base is not None:
        mix += base
    return mix


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of `weight * tensor` in source order, as a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def elected(vectors: Sequence[Tensor], blend: Blend) -> Tensor:
    """Return the sum or mean of the weighted vectors' elements that have the majority sign.

    Algorithm 1 of Yadav et al. 2023 (arXiv:2306.01708): the sign of an element is that of the weighted
    sum (0 elects plus); zeros never take part.
    """
    import torch

    weighted = [v * w for v, w in zip(vectors, blend.weights, strict=True)]
    total = weighted[0].clone()
    for part in weighted[1:]:
        total += part
    # Masks are floats 0 and 1, because boolean tensors and `where` are many times slower on a CPU.
    sign = torch.copysign(torch.ones_like(total), total)
    mix, taking_part = torch.zeros_like(total), torch.empty_like(total)
    divisor, size = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight, bulk in zip(weighted, blend.weights, blend.sizes, strict=True):
        agreeing = part.mul_(sign)
        if blend.mean:
            torch.gt(agreeing, 0.0, out=taking_part)
            divisor += taking_part * weight
            if bulk:
                size += taking_part * bulk
        mix += agreeing.clamp_(min=0.0)
    mix *= sign
    if blend.mean:
        torch.le(divisor.abs(), size * GUARD, out=taking_part)
        divisor *= 1.0 - taking_part
        divisor += taking_part
        mix *= divisor.reciprocal()  # as kernels do, which precompute the few possible reciprocals
    return mix


def keep(vector: Tensor, rule: Ranks | Draws) -> Tensor:
    """Return the vector with the elements outside the mask set to 0; may return the argument itself."""
    import torch

    if isinstance(rule, Ranks):
        return keep_ranks(vector, rule)
    mask = torch.from_numpy(short(rule.key, vector.numel()) >= rule.share).view(vector.shape)
    thinned = vector.masked_fill(mask.to(vector.device), 0.0)
    return thinned * rule.factor if rule.factor != 1.0 else thinned


def keep_ranks(vector: Tensor, ranks: Ranks) -> Tensor:
    """Return the vector with all elements but those of the given ranks by magnitude set to 0.

    May return the argument itself.

    >>> import torch
    >>> keep_ranks(torch.tensor([1.0, -3.0, 1.0, 2.0]), Ranks(last=3))
    tensor([ 1., -3.,  0.,  2.])
    """
    if ranks.first == 0 and ranks.last >= vector.numel():
        return vector
    magnitudes = vector.abs().flatten()
    on_cpu = magnitudes.cpu().numpy()
    dropped = ~reaches(magnitudes, boundary(on_cpu, ranks.last))
    if ranks.first:
        dropped |= reaches(magnitudes, boundary(on_cpu, ranks.first))
    return vector.masked_fill((dropped & ~magnitudes.isnan()).view(vector.shape), 0.0)


def reaches(magnitudes: Tensor, limit: Boundary) -> Tensor:
    """Return a mask of the elements above a boundary."""
    mask = magnitudes >= limit.magnitude
    if limit.magnitude > 0.0:
        equal = (magnitudes == limit.magnitude).nonzero()[:, 0]
        mask[equal[limit.ties :]] = False
    return mask
