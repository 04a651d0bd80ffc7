"""Heat maps of interference: what a cell shows, its colours, and which cells there are.

The terminal and the page draw from this file, so that they show the same numbers in the same colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.delivery.style import decimal
from evomerge.merging.analysis.interference import Interference, Tally

Colour = tuple[int, int, int]
GOOD: Colour = (64, 145, 108)
BAD: Colour = (200, 75, 60)
STRONG: Colour = (47, 111, 237)
_WHITE: Colour = (255, 255, 255)
_NAMES = {GOOD: "green", BAD: "red", STRONG: "accent"}
"""Names of the page's colours, which differ in the dark."""

MEASURES = ("conflict", "cosine", "overlap", "norm")
SHARES = ("unchanged", "changed by one", "by several, same direction", "by several, opposite directions")
"""Names of the four parts of `Tally.shares`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMapMeasure:
    """One measure of a heat map: its title, its unit and its colour scale.

    unit: factor from the value to the shown number. low, middle, high: the values shown in the full colour
    of `ends[0]`, in white, and in the full colour of `ends[1]`.
    """

    name: str
    title: str
    unit: float
    low: float
    middle: float
    high: float
    ends: tuple[Colour, Colour]

    def of(self, tally: Tally) -> float:
        """Return the measure's value over the elements of a tally, NaN where it is undefined."""
        if self.name == "conflict":
            return tally.mean_conflict
        if self.name == "overlap":
            return tally.mean_overlap
        if self.name == "cosine":
            return tally.mean_cosine if tally.norms.any() else math.nan
        return float(tally.relative.mean()) if tally.base else math.nan

    def text(self, value: float) -> str:
        """Return a value as the text of a cell; `-` for NaN."""
        digits = 0 if self.unit == 100 and self.name != "norm" else 2 if self.unit == 1 else 1
        return decimal(self.unit * value, digits)

    def tone(self, value: float) -> tuple[str, float]:
        """Return the name of the page's colour for a value, and how much of it shows (0 to 1)."""
        end = self.ends[value > self.middle]
        return _NAMES.get(end, "grey"), 0.85 * self._strength(value)

    def _strength(self, value: float) -> float:
        reach = (self.high if value > self.middle else self.low) - self.middle
        return min(1.0, abs(value - self.middle) / abs(reach)) if reach else 0.0

    def colour(self, value: float) -> Colour:
        """Return the background of a value (red, green, blue; 0 to 255), from white to one of the ends."""
        if math.isnan(value):
            return _WHITE
        end, strength = self.ends[value > self.middle], self._strength(value)
        red, green, blue = (round(255 + strength * (channel - 255)) for channel in end)
        return red, green, blue


def measures(interference: Interference) -> dict[str, HeatMapMeasure]:
    """Return the measures of a heat map by name; the value of unrelated task vectors is white."""
    chance = interference.chance_overlap
    norms = (float(tally.relative.mean()) for tally in interference.cells().values() if tally.base)
    largest = max(norms, default=1.0)
    listed = (
        HeatMapMeasure(
            name="conflict",
            title="conflict: opposite directions, % of what two models change, all pairs; unrelated: 50",
            unit=100,
            low=0.3,
            middle=0.5,
            high=0.7,
            ends=(GOOD, BAD),
        ),
        HeatMapMeasure(
            name="cosine",
            title="cosine of the task vectors, mean of all pairs; unrelated: 0",
            unit=1,
            low=-0.3,
            middle=0.0,
            high=0.3,
            ends=(BAD, GOOD),
        ),
        HeatMapMeasure(
            name="overlap",
            title=f"overlap of the top {100 * interference.top:g} % of elements, Jaccard %, mean of all "
            f"pairs; unrelated: {100 * chance:.0f}",
            unit=100,
            low=0.0,
            middle=chance,
            high=min(1.0, 4 * chance),
            ends=(GOOD, BAD),
        ),
        HeatMapMeasure(
            name="norm",
            title="norm of the task vectors, % of the base's, mean of all models",
            unit=100,
            low=0.0,
            middle=0.0,
            high=largest or 1.0,
            ends=(_WHITE, STRONG),
        ),
    )
    return {measure.name: measure for measure in listed}


def grid(interference: Interference) -> tuple[list[str], list[str], dict[tuple[int, str], Tally]]:
    """Return the cells inside the layers: module kinds, their short labels, (layer, kind) -> tally."""
    cells = {(layer, kind): t for (layer, kind), t in interference.cells().items() if layer is not None}
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    return kinds, labels(kinds), cells


def outside(interference: Interference) -> dict[str, Tally]:
    """Return the tallies of the tensors outside the layers, by module kind."""
    return {kind: tally for (layer, kind), tally in interference.cells().items() if layer is None}


def labels(kinds: Sequence[str]) -> list[str]:
    """Shorten module kinds to their last parts, so that they stay different.

    >>> labels(["self_attn.q_proj", "mlp.gate_proj", "attn.norm", "mlp.norm"])
    ['q', 'gate', 'attn.norm', 'mlp.norm']
    """
    paths = [kind.removesuffix("_proj").replace("_proj.", ".").split(".") for kind in kinds]
    short = []
    for path in paths:
        lengths = (n for n in range(1, len(path)) if sum(p[-n:] == path[-n:] for p in paths) == 1)
        short.append(".".join(path[-next(lengths, len(path)) :]))
    return [label.replace("layernorm", "norm").replace("attention", "attn") for label in short]
