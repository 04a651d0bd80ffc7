"""Sharing: whether requests that begin alike share a row of a forward pass.

It is decided once per run, on the base, because it changes the last digits of scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Where requests share rows: scored: for likelihoods; generated: for answers that the model writes;
    companions: for these and the right answers to the same prompts."""

    scored: bool
    generated: bool
    companions: bool = False

    def as_data(self) -> dict[str, bool]:
        """Return it as a fact for the store."""
        return asdict(self)

    @classmethod
    def of_run(cls, data: Mapping[str, bool] | None) -> Sharing:
        """Return that of a stored run; without the fact it began when every request had its own row."""
        return cls(**data) if data is not None else cls(scored=False, generated=False)
