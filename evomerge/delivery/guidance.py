"""What the surrogate did for a search: how well it ranked what it had not seen, and when it was not asked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from evomerge.running.store import StoreReader
from evomerge.search.surrogate.guide import TRUSTED, WINDOW

_ACCENT, _WARM, _PALE = "#2f6fed", "#d9822b", "#f3e3cf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The surrogate over a run; one element per generation.

    correlations: Spearman's, of its last predictions with what was then measured, None while there are too
    few. proposed: candidates it proposed itself. candidates: all that were asked for. blocks: item blocks
    scored, of `of`. off: generations in which the optimizer worked alone, because it had not predicted.
    """

    correlations: tuple[float | None, ...]
    proposed: tuple[int, ...]
    candidates: int
    blocks: tuple[int, ...]
    of: int
    off: tuple[int, ...]

    @property
    def latest(self) -> float | None:
        """The last rank correlation there is."""
        return next((found for found in reversed(self.correlations) if found is not None), None)

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        quality = "too few predictions to judge it"
        if self.latest is not None:
            quality = f"rank correlation {self.latest:.2f} with unseen candidates"
        parts = [quality, f"proposed {sum(self.proposed)} of {self.candidates} candidates"]
        if self.of > 1:
            parts.append(f"scored on {self.course} of {self.of} item blocks")
        if self.off:
            parts.append(
                f"not listened to in {len(self.off)} of {len(self.proposed)} generations ({_spans(self.off)})"
            )
        return f"surrogate: {', '.join(parts)}"

    @property
    def course(self) -> str:
        """The item blocks over the run, as in `2, from generation 12 on 4`."""
        starts = [next(group) for _, group in groupby(enumerate(self.blocks), key=lambda pair: pair[1])]
        return ", ".join(f"from generation {g} on {n}" if g else str(n) for g, n in starts)

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

    def figure(self) -> go.Figure | None:
        """The rank correlation after each generation, and where it was too low."""
        known = [(g, c) for g, c in enumerate(self.correlations) if c is not None]
        if len(known) < 2:
            return None
        figure = go.Figure()
        figure.add_scatter(
            x=[g for g, _ in known],
            y=[c for _, c in known],
            mode="lines+markers",
            line={"color": _ACCENT, "width": 2},
            name=f"rank correlation, the optimizer's last {WINDOW}",
        )
        for first, last in _runs(self.off):
            figure.add_vrect(
                x0=first - 0.5, x1=last + 0.5, fillcolor=_PALE, opacity=0.6, line_width=0, layer="below"
            )
        figure.add_hline(
            y=TRUSTED,
            line={"color": _WARM, "width": 1.5, "dash": "dot"},
            annotation_text="listened to above",
            annotation_position="top right",
        )
        figure.update_layout(
            xaxis_title="generation",
            yaxis_title="rank correlation",
            yaxis_range=[min(-0.1, *(c - 0.1 for _, c in known)), 1.05],
            height=260,
        )
        return figure


def guidance(store: StoreReader) -> Guidance | None:
    """Return what the surrogate did, or None where it was off or nothing was asked yet."""
    states = store.guide()
    if not states:
        return None
    generations = store.generations()[: len(states)]
    before = [states[0], *states[:-1]]  # a state is that after a generation; it decides about the next
    low = [
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
        off=tuple(low),
    )


def _runs(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    found = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        found.append((members[0], members[-1]))
    return found


def _spans(numbers: tuple[int, ...]) -> str:
    """Return numbers as people list them.

    >>> _spans((1, 2, 3, 7))
    '1-3, 7'
    """
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(numbers))
