"""Served pages of candidates: all of a run as a table, and one with recipe, scores and items."""

from __future__ import annotations

from typing import Any

from evomerge.delivery import candidate
from evomerge.delivery.candidates import candidates
from evomerge.delivery.course import Course
from evomerge.delivery.page import Served, render
from evomerge.delivery.style import short_task
from evomerge.delivery.summary import Summary

ITEMS, TEXT = 500, 600
"""Most items that a page lists, and most letters of a prompt, from its end."""


def table(summary: Summary, live: Served) -> str:
    """Return the page of all candidates that the optimizer asked for."""
    listed = candidates(summary, Course(summary))
    scored = next(iter(listed.scored), None)
    tasks = [] if scored is None else [t for t in summary.shown_tasks if t.task in scored.tasks]
    return render(
        "candidates.html.jinja",
        figures={},
        live=live,
        rows=sorted(listed.rows, key=lambda row: (row.mean is None, -(row.mean or 0.0))),
        blocks=listed.blocks,
        tasks=[(task.task, short_task(task.task, summary.suite.name)) for task in tasks],
    )


def page(summary: Summary, pick: str, task: str | None, live: Served) -> str:
    """Return the page of one candidate; task: whose items are listed.

    Raises:
        ConfigError: there is no such candidate or task.
    """
    data = candidate.as_data(summary, pick, items=task)
    items: dict[str, Any] | None = data.get("items")
    return render(
        "candidate.html.jinja",
        figures={},
        live=live,
        data=data,
        folder=str(summary.store.folder),
        tasks=[(t.task, short_task(t.task, summary.suite.name)) for t in summary.suite.tasks],
        items=items,
        rows=[] if items is None else items["rows"][:ITEMS],
        limit=TEXT,
    )
