"""How far a model agrees with a specialist's distributions, differentiably.

The agreement on an item is

    exp(-mean over the answer's tokens of KL(specialist, model))

which is 1 where both expect the same. The specialist's likeliest tokens count by themselves, all others as
one, so the divergence is at most that of the whole distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.evaluation.activations import Room
from evomerge.evaluation.distributions import LIKELIEST, Distributions
from evomerge.evaluation.likelihood import Batch, forward, plan, trims, whole
from evomerge.evaluation.live_lm import Pair

LEAST = 1e-7
"""Smallest probability of all other tokens together, so that its logarithm is finite."""


def read_off(
    model: Any, pairs: Sequence[Pair], *, batch_size: int, max_length: int, name: str
) -> list[Distributions]:
    """Return what a model expects at each token of the continuations of some pairs.

    name: the task of the pairs, for errors.
    """
    laid = plan(pairs, batch_size=batch_size, max_length=max_length, names=[name] * len(pairs))
    trimmed = trims(model)
    tops = []
    with torch.no_grad():
        for batch in laid.batches:
            expected = _expected(model, batch, trimmed)
            tops.append(expected.topk(min(LIKELIEST, expected.shape[1])))
    ids = np.concatenate([top.indices.cpu().numpy() for top in tops]).astype(np.int32)
    logs = np.concatenate([top.values.cpu().numpy() for top in tops])
    found: dict[int, Distributions] = {}
    for index, start in zip(laid.order.tolist(), laid.starts.tolist(), strict=True):
        answer = tuple(pairs[index][1])
        place = slice(start, start + len(answer))
        found[index] = Distributions(answer=answer, ids=ids[place], logs=logs[place])
    return [found[index] for index in range(len(pairs))]


def agreements(
    model: Any,
    pairs: Sequence[Pair],
    rows: Sequence[Distributions],
    *,
    max_length: int,
    name: str,
    room: Room,
) -> Tensor:
    """Return (pairs,) how far a model agrees with distributions at the pairs' continuations, in one batch.

    room: memory for the batch's activations.
    """
    laid = whole(pairs, max_length=max_length, names=[name] * len(pairs))
    (batch,) = laid.batches
    with room.keeping(model, room.bytes(*batch.ids.shape)):
        expected = _expected(model, batch, trims(model))
    device, order = expected.device, laid.order.tolist()
    ids = torch.from_numpy(np.concatenate([rows[i].ids for i in order]).astype(np.int64)).to(device)
    logs = torch.from_numpy(np.concatenate([rows[i].logs for i in order])).to(device)
    ours = expected.gather(1, ids)
    rest, our_rest = ((1.0 - values.exp().sum(1)).clamp(min=LEAST) for values in (logs, ours))
    divergence = (logs.exp() * (logs - ours)).sum(1) + rest * (rest / our_rest).log()
    lengths = torch.tensor([len(rows[i].answer) for i in order])
    pair = torch.tensor(order).repeat_interleave(lengths).to(device)
    sums = torch.zeros(len(pairs), device=device).index_add(0, pair, divergence)
    return torch.exp(-sums / torch.tensor([len(row.answer) for row in rows], device=device))


def _expected(model: Any, batch: Batch, trimmed: bool) -> Tensor:
    """Return (tokens, vocabulary) log-probabilities at the scored tokens of a batch."""
    logits = forward(model, batch, trimmed)
    return logits[batch.row.to(logits.device), batch.column.to(logits.device)].float().log_softmax(1)
