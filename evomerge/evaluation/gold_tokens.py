"""Gold tokens: what a model's logits say of tokens that are given."""

from __future__ import annotations

import torch


def read(logits: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens,) each token's log-likelihood in nats, whether it is the arg-max, and its lead.

    The lead is over the best other token, in nats. logits: (tokens, vocabulary) before each token, float32,
    which are overwritten. gold: (tokens,) their ids.
    """
    gold_logits = logits.gather(1, gold[:, None])
    likelihood = gold_logits[:, 0] - logits.logsumexp(1)
    hit = logits.argmax(1) == gold
    others = logits.scatter_(1, gold[:, None], -torch.inf).amax(1)
    return likelihood, hit, gold_logits[:, 0] - others
