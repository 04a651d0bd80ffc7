"""Where a run's items, time and money went, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import SPLITS, Split
from evomerge.running.store import facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one part of a run took: scored items, and seconds of all workers together; None: not timed."""

    part: str
    items: int
    seconds: float | None


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
    sizes = _sizes(summary, "search")
    references, searched = 0, 0
    for recipe, blocks in store.scored_blocks("search").items():
        items = sum(sizes[block] for block in blocks if block < len(sizes))
        references, searched = (
            (references + items, searched) if recipe in hand_made else (references, searched + items)
        )
    times: dict[Split, dict[str, float]] = {
        split: {recipe: timing.total for recipe, timing in store.timings(split).items()} for split in SPLITS
    }
    parts = [
        Spent(
            part="base, parents, baselines",
            items=references,
            seconds=sum(s for recipe, s in times["search"].items() if recipe in hand_made),
        ),
        Spent(part="gradients", items=store.gradient_items(), seconds=facts.GRADIENT_SECONDS.get(store)),
        Spent(
            part="candidates",
            items=searched,
            seconds=sum(s for recipe, s in times["search"].items() if recipe not in hand_made),
        ),
    ]
    later: tuple[tuple[Split, str], ...] = (("select", "finalists on select"), ("test", "test"))
    for split, name in later:
        per_model = sum(_sizes(summary, split))
        models = len(store.scored_blocks(split))
        parts.append(Spent(part=name, items=per_model * models, seconds=sum(times[split].values())))
    price = (facts.CONFIG.require(store).get("budget", {}).get("cost") or {}).get("per_hour")
    hours = store.hours()
    return Spending(
        parts=tuple(part for part in parts if part.items),
        hours=hours,
        cost=None if price is None else price * hours,
    )


def _sizes(summary: Summary, split: Split) -> list[int]:
    """Return the items of each block of a split, as the base was scored on them."""
    if not summary.parents:
        return []
    base, store = summary.parents[0].recipe.hash, summary.store
    parts = [store.result(base, split, block) for block in range(store.blocks(split))]
    return [getattr(part, "items", 0) for part in parts]
