"""Gradients of attention on a CPU: the backward pass in float32 where the forward pass is in 16 bits.

On short rows torch's kernel for the backward pass of attention takes five to eight times as long in 16 bits
as in float32, on rows of 500 tokens as long. So attention is computed again in float32 when a gradient comes
back, and differentiated there. The forward pass keeps its bits, and all that it leaves behind are queries,
keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)


def float_backward(model: Any) -> contextlib.AbstractContextManager[object]:
    """Return the context for forward passes of a model whose attention goes back in float32.

    Where layers are computed again in the backward pass (checkpointing), that needs a context of its own.
    """
    slow = model.device.type == "cpu" and model.dtype in HALVES
    return FloatBackward() if slow else contextlib.nullcontext()


class FloatBackward(TorchFunctionMode):
    """A context in which scaled dot-product attention of tensors in 16 bits on a CPU goes back in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and len(args) == 3 and _concerned(args, kwargs):
            return _Attention.apply(*args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _concerned(inputs: Sequence[Tensor], options: dict[str, Any]) -> bool:
    mask = options.get("attn_mask")
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in inputs)
        and all(tensor.dtype in HALVES and tensor.device.type == "cpu" for tensor in inputs)
        and not options.get("dropout_p")  # it would drop others the second time
        and not (isinstance(mask, Tensor) and mask.requires_grad)
    )


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention of queries, keys and values: a gradient goes back through float32."""

    @staticmethod
    def forward(
        context: Any, queries: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]
    ) -> Tensor:
        context.save_for_backward(queries, keys, values)
        context.options = options
        return scaled_dot_product_attention(queries, keys, values, **options)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        options = dict(context.options)
        if isinstance(mask := options.get("attn_mask"), Tensor) and mask.is_floating_point():
            options["attn_mask"] = mask.float()
        with torch.enable_grad():
            inputs = [tensor.detach().float().requires_grad_() for tensor in context.saved_tensors]
            attended = scaled_dot_product_attention(*inputs, **options)
        found = torch.autograd.grad(attended, inputs, gradient.float())
        return (*(one.to(gradient.dtype) for one in found), None)
