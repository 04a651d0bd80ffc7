"""Activations: what a backward pass keeps of a forward pass, and which batches there is memory for.

A forward pass whose gradient is wanted keeps the activations of all layers: for a model of 135 million
parameters 0.75 MB per input token, so almost three times its weights for 1,000 tokens. So batches are as
small as the memory wants them. Of one item that is too long by itself only the inputs of the layers are kept,
which are computed again in the backward pass, one after the other, with the same bits (gradient
checkpointing, Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from evomerge.evaluation.smooth_loss import ACTIVATIONS

PROBE = 128
"""Tokens of the input at which a model's activations are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory for a batch's activations. most: bytes. by_token: bytes kept per input token. by_answer: bytes
    kept per token of an answer, whose logits are read in float32.

    >>> room = Room(most=1000, by_token=10.0, by_answer=100.0)
    >>> room.holds(40, 6), room.holds(40, 7), room.tokens
    (True, False, 9)
    """

    most: int
    by_token: float
    by_answer: float

    def holds(self, tokens: int, answers: int) -> bool:
        """Say whether there is room for a batch's input tokens, padding included, and answers' tokens."""
        return tokens * self.by_token + answers * self.by_answer <= self.most

    @property
    def tokens(self) -> int:
        """Number of tokens that there is room for, all of them read."""
        return int(self.most / (self.by_token + self.by_answer))

    @contextlib.contextmanager
    def keeping(self, model: Any, tokens: int) -> Iterator[None]:
        """Let a forward pass over some input tokens keep no more than there is room for, if its layers can be
        computed again."""
        layers = [] if self.holds(tokens, 0) else _layers(model)
        forwards = [layer.forward for layer in layers]
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        try:
            for layer in layers:
                layer.forward = partial(checkpoint, layer.forward, **again)
            yield
        finally:
            for layer, forward in zip(layers, forwards, strict=True):
                layer.forward = forward


def measured(model: Any, trims: bool, max_length: int) -> Room:
    """Return the room for a model's batches; its weights must require gradients.

    What is kept depends on the weights only where tokens are routed, and there little; measure it at the same
    weights in every process, because batches and so the last bits of gradients follow from it.

    model: a causal LM. trims: whether it computes logits at chosen positions only. max_length: of an input.
    """
    tokens = min(PROBE, max_length)
    some, every = (_kept(model, trims, tokens, answers) for answers in (1, tokens))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Room(
        most=max(ACTIVATIONS, weights // 2),
        by_token=some / tokens,
        by_answer=max(0, every - some) / max(1, tokens - 1),
    )


def _kept(model: Any, trims: bool, tokens: int, answers: int) -> int:
    """Return the bytes that a forward pass over some tokens keeps, with the logits of the last ones read."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding them keeps other tensors from taking their places

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    words = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=model.device) % words)[None]
    columns = torch.arange(tokens - answers, tokens, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if trims:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        else:
            logits = model(input_ids=ids).logits[:, columns]
        read = logits[0].float()
        read.logsumexp(1).sum() - read.scatter(1, ids[0, columns, None], -torch.inf).amax(1).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
