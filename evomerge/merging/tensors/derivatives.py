"""Derivatives of a loss with respect to a merge's parameters, from the gradient of the merged weights.

With L a loss of the merged model and G = dL/dW its gradient at one output tensor, the derivative of L with
respect to a parameter p of that tensor's group is the inner product <G, dW/dp>, summed over the group's
tensors. A merge that is a `Blend`,

    W = base + s * sum_i c_i v_i        (v_i: input i after its mask)

depends on its parameters only through the numbers c_i and s, as long as masks and elected signs stay the
same. So all derivatives follow from one inner product per source, <G, v_i>, and the Jacobian of (c, s) with
respect to the parameters, which needs scalars only. Masks and elected signs are held constant: the
derivative with respect to a parameter that only selects elements (density, gamma) is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from evomerge.merging import methods
from evomerge.merging.methods.blend import GUARD, Blend, Statistics, keep
from evomerge.merging.methods.declaration import Method
from evomerge.merging.methods.reduction import BLOCK
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.arrays import WeightArray, of_tensor, to_tensor, widened
from evomerge.merging.tensors.inputs import Inputs
from evomerge.merging.tensors.merge_tensor import StoredStatistics, Task, alone

if TYPE_CHECKING:
    from torch import Tensor

STEP = 1e-6
"""Relative step of the central differences of coefficients; the error is about 1e-10 in double precision."""

Derivatives = Mapping[str, tuple[float, ...]]
"""Parameter name -> one derivative per source, or a single one for a parameter of the group."""


def supports(method: str) -> bool:
    """Say whether a method can be differentiated, which needs it to be a `Blend` of its inputs.

    >>> supports("ties"), supports("slerp"), supports("sce")
    (True, True, False)
    """
    return methods.get(method).blend is not None


def parameters(group: TensorGroup) -> tuple[str, ...]:
    """Return the names of a group's real-valued parameters, in declared order."""
    declared = methods.get(group.method).parameters
    return tuple(name for name, parameter in declared.items() if parameter.kind == "real")


def tensor_derivatives(
    recipe: Recipe, tensor: str, gradient: WeightArray, inputs: Inputs
) -> Derivatives | None:
    """Return <gradient, dW/dp> for every real-valued parameter p of an output tensor's group.

    Rounding to the recipe's dtype counts as the identity.

    Args:
        recipe: the recipe that made the tensor.
        tensor: the output tensor's name.
        gradient: dL/dW, float32, in the tensor's shape.
        inputs: provides the sources' tensors.

    Returns:
        Parameter -> derivatives, or None if the method is not a `Blend` (see `supports`).
    """
    group = recipe.group_for(tensor)
    method = methods.get(group.method)
    if method.blend is None:
        return None
    task = Task.of(recipe, tensor)
    settings = task.settings
    operands = [inputs.operand(*read, task.subtracted) for read in task.reads]
    origin = None if task.base is None else inputs.operand(*task.base, None)
    measure = StoredStatistics(inputs, task.places, operands[0].data.size, lambda: (origin, operands))
    blend = method.blend(measure, **settings)
    if blend is None:
        return None
    full = None if origin is None else to_tensor(widened(origin.data))
    vectors = [alone(operand, full) for operand in operands]
    partial = _partials(blend, vectors, gradient)
    return _chained(method, group, settings, measure, partial)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partials:
    """<G, dW/dc_i> for each coefficient and <G, dW/ds> for the scale of a blend."""

    weights: tuple[float, ...]
    scale: float


def _partials(blend: Blend, vectors: Sequence[Tensor], gradient: WeightArray) -> _Partials:
    if blend.masks:
        vectors = [keep(vector, rule) for vector, rule in zip(vectors, blend.masks, strict=True)]
    if blend.elect:
        return _elected(blend, vectors, gradient)
    products = [inner(gradient, of_tensor(vector)) for vector in vectors]
    return _Partials(
        weights=tuple(blend.scale * product for product in products),
        scale=sum(w * product for w, product in zip(blend.weights, products, strict=True)),
    )


def _elected(blend: Blend, vectors: Sequence[Tensor], gradient: WeightArray) -> _Partials:
    """Differentiate sum_i c_i m_i v_i / D with D = sum_i c_i m_i (1 without `mean`), for constant masks m_i.

    dW/dc_i = s m_i (v_i - W / s) / D where D divides, s m_i v_i where it does not.
    """
    import torch

    weighted = [vector * weight for vector, weight in zip(vectors, blend.weights, strict=True)]
    sign = torch.copysign(torch.ones_like(weighted[0]), torch.stack(weighted).sum(0))
    agreeing = [part * sign > 0.0 for part in weighted]
    # A source of weight 0 agrees nowhere, so the sign of its own elements decides where it would take part.
    agreeing = [
        vector * sign > 0.0 if weight == 0.0 else mask
        for mask, vector, weight in zip(agreeing, vectors, blend.weights, strict=True)
    ]
    mix, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    size = torch.zeros_like(sign)
    for part, mask, weight, bulk in zip(weighted, agreeing, blend.weights, blend.sizes, strict=True):
        mix += part * mask
        divisor += mask * weight
        size += mask * bulk
    divides = (divisor.abs() > size * GUARD) & (divisor != 0.0) if blend.mean else torch.zeros_like(sign) > 0
    divisor = torch.where(divides, divisor, 1.0)
    mix /= divisor
    reached = to_tensor(gradient) / divisor
    return _Partials(
        weights=tuple(
            blend.scale * inner(of_tensor(reached), of_tensor((vector - mix * divides) * mask))
            for vector, mask in zip(vectors, agreeing, strict=True)
        ),
        scale=inner(gradient, of_tensor(mix)),
    )


def _chained(
    method: Method,
    group: TensorGroup,
    settings: Mapping[str, Any],
    measure: Statistics,
    partial: _Partials,
) -> Derivatives:
    """Multiply the partials with the Jacobian of a blend's numbers with respect to its parameters."""

    def along(argument: str, index: int | None) -> float:
        value = settings[argument] if index is None else settings[argument][index]
        step = STEP * max(1.0, abs(value))
        ends = []
        for moved in (value - step, value + step):
            changed = moved if index is None else _replaced(settings[argument], index, moved)
            assert method.blend is not None
            blend = method.blend(measure, **{**settings, argument: changed})
            assert blend is not None
            ends.append(blend)
        low, high = ends
        changes = zip(partial.weights, high.weights, low.weights, strict=True)
        total = sum(p * (b - a) for p, b, a in changes) + partial.scale * (high.scale - low.scale)
        return float(total / (2.0 * step))

    derivatives: dict[str, tuple[float, ...]] = {}
    for name in parameters(group):
        argument = "lambda_" if name == "lambda" else name
        per_source = method.parameters[name].per_source
        indices = range(len(group.sources)) if per_source else (None,)
        derivatives[name] = tuple(along(argument, index) for index in indices)
    return derivatives


def _replaced(values: Sequence[float], index: int, value: float) -> tuple[float, ...]:
    return (*values[:index], value, *values[index + 1 :])


def added(summands: Sequence[Derivatives]) -> Derivatives:
    """Return the sum of derivatives with respect to the same parameters, added in order.

    >>> added([{"weight": (1.0, 2.0)}, {"weight": (0.5, 0.0)}])
    {'weight': (1.5, 2.0)}
    """
    total: dict[str, tuple[float, ...]] = {}
    for derivatives in summands:
        for name, values in derivatives.items():
            before = total.get(name, (0.0,) * len(values))
            total[name] = tuple(a + b for a, b in zip(before, values, strict=True))
    return total


def inner(first: WeightArray, second: WeightArray) -> float:
    """Return the inner product of two arrays of equal size, the same for any number of threads.

    >>> inner(numpy.ones(3, dtype=numpy.float32), numpy.array([1.0, 2.0, 3.0], dtype=numpy.float32))
    6.0
    """
    flat, other = first.reshape(-1), second.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, BLOCK):
        place = slice(start, start + BLOCK)
        total += float(numpy.sum(flat[place].astype(numpy.float64) * other[place]))
    return total
