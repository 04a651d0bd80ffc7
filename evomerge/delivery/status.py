"""Where a run stands, in a few lines; read from the store while the run goes on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from evomerge.delivery import objectives
from evomerge.delivery.guidance import guidance
from evomerge.delivery.notes import notes
from evomerge.delivery.progress import outlook
from evomerge.delivery.report import blocks_text
from evomerge.delivery.summary import Summary
from evomerge.running import forward
from evomerge.running.budget import LIMITS
from evomerge.running.clock import shown
from evomerge.running.observers import Estimate
from evomerge.running.store import StoreReader, facts


def as_data(summary: Summary) -> dict[str, Any]:
    """Return the state of a run as plain data (`status --json`)."""
    store = summary.store
    generations = store.generations()
    told = [g for g in generations if g.losses is not None]
    progress, failures = summary.progress(), store.failures()
    guided = guidance(store)
    verdict, front = summary.verdict(summary.rows()), objectives.front(summary)
    passes = forward.stored(store)
    return {
        "run": str(store.folder),
        "state": "finished" if facts.STOPPED.get(store) else "running" if store.held() else "stopped",
        "stopped": facts.STOPPED.get(store),
        "generations": len(told),
        "candidates": sum(len(g.recipes) for g in told),
        "evaluations": round(summary.evaluations(), 2),
        "budget": facts.CONFIG.require(store)["budget"],
        "hours": round(store.hours(), 4),
        **_clock(store),
        "best_on_search": progress.best_so_far[-1] if progress.best_so_far else None,
        "best_on_blocks": [progress.blocks[-1], progress.of] if progress.blocks else None,
        "best_baseline_on_search": progress.best_baseline,
        "best_baseline": progress.best_baseline_name,
        "forward": None if passes is None else forward.as_data(passes),
        "failures": len(failures),
        "last_failure": failures[-1][2].reason if failures else None,
        "winner": summary.winner.recipe.hash if summary.winner else None,
        "verdict": verdict.sentence if verdict else None,
        "front": front.as_data() | {"sentence": front.sentence} if front else None,
        "constraints": objectives.constraints(summary),
        "surrogate": None if guided is None else guided.as_data(),
        "notes": notes(summary),
    }


def _clock(store: StoreReader) -> dict[str, Any]:
    """What the clock says: when the session under way stops searching, what is expected, what was spent."""
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
    """Return the limits of a stored budget in a line."""
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
    """Return the state for people."""
    lines = [
        f"{data['run']}: {data['state']}" + (f" ({data['stopped']})" if data["stopped"] else ""),
        f"  {data['candidates']} candidates in {data['generations']} generations, "
        f"{data['evaluations']:.4g} evaluations, {60 * data['hours']:.1f} minutes "
        f"(budget: {limits(data['budget'])})",
    ]
    if data["state"] == "running" and data["time_limit"] is not None:
        lines.append(f"  time is up at {data['time_limit']}")
    if data["outlook"]:
        lines.append(f"  {', '.join(data['outlook'])}")
    elif data["cost"] is not None:
        lines.append(f"  cost so far {data['cost']:.2f}")
    if data["best_on_search"] is not None:
        part = blocks_text(*data["best_on_blocks"])
        lines.append(f"  best so far on search: {100 * data['best_on_search']:.1f} points{part}")
    if data["best_baseline_on_search"] is not None:
        points = 100 * data["best_baseline_on_search"]
        lines.append(f"  best baseline on search: {points:.1f} points ({data['best_baseline']})")
    if data["surrogate"]:
        lines.append(f"  {data['surrogate']['sentence']}")
    if data["forward"]:
        lines.append(f"  {forward.Forward(**data['forward']).sentence}")
    lines += [f"  note: {note}" for note in data["notes"]]
    if data["failures"]:
        lines.append(f"  {data['failures']} failed, the last: {data['last_failure']}")
    front = data["front"]["sentence"] if data["front"] else None
    lines += [f"  {line}" for line in (front, data["verdict"], data["constraints"]) if line]
    if data["state"] == "finished" and data["stopped_by_clock"]:
        lines.append(f"  the clock ended it; go on with: evomerge resume {data['run']} {_more(data)}")
    if data["state"] == "stopped":
        lines.append(f"  go on with: evomerge resume {data['run']}")
    return "\n".join(lines)


def _more(data: dict[str, Any]) -> str:
    """The option that raises the limit that ended a search."""
    return {"until": "--until 08:00", "hours": "--hours N", "cost": "--cost N"}[
        data["stopped_by_clock"]["limit"]
    ]
