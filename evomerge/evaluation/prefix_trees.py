"""Prefix trees: token sequences laid out in one row, in which a shared prefix stands once.

A token sees its ancestors in the tree and itself, and its position is its depth. So a causal model computes
at each token what it would compute in that token's own sequence, but a prefix that several sequences share is
computed once. Sequences without a common prefix are trees beside each other in the same row.

Not every model takes such a row: its attention may ignore the mask, or its layers the positions. Callers
compare before they rely on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.evaluation.scores import NonFiniteScores

ROW = 512
"""Number of tokens from which no further tree is added to a row: attention computes all pairs of its tokens.

A tree itself may grow to three times its longest sequence, because a cut repeats the prefix.
"""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.09}
"""Type of the forward pass -> mean difference, in nats per token, up to which two passes are the same.

In bfloat16, that is about twice the difference of two plain passes (padded or not, other attention): 0.035
to 0.057 for SmolLM2-135M. Its shared rows differ by 0.036 to 0.043, and by 0.37 or more without the mask or
the positions. In float32 they differ by 0.000003.
"""
MARGIN, MOST = 3.0, 0.25
"""Passes that differ more are the same up to so many times the difference of two plain passes, and so many
nats: how much is rounded differs from model to model."""

COMPARED = 8
"""Last tokens of a sequence at which two passes are compared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeRow:
    """Sequences in one row.

    ids, positions: (tokens,) of each token of the row. ends: (tokens,) the end of each token's subtree: the
        tokens from itself up to there are those that see it.
    paths: for each sequence, in the order given, the places of its tokens in the row.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    paths: tuple[torch.Tensor, ...]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the model's arguments: token ids, positions and the mask, on a device."""
        ends = self.ends.to(device)
        place = torch.arange(len(ends), device=device)
        seen = (place[None] <= place[:, None]) & (place[:, None] < ends[None])
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        return {
            "input_ids": self.ids.to(device)[None],
            "position_ids": self.positions.to(device)[None],
            "attention_mask": mask[None, None],
        }


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def row(sequences: Sequence[Sequence[int]]) -> TreeRow:
    """Lay out sequences, sorted like tuples, in one row.

    >>> tree = row([(5, 6), (5, 7, 8)])
    >>> tree.ids.tolist(), tree.positions.tolist(), tree.ends.tolist()
    ([5, 6, 7, 8], [0, 1, 1, 2], [4, 2, 4, 4])
    """
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    paths: list[torch.Tensor] = []
    path: list[int] = []
    last: Sequence[int] = ()
    for sequence in sequences:
        kept = shared(last, sequence)
        for place in path[kept:]:
            ends[place] = len(ids)
        new = range(len(ids), len(ids) + len(sequence) - kept)
        path = [*path[:kept], *new]
        ids += sequence[kept:]
        positions += range(kept, len(sequence))
        ends += [-1] * len(new)
        paths.append(torch.tensor(path))
        last = sequence
    return TreeRow(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        ends=torch.tensor([len(ids) if end < 0 else end for end in ends]),
        paths=tuple(paths),
    )


def in_rows(sequences: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Cut sorted sequences into rows of at most `most` sequences, and of limited length (see ROW)."""
    held: list[tuple[int, ...]] = []
    tokens = 0
    for sequence in sequences:
        new = len(sequence) - (shared(held[-1], sequence) if held else 0)
        limit = ROW if 2 * new > len(sequence) else max(ROW, 3 * len(sequence))
        if held and (len(held) >= most or tokens + new > limit):
            yield held
            held, tokens, new = [], 0, len(sequence)
        held.append(sequence)
        tokens += new
    if held:
        yield held


def accepts(model: Any, *names: str) -> bool:
    """Say whether a model's forward pass has arguments of these names."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter passes all on
    parameters = inspect.signature(getattr(inner, "forward", inner)).parameters
    return all(name in parameters for name in names)


def reach(model: Any) -> int | None:
    """Return how many tokens a model's attention looks back at most; None where it sees everything.

    0: it has layers of another kind than attention, which don't take a row.
    """
    config = model.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds - {"sliding_attention", "chunked_attention"}:
        return 0
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if not kinds and getattr(config, "layer_types", None):
        return None
    return min((size for size in sizes if isinstance(size, int)), default=None)


def agree(model: Any, sequences: Sequence[Sequence[int]]) -> bool:
    """Say whether a model computes some sequences in one row as it does each alone, but for rounding.

    The model's weights matter only if they are not finite or huge: ask with a base model's.

    Raises:
        NonFiniteScores: the model's logits are not finite.
    """
    if not takes(model):
        return False
    tree = row(sorted(map(tuple, sequences)))
    paths = [tree.ids[path].tolist() for path in tree.paths]
    wanted = alone(model, paths)
    lasts = torch.cat([path[-COMPARED:] for path in tree.paths])
    try:
        with torch.no_grad():
            found = _logprobs(model, lasts, tree.inputs(model.device, model.dtype))
    except Exception:  # whatever an attention makes of a mask that it doesn't know
        return False
    return same(found, wanted, model, paths)


@torch.no_grad()
def alone(model: Any, sequences: Sequence[Sequence[int]], last: int = COMPARED) -> torch.Tensor:
    """Return (tokens, vocabulary) log-probabilities at the last tokens of sequences, a pass for each.

    Raises:
        NonFiniteScores: the model's logits are not finite.
    """
    found = []
    for ids in sequences:
        places = torch.arange(len(ids))[-last:]
        found.append(_logprobs(model, places, {"input_ids": torch.tensor([ids], device=model.device)}))
    if not all(bool(torch.isfinite(each).all()) for each in found):
        raise NonFiniteScores("the model's logits are not finite", got="NaN or infinite on a prompt")
    return torch.cat(found)


def same(
    found: torch.Tensor,
    expected: torch.Tensor,
    model: Any,
    sequences: Sequence[Sequence[int]],
    last: int = COMPARED,
) -> bool:
    """Say whether (tokens, vocabulary) log-probabilities are equal but for the rounding of a model's type.

    Their differences are weighted with the probabilities: unlikely tokens differ most.

    expected: those of `alone`, at the last tokens of some sequences.
    """
    difference = _difference(found, expected)
    if difference <= TOLERANCE.get(model.dtype, 0.0):
        return True
    if not difference <= MOST:  # NaN, too
        return False
    return difference <= MARGIN * _difference(_padded(model, sequences, last), expected)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((expected.exp() * (found - expected).abs()).sum(-1).mean())


@torch.no_grad()
def _padded(model: Any, sequences: Sequence[Sequence[int]], last: int) -> torch.Tensor:
    """Return what `alone` does, of one pass over all sequences, padded on the right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for number, sequence in enumerate(sequences):
        ids[number, : len(sequence)] = torch.tensor(sequence)
    places = [torch.arange(len(sequence))[-last:] for sequence in sequences]
    columns = torch.unique(torch.cat(places))
    read: dict[str, Any] = {"use_cache": False}
    if accepts(model, "logits_to_keep"):
        read["logits_to_keep"] = columns.to(model.device)
    logits = model(input_ids=ids.to(model.device), **read).logits
    if "logits_to_keep" not in read:
        logits = logits[:, columns]
    chosen = [row[torch.searchsorted(columns, place)] for row, place in zip(logits, places, strict=True)]
    return torch.cat(chosen).float().log_softmax(-1)


def takes(model: Any) -> bool:
    """Say whether a model's forward pass has the arguments of a row."""
    return accepts(model, "position_ids", "attention_mask", "use_cache")


def _logprobs(model: Any, places: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (places, vocabulary) log-probabilities at some places of a row."""
    places = places.to(model.device)
    if accepts(model, "logits_to_keep"):
        logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=places).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0, places]
    return logits.float().log_softmax(-1)
