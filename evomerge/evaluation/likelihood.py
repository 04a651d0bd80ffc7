"""Likelihood: score fixed (context, continuation) pairs with one forward pass per prebuilt batch.

The numbers are those of lm-eval's HFLM: same tokens, same left truncation, same right padding (without an
attention mask, since earlier positions of a causal model don't see it). The batches are built once and
reused for every candidate. They depend on the pairs and the batch size only, so the same weights give the
same bits in every process.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.evaluation.live_lm import Pair
from evomerge.evaluation.scores import Array, NonFiniteScores

_PADDING = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One forward pass, and the tokens that it scores.

    ids: (rows, length) int64 input tokens, right-padded.
    columns: (columns,) the positions whose logits at least one row needs.
    row, column, gold: (tokens,) for each scored token its row, its index in `columns`, and its id.
    """

    ids: torch.Tensor
    columns: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Likelihoods:
    """Results in the order of the pairs.

    ll: (n,) sums of log-likelihoods in nats. greedy: (n,) whether every token is the arg-max.
    margin: (n,) the smallest lead, in nats, of any token of the continuation over the best other token. It is
        above 0 if the continuation is greedy; else its size is the distance from that.
    """

    ll: Array
    greedy: NDArray[np.bool_]
    margin: Array
    forward_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Fixed batches for a list of pairs, made by `plan`.

    order: (n,) the indices of the pairs in the order in which their tokens are scored.
    starts: (n,) the index of each pair's first token among the scored tokens.
    """

    batches: tuple[Batch, ...]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    def score(self, model: Any) -> Likelihoods:
        """Run the model over all batches.

        model: a causal LM: `model(input_ids=ids).logits` of shape (rows, length, vocabulary).

        Raises:
            NonFiniteScores: a log-likelihood is NaN or infinite.
        """
        sums, hits, leads, seconds = [], [], [], 0.0
        trimmed = trims(model)
        with torch.no_grad():
            for batch in self.batches:
                start = time.perf_counter()
                logits = forward(model, batch, trimmed)
                seconds += time.perf_counter() - start
                likelihood, hit, lead = _read(logits, batch)
                sums.append(likelihood)
                hits.append(hit)
                leads.append(lead)
        tokens = torch.cat(sums).cpu().double().numpy()  # MPS has no float64 to convert to
        if not np.isfinite(tokens).all():
            raise NonFiniteScores(
                "the model's logits are not finite",
                got=f"{int((~np.isfinite(tokens)).sum())} of {len(tokens)} scored tokens are NaN or infinite",
            )
        ll = np.empty(len(self.order))
        greedy = np.empty(len(self.order), dtype=np.bool_)
        ll[self.order] = np.add.reduceat(tokens, self.starts)
        greedy[self.order] = np.logical_and.reduceat(torch.cat(hits).cpu().numpy(), self.starts)
        margin = np.empty(len(self.order))
        lead_of_tokens = torch.cat(leads).cpu().double().numpy()
        margin[self.order] = np.minimum.reduceat(lead_of_tokens, self.starts)
        return Likelihoods(ll=ll, greedy=greedy, margin=margin, forward_seconds=seconds)


def plan(pairs: Sequence[Pair], *, batch_size: int, max_length: int, names: Sequence[str]) -> Plan:
    """Arrange pairs in batches: longest first, equal inputs only once.

    pairs: token ids of each context (at least one) and continuation.
    names: the task of each pair, for errors.

    The input of a pair is its last `max_length + 1` tokens without the final one; the continuation's
    tokens are read from its last positions, as in HFLM. Pairs that share an input, such as one-token
    choices, share its row.

    Raises:
        ConfigError: a continuation is empty or longer than `max_length`.

    >>> p = plan([([1, 2], [3]), ([1], [2, 4])], batch_size=2, max_length=8, names=["t", "t"])
    >>> p.batches[0].ids.tolist(), p.batches[0].gold.tolist()
    ([[1, 2]], [3, 2, 4])
    """
    assert pairs, "nothing to score"
    assert batch_size >= 1, batch_size
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= max_length:
            raise ConfigError(
                f"task {names[index]!r} has an answer of {len(continuation)} tokens",
                expected=f"1 to {max_length} tokens (the model's context length)",
            )
        tokens = tuple((context + continuation)[-(max_length + 1) :][:-1])
        rows.setdefault(tokens, []).append(index)
    inputs = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
    order = [index for tokens in inputs for index in rows[tokens]]
    lengths = [len(pairs[index][1]) for index in order]
    return Plan(
        batches=tuple(
            _batch(inputs[start : start + batch_size], rows, pairs)
            for start in range(0, len(inputs), batch_size)
        ),
        order=np.array(order, dtype=np.intp),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.intp),
    )


def _batch(
    inputs: Sequence[tuple[int, ...]], rows: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair]
) -> Batch:
    ids = torch.full((len(inputs), len(inputs[0])), _PADDING, dtype=torch.long)
    row: list[int] = []
    position: list[int] = []
    gold: list[int] = []
    for number, tokens in enumerate(inputs):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        for index in rows[tokens]:
            continuation = pairs[index][1]
            row += [number] * len(continuation)
            position += range(len(tokens) - len(continuation), len(tokens))
            gold += continuation
    columns, column = np.unique(position, return_inverse=True)
    return Batch(
        ids=ids,
        columns=torch.from_numpy(columns),
        row=torch.tensor(row),
        column=torch.from_numpy(column),
        gold=torch.tensor(gold),
    )


def trims(model: Any) -> bool:
    """Say whether the model can compute logits at chosen positions only, as most transformers models can.

    With a vocabulary of 10^5 the logits of a whole batch are gigabytes, most of which nothing reads.
    """
    return "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters


def forward(model: Any, batch: Batch, trims: bool) -> torch.Tensor:
    """Return the logits of a batch at its columns, shape (rows, columns, vocabulary)."""
    ids = batch.ids.to(model.device)
    if trims:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=batch.columns.to(ids.device)).logits
    else:
        logits = model(input_ids=ids).logits[:, batch.columns.to(ids.device)]
    assert isinstance(logits, torch.Tensor)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # so that the time of this pass is measured here
    return logits


def _read(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens,) each gold token's log-likelihood in float32, whether it is the arg-max, its lead."""
    device = logits.device
    gold = batch.gold.to(device)
    scored = logits[batch.row.to(device), batch.column.to(device)].float()
    gold_logits = scored.gather(1, gold[:, None])
    likelihood = gold_logits[:, 0] - scored.logsumexp(1)
    hit = scored.argmax(1) == gold
    others = scored.scatter_(1, gold[:, None], -torch.inf).amax(1)  # `scored` is a copy of the logits
    return likelihood, hit, gold_logits[:, 0] - others
