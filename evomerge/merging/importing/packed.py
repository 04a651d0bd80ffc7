"""Quantised tensors that can be computed one by one: 8-bit weights with scales, and MXFP4.

An 8-bit weight is multiplied by its scale: one number, one per row, or one per block (FP8 of DeepSeek-V3,
https://arxiv.org/abs/2412.19437, section 3.3). MXFP4 has 4-bit elements, two in a byte, and one power of two
for every 32 of them (OCP Microscaling Formats 1.0, section 5.3.3); gpt-oss stores it transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.sources.tensorfile import Header, is_copied

if TYPE_CHECKING:
    from torch import Tensor

Stored = Callable[[str], "Tensor"]
SCALES = ("_scale_inv", "_scale")
UNUSED = ("input_scale", "activation_scale", "output_scale", "weight_zero_point", "k_scale", "v_scale")
"""Endings of the names of scales of activations, which float weights don't need."""
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
FLOATS = ("F32", "BF16", "F16")
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive numbers of FP4 (E2M1); the fourth bit is the sign."""
BIAS = 127
"""Of the exponents of scales (E8M0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A format. name: for people. block: rows and columns of a block of scales, if the config says so."""

    name: str
    block: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatTensor:
    """A float tensor to be computed from the stored ones. dtype: of whole numbers, which are copied."""

    shape: tuple[int, ...]
    compute: Callable[[Stored], Tensor]
    dtype: str = "F32"


def form_of(config: Mapping[str, Any], headers: Mapping[str, Header]) -> Form | None:
    """Return the format of quantised tensors, or None if they can't be computed one by one.

    config: the `quantization_config`. headers: of all tensors.
    """
    method = str(config.get("quant_method"))
    blocks = [name for name in headers if name.endswith("_blocks")]
    packed = [name for name, header in headers.items() if header.dtype in EIGHT_BITS]
    if method == "mxfp4" and blocks:
        return Form(name="MXFP4")
    others = [
        n
        for n, h in headers.items()
        if h.dtype not in (*EIGHT_BITS, *FLOATS) and not n.endswith(UNUSED) and not is_copied(n, h)
    ]
    if packed and not others and all(_scale(name, headers) for name in packed):
        block = config.get("weight_block_size")
        return Form(name=f"{method} (8 bits)", block=tuple(block) if isinstance(block, list) else None)
    return None


def outputs(headers: Mapping[str, Header], form: Form) -> dict[str, FloatTensor]:
    """Return name -> float tensor for all tensors of a model."""
    made: dict[str, FloatTensor] = {}
    for name, header in headers.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in headers:
            target = name.removesuffix("_blocks")
            *batch, rows, groups, width = header.shape
            made[target] = FloatTensor(shape=(*batch, groups * width * 2, rows), compute=_from_mxfp4(target))
        elif header.dtype in EIGHT_BITS:
            scale = _scale(name, headers)
            assert scale is not None
            _check_blocks(name, header, headers[scale], form)
            made[name] = FloatTensor(shape=header.shape, compute=_scaled(name, scale, form))
        elif header.dtype in FLOATS and not _is_scale(name, headers):
            made[name] = FloatTensor(shape=header.shape, compute=_plain(name))
        elif is_copied(name, header) and not name.endswith(UNUSED):
            made[name] = FloatTensor(shape=header.shape, compute=_unchanged(name), dtype=header.dtype)
    return made


def _scale(name: str, headers: Mapping[str, Header]) -> str | None:
    return next((name + end for end in SCALES if name + end in headers), None)


def _is_scale(name: str, headers: Mapping[str, Header]) -> bool:
    of = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None)
    return name.endswith(UNUSED) or (of is not None and of in headers)


def _plain(name: str) -> Callable[[Stored], Tensor]:
    return lambda stored: stored(name).float()


def _unchanged(name: str) -> Callable[[Stored], Tensor]:
    return lambda stored: stored(name)


def _scaled(name: str, scale: str, form: Form) -> Callable[[Stored], Tensor]:
    def compute(stored: Stored) -> Tensor:
        weights = stored(name).float()
        return weights.mul_(expanded_scale(stored(scale).float(), tuple(weights.shape), form.block))

    return compute


def expanded_scale(scale: Tensor, shape: tuple[int, ...], block: tuple[int, ...] | None) -> Tensor:
    """Return scales that can be multiplied with a tensor of a shape.

    Args:
        scale: one number, or per trailing axis one scale for every block of rows and columns.
        shape: of the tensor.
        block: rows and columns of a block; None computes them from the shapes.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    while scale.dim() < len(shape):
        scale = scale.unsqueeze(-1)
    for axis in (-2, -1):
        count, size = scale.shape[axis], shape[axis]
        if count not in (1, size):
            step = block[axis] if block is not None else math.ceil(size / count)
            scale = scale.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
    return scale


def _check_blocks(name: str, header: Header, scale: Header, form: Form) -> None:
    """Raise ModelError for scales that don't fit their tensor."""
    if scale.count == 1:
        return
    shape = scale.shape + (1,) * (len(header.shape) - len(scale.shape))
    for axis in (-2, -1)[-min(2, len(header.shape)) :]:
        step = form.block[axis] if form.block is not None else 0
        fits = (1, header.shape[axis], math.ceil(header.shape[axis] / step) if step else shape[axis])
        if shape[axis] not in fits:
            raise ModelError(
                f"tensor {name!r}: its scales don't fit it",
                expected=f"blocks of {form.block} over {list(header.shape)}",
                got=f"scales of shape {list(scale.shape)}",
                fix="download the model again",
            )


def _from_mxfp4(target: str) -> Callable[[Stored], Tensor]:
    def compute(stored: Stored) -> Tensor:
        import torch

        blocks, scales = stored(f"{target}_blocks"), stored(f"{target}_scales")
        numbers = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.float32)
        low, high = numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]
        elements = torch.stack((low, high), dim=-1).flatten(-2)
        exponents = (scales.to(torch.int32) - BIAS).unsqueeze(-1)
        return torch.ldexp(elements, exponents).flatten(-2).transpose(-1, -2)

    return compute
