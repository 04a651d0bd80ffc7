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
"""Tokens of the input at which a model's activations are measured, and at twice as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory for a batch's activations.

    most: bytes. by_token: bytes kept per input token. by_pair: bytes kept per input token and token of its
    row, where attention keeps a matrix (`attention: eager`). by_answer: bytes kept per token of an answer,
    whose logits are read in float32.

    >>> room = Room(most=1000, by_token=10.0, by_answer=100.0)
    >>> room.bytes(2, 20, 6), room.holds(1000), room.holds(1001), room.tokens(20)
    (1000, True, False, 9)
    >>> Room(most=1000, by_token=10.0, by_answer=0.0, by_pair=1.0).bytes(2, 20)
    1200
    """

    most: int
    by_token: float
    by_answer: float
    by_pair: float = 0.0

    def bytes(self, rows: int, length: int, answers: int = 0) -> int:
        """Return what a batch keeps: rows of some length, padding included, and tokens of answers."""
        return round(rows * length * (self.by_token + self.by_pair * length) + answers * self.by_answer)

    def holds(self, kept: int) -> bool:
        """Say whether there is room for some bytes."""
        return kept <= self.most

    def tokens(self, length: int) -> int:
        """Return for how many tokens, in rows of some length, there is room where all of them are read."""
        return int(self.most / (self.by_token + self.by_pair * length + self.by_answer))

    @contextlib.contextmanager
    def keeping(self, model: Any, kept: int) -> Iterator[None]:
        """Let forward passes that would keep some bytes together keep less, if there is no room for them and
        the model's layers can be computed again."""
        layers = [] if self.holds(kept) else _layers(model)
        own = [vars(layer).get("forward") for layer in layers]
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        try:
            for layer in layers:
                layer.forward = partial(checkpoint, layer.forward, **again)
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward  # that of its class; one kept here would refer to its layer for good
                else:
                    layer.forward = forward


def measured(model: Any, trims: bool, max_length: int) -> Room:
    """Return the room for a model's batches; its weights must require gradients.

    What is kept depends on the weights only where tokens are routed, and there little; measure it at the same
    weights in every process, because batches and so the last bits of gradients follow from it.

    model: a causal LM. trims: whether it computes logits at chosen positions only. max_length: of an input.
    """
    tokens = min(PROBE, max_length)
    some, every = (_kept(model, trims, tokens, answers) for answers in (1, tokens))
    longer = min(2 * PROBE, max_length)
    by_token, by_pair = some / tokens, 0.0
    if longer > tokens:
        by_pair = max(0.0, (_kept(model, trims, longer, 1) / longer - by_token) / (longer - tokens))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Room(
        most=max(ACTIVATIONS, weights // 2),
        by_token=by_token - by_pair * tokens,
        by_answer=max(0, every - some) / max(1, tokens - 1),
        by_pair=by_pair,
    )


def _kept(model: Any, trims: bool, tokens: int, answers: int) -> int:
    """Return the bytes that a forward pass over some tokens keeps, with the logits of the last ones read."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding them keeps other tensors from taking their places

    def keep(tensor: Tensor) -> None:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor

    words = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=model.device) % words)[None]
    columns = torch.arange(tokens - answers, tokens, device=model.device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
            if trims:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
            else:
                logits = model(input_ids=ids).logits[:, columns]
            read = logits[0].float()
            read.logsumexp(1).sum() - read.scatter(1, ids[0, columns, None], -torch.inf).amax(1).sum()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    finally:
        kept.clear()  # the graph has `keep`, and what it keeps has the graph: a circle that Python can't see


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
