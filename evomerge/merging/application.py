"""Apply a tensor group's method to tensors: parameters become arguments, random draws get their owners."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge.merging import methods
from evomerge.merging.recipe import TensorGroup

if TYPE_CHECKING:
    from torch import Generator, Tensor


def apply(
    group: TensorGroup,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    seed: int,
    tensor: str,
    fishers: Sequence[Tensor] = (),
) -> Tensor:
    """Return the group's method applied to float32 tensors, one per source; they are not modified.

    seed and tensor (the output tensor's name) own the draws of random methods. fishers: one tensor per
    source, for methods that need them.

    >>> import torch
    >>> half = TensorGroup(method="linear", sources=("a", "b"))
    >>> apply(half, None, [torch.zeros(1), torch.ones(1)], seed=0, tensor="norm.weight")
    tensor([0.5000])
    """
    method = methods.get(group.method)
    arguments: dict[str, Any] = {
        "lambda_" if name == "lambda" else name: value for name, value in group.parameters.items()
    }
    if method.random:
        arguments["generators"] = generators(seed, tensor, group.sources)
    if method.fisher:
        arguments["fishers"] = fishers
    return method.function(base, tensors, **arguments)


def generators(seed: int, tensor: str, sources: Sequence[str]) -> list[Generator]:
    """Return the random generator of each source for one tensor.

    Owned by (seed, tensor, source), so neither the order of work nor other sources change the draws. A
    source that appears twice draws independently the second time. The masks of random methods are
    always drawn on the CPU: other devices have other generators.
    """
    import torch

    made = []
    for position, source in enumerate(sources):
        occurrence = sources[:position].count(source)
        digest = hashlib.sha256(json.dumps([seed, tensor, source, occurrence]).encode()).digest()
        made.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")))
    return made
