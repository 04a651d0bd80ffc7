"""Merge one output tensor of a recipe.

The writer and the workbench both call this function, so the exported weights are the scored ones, bit for
bit. Methods that are a `Blend` run as compiled kernels if there is a compiler, else in torch; other methods
are called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from evomerge.errors import NonFiniteError
from evomerge.merging import methods
from evomerge.merging.methods.blend import Blend, run
from evomerge.merging.methods.declaration import Method
from evomerge.merging.methods.reduction import gram
from evomerge.merging.methods.selection import EVERYTHING, NOTHING, Boundary
from evomerge.merging.modules import shifted
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.arrays import DTYPES, WeightArray, is_finite, of_tensor, to_tensor, widened
from evomerge.merging.tensors import kernels
from evomerge.merging.tensors.application import arguments
from evomerge.merging.tensors.inputs import Difference, Inputs, TensorKey
from evomerge.merging.tensors.kernels import Operand

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS_AT_ONCE = 1 << 18
"""Number of elements per call of methods that work row by row."""


class NonFiniteWeights(NonFiniteError):  # noqa: N818  (named for what it reports)
    """A merged tensor has NaN or infinite elements."""


class Storage(Protocol):
    """The place of a checkpoint tensor in a live model: a view of a parameter, or an index per element."""

    def copy_(self, weights: Tensor, /) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done for one output tensor: a method, the tensors it reads, and its arguments.

    base: the base's tensor, if the group has one. subtracted: the same where the method works on differences
    from it; it then is added to the result.
    """

    method: Method
    reads: tuple[TensorKey, ...]
    base: TensorKey | None
    subtracted: TensorKey | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe, tensor: str) -> Task:
        group = recipe.group_for(tensor)
        method = methods.get(group.method)
        name = recipe.base_of(group)
        base = None if name is None else (name, shifted(tensor, group.base_shift))
        return cls(
            method=method,
            reads=tuple(group.reads(tensor)),
            base=base,
            subtracted=base if method.uses_task_vectors(name) else None,
            settings=arguments(group, seed=recipe.seed, tensor=tensor),
        )

    @property
    def places(self) -> list[Difference]:
        """The inputs of the method."""
        return [(read, self.subtracted) for read in self.reads]


def merge_tensor(recipe: Recipe, tensor: str, inputs: Inputs, *, out: Storage | None = None) -> Tensor:
    """Return one output tensor of a recipe, rounded to the recipe's dtype.

    The method computes in float32. Rounding is to nearest, ties to even.

    Args:
        recipe: the recipe; its groups and seed determine the tensor.
        tensor: the output tensor's name.
        inputs: provides the sources' tensors.
        out: the tensor's place in a live model, which is written too. It may have another type than the
            recipe's, and then holds the rounded values.

    Raises:
        NonFiniteWeights: an element is NaN or infinite.
    """
    space = _space(out, recipe.dtype)
    merged = to_tensor(merge_array(recipe, tensor, inputs, out=space))
    if out is not None and space is None:
        out.copy_(merged)
    return merged


def merge_array(
    recipe: Recipe, tensor: str, inputs: Inputs, *, out: WeightArray | None = None
) -> WeightArray:
    """Return the same as `merge_tensor` as an array (see `arrays`), for which blends need no torch.

    Whole numbers and truth values are copied in their stored type, and not written to `out`.

    out: contiguous memory to write to, of the recipe's dtype, or float32 if that is bfloat16.
    """
    if (copied := inputs.copied(recipe, tensor)) is not None:
        return copied
    task = Task.of(recipe, tensor)
    method, base, settings = task.method, task.base, task.settings
    updates = inputs.updates(task.reads) if method.factored else None
    if base is not None and updates is not None:
        full = to_tensor(widened(inputs.operand(*base, None).data))
        moved = method.function(full, (), updates=updates, **settings)
        return _finished(of_tensor(moved.to(_type(recipe.dtype))), out, tensor, recipe, inputs)
    operands = [inputs.operand(*read, task.subtracted) for read in task.reads]
    origin = None if base is None else inputs.operand(*base, None)
    if kind := method.file:
        files = recipe.files(kind)
        settings[f"{kind}s"] = [inputs.measured(kind, files[source], name) for source, name in task.reads]
    measure = StoredStatistics(inputs, task.places, operands[0].data.size, lambda: (origin, operands))
    plan = None if method.blend is None else method.blend(measure, **settings)
    finite = None
    if plan is not None and kernels.available():
        shape = operands[0].data.shape
        computed = recipe.dtype if recipe.dtype in ("float32", "bfloat16") else "float32"
        merged = numpy.empty(shape, dtype=DTYPES[computed]) if out is None else out
        with suppress(kernels.NoKernelError):
            finite = kernels.blend(
                plan,
                origin,
                operands,
                measure.boundary,
                merged,
                add_base=task.subtracted is not None,
                rounded=recipe.dtype == "bfloat16",
            )
        if finite and computed != recipe.dtype:
            with numpy.errstate(over="ignore"):
                merged = merged.astype(DTYPES[recipe.dtype])
            finite = is_finite(merged)
    if finite is None:
        bases = [] if origin is None else [origin.data]
        origin = None
        del measure
        merged = _in_torch(method, plan, bases, operands, settings, recipe.dtype)
        return _finished(merged, out, tensor, recipe, inputs)
    if not finite:
        same = _shared(tensor, recipe, inputs)
        if same is None:
            raise _not_finite(tensor, recipe, inputs)
        merged[...] = same if same.dtype == merged.dtype else widened(same)
    return merged


def _finished(
    merged: WeightArray, out: WeightArray | None, tensor: str, recipe: Recipe, inputs: Inputs
) -> WeightArray:
    """Return merged weights, also in the place where they go, or raise NonFiniteWeights."""
    finite = is_finite(merged)
    if out is not None:
        out[...] = merged if out.dtype == merged.dtype else widened(merged)
        merged = out
    if not finite:
        same = _shared(tensor, recipe, inputs)
        if same is None:
            raise _not_finite(tensor, recipe, inputs)
        merged[...] = same if same.dtype == merged.dtype else widened(same)
    return merged


def _type(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found


def _shared(tensor: str, recipe: Recipe, inputs: Inputs) -> WeightArray | None:
    """Return the numbers that all inputs of a tensor have in common, in the recipe's dtype.

    Models can hold infinite numbers, such as the bounds of activations, whose sums and differences are NaN.
    None if the inputs differ, are finite, hold NaN, or have finite numbers that are infinite in the dtype.
    """
    import torch

    group = recipe.group_for(tensor)
    base, reads = recipe.base_of(group), list(group.reads(tensor))
    below = [] if base is None else [(base, shifted(tensor, group.base_shift))]
    arrays = [widened(inputs.operand(source, name, None).data) for source, name in below + reads]
    first = arrays[0]
    if numpy.isfinite(first).all() or numpy.isnan(first).any():
        return None  # the method made them
    if not all(numpy.array_equal(first, other) for other in arrays[1:]):
        return None
    rounded = of_tensor(to_tensor(first).to(getattr(torch, recipe.dtype)))
    return None if (numpy.isfinite(first) & ~numpy.isfinite(widened(rounded))).any() else rounded


def _in_torch(
    method: Method,
    plan: Blend | None,
    bases: list[WeightArray],
    operands: list[Operand],
    settings: dict[str, Any],
    dtype: str,
) -> WeightArray:
    """Merge by calling the method's function, for some rows at a time if it allows that; round the result.

    bases: the base's weights, or an empty list. Both lists are emptied, to free what was converted.
    """
    type_ = _type(dtype)
    shape = operands[0].data.shape
    if not method.by_rows or len(shape) < 2 or plan is not None:
        full = to_tensor(widened(bases.pop())) if bases else None
        inputs = [alone(operands.pop(0), full) for _ in range(len(operands))]
        if plan is not None:
            return of_tensor(run(plan, full, inputs).to(type_))
        return of_tensor(method.function(full, inputs, **settings).to(type_))
    columns = shape[-1]
    rows = [operand.data.reshape(-1, columns) for operand in operands]
    step = max(1, ROWS_AT_ONCE // max(columns, 1))
    merged = numpy.empty(rows[0].shape, dtype=DTYPES[dtype])
    for start in range(0, len(rows[0]), step):
        here = slice(start, start + step)
        full = to_tensor(widened(bases[0].reshape(-1, columns)[here])) if bases else None
        inputs = [
            alone(Operand(matrix[here], operand.minus_base), full)
            for matrix, operand in zip(rows, operands, strict=True)
        ]
        first = {"first": start * columns} if method.random else {}
        merged[here] = of_tensor(method.function(full, inputs, **settings, **first).to(type_))
    return merged.reshape(shape)


def alone(operand: Operand, base: Tensor | None) -> Tensor:
    """Return an operand as methods take it: float32, with its base subtracted if it needs that."""
    tensor = to_tensor(widened(operand.data))
    if not operand.minus_base:
        return tensor
    assert base is not None
    return tensor - base


def _space(out: Storage | None, dtype: str) -> WeightArray | None:
    """Return the memory of a live tensor if a merge can be written directly into it."""
    import torch

    if not isinstance(out, torch.Tensor) or out.device.type != "cpu" or not out.is_contiguous():
        return None
    if out.dtype == getattr(torch, dtype) or (out.dtype == torch.float32 and dtype == "bfloat16"):
        return of_tensor(out) if out.dtype != torch.float16 else None
    return None


def checked(weights: Tensor, tensor: str, recipe: Recipe, inputs: Inputs) -> Tensor:
    """Return weights from which an output tensor is made as they are, or raise NonFiniteWeights."""
    if not is_finite(of_tensor(weights)):
        raise _not_finite(tensor, recipe, inputs)
    return weights


def _not_finite(tensor: str, recipe: Recipe, inputs: Inputs) -> NonFiniteWeights:
    group = recipe.group_for(tensor)
    made = f"NaN or infinite elements made by group {group.label()!r} ({group.method})"
    faults = _faults(tensor, recipe, inputs)
    return NonFiniteWeights(
        f"the merged tensor {tensor!r} is not finite",
        expected=f"finite {recipe.dtype} numbers",
        got="; ".join((made, *faults)) if faults else f"{made} of finite sources",
        fix="restore these files, or leave the model out" if faults else "use smaller weights or lambda",
    )


def _faults(tensor: str, recipe: Recipe, inputs: Inputs) -> list[str]:
    """Say which inputs of a tensor are not finite themselves, and in how many elements."""
    group = recipe.group_for(tensor)
    base, reads = recipe.base_of(group), list(group.reads(tensor))
    below = [] if base is None else [(base, shifted(tensor, group.base_shift))]
    arrays = {
        f"model {source!r} ({recipe.models[source]})": (name, inputs.operand(source, name, None).data)
        for source, name in below + reads
    }
    wrong = {place: int((~numpy.isfinite(widened(data))).sum()) for place, (_, data) in arrays.items()}
    return [
        f"{place}: {wrong[place]} of {data.size} elements of {name!r} are NaN or infinite"
        for place, (name, data) in arrays.items()
        if wrong[place]
    ]


class StoredStatistics:
    """Statistics of the inputs of one tensor, which `Inputs` may have cached."""

    def __init__(
        self,
        inputs: Inputs,
        places: list[Difference],
        size: int,
        operands: Callable[[], tuple[Operand | None, list[Operand]]],
    ) -> None:
        """Describe the inputs at some places; operands: returns the base, if there is one, and the inputs."""
        self._inputs, self._places, self._operands = inputs, places, operands
        self.count, self.size = len(places), size

    def gram(self) -> list[list[float]]:
        def compute() -> list[list[float]]:
            origin, operands = self._operands()
            if kernels.available():
                with suppress(kernels.NoKernelError):
                    return kernels.gram(origin, operands)
            base = None if origin is None else to_tensor(widened(origin.data))
            return gram([alone(operand, base) for operand in operands])

        return self._inputs.gram(tuple(self._places), compute)

    def boundary(self, index: int, rank: int) -> Boundary:
        """Return the magnitude above which exactly `rank` elements of an operand lie."""
        if rank <= 0:
            return NOTHING
        if rank >= self.size:
            return EVERYTHING

        def magnitudes() -> WeightArray:
            origin, operands = self._operands()
            if kernels.available():
                with suppress(kernels.NoKernelError):
                    return kernels.magnitudes(operands[index], origin)
            base = None if origin is None else to_tensor(widened(origin.data))
            return of_tensor(alone(operands[index], base).abs().reshape(-1))

        return self._inputs.boundary(self._places[index], rank, magnitudes)
