"""Next-token distributions of specialists on their own answers, as plain data.

Where no answer is known to be right, gradients can follow a specialist's distributions instead: it answers
the prompts of its task, and what it expects at each token of its answers is kept. `agreement` computes how
far another model agrees.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 16
"""Tokens of a distribution that are kept by themselves; all others count as one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distributions:
    """What a specialist wrote in answer to one item, and what it expected at each token.

    answer: its tokens, at least one. ids: (tokens, k) int32 the likeliest tokens at each place.
    logs: (tokens, k) float32 their log-probabilities.
    """

    answer: tuple[int, ...]
    ids: NDArray[np.int32]
    logs: NDArray[np.float32]


def packed(rows: Sequence[Distributions]) -> dict[str, Any]:
    """Return the distributions of a task's items as a JSON value; `unpacked` makes the same bits of it."""
    return {
        "answers": [list(row.answer) for row in rows],
        "ids": _text(np.concatenate([row.ids for row in rows]).astype("<i4")),
        "logs": _text(np.concatenate([row.logs for row in rows]).astype("<f4")),
    }


def unpacked(data: Mapping[str, Any]) -> list[Distributions]:
    """Return what `packed` was given."""
    lengths = [len(answer) for answer in data["answers"]]
    total, ends = sum(lengths), np.cumsum(lengths)[:-1]
    ids, logs = (
        np.split(np.frombuffer(base64.b64decode(data[key]), dtype=kind).reshape(total, -1), ends)
        for key, kind in (("ids", "<i4"), ("logs", "<f4"))
    )
    return [
        Distributions(answer=tuple(answer), ids=i, logs=log)
        for answer, i, log in zip(data["answers"], ids, logs, strict=True)
    ]


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
