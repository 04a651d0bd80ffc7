"""A run in the terminal while another process works on it: state, bar, scores, the latest candidates."""

from __future__ import annotations

import json
import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import status, style
from evomerge.delivery.course import Course
from evomerge.delivery.run_list import last_change
from evomerge.delivery.summary import Summary
from evomerge.files import open_regular
from evomerge.running.log import JSON_LINES
from evomerge.running.store import ID, StoreReader, facts

LATEST = 6
"""Candidates that are listed."""
TAIL = 500_000
"""Bytes at the end of the log in which the phase is looked for."""
BAR = 30
"""Width of the bar, in characters."""
_STATES = {"running": "bold cyan", "finished": "bold green", "stopped": "bold yellow"}
_LEVELS = {"green": "green", "amber": "yellow", "red": "red"}


def as_data(summary: Summary) -> dict[str, Any]:
    """Return the state of a run as plain data: that of `status`, the phase, and the latest candidates."""
    store = summary.store
    return status.as_data(summary) | {
        "phase": _phase(store.folder),
        "progress": _progress(store, summary),
        "changed": last_change(store.folder),
        "latest": _latest(summary),
    }


def _phase(folder: Path) -> str | None:
    """Return what the run is at, as its log says: "baselines", "generation 12"; None where it does not."""
    try:
        with open_regular(folder / JSON_LINES) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read(TAIL).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if b'"event": "phase"' in line:
            with suppress(ValueError, KeyError, TypeError):  # cut off, or someone wrote into the log
                return str(json.loads(line)["name"])
    return None


def _progress(store: StoreReader, summary: Summary) -> list[Any] | None:
    """Return [used, limit, unit] of the budget's limit that is nearest; None without such limits."""
    limits = facts.CONFIG.require(store)["budget"]
    told = sum(generation.losses is not None for generation in store.generations())
    used = {
        "evaluations": Course(summary).evaluations(),
        "generations": told,
        "hours": store.hours(),
    }
    shares = [[round(count, 2), limits[unit], unit] for unit, count in used.items() if limits.get(unit)]
    return max(shares, key=lambda part: part[0] / part[1], default=None)


def _latest(summary: Summary) -> list[dict[str, Any]]:
    """Return the candidates that were asked for last and are scored or failed, the latest first."""
    store, course = summary.store, Course(summary)
    failed = {recipe: failure.reason for recipe, split, failure in store.failures() if split == "search"}
    found: dict[str, dict[str, Any]] = {}
    for generation in reversed(store.generations()):
        for recipe in reversed(generation.recipes):
            if len(found) == LATEST:
                return list(found.values())
            score = course.score(recipe)
            if recipe not in found and (score is not None or recipe in failed):
                found[recipe] = {
                    "id": recipe[:ID],
                    "generation": generation.number,
                    "mean": None if score is None else score.mean,
                    "blocks": 0 if score is None else score.blocks,
                    "of": course.blocks,
                    "failure": failed.get(recipe),
                }
    return list(found.values())


def text(data: dict[str, Any], now: float | None = None) -> RenderableType:
    """Return the data of `as_data` as a frame for a rich console. now: in epoch seconds."""
    at = time.time() if now is None else now
    head = Text.assemble((data["run"], "bold"), "  ", (data["state"], _STATES[data["state"]]))
    if data["state"] == "running":
        head.append(f", {data['phase'] or 'starting'}")
    head.append(f", last stored {style.age(at - data['changed'])} ago", style="dim")
    parts: list[RenderableType] = [head]
    if data["stopped"]:
        parts.append(Text(data["stopped"]))
    if data["progress"] is not None:
        parts.append(_bar(*data["progress"], finished=data["state"] == "finished"))
    parts.append(_facts(data))
    if data["latest"]:
        parts.append(_table(data["latest"]))
    if data["failures"]:
        parts.append(Text(f"{data['failures']} failures, the latest: {data['last_failure']}", style="red"))
    parts += [Text(note, style="yellow") for note in data["notes"]]
    if data["verdict"]:
        parts.append(Text(data["verdict"], style=_LEVELS[data["level"]]))
    if data["state"] == "stopped":
        parts.append(Text(f"no process works on it; to continue: evomerge resume {shlex.quote(data['run'])}"))
    return Group(*parts)


def _bar(used: float, limit: float, unit: str, *, finished: bool) -> Text:
    done = BAR if finished else int(BAR * min(1.0, used / limit))
    return Text.assemble(
        ("━" * done, "cyan"), ("╌" * (BAR - done), "dim"), f" {used:.4g} of {limit:g} {unit}"
    )


def _facts(data: dict[str, Any]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    if data["best_on_search"] is not None:
        blocks = style.of_blocks(*data["best_on_blocks"])
        grid.add_row("best", Text(f"{style.points(data['best_on_search'])} on search{blocks}", style="bold"))
    if data["best_baseline_on_search"] is not None:
        points = style.points(data["best_baseline_on_search"])
        grid.add_row("best baseline", Text(f"{points} ({data['best_baseline']})"))
    grid.add_row("candidates", f"{data['candidates']} in {data['generations']} generations")
    worked = style.elapsed(3600 * data["hours"])
    outlook = data["outlook"] or ([] if data["cost"] is None else [f"cost {data['cost']:.2f}"])
    grid.add_row("worked", ", ".join([worked, *outlook]))
    return grid


def _table(latest: list[dict[str, Any]]) -> Table:
    table = style.table(
        style.words("latest candidates"),
        style.numbers("generation"),
        style.numbers("points"),
        style.numbers("item blocks", wrap=True),
    )
    for row in latest:
        scored = "failed" if row["failure"] else style.percent(row["mean"])
        table.add_row(row["id"], str(row["generation"]), scored, f"{row['blocks']} of {row['of']}")
    return table
