"""Gold tokens: what a model's logits say of tokens that are given."""

from __future__ import annotations

import torch

IN_CACHE, ON_DEVICE = 2**21, 2**26
"""Logits that are read at a time, on a processor and on other devices. All of a batch at once would be two to
three times as slow on a processor, and take gigabytes with a vocabulary of 10^5."""


def read(
    logits: torch.Tensor, place: tuple[torch.Tensor, ...], gold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens,) each token's log-likelihood in nats, whether it is the arg-max, and its lead.

    The lead is over the best other token, in nats. How many are read at a time changes no bits.

    logits: (..., vocabulary), of any float type; they are read in float32.
    place: index tensors, (tokens,) each, of the logits before each token.
    gold: (tokens,) the tokens' ids.
    """
    most = IN_CACHE if logits.device.type == "cpu" else ON_DEVICE
    count = max(1, -(-len(gold) * logits.shape[-1] // most))
    parts = zip(*(torch.tensor_split(index, count) for index in (*place, gold)), strict=True)
    found = [_read(logits[tuple(index)].float(), ids) for *index, ids in parts]
    likelihood, hit, lead = (torch.cat(each) for each in zip(*found, strict=True))
    return likelihood, hit, lead


def _read(logits: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `read`, of (tokens, vocabulary) logits in float32, which are overwritten."""
    index = gold[:, None]
    of_gold = logits.gather(1, index)
    of_others = logits.scatter_(1, index, -torch.inf).amax(1, keepdim=True)
    logits.scatter_(1, index, of_gold)
    lead = (of_gold - of_others)[:, 0]
    hit = lead > 0
    tied = lead == 0
    if bool(tied.any()):  # the arg-max is the first of equals
        hit[tied] = logits[tied].argmax(1) == gold[tied]
    largest = torch.maximum(of_gold, of_others)
    total = logits.sub_(largest).exp_().sum(1).log_() + largest[:, 0]
    return of_gold[:, 0] - total, hit, lead
