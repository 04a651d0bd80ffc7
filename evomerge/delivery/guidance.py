"""What the surrogate did for a search: how well it ranked new candidates, and when it was ignored."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from evomerge.running.store import StoreReader
from evomerge.search.surrogate.guide import TRUSTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The surrogate over a run; tuples have one element per generation, except `off`.

    correlations: Spearman's rank correlation of its latest predictions with the scores measured afterwards,
    None while there are too few. proposed: number of candidates it proposed. candidates: number of all
    candidates. blocks: number of item blocks the generation was scored on, of `of`. off: the generations in
    which it was ignored, because that correlation was below the limit.
    """

    correlations: tuple[float | None, ...]
    proposed: tuple[int, ...]
    candidates: int
    blocks: tuple[int, ...]
    of: int
    off: tuple[int, ...]

    @property
    def latest(self) -> float | None:
        """The latest rank correlation; None where there is none."""
        return next((c for c in reversed(self.correlations) if c is not None), None)

    @property
    def sentence(self) -> str:
        """The summary of all fields in one line."""
        quality = "too few predictions for a rank correlation"
        if self.latest is not None:
            quality = f"rank correlation {self.latest:.2f} on unseen candidates"
        parts = [quality, f"proposed {sum(self.proposed)} of {self.candidates} candidates"]
        if self.of > 1:
            parts.append(f"scored on {self.block_counts} of {self.of} item blocks")
        if self.off:
            parts.append(
                f"ignored in {len(self.off)} of {len(self.proposed)} generations ({_ranges(self.off)}; "
                f"rank correlation below {TRUSTED:g})"
            )
        return f"surrogate: {', '.join(parts)}"

    @property
    def block_counts(self) -> str:
        """The number of scored item blocks over the run, as in `2 (from generation 12: 4)`."""
        starts = [next(group) for _, group in groupby(enumerate(self.blocks), key=lambda pair: pair[1])]
        (_, first), *later = starts
        changes = ", ".join(f"from generation {generation}: {count}" for generation, count in later)
        return f"{first} ({changes})" if changes else str(first)

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data, for `report --json` and `status --json`."""
        return {
            "sentence": self.sentence,
            "correlation": self.latest,
            "correlations": list(self.correlations),
            "proposed": list(self.proposed),
            "blocks": list(self.blocks),
            "of": self.of,
            "off": list(self.off),
        }


def guidance(store: StoreReader) -> Guidance | None:
    """Return what the surrogate did, or None where it was off or no generation was asked yet."""
    states = store.guide()
    if not states:
        return None
    generations = store.generations()[: len(states)]
    before = [states[0], *states[:-1]]  # a state is that after its generation and decides about the next
    ignored = [
        number
        for number, state in enumerate(before)
        if number and state.correlation is not None and state.correlation < TRUSTED
        if not states[number].proposed
    ]
    return Guidance(
        correlations=tuple(state.correlation for state in states),
        proposed=tuple(state.proposed for state in states),
        candidates=sum(len(generation.recipes) for generation in generations),
        blocks=tuple(state.blocks for state in before),
        of=store.blocks("search"),
        off=tuple(ignored),
    )


def consecutive(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the first and last number of every run of consecutive ones.

    >>> consecutive((1, 2, 3, 7))
    [(1, 3), (7, 7)]
    """
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        runs.append((members[0], members[-1]))
    return runs


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return numbers as a list of ranges.

    >>> _ranges((1, 2, 3, 7))
    '1-3, 7'
    """
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in consecutive(numbers))
