"""Apply a tensor group's method to tensors: parameters become arguments, and random methods get keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge.merging import methods
from evomerge.merging.methods.draws import keys
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import TensorGroup

if TYPE_CHECKING:
    from torch import Tensor


def apply(
    group: TensorGroup,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    seed: int,
    tensor: str,
    files: Sequence[Tensor | None] = (),
) -> Tensor:
    """Return the group's method applied to float32 tensors, one per source; they are not modified.

    seed, tensor: the recipe's seed and the output tensor's name, from which random methods draw.
    files: what was measured of each source, for methods that need it.

    >>> import torch
    >>> half = TensorGroup(method="linear", sources=("a", "b"))
    >>> apply(half, None, [torch.zeros(1), torch.ones(1)], seed=0, tensor="norm.weight")
    tensor([0.5000])
    """
    function = methods.get(group.method).function
    settings = arguments(group, seed=seed, tensor=tensor)
    if kind := methods.get(group.method).file:
        settings[f"{kind}s"] = files
    return function(base, tensors, **settings)


def arguments(group: TensorGroup, *, seed: int, tensor: str) -> dict[str, Any]:
    """Return the keyword arguments of the group's method."""
    named: dict[str, Any] = {
        "lambda_" if name == "lambda" else name: value for name, value in group.parameters.items()
    }
    if methods.get(group.method).random:
        named["keys"] = keys(seed, tensor, group.sources)
    if methods.get(group.method).matrices:
        named["inside"] = layer_of(tensor) is not None
    return named
