"""The state of a run in a few lines; read from the store, also while the run works."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from typing import Any

from evomerge.delivery import objectives
from evomerge.delivery.course import Course
from evomerge.delivery.guidance import guidance
from evomerge.delivery.notes import notes
from evomerge.delivery.progress import outlook
from evomerge.delivery.style import of_blocks, plus_minus
from evomerge.delivery.summary import Summary
from evomerge.evaluation.statistics import Interval
from evomerge.running import forward
from evomerge.running.budget import LIMITS
from evomerge.running.clock import shown
from evomerge.running.observers import Estimate
from evomerge.running.store import StoreReader, facts


def as_data(summary: Summary) -> dict[str, Any]:
    """Return the state of a run as plain data (`status --json`).

    Args:
        summary: of a finished, running or stopped run.

    Returns:
        Values that JSON can hold; normalised scores from 0 (base) to 1 (specialists), `hours` of work so far,
        `cost` in the budget's currency.
    """
    store, course = summary.store, Course(summary)
    finished = [generation for generation in store.generations() if generation.losses is not None]
    convergence, failures = course.convergence(), store.failures()
    surrogate, passes = guidance(store), forward.stored(store)
    verdict, front = summary.verdict(summary.rows()), objectives.front(summary)
    blocks = [convergence.blocks[-1], convergence.of] if convergence.blocks else None
    return {
        "run": str(store.folder),
        "state": "finished" if facts.STOPPED.get(store) else "running" if store.held() else "stopped",
        "stopped": facts.STOPPED.get(store),
        "generations": len(finished),
        "candidates": sum(len(generation.recipes) for generation in finished),
        "evaluations": round(course.evaluations(), 2),
        "budget": facts.CONFIG.require(store)["budget"],
        "hours": round(store.hours(), 4),
        **_time_and_cost(store),
        "best_on_search": convergence.best_so_far[-1] if convergence.best_so_far else None,
        "best_interval": _ends(convergence.best_interval),
        "best_on_blocks": blocks,
        "best_baseline_on_search": convergence.best_baseline,
        "best_baseline": convergence.best_baseline_name,
        "best_baseline_interval": _ends(convergence.baseline_interval),
        "forward": None if passes is None else forward.as_data(passes),
        "failures": len(failures),
        "last_failure": failures[-1][2].reason if failures else None,
        "winner": summary.winner.recipe.hash if summary.winner else None,
        "verdict": verdict.sentence if verdict else None,
        "level": verdict.level if verdict else None,
        "front": front.as_data() | {"sentence": front.sentence} if front else None,
        "constraints": objectives.constraints(summary),
        "surrogate": None if surrogate is None else surrogate.as_data(),
        "notes": notes(summary),
    }


def _time_and_cost(store: StoreReader) -> dict[str, Any]:
    """Return the cost so far, the time limit of the current session, and the estimate of the run's end."""
    clock, cost = facts.CLOCK.get(store) or {}, facts.CONFIG.require(store)["budget"].get("cost")
    estimate = None
    if clock.get("estimate") and store.held():
        estimate = replace(Estimate(**clock["estimate"]), made=time.time())
    limit = clock.get("limit")
    return {
        "cost": round(store.hours() * cost["per_hour"], 4) if cost else None,
        "time_limit": None if limit is None else shown(limit),
        "stopped_by_clock": facts.STOP.get(store),
        "estimate": None if estimate is None else estimate.as_data(),
        "outlook": [] if estimate is None else outlook(estimate),
    }


def limits(budget: dict[str, Any]) -> str:
    """Return the limits of a stored budget in one line."""
    parts = [f"{v} {k}" for k, v in budget.items() if v is not None and k in LIMITS[:4]]
    if budget.get("until"):
        parts.append(f"until {budget['until']}")
    if cost := budget.get("cost"):
        most = "" if cost["max"] is None else f"{cost['max']:g} "
        parts.append(f"{most}at {cost['per_hour']:g} per hour")
    if budget.get("patience"):
        parts.append(f"patience {budget['patience']}")
    return ", ".join(parts)


def text(data: dict[str, Any]) -> str:
    """Return the data of `as_data` as lines for the terminal."""
    resume = f"to continue: evomerge resume {shlex.quote(data['run'])}"
    lines = [
        f"{data['run']}: {data['state']}" + (f" ({data['stopped']})" if data["stopped"] else ""),
        f"  {data['candidates']} candidates in {data['generations']} generations, "
        f"{data['evaluations']:.4g} evaluations, {60 * data['hours']:.1f} minutes "
        f"(budget: {limits(data['budget'])})",
    ]
    if data["state"] == "running" and data["time_limit"] is not None:
        lines.append(f"  time limit: {data['time_limit']}")
    if data["outlook"]:
        lines.append(f"  {', '.join(data['outlook'])}")
    elif data["cost"] is not None:
        lines.append(f"  cost so far: {data['cost']:.2f}")
    if data["best_on_search"] is not None:
        blocks = of_blocks(*data["best_on_blocks"])
        best = _score(data["best_on_search"], data["best_interval"])
        lines.append(f"  best so far on search: {best} points{blocks}")
    if data["best_baseline_on_search"] is not None:
        best = _score(data["best_baseline_on_search"], data["best_baseline_interval"])
        lines.append(f"  best baseline on search: {best} points ({data['best_baseline']})")
    if data["surrogate"]:
        lines.append(f"  {data['surrogate']['sentence']}")
    if data["forward"]:
        lines.append(f"  {forward.Forward(**data['forward']).sentence}")
    lines += [f"  note: {note}" for note in data["notes"]]
    if data["failures"]:
        lines.append(f"  {data['failures']} failures, the latest: {data['last_failure']}")
    front = data["front"]["sentence"] if data["front"] else None
    lines += [f"  {line}" for line in (front, data["verdict"], data["constraints"]) if line]
    if data["state"] == "finished" and (stop := data["stopped_by_clock"]):
        lines.append(f"  the {stop['limit']} limit stopped the search; {resume} {_raised(stop['limit'])}")
    if data["state"] == "stopped":
        lines.append(f"  {resume}")
    return "\n".join(lines)


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _score(estimate: float, ends: list[float] | None) -> str:
    low, high = ends or (estimate, estimate)
    return plus_minus(Interval(estimate=estimate, low=low, high=high))


def _raised(limit: str) -> str:
    """Return the option that raises the limit that stopped a search."""
    return {"until": "--until 08:00", "hours": "--hours N", "cost": "--cost N"}[limit]
