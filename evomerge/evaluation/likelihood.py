"""Likelihood: score fixed (context, continuation) pairs with one forward pass per prebuilt batch.

The numbers are those of lm-eval's HFLM: same tokens, same left truncation, same right padding (without an
attention mask, since earlier positions of a causal model don't see it). The batches are built once and
reused for every candidate. They depend on the pairs and the batch size only, so the same weights give the
same bits in every process.

Inputs that share a long prefix, such as the choices of an item or the items of a few-shot task, can be laid
out as prefix trees (`prefix_trees`), which compute it once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.evaluation import gold_tokens, prefix_trees
from evomerge.evaluation.live_lm import Pair
from evomerge.evaluation.scores import Array, NonFiniteScores

_PADDING = 0
TOKENS = 128
"""Tokens that a row of a batch has on average at most, padding included."""
WORTH_SHARING = 16
"""Length in tokens from which a common prefix is shared; shorter ones cost more to share than to repeat."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One forward pass, and the tokens that it scores.

    ids: (rows, length) int64 input tokens, right-padded. tree: of the inputs if they share prefixes; they
        are then one row.
    columns: (columns,) the positions whose logits at least one row needs.
    row, column, gold: (tokens,) for each scored token its row, its index in `columns`, and its id.
    """

    ids: torch.Tensor
    columns: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor
    tree: prefix_trees.TreeRow | None = None


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

    def sample(self) -> list[list[int]]:
        """Return a few inputs that share a long prefix, to try a model with; none if no inputs do."""
        trees = [batch.tree for batch in self.batches if batch.tree is not None]
        if not trees:
            return []
        deepest = max(trees, key=lambda tree: max(map(len, tree.paths)))
        longest = max(range(len(deepest.paths)), key=lambda number: len(deepest.paths[number]))
        chosen = deepest.paths[max(longest - 1, 0) : longest + 2]
        return [deepest.ids[path].tolist() for path in chosen]

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


def check_answer(task: str, continuation: Sequence[int], max_length: int) -> None:
    """Raise ConfigError for an answer that is empty, or longer than the context, in tokens."""
    if not 0 < len(continuation) <= max_length:
        raise ConfigError(
            f"task {task!r} has an answer of {len(continuation)} tokens",
            expected=f"1 to {max_length} tokens (the model's context length)",
        )


def plan(
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    max_length: int,
    names: Sequence[str],
    share: int = 0,
    most_tokens: int | None = None,
) -> Plan:
    """Arrange pairs in batches: longest first, equal inputs only once.

    pairs: token ids of each context (at least one) and continuation.
    names: the task of each pair, for errors.
    share: inputs of up to this number of tokens may be laid out as prefix trees.
    most_tokens: of a batch of several rows, padding included; by default TOKENS for each row.

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
        check_answer(names[index], continuation, max_length)
        tokens = tuple((context + continuation)[-(max_length + 1) :][:-1])
        rows.setdefault(tokens, []).append(index)
    trees = _trees(sorted(rows), batch_size, share)
    in_trees = {tokens for tree in trees for tokens in tree}
    alone = sorted(rows.keys() - in_trees, key=lambda tokens: (-len(tokens), tokens))
    groups = _rows(alone, batch_size, batch_size * TOKENS if most_tokens is None else most_tokens)
    order = [index for group in [*trees, *groups] for tokens in group for index in rows[tokens]]
    lengths = [len(pairs[index][1]) for index in order]
    return Plan(
        batches=(
            *(_batch(tree, rows, pairs, tree=prefix_trees.row(tree)) for tree in trees),
            *(_batch(group, rows, pairs) for group in groups),
        ),
        order=np.array(order, dtype=np.intp),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.intp),
    )


def whole(pairs: Sequence[Pair], *, max_length: int, names: Sequence[str]) -> Plan:
    """Return a plan of one batch with all pairs."""
    longest = max(len(context) + len(continuation) for context, continuation in pairs)
    size, tokens = len(pairs), longest * len(pairs)
    return plan(pairs, batch_size=size, max_length=max_length, names=names, most_tokens=tokens)


def _rows(inputs: Sequence[tuple[int, ...]], batch_size: int, most: int) -> list[list[tuple[int, ...]]]:
    """Return batches of inputs, longest first: of `batch_size`, or fewer where they are long.

    A pass over long inputs is as fast with fewer rows, and its memory grows with its tokens. most: tokens.

    >>> [len(rows) for rows in _rows([(1,) * 300] * 5 + [(1,) * 100] * 6, batch_size=4, most=512)]
    [1, 1, 1, 1, 1, 4, 2]
    """
    groups: list[list[tuple[int, ...]]] = []
    for tokens in inputs:
        last = groups[-1] if groups else []
        if last and len(last) < batch_size and (len(last) + 1) * len(last[0]) <= most:
            last.append(tokens)
        else:
            groups.append([tokens])
    return groups


def _trees(inputs: Sequence[tuple[int, ...]], batch_size: int, share: int) -> list[list[tuple[int, ...]]]:
    """Return rows of those sorted inputs that share at least half of their tokens with a neighbour."""
    if batch_size == 1 or not share:
        return []
    allowed = [tokens for tokens in inputs if len(tokens) <= share]
    common = [prefix_trees.shared(one, other) for one, other in pairwise(allowed)]
    chosen = [
        tokens
        for number, tokens in enumerate(allowed)
        if max(common[max(number - 1, 0) : number + 1], default=0) >= max(WORTH_SHARING, len(tokens) / 2)
    ]
    return [tree for tree in prefix_trees.in_rows(chosen, batch_size) if len(tree) > 1]


def _batch(
    inputs: Sequence[tuple[int, ...]],
    rows: dict[tuple[int, ...], list[int]],
    pairs: Sequence[Pair],
    *,
    tree: prefix_trees.TreeRow | None = None,
) -> Batch:
    if tree is None:
        ids = torch.full((len(inputs), len(inputs[0])), _PADDING, dtype=torch.long)
        for number, tokens in enumerate(inputs):
            ids[number, : len(tokens)] = torch.tensor(tokens)
    else:
        ids = tree.ids[None]
    row: list[int] = []
    position: list[int] = []
    gold: list[int] = []
    for number, tokens in enumerate(inputs):
        places = range(len(tokens)) if tree is None else tree.paths[number].tolist()
        for index in rows[tokens]:
            continuation = pairs[index][1]
            row += [number if tree is None else 0] * len(continuation)
            position += places[len(tokens) - len(continuation) :]
            gold += continuation
    columns, column = np.unique(position, return_inverse=True)
    return Batch(
        ids=ids,
        columns=torch.from_numpy(columns),
        row=torch.tensor(row),
        column=torch.from_numpy(column),
        gold=torch.tensor(gold),
        tree=tree,
    )


def trims(model: Any) -> bool:
    """Say whether the model can compute logits at chosen positions only, as most transformers models can.

    With a vocabulary of 10^5 the logits of a whole batch are gigabytes, most of which nothing reads.
    """
    return prefix_trees.accepts(model, "logits_to_keep")


def forward(model: Any, batch: Batch, trims: bool) -> torch.Tensor:
    """Return the logits of a batch at its columns, shape (rows, columns, vocabulary)."""
    columns = batch.columns.to(model.device)
    if batch.tree is None:
        inputs = {"input_ids": batch.ids.to(model.device)}
    else:
        inputs = batch.tree.inputs(model.device, model.dtype)
    if trims:
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        uncached = {"use_cache": False} if prefix_trees.accepts(model, "use_cache") else {}
        logits = model(**inputs, **uncached).logits[:, columns]
    assert isinstance(logits, torch.Tensor)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # so that the time of this pass is measured here
    return logits


def _read(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens,) each gold token's log-likelihood in float32, whether it is the arg-max, its lead."""
    device = logits.device
    place = batch.row.to(device), batch.column.to(device)
    return gold_tokens.read(logits, place, batch.gold.to(device))
