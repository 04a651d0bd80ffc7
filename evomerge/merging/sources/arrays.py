"""Weights as numpy arrays, for merges without torch, whose import takes a second.

numpy has no bfloat16, so those weights are stored as their bits in uint16; float32 and float16 are numpy's
own types. Conversions to and from torch share memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from torch import Tensor

WeightArray = numpy.ndarray[Any, Any]
"""Weights of any stored type; bfloat16 as its bits in uint16."""
DTYPES = {"float32": numpy.float32, "float16": numpy.float16, "bfloat16": numpy.uint16}


def of_tensor(tensor: Tensor) -> WeightArray:
    """Return a CPU tensor's memory as an array; floats of types other than the three become float32."""
    import torch

    if not tensor.is_floating_point():
        array: WeightArray = tensor.numpy()
        return array.view(array.dtype.name.removeprefix("u")) if array.itemsize > 1 else array

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy.uint16)
    supported = tensor if tensor.dtype in (torch.float32, torch.float16) else tensor.to(torch.float32)
    return supported.numpy()


def to_tensor(array: WeightArray) -> Tensor:
    """Return an array's memory as a tensor."""
    import torch

    if array.dtype == numpy.uint16:
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def computable(array: WeightArray) -> WeightArray:
    """Return weights in a type that kernels read: float32 and bfloat16 unchanged, others as float32."""
    return array if array.dtype in (numpy.float32, numpy.uint16) else array.astype(numpy.float32)


def widened(array: WeightArray) -> WeightArray:
    """Return weights in float32.

    >>> widened(numpy.array([0x3F80], dtype=numpy.uint16))
    array([1.], dtype=float32)
    """
    if array.dtype == numpy.uint16:
        return (array.astype(numpy.uint32) << numpy.uint32(16)).view(numpy.float32)
    return array.astype(numpy.float32, copy=False)


def is_finite(array: WeightArray) -> bool:
    """Say whether all weights are finite."""
    if array.dtype == numpy.uint16:
        return not ((array & numpy.uint16(0x7F80)) == numpy.uint16(0x7F80)).any()
    return array.size == 0 or bool(numpy.isfinite(array.min()) and numpy.isfinite(array.max()))
