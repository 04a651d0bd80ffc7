"""Attention that goes back in float32: gradients are those of float32; the forward pass keeps its bits."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from evomerge.evaluation import attention_gradients
from evomerge.evaluation.attention_gradients import FloatBackward

CAUSAL: dict[str, Any] = {"is_causal": True}
MASKED: dict[str, Any] = {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril(), "scale": 0.3}
ADDED: dict[str, Any] = {"attn_mask": torch.linspace(-2.0, 2.0, 81, dtype=torch.bfloat16).view(9, 9)}
AGAIN: dict[str, Any] = {
    "use_reentrant": False,
    "context_fn": lambda: (contextlib.nullcontext(), FloatBackward()),
}
GROUPED: dict[str, Any] = {"is_causal": True, "enable_gqa": True}


def _inputs(heads: int, dtype: torch.dtype) -> list[Tensor]:
    """(rows, heads, tokens, size) queries, keys and values; those two with as many heads as asked for."""
    torch.manual_seed(1)
    shapes = [(2, 4, 9, 16), (2, heads, 9, 16), (2, heads, 9, 16)]
    return [torch.randn(shape).to(torch.bfloat16).to(dtype).requires_grad_() for shape in shapes]


def _gradients(inputs: list[Tensor], attended: Tensor) -> list[Tensor]:
    towards = torch.linspace(-1.0, 1.0, attended.numel()).view(attended.shape).to(attended)
    return list(torch.autograd.grad(attended, inputs, towards))


@pytest.mark.parametrize(
    ("options", "heads"),
    [(CAUSAL, 4), (MASKED, 4), (ADDED, 4), (GROUPED, 2)],
    ids=["causal", "a mask", "an added mask", "grouped queries"],
)
@pytest.mark.parametrize("computed_again", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_those_of_float32_rounded_and_the_forward_pass_keeps_its_bits(
    options: dict[str, Any], heads: int, computed_again: bool
) -> None:
    exact = _inputs(heads, torch.float32)
    in_float = {
        key: value.float() if value is ADDED["attn_mask"] else value for key, value in options.items()
    }
    expected = _gradients(exact, scaled_dot_product_attention(*exact, **in_float))
    halves = _inputs(heads, torch.bfloat16)

    def attend(*inputs: Tensor) -> Tensor:
        return scaled_dot_product_attention(*inputs, **options)

    with FloatBackward():
        attended = checkpoint(attend, *halves, **AGAIN) if computed_again else attend(*halves)
        found = _gradients(halves, attended)
    assert torch.equal(attended, attend(*halves))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), right, rtol=2**-8, atol=2**-9 * float(right.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "wanted", "options"),
    [(torch.float32, True, {}), (torch.bfloat16, False, {}), (torch.bfloat16, True, {"dropout_p": 0.5})],
    ids=["float32", "no gradient", "dropout"],
)
def test_other_attention_is_left_alone(
    dtype: torch.dtype, wanted: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gradients, "_Attention", None)  # calling it would fail
    inputs = [tensor.detach().requires_grad_(wanted) for tensor in _inputs(4, dtype)]
    with FloatBackward():
        assert scaled_dot_product_attention(*inputs, **options).requires_grad == wanted
