"""A scorer that tests pass as a function."""

from __future__ import annotations

from typing import Any


def closeness(answer: str, row: dict[str, Any]) -> float:
    """Return the share of characters at the right place."""
    right = str(row["reply"])
    return sum(a == b for a, b in zip(answer.strip(), right, strict=False)) / len(right)
