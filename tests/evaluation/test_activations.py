"""Activations: batches are as small as the memory wants them; long items keep less, with the same bits."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from evomerge import heap
from evomerge.evaluation import activations
from evomerge.evaluation.activations import Room, measured
from evomerge.evaluation.gradient import differentiable
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.smooth_loss import ACTIVATIONS, SmoothLoss, SmoothTask

from .conftest import CONTEXT, MakeSuite, entry, new_model, new_tokenizer

LOSS = SmoothLoss(
    tasks=(
        SmoothTask(task="first", gain=1.0, items=tuple(range(12))),
        SmoothTask(task="text", gain=1.0, items=tuple(range(6)), base=0.0),
    ),
    price=1.0,
    softness=0.5,
)
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 16}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def mixture() -> Any:
    config = transformers.Qwen2MoeConfig(
        **SMALL, **HEADS, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    )
    return transformers.Qwen2MoeForCausalLM(config).eval()


def learned_positions() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=16, n_positions=CONTEXT)
    return transformers.GPT2LMHeadModel(config).eval()


def kept(model: Any, room: Room, rows: int) -> int:
    """Return the bytes that a batch keeps, and check that it can be gone back through."""
    held: dict[int, Any] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Any) -> Any:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            held[place] = tensor
        return tensor

    ids = torch.arange(rows * CONTEXT).reshape(rows, CONTEXT) % 16
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, room.keeping(model, room.bytes(rows, CONTEXT)):
        read = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    size = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    held.clear()
    read.sum().backward()
    return size


@pytest.mark.parametrize("make", [new_model, mixture, learned_positions])
def test_what_a_batch_keeps_is_known_and_less_where_it_is_too_much(make: Any) -> None:
    model = make()
    with differentiable(model):
        room = measured(model, True, CONTEXT)
        assert room.most == ACTIVATIONS
        expected = room.bytes(8, CONTEXT)
        assert kept(model, room, 8) == pytest.approx(expected, rel=0.25)
        slopes = [parameter.grad.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        less = replace(room, most=1)
        assert kept(model, less, 8) < expected / 2
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            assert torch.equal(parameter.grad, slope)
    assert all("forward" not in vars(module) for module in model.modules())


def eager() -> Any:
    config = transformers.LlamaConfig(
        **SMALL, **HEADS, max_position_embeddings=512, attn_implementation="eager"
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_where_attention_keeps_a_matrix_long_rows_keep_more_by_token() -> None:
    """Measured at 128 and 256 tokens, it holds at 512; without the matrix nothing is quadratic."""
    model = eager()
    with differentiable(model):
        room = measured(model, True, 512)
        assert room.by_pair > 0
        assert activations._kept(model, True, 512, 1) == pytest.approx(room.bytes(1, 512), rel=0.05)
        model.set_attn_implementation("sdpa")
        assert measured(model, True, 512).by_pair * 512 < 0.01 * room.by_token


def test_what_is_gone_back_through_together_counts_together() -> None:
    """The batches of one chunk are held at once, so none of them alone decides what is kept."""
    model = new_model()
    with differentiable(model):
        room = measured(model, True, CONTEXT)
        one = room.bytes(1, CONTEXT)
        assert kept(model, replace(room, most=one), 1) > 0.5 * one
        with replace(room, most=one).keeping(model, 2 * one):
            assert any("forward" in vars(module) for module in model.modules())
        with replace(room, most=2 * one).keeping(model, 2 * one):
            assert not any("forward" in vars(module) for module in model.modules())


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_measuring_leaves_nothing_behind() -> None:
    """What was measured made a circle with its graph that Python can't see: 0.4 GB of a model of 135M."""
    model = new_model()
    with differentiable(model):
        measured(model, True, CONTEXT)  # whatever the first pass keeps for good
        before = tensors()
        measured(model, True, CONTEXT)
        assert tensors() <= before


def test_a_larger_model_may_keep_half_as_much_as_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "ACTIVATIONS", 1)
    model = new_model()
    with differentiable(model):
        weights = sum(parameter.nbytes for parameter in model.parameters())
        assert measured(model, True, CONTEXT).most == weights // 2


def test_a_large_model_gives_memory_back_between_batches(
    make_suite: MakeSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[int] = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(1))
    harness = Harness(make_suite(entry("first")), tokenizer=new_tokenizer(), batch_size=8, max_length=None)
    model, loss = new_model(), replace(LOSS, tasks=LOSS.tasks[:1])
    with differentiable(model):
        harness.backward(model, "search", loss)
        assert trims == []
        monkeypatch.setattr(heap, "WORTH_TRIMMING", 1)
        harness.backward(model, "search", loss)
    assert len(trims) >= 2


def test_batches_have_room(make_suite: MakeSuite) -> None:
    """Little memory makes more batches, and changes a gradient by rounding alone."""
    suite = make_suite(entry("first"), entry("text"))
    found = []
    for most in (ACTIVATIONS, 500_000, 1):
        harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=32, max_length=None)
        model, passes = new_model(), 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        with differentiable(model):
            harness.measure(model)
            assert harness._room is not None
            harness._room = replace(harness._room, most=most)
            with model.register_forward_pre_hook(count):
                value, _ = harness.backward(model, "search", LOSS)
            found.append((passes, value, [parameter.grad.clone() for parameter in model.parameters()]))
    assert found[0][0] < found[1][0] < found[2][0]
    for _, value, slopes in found[1:]:
        assert value == pytest.approx(found[0][1], rel=1e-5)
        for one, other in zip(slopes, found[0][2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
