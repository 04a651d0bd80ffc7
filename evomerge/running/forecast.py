"""The forecast: the time after the search and the end of the run, estimated from the run's own times.

Candidates are scored in rounds of one per worker. After the search come, one after another on `search`, the
soups of the finalists and the optimizer's favourite; then the finalists on `select`; then the winner and its
rivals on `test`; then the report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluation.scores import SPLITS, Split
from evomerge.running.budget import BudgetSpec
from evomerge.running.clock import Clock
from evomerge.running.earlier_scores import EarlierScores
from evomerge.running.observers import Estimate, Observer
from evomerge.running.store import RunStore, facts

SAFETY = 1.5
"""Factor on the expected time after the search, so that a slow end is still in time."""
REPORT = 10.0
"""Seconds reserved for the report and everything else but scoring."""
EXTRA = 2
"""Scored on `select` beside the finalists: their soup, and the optimizer's favourite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work after the search: soups one after another, then candidates per split in parallel."""

    soups: int
    select: int
    test: int

    def seconds(self, per_candidate: Mapping[Split, float], workers: int) -> float:
        """Return how long it takes. per_candidate: seconds on each split.

        >>> Work(soups=8, select=10, test=3).seconds({"search": 1.0, "select": 2.0, "test": 3.0}, workers=4)
        17.0
        """
        rounds: dict[Split, int] = {
            "select": math.ceil(self.select / workers),
            "test": math.ceil(self.test / workers),
        }
        search, select, test = (per_candidate[split] for split in SPLITS)
        return self.soups * search + rounds["select"] * select + rounds["test"] * test


class Forecast:
    """Estimates the remaining time of a run from its store.

    workers: number of parallel workers. finalists: number of finalists. several: whether there are several
    objectives; unsearched recipes are then scored on `select`, too. earlier: scores that are only copied.
    """

    def __init__(
        self,
        store: RunStore,
        clock: Clock,
        budget: BudgetSpec,
        *,
        workers: int,
        finalists: int,
        several: bool,
        earlier: EarlierScores | None = None,
    ) -> None:
        self._earlier = earlier
        self._store, self._clock, self._budget, self._workers = store, clock, budget, workers
        self._finalists, self._several = finalists, several

    def work(self) -> Work:
        """Return the work left after the search."""
        references, baselines = ("base", "parent"), ("baseline",)
        beside = (*references, *(baselines if self._several else ()))
        return Work(
            soups=self._finalists,  # of all but the first with those before it; and the favourite
            select=self._finalists + EXTRA + self._missing(beside, "select"),
            test=1 + self._missing((*references, *baselines, "start"), "test"),
        )

    def _missing(self, roles: Sequence[str], split: Split) -> int:
        """Return how many recipes of some roles are still to be scored on a split."""
        recipes = self._store.untimed(roles, split)
        return sum(self._earlier is None or not self._earlier.has(recipe, split) for recipe in recipes)

    def seconds(self) -> dict[Split, float]:
        """Return the seconds of a candidate on each split, once some are scored.

        On `search`, the longest of the last generation: only the best candidates are scored on all items. On
        splits where nothing was scored yet, in proportion to their items.
        """
        means: dict[Split, float] = {}
        for split in SPLITS:
            totals = [timing.total for timing in self._store.timings(split).values()]
            if totals:
                means[split] = sum(totals) / len(totals)
        if "search" not in means:
            return dict.fromkeys(SPLITS, 0.0)
        items = self._store.split_items()
        for split in SPLITS:
            if split not in means:
                means[split] = means["search"] * items.get(split, 1) / items.get("search", 1)
        return {**means, "search": self._store.longest_of_last_generation() or means["search"]}

    def finish_seconds(self) -> float:
        """Return how long what follows the search is expected to take."""
        return self.work().seconds(self.seconds(), self._workers) + REPORT

    def reserve(self) -> float:
        """Return the seconds to keep for what follows the search, and for a candidate just begun."""
        return SAFETY * self.finish_seconds() + self.seconds()["search"]

    def estimate(self, search_left: float | None) -> Estimate:
        """Return when the run ends. search_left: seconds the counting limits leave it, None where unknown."""
        now, finish, limit = self._clock.now(), self.finish_seconds(), self._budget.clock_limit(self._clock)
        ends = [] if search_left is None else [now + search_left]
        if limit is not None:
            ends.append(max(now, limit.at - self.reserve()))
        search_ends = min(ends, default=None)
        ended = None if search_ends is None else search_ends + finish
        price = None if self._budget.cost is None else self._budget.cost.per_hour
        hours = self._clock.hours
        return Estimate(
            made=now,
            search_ends=search_ends,
            ends=ended,
            cost=None if price is None or ended is None else price * (hours + (ended - now) / 3600),
            spent=None if price is None else price * hours,
        )


class Watch(Observer):
    """Estimates when the run will end, for observers and for the store.

    It measures the pace of the generations scored in this session: seconds per evaluation and per generation.
    It must come before its observers, so that they receive an estimate before the event of its generation.
    """

    def __init__(
        self,
        forecast: Forecast,
        store: RunStore,
        budget: BudgetSpec,
        audience: Observer,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._forecast, self._store, self._budget, self._audience = forecast, store, budget, audience
        self._now = now
        self._since: float | None = None
        self._before = 0.0
        """Evaluations spent before the pace was taken."""
        self._fresh = False
        self._generations = 0

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Record when the first generation starts that is not replayed."""
        if name.startswith("generation ") and jobs > known:
            self._fresh = True
            self._since = self._now() if self._since is None else self._since

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Make a new estimate, if anything was scored."""
        if self._fresh and self._since is not None:
            self._generations += 1
            elapsed = self._now() - self._since
            estimate = self._forecast.estimate(self._left(generation, evaluations, elapsed))
            clock = facts.CLOCK.require(self._store)
            facts.CLOCK.set(self._store, {**clock, "estimate": estimate.as_data()})
            self._audience.expected(estimate)
        else:
            self._before = evaluations
        self._fresh = False

    def _left(self, generation: int, evaluations: float, elapsed: float) -> float | None:
        """Seconds until a counting limit ends the search, at the pace so far."""
        budget, ends = self._budget, []
        spent = evaluations - self._before
        limits = [budget.evaluations]
        if budget.items is not None and (full := self._store.split_items().get("search")):
            limits.append(budget.items / full)  # type: ignore[arg-type]
        for limit in limits:
            if limit is not None and spent > 0:
                ends.append(elapsed / spent * max(0.0, limit - evaluations))
        if budget.generations is not None:
            left = max(0, budget.generations - generation - 1)
            ends.append(elapsed / self._generations * left)
        return min(ends, default=None)
