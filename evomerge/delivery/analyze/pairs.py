"""Expected gains of pairs in the terminal and as data (`evomerge analyze --gain`)."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.style import decimal, numbers, percent, words
from evomerge.pair_gains import CORRELATION, ERROR, PAIRS, ZOOS, PairGains


def table(found: PairGains) -> RenderableType:
    """Return a table of the pairs and what the numbers mean, for a rich console."""
    rows = style.table(
        words("pair"),
        numbers("expected gain"),
        numbers("slack"),
        title="what a merge of two is expected to gain over the better of both, on their two skills",
    )
    for each in found.pairs:
        rows.add_row(" - ".join(each.pair), f"{percent(each.gain)} ±{percent(ERROR)}", decimal(each.slack))
    lines = [f"- no prediction for {name}: {reason}" for name, reason in found.without.items()]
    return Group(Text(), rows, Text(sentence(found)), *(Text(line) for line in lines))


def sentence(found: PairGains) -> str:
    """Return what the gains are, what they come from and how wrong they are."""
    return (
        "points of the mean normalised score: 0 the base, 100 the specialists; ± is the typical error. From "
        f"margins and gradients of {found.items} items at the specialists. On {PAIRS} pairs of {ZOOS} small "
        f"zoos, each predicted from the other zoos, the rank correlation with the best of ten merges was "
        f"{CORRELATION:.2f}; other models may differ. Use the order: it says which pairs to merge first"
    )


def as_data(found: PairGains) -> dict[str, Any]:
    """Return the gains as plain data (`analyze --gain --json`)."""
    return {
        "pairs": [{"pair": list(p.pair), "gain": p.gain, "slack": p.slack} for p in found.pairs],
        "without": dict(found.without),
        "items": found.items,
        "error": ERROR,
        "rank_correlation": CORRELATION,
        "measured_pairs": PAIRS,
    }
