"""The report of a run: tables for the terminal, and plain data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import objectives, style
from evomerge.delivery.course import Course
from evomerge.delivery.guidance import guidance
from evomerge.delivery.notes import notes, stop_sentence
from evomerge.delivery.objectives import Front
from evomerge.delivery.spending import spending
from evomerge.delivery.style import percent, plus_minus, short_task
from evomerge.delivery.summary import Row, Summary, kept_sentence
from evomerge.delivery.verdict import STYLES
from evomerge.running import forward
from evomerge.running.store import facts


def terminal(summary: Summary, *, width: int = 120) -> RenderableType:
    """Return the comparison table, the verdict, notes and times, for a rich console.

    Args:
        summary: of a finished or unfinished run.
        width: of the console, in characters; a narrow one shows the interval of the mean only.
    """
    store, course = summary.store, Course(summary)
    rows, failures = summary.rows(), store.failures()
    surrogate, cost, passes = guidance(store), course.cost(), forward.stored(store)
    parts: list[RenderableType] = [_comparison(summary, rows, width)] if rows else []
    front = objectives.front(summary)
    if front is not None and front.generations:
        parts += [_front(front)] if front.searched else []
        parts.append(Text(front.sentence))
    parts += _verdict(summary, course, rows)
    parts += [Text(f"note: {note}", style="yellow") for note in notes(summary)]
    details = [surrogate.sentence] if surrogate is not None else []
    if stopped := stop_sentence(store):
        details.append(f"search stopped: {stopped}")
    details += [cost.sentence] if cost.candidates else []
    details += [passes.sentence] if passes is not None else []
    parts += [Text(line, style="dim") for line in details]
    if failures:
        parts.append(Text(f"{len(failures)} failures, the latest: {failures[-1][2].reason}", style="red"))
    return Group(*parts)


def _verdict(summary: Summary, course: Course, rows: Sequence[Row]) -> list[RenderableType]:
    verdict = summary.verdict(rows)
    if verdict is None:
        return [Text("no verdict yet: the run has not scored `test`", style="yellow")]
    optimism = course.optimism()
    lines = [
        *verdict.losses,
        summary.weakest(rows),
        kept_sentence(summary.shares(rows)),
        optimism.sentence if optimism else None,
    ]
    if not verdict.helped:
        folder = shlex.quote(str(summary.store.folder))
        lines.append(f"to export the best baseline: evomerge export {folder} OUT --pick best-baseline")
    headline = Text(verdict.sentence, style=STYLES[verdict.level])
    return [headline, *(Text(line) for line in lines if line)]


def _comparison(summary: Summary, rows: Sequence[Row], width: int) -> Table:
    counted = [task.task for task in summary.shown_tasks if task.counted]
    narrow = width < 60 + 9 * len(counted)
    best = summary.best_baseline(rows)
    generates = any(row.tokens is not None for row in rows)
    table = style.table(
        style.words("model"),
        *(style.numbers(short_task(task, summary.suite.name)) for task in counted),
        style.numbers("mean"),
        style.numbers("retention"),
        *([style.numbers("tokens")] if generates else []),
        title="scores on `test`, % with 95 % intervals; mean: 0 = base, 100 = specialists"
        + (f"; tokens: {objectives.lengths(summary)}" if generates else ""),
        caption=None
        if best is None
        else "* best baseline: the highest mean on `test` among base, parents and baselines",
    )
    for index, row in enumerate(rows):
        quiet = row.role == "baseline" and row is not best
        intervals = [row.tasks[task] for task in counted]
        after = rows[index + 1].role if index + 1 < len(rows) else row.role
        table.add_row(
            f"winner ({row.name})" if row.role == "winner" else row.name + (" *" if row is best else ""),
            *(percent(i.estimate, 0) if narrow else plus_minus(i, 0) for i in intervals),
            plus_minus(row.mean),
            percent(row.retention),
            *([percent(row.tokens)] if generates else []),
            style="bold" if row.role == "winner" else "dim" if quiet else "",
            end_section=row.role not in (after, "base"),
        )
    return table


def _front(front: Front) -> Table:
    table = style.table(
        style.words("candidate"),
        style.words("recipe"),
        *(style.numbers(axis, wrap=True) for axis in front.axes),
        title="Pareto front on `select`",
        caption="* winner (knee); - dominated on `select`. To export another: evomerge export --pick RECIPE",
    )
    for point in front.searched:
        mark = " *" if point.role == "winner" else "" if point.on_front else " -"
        table.add_row(
            point.name + mark,
            point.recipe[:8],
            *(percent(value) for value in point.values),
            style="bold" if point.role == "winner" else "" if point.on_front else "dim",
        )
    return table


def as_data(summary: Summary) -> dict[str, Any]:
    """Return the report as plain data (`report --json`).

    Args:
        summary: of a finished or unfinished run.

    Returns:
        Values that JSON can hold. Normalised scores run from 0 (base) to 1 (specialist), raw scores are in
        the metric's unit, keys that name points are hundredths; what does not exist is None.
    """
    store, course = summary.store, Course(summary)
    rows = summary.rows()
    verdict, optimism = summary.verdict(rows), course.optimism()
    front, surrogate = objectives.front(summary), guidance(store)
    return {
        "run": str(store.folder),
        "suite": summary.suite.name,
        "digest": store.digest(),
        "stopped": facts.STOPPED.get(store),
        "verdict": None if verdict is None else verdict.as_data(),
        "claims": [claim.as_data() for claim in summary.claims(rows)],
        "kept": [share.as_data() for share in summary.shares(rows)],
        "optimism": None if optimism is None else optimism.as_data(),
        "rows": [row.as_data() for row in rows],
        "milliseconds_per_candidate": course.cost().as_data(),
        "spending": spending(summary).as_data(),
        "notes": notes(summary),
        "forward": facts.FORWARD.get(store),
        "surrogate": None if surrogate is None else surrogate.as_data(),
        "front": None if front is None else front.as_data(),
        "constraints": objectives.constraints(summary),
        "failures": [
            {"recipe": recipe, "split": split, "kind": failure.kind, "reason": failure.reason}
            for recipe, split, failure in store.failures()
        ],
    }
