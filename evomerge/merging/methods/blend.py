"""What most methods come down to: choose elements, weigh, elect signs, add. As data, and run by torch.

A `Blend` says which elements of each input take part and with which coefficients; a method that returns
one (declared with `@blended`) never touches a tensor. It is run by `run`, here, on whole tensors of any
device, or in one compiled pass over memory by `evomerge.merging.tensors.kernels`. Both give the same
bits: the elementwise steps are separate multiplications and additions in one order, never fused, and nothing
depends on the number of threads.

Guards: a divisor below 1/100 of the size of the weights that took part counts as 0, and a divisor of 0
means "do not divide". Without that, weights such as 0.5 and -0.4999 would blow the result up by 1e4.
Where a mean is taken, weights below 2^-119 count as 0: see `SMALLEST_SHARE`.
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
"""The smallest number float32 holds in full. What is below is subnormal: its reciprocal may be infinite."""
SMALLEST_SHARE = 2.0**-119
"""Size below which a weight counts as 0 where a mean is taken. A sum of larger ones that passes the guard is
at least GUARD * SMALLEST_SHARE, which is above SMALLEST: no divisor is subnormal."""


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
    """A merge of one tensor's inputs: [base +] scale * sum(weight * kept input), or its elected mean.

    weights: one coefficient per input.
    kept: which elements of each input take part, all `Ranks` or all `Draws`; () keeps everything.
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
        """What each weight adds to the size its divisor is compared with: nothing if they share a sign."""
        one_signed = min(self.weights) >= 0.0 or max(self.weights) <= 0.0
        return tuple(0.0 if one_signed else abs(w) for w in self.weights)


class Statistics(Protocol):
    """Facts about the inputs of one tensor that a method may ask for before it says its blend."""

    @property
    def count(self) -> int:
        """The number of inputs."""
        ...

    @property
    def size(self) -> int:
        """The number of elements of each."""
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
    """Return the weights with those below a size as 0 of their sign.

    >>> without_tiny((1.0, -1e-45, 0.5))
    (1.0, -0.0, 0.5)
    """
    return tuple(math.copysign(0.0, w) if abs(w) < smallest else w for w in weights)


def normalised(weight: Sequence[float], normalize: bool) -> tuple[float, ...]:
    """Return the weights, divided by their sum where that is asked for and not near 0."""
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
    # Masks are kept as floats 0 and 1: boolean tensors and `where` are many times slower on a CPU.
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
        mix *= divisor.reciprocal()  # as kernels do, which know the few possible ones beforehand
    return mix


def keep(vector: Tensor, rule: Ranks | Draws) -> Tensor:
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
    """Return where the elements above a boundary are, as a mask."""
    mask = magnitudes >= limit.magnitude
    if limit.magnitude > 0.0:
        equal = (magnitudes == limit.magnitude).nonzero()[:, 0]
        mask[equal[limit.ties :]] = False
    return mask
