"""Scores: the per-item results of one model on one split of a suite, from which all else is derived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError, NonFiniteError, nearest

Split = Literal["search", "select", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def named_split(name: str) -> Split:
    """Return the split of that name; raise ConfigError where there is none."""
    chosen = next((split for split in SPLITS if split == name), None)
    if chosen is None:
        raise ConfigError(f"unknown split {name!r}", fix=nearest(name, SPLITS))
    return chosen


Array = NDArray[np.float64]


def read_only(values: object) -> Array:
    """Return a read-only float64 copy of a vector."""
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskScores:
    """One model's results on one task: one number per item, in the suite's fixed item order.

    metric: (n,) the task's metric, higher is better (0 or 1 for accuracies; mean gold log-likelihood per
        token, in nats, for retention tasks).
    smooth: (n,) a continuous companion in [0, 1]: the geometric mean of the gold tokens' probabilities, or
        for multiple choice the gold choice's share of all choices' probability. None for tasks without
        likelihoods (text, and free generation without a companion).
    margin: (n,) the lead of the right answer in nats: over the best other token at its weakest token, or for
        multiple choice over the best wrong choice. It changes smoothly with the weights and is above 0 if
        the answer is right, but for free generation, where it is that of a right answer. None as `smooth`.
    tokens: (n,) generated tokens per item, the mean over its answers; None where nothing is generated.
    texts: for each item the generated answers; None where nothing is generated, or they are not stored.
    """

    task: str
    metric: Array
    smooth: Array | None = None
    margin: Array | None = None
    tokens: Array | None = None
    texts: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", read_only(self.metric))
        assert self.texts is None or len(self.texts) == len(self.metric), self.task
        for name in ("smooth", "margin", "tokens"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, read_only(values))
                assert getattr(self, name).shape == self.metric.shape, self.task

    @property
    def mean(self) -> float:
        """Mean of the metric over the items."""
        return float(self.metric.mean())


class Question(NamedTuple):
    """What a model is asked in one item, and what is right, for people to read.

    prompt: all that the model sees. choices: the answers that are compared, () where it answers freely.
    right: the right choices; where it answers freely, the right answers as the task's data has them.
    """

    prompt: str
    choices: Sequence[str]
    right: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """One model's results on one split: the tasks of the suite that have items there, in suite order.

    blocks: numbers of the split's item blocks that were scored, in order.
    """

    split: Split
    tasks: tuple[TaskScores, ...]
    blocks: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[TaskScores]:
        return iter(self.tasks)

    def __getitem__(self, task: str) -> TaskScores:
        for scores in self.tasks:
            if scores.task == task:
                return scores
        raise KeyError(task)

    @property
    def items(self) -> int:
        """Number of scored items, all tasks together."""
        return sum(len(scores.metric) for scores in self.tasks)

    def same_as(self, other: Scores) -> bool:
        """Say whether all numbers are equal, bit for bit, and generated texts where both have them."""
        if (self.split, self.blocks) != (other.split, other.blocks):
            return False
        if [_bits(t) for t in self] != [_bits(t) for t in other]:
            return False
        return all(a.texts == b.texts for a, b in zip(self, other, strict=True) if a.texts and b.texts)


def _bits(scores: TaskScores) -> tuple[str, list[bytes | None]]:
    vectors = (scores.metric, scores.smooth, scores.margin, scores.tokens)
    return scores.task, [None if vector is None else vector.tobytes() for vector in vectors]


def joined(parts: Sequence[Scores]) -> Scores:
    """Join one model's scores on several blocks of a split: for each task, block after block.

    parts: scores on the same split and different blocks; they are sorted by block.

    >>> halves = [
    ...     Scores(split="test", tasks=(TaskScores(task="t", metric=np.array([n])),), blocks=(n,))
    ...     for n in (1, 0)
    ... ]
    >>> whole = joined(halves)
    >>> whole.blocks, whole["t"].metric.tolist()
    ((0, 1), [0.0, 1.0])
    """
    assert parts, "nothing to join"
    if len(parts) == 1:
        return parts[0]
    ordered = sorted(parts, key=lambda part: part.blocks)
    blocks = tuple(block for part in ordered for block in part.blocks)
    assert list(blocks) == sorted(set(blocks)), f"blocks {blocks}"
    assert len({part.split for part in ordered}) == 1, "scores of different splits"
    tasks = []
    for rows in zip(*(part.tasks for part in ordered), strict=True):
        assert len({row.task for row in rows}) == 1, "scores of different suites"
        tasks.append(
            TaskScores(
                task=rows[0].task,
                metric=np.concatenate([row.metric for row in rows]),
                smooth=_together([row.smooth for row in rows]),
                margin=_together([row.margin for row in rows]),
                tokens=_together([row.tokens for row in rows]),
                texts=_texts(rows),
            )
        )
    return Scores(split=ordered[0].split, tasks=tuple(tasks), blocks=blocks)


def _together(vectors: Sequence[Array | None]) -> Array | None:
    present = [vector for vector in vectors if vector is not None]
    assert len(present) in (0, len(vectors)), "blocks of different kinds"
    return np.concatenate(present) if present else None


def _texts(rows: Sequence[TaskScores]) -> tuple[tuple[str, ...], ...] | None:
    present = [row.texts for row in rows if row.texts is not None]
    return tuple(text for texts in present for text in texts) if len(present) == len(rows) else None


class NonFiniteScores(NonFiniteError):  # noqa: N818  # named for the condition, as a Failure's kind is
    """A model's logits are NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The result of a candidate that could not be scored.

    kind: "error" (an exception), "crash" (its worker died), "timeout", "non_finite", or "out_of_memory" (the
        device's memory, at the smallest batch size).
    reason: one line for the user.
    """

    kind: Literal["error", "crash", "timeout", "non_finite", "out_of_memory"]
    reason: str
