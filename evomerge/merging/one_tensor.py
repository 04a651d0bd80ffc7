"""One function makes one output tensor; it is the only place where a recipe meets weights.

The writer and the workbench both call it, and that is why what was scored is what is exported, bit for bit.
Blends run as compiled kernels where there are any, else in torch; all other methods are called as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evomerge.errors import NonFiniteError
from evomerge.merging import kernels, methods
from evomerge.merging.application import arguments
from evomerge.merging.inputs import Difference, Inputs
from evomerge.merging.kernels import Operand
from evomerge.merging.live_weights import Place
from evomerge.merging.methods import blend
from evomerge.merging.methods.declaration import Method
from evomerge.merging.methods.reduction import as_rows, gram
from evomerge.merging.methods.selection import EVERYTHING, NOTHING, Boundary
from evomerge.merging.recipe import Recipe, TensorGroup, shifted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS_AT_ONCE = 1 << 18
"""Elements that methods working row by row are given at a time."""


class NonFiniteWeights(NonFiniteError):  # noqa: N818  (named for what it reports)
    """A merged tensor has NaN or infinite elements: the recipe's parameters make no model."""


def merge_tensor(recipe: Recipe, tensor: str, inputs: Inputs, *, out: Place | None = None) -> Tensor:
    """Return one output tensor of a recipe, rounded to the recipe's dtype.

    The method computes in float32; rounding is to nearest, ties to even. Raises NonFiniteWeights.

    out: where the tensor lies in a live model, to be written into; it may have another type than the
        recipe's, and then holds the rounded values.
    """
    import torch

    group = recipe.group_for(tensor)
    method = methods.get(group.method)
    base, at_base = recipe.base_of(group), shifted(tensor, group.base_shift)
    subtracted = None if base is None or not method.uses_task_vectors(base) else (base, at_base)
    reads = group.reads(tensor)
    operands = [inputs.operand(*read, subtracted) for read in reads]
    origin = None if base is None else inputs.operand(base, at_base, None).tensor
    settings = arguments(group, seed=recipe.seed, tensor=tensor)
    if method.fisher:
        settings["fishers"] = [inputs.fisher(recipe.fisher[source], name) for source, name in reads]
    measure = _Measure(inputs, [(read, subtracted) for read in reads], operands, origin)
    plan = None if method.blend is None else method.blend(measure, **settings)
    dtype = getattr(torch, recipe.dtype)
    if plan is None:
        bases = [] if origin is None else [origin]
        del origin, measure
        merged = _by_function(method, bases, operands, settings, dtype)
        return _delivered(merged, out, tensor, group)
    if not kernels.available():
        full = None if origin is None else origin.to(torch.float32)
        merged = blend.run(plan, full, [_alone(each, origin) for each in operands])
        return _delivered(merged.to(dtype), out, tensor, group)
    computed = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    space = torch.empty(operands[0].tensor.shape, dtype=computed) if not _direct(out, dtype) else out
    assert isinstance(space, torch.Tensor)
    rounded = recipe.dtype == "bfloat16"
    finite = kernels.blend(
        plan, origin, operands, measure.boundary, space, add_base=subtracted is not None, rounded=rounded
    )
    if not finite:
        raise _not_finite(tensor, recipe.dtype, group)
    return space if space is out else _delivered(space.to(dtype), out, tensor, group)


def _by_function(
    method: Method, bases: list[Tensor], operands: list[Operand], settings: dict[str, Any], dtype: Any
) -> Tensor:
    """Call a method that is no blend, some rows at a time where it lets us, and round the result.

    bases: the base's tensor, or none. Both lists are used up: what is widened need not stay as stored.
    """
    import torch

    shape = operands[0].tensor.shape
    if not method.by_rows or len(shape) < 2:
        full = bases.pop().to(torch.float32) if bases else None
        inputs = [_alone(operands.pop(0), full) for _ in range(len(operands))]
        return method.function(full, inputs, **settings).to(dtype)
    rows = [as_rows(each.tensor) for each in operands]
    count, columns = rows[0].shape
    step = max(1, ROWS_AT_ONCE // max(columns, 1))
    merged = torch.empty((count, columns), dtype=dtype)
    for start in range(0, count, step):
        here = slice(start, start + step)
        origin = as_rows(bases[0])[here] if bases else None
        inputs = [
            _alone(Operand(matrix[here], each.minus_base), origin)
            for matrix, each in zip(rows, operands, strict=True)
        ]
        full = None if origin is None else origin.to(torch.float32)
        first = {"first": start * columns} if method.random else {}
        merged[here] = method.function(full, inputs, **settings, **first).to(dtype)
    return merged.view(shape)


def _alone(operand: Operand, base: Tensor | None) -> Tensor:
    """Return an operand as a method takes it: float32, its base subtracted."""
    import torch

    tensor = operand.tensor.to(torch.float32)
    if not operand.minus_base:
        return tensor
    assert base is not None
    return tensor - base.to(torch.float32)


def _direct(out: Place | None, dtype: torch.dtype) -> bool:
    """Say whether a kernel can write a tensor of that type straight into its place."""
    import torch

    if not isinstance(out, torch.Tensor) or not kernels.fits(out):
        return False
    return out.dtype == dtype or (out.dtype == torch.float32 and dtype == torch.bfloat16)


def _delivered(merged: Tensor, out: Place | None, tensor: str, group: TensorGroup) -> Tensor:
    """Check a merged tensor, and put it into its place if it has one."""
    checked(merged, tensor, group)
    if out is not None:
        out.copy_(merged)
    return merged


def checked(merged: Tensor, tensor: str, group: TensorGroup | None = None) -> Tensor:
    """Return a tensor as it is, or raise NonFiniteWeights naming it and who made it."""
    import torch

    if merged.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(merged)).tolist())):
        raise _not_finite(tensor, str(merged.dtype).removeprefix("torch."), group)
    return merged


def _not_finite(tensor: str, dtype: str, group: TensorGroup | None) -> NonFiniteWeights:
    made = "" if group is None else f" made by group {group.label()!r} ({group.method})"
    return NonFiniteWeights(
        f"the merged tensor {tensor!r} is not finite",
        expected=f"finite {dtype} numbers",
        got=f"NaN or infinite elements{made}",
        fix="use smaller weights or lambda, and check that the sources themselves are finite",
    )


class _Measure:
    """What a method may ask about the inputs of one tensor, answered by `Inputs` if it has been before."""

    def __init__(
        self,
        inputs: Inputs,
        places: list[Difference],
        operands: list[Operand],
        origin: Tensor | None,
    ) -> None:
        self._inputs, self._operands, self._origin = inputs, operands, origin
        self._places = places
        self.count, self.size = len(operands), operands[0].tensor.numel()

    def gram(self) -> list[list[float]]:
        def compute() -> list[list[float]]:
            if kernels.available():
                return kernels.gram(self._origin, self._operands)
            return gram([_alone(each, self._origin) for each in self._operands])

        return self._inputs.gram(tuple(self._places), compute)

    def boundary(self, index: int, rank: int) -> Boundary:
        """Return the boundary above which `rank` elements of an operand are."""
        if rank <= 0:
            return NOTHING
        if rank >= self.size:
            return EVERYTHING
        operand = self._operands[index]
        return self._inputs.boundary(
            self._places[index], rank, lambda: kernels.magnitudes(operand, self._origin)
        )
