"""The budget: the limits of a search, after which the run picks its winner.

Limits that count (evaluations, items, generations, patience) depend on stored scores alone, so they end a
resumed search where they end an uninterrupted one. Limits of the clock (hours, until, cost) don't; the place
where one of them ended a search is stored as a `Stop`, and holds until that limit is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from pydantic import Field, field_validator, model_validator

from evomerge.running.clock import Clock, fixed, moment, shown, span
from evomerge.running.store import RunStore, facts
from evomerge.schema import LARGEST_COUNT, Strict

LIMITS = ("evaluations", "items", "generations", "hours", "until", "cost", "patience")
MOST_HOURS = 87_600
"""Bound of the hours of work that a budget allows: ten years."""


class CostSpec(Strict):
    """The price of the machines, in any currency."""

    per_hour: float = Field(ge=1e-6, le=1e12)
    """Price of one hour of work, all machines together."""
    max: float | None = Field(default=None, gt=0, le=1e12)
    """Limit of the run; the search ends in time for selection and test. Without it, cost is shown only."""

    @model_validator(mode="after")
    def _within_years(self) -> CostSpec:
        if self.max is not None and self.max / self.per_hour > MOST_HOURS:
            raise ValueError(
                f"max pays for {self.max / self.per_hour:.3g} hours; at most {MOST_HOURS} are valid"
            )
        return self


class BudgetSpec(Strict):
    """The `budget` part of a run config; the search ends at the limit that is reached first.

    A budget names at least one of the first seven keys (of `cost`: its `max`). Limits that count are
    checked between generations, and the next generation is expected to cost what the last one did. Limits
    of the clock (hours, until, cost) may cut a generation short, and leave time for selection and test.
    """

    evaluations: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Full evaluations: the optimizer's candidates on all `search` items. A candidate that stops early or
    fails counts in part, a repeated one not at all. Baselines, selection and test do not count."""
    items: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """The same limit in scored items."""
    generations: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Generations of the optimizer."""
    hours: float | None = Field(default=None, gt=0, le=MOST_HOURS)
    """Hours of work on the run, all sessions together."""
    until: str | None = None
    """A time of day in quotes, such as "08:00": its next occurrence after each start of a session; or a date
    and time such as "2026-12-24T08:00"."""
    cost: CostSpec | None = None
    """A limit in money: `{per_hour: 2.5, max: 30}`."""
    patience: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Generations in a row without a better candidate; with several objectives, without a larger
    hypervolume."""
    failures: int = Field(default=16, ge=1, le=LARGEST_COUNT)
    """Failed candidates in a row after which the run stops with an error."""

    @field_validator("until", mode="before")
    @classmethod
    def _moment(cls, until: object) -> object:
        if isinstance(until, date):  # unquoted, YAML makes a date of it
            until = until.isoformat()
        if until is not None:
            moment(until if isinstance(until, str) else "", 0.0)  # and a number of 18:30
        return until

    @model_validator(mode="after")
    def _limited(self) -> BudgetSpec:
        limits = [getattr(self, name) for name in LIMITS if name != "cost"]
        if all(limit is None for limit in (*limits, self.cost and self.cost.max)):
            raise ValueError(f"a budget needs at least one of: {', '.join(LIMITS)} (cost.max)")
        return self

    @property
    def paid_hours(self) -> float | None:
        """Hours of work that `cost.max` pays for."""
        return None if self.cost is None or self.cost.max is None else self.cost.max / self.cost.per_hour

    def allowed(self, full: int, population: int) -> float | None:
        """Return how many full evaluations the limits that count allow, None where there are none.

        full: items of one. population: candidates of a generation, none of which stops early.
        """
        limits = [self.evaluations, self.items and self.items / full]
        limits.append(self.generations and self.generations * population)
        return min((limit for limit in limits if limit), default=None)

    def clock_limit(self, clock: Clock) -> ClockLimit | None:
        """Return the limit of the clock that comes first, or None where there is none."""
        limits: list[ClockLimit] = []
        if self.hours is not None:
            limits.append(ClockLimit(name="hours", value=f"{self.hours:g}", at=clock.after(self.hours)))
        if self.cost is not None and self.paid_hours is not None:
            value = f"{self.cost.max:g} at {self.cost.per_hour:g} per hour"
            limits.append(ClockLimit(name="cost", value=value, at=clock.after(self.paid_hours)))
        if self.until is not None:
            limits.append(ClockLimit(name="until", value=self.until, at=moment(self.until, clock.started)))
        return min(limits, key=lambda limit: limit.at, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockLimit:
    """A limit of the clock: its name and value in the config, and when it comes, in epoch seconds."""

    name: str
    value: str
    at: float

    def __str__(self) -> str:
        if self.name == "hours":
            return f"budget of {self.value} hours used"
        return f"budget of {self.value} used" if self.name == "cost" else f"until {shown(self.at)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The place where a limit of the clock ended a search.

    limit, value: its name and value in the config. at: for `until` the moment in epoch seconds, else the
    hours of work it allows. reason: one sentence. generations: number of finished generations.
    """

    limit: str
    value: str
    at: float
    reason: str
    generations: int

    def holds(self, spec: BudgetSpec, now: float) -> bool:
        """Whether a budget still ends the search there: the same limit, not raised.

        An unchanged time of day counts as not raised; otherwise a finished run would continue every evening.
        """
        if self.limit == "until":
            return spec.until is not None and (spec.until == self.value or moment(spec.until, now) <= self.at)
        hours = spec.hours if self.limit == "hours" else spec.paid_hours
        return hours is not None and hours <= self.at

    def as_data(self) -> dict[str, Any]:
        """Return it as a fact of the store."""
        return dataclasses.asdict(self)


class Budget:
    """Decides when the search stops.

    reserve: seconds to keep for the work after the search. stop: where the clock ended the search in an
    earlier session, if that limit still holds. record: receives the stop of this session.
    """

    def __init__(
        self,
        spec: BudgetSpec,
        clock: Clock,
        *,
        reserve: Callable[[], float] = lambda: 0.0,
        stop: Stop | None = None,
        record: Callable[[Stop], None] = lambda _: None,
    ) -> None:
        self._spec, self._clock, self._reserve, self._stop, self._record = spec, clock, reserve, stop, record
        self._kept = 0.0

    @classmethod
    def of_run(
        cls, store: RunStore, spec: BudgetSpec, clock: Clock, reserve: Callable[[], float] = lambda: 0.0
    ) -> Budget:
        """Return the budget of a session; a stop by the clock holds until its limit is raised."""
        stored = facts.STOP.get(store)
        stop = None if stored is None else Stop(**stored)
        if stop is not None and not stop.holds(spec, clock.now()):
            facts.STOP.set(store, None)
            stop = None
        limit = spec.clock_limit(clock)
        facts.CLOCK.set(store, {"limit": None if limit is None else limit.at})
        return cls(
            spec,
            clock,
            reserve=reserve,
            stop=stop,
            record=lambda stop: facts.STOP.set(store, stop.as_data()),
        )

    @property
    def _limit(self) -> ClockLimit | None:
        """The limit of the clock, which moves where the clock is set."""
        return self._spec.clock_limit(self._clock)

    @property
    def timed(self) -> bool:
        """Whether the clock may end the search."""
        return self._limit is not None

    def deadline(self) -> float | None:
        """Return when the last job of the search may begin, in epoch seconds; None: at any time."""
        if self._stop is not None:
            return -math.inf
        limit = self._limit
        if limit is None:
            return None
        self._kept = self._reserve()
        return limit.at - self._kept

    def evaluations(self, full: int, population: int) -> float | None:
        """Return how many full evaluations the limits that count allow, None where there are none.

        full: items of one. population: candidates of a generation.
        """
        return self._spec.allowed(full, population)

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int = 0
    ) -> str | None:
        """Return why the next generation must not start, or None.

        items: scored so far. forecast: what the next generation will cost. full: of one evaluation. stale:
        generations in a row without improvement.

        The first generation always runs, so that there are candidates to choose a winner from.
        """
        spec = self._spec
        if generations == 0:
            return None
        if spec.generations is not None and generations >= spec.generations:
            return f"budget of {spec.generations} generations used"
        if spec.evaluations is not None and items + forecast > spec.evaluations * full:
            return f"budget of {spec.evaluations} evaluations used ({items / full:.4g} in whole generations)"
        if spec.items is not None and items + forecast > spec.items:
            return f"budget of {spec.items} items used ({items} in whole generations)"
        if spec.patience is not None and stale >= spec.patience:
            return f"nothing better in {stale} generation{'s' if stale > 1 else ''}"
        deadline = self.deadline()
        if deadline is None or self._clock.now() < deadline:
            return None
        return self.out_of_time(generations, cut=False)

    def out_of_time(self, generations: int, *, cut: bool = True) -> str:
        """Return why the clock ends the search after some finished generations, and record it.

        cut: whether the next generation is under way.
        """
        if self._stop is None:
            limit = self._limit
            assert limit is not None
            reason = f"{limit} ({span(self._kept)} kept for selection and test)"
            if cut:
                reason += f"; generation {generations} was cut short"
            hours = {"hours": self._spec.hours, "cost": self._spec.paid_hours}
            self._stop = Stop(
                limit=limit.name,
                value=limit.value,
                at=hours.get(limit.name) or limit.at,
                reason=reason,
                generations=generations,
            )
            self._record(self._stop)
        return self._stop.reason


def replaced(budget: Mapping[str, Any], changes: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return a budget as data with single limits replaced, as the command line gives them.

    changes: limits by name, None where unchanged; `cost` and `per_hour` are numbers. A time of day becomes
    that moment: said again on another evening it means another one.

    >>> replaced({"hours": 3}, {"hours": 5, "cost": 20.0, "per_hour": 2.5, "items": None}, 0.0)
    {'hours': 5, 'cost': {'max': 20.0, 'per_hour': 2.5}}
    """
    limits = {name: value for name, value in changes.items() if value is not None}
    cost = {
        key: limits.pop(name) for name, key in (("cost", "max"), ("per_hour", "per_hour")) if name in limits
    }
    before = budget.get("cost") or {}
    if cost and isinstance(before, Mapping):
        limits["cost"] = {**before, **cost}
    if "until" in limits:
        with contextlib.suppress(ValueError):  # parsing the config reports the mistake
            limits["until"] = fixed(limits["until"], now)
    return {**budget, **limits}
