"""How far apart two float32 computations of the same numbers may lie: from the type and the sums' length."""

from __future__ import annotations

import math
from typing import Any

import torch

UNIT = torch.finfo(torch.float32).eps / 2
"""The largest relative error of one rounding."""
CONFIDENCE = 5.0
"""n roundings move a sum by more than CONFIDENCE * sqrt(n) * UNIT times the size of what is added once in 1e5
(2 exp(-CONFIDENCE^2 / 2): Higham and Mary 2019, A new approach to probabilistic rounding error analysis)."""


def of_log_likelihoods(model: Any, *, tokens: int = 1) -> float:
    """Return how far two passes of a Llama-shaped float32 model may lie apart, in nats.

    Rows beside a row, adapters beside weights, BLAS kernels and processors all choose the order of the
    sums. The chain of additions from the embeddings to the logits has, per layer, the width for what goes
    into attention, what comes out and what goes into the MLP, the context for attention itself, and the
    MLP's width; then the width for the logits. What a logit adds has at most the size |hidden| |embedding|,
    and the last norm makes |hidden| the root of the width times its own weights. A log-likelihood or a
    margin is a difference of two such sums, and two passes are compared.

    tokens: how many log-likelihoods are added; their roundings are their own.
    """
    config, width = model.config, model.config.hidden_size
    chain = width + config.num_hidden_layers * (
        3 * width + config.intermediate_size + config.max_position_embeddings
    )
    hidden = math.sqrt(width) * model.model.norm.weight.abs().max().item()
    size = hidden * model.lm_head.weight.float().norm(dim=1).max().item()
    return 2 * 2 * CONFIDENCE * math.sqrt(chain * tokens) * UNIT * size
