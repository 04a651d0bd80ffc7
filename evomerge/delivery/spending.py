"""Where a run's items, time and money went, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import Split
from evomerge.running.store import facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one part of a run took: scored items, and seconds of all workers together; None: not timed.

    copied: items whose scores came from another run (`scores_from`); their seconds are not counted.
    """

    part: str
    items: int
    seconds: float | None
    copied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What a run took. hours: of the clock, all sessions together. cost: at the config's price per hour."""

    parts: tuple[Spent, ...]
    hours: float
    cost: float | None

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def spending(summary: Summary) -> Spending:
    """Return what a run took so far, from its store."""
    store = summary.store
    hand_made = {named.recipe.hash for named in (*summary.parents, *summary.baselines)}
    parts = [
        _scored(summary, "search", "base, parents, baselines", hand_made.__contains__),
        Spent(part="gradients", items=store.gradient_items(), seconds=facts.GRADIENT_SECONDS.get(store)),
        _scored(summary, "search", "candidates", lambda recipe: recipe not in hand_made),
        _scored(summary, "select", "finalists on select", lambda _: True),
        _scored(summary, "test", "test", lambda _: True),
    ]
    price = (facts.CONFIG.require(store).get("budget", {}).get("cost") or {}).get("per_hour")
    hours = store.hours()
    return Spending(
        parts=tuple(part for part in parts if part.items),
        hours=hours,
        cost=None if price is None else price * hours,
    )


def _scored(summary: Summary, split: Split, part: str, counts: Callable[[str], bool]) -> Spent:
    """Return what scoring took on a split, of the recipes (hashes) that count."""
    sizes = _sizes(summary, split)
    timings = summary.store.timings(split)
    items, copied = 0, 0
    for recipe, blocks in summary.store.scored_blocks(split).items():
        if counts(recipe):
            scored = sum(sizes[block] for block in blocks if block < len(sizes))
            items += scored
            copied += scored if recipe in timings and timings[recipe].run is not None else 0
    seconds = sum(t.total for recipe, t in timings.items() if counts(recipe) and t.run is None)
    return Spent(part=part, items=items, seconds=seconds, copied=copied)


def _sizes(summary: Summary, split: Split) -> list[int]:
    """Return the items of each block of a split, as the base was scored on them."""
    if not summary.parents:
        return []
    base, store = summary.parents[0].recipe.hash, summary.store
    parts = [store.result(base, split, block) for block in range(store.blocks(split))]
    return [getattr(part, "items", 0) for part in parts]
