"""The report: tables for the terminal and one self-contained HTML page that needs no network."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import front_plots, objectives
from evomerge.delivery.guidance import guidance
from evomerge.delivery.notes import notes
from evomerge.delivery.objectives import Front
from evomerge.delivery.summary import Claim, Luck, Progress, Row, Share, Summary, Verdict
from evomerge.evaluation.statistics import Interval
from evomerge.files import drafted_file
from evomerge.merging.recipe import Recipe
from evomerge.running import forward
from evomerge.running.store import facts

_INK, _ACCENT, _MUTED, _GRID = "#1d2433", "#2f6fed", "#8a94a6", "#e6e9ef"


def terminal(summary: Summary, *, width: int = 120) -> RenderableType:
    """Return the comparison table, the verdict and where the time went, for a rich console.

    width: of the console in characters; a narrow one shows intervals for the mean only.
    """
    store = summary.store
    rows = summary.rows()
    parts: list[RenderableType] = []
    if rows:
        parts.append(_table(summary, rows, width))
    front = objectives.front(summary)
    if front is not None and front.generations:
        parts += [_front(front)] if front.searched else []
        parts.append(Text(front.sentence))
    verdict = summary.verdict(rows)
    if verdict is not None:
        parts.append(Text(verdict.sentence, style="bold green" if verdict.helped else "bold yellow"))
        parts.append(Text(summary.weakest(rows) or ""))
        parts += [Text(line) for line in (kept_line(summary.shares(rows)), luck_line(summary.luck())) if line]
        if not verdict.helped:
            folder = shlex.quote(str(store.folder))
            parts.append(Text(f"the best baseline: evomerge export {folder} OUT --pick best-baseline"))
    else:
        parts.append(Text("no verdict yet: the run has not been tested", style="yellow"))
    parts += [Text(f"note: {note}", style="yellow") for note in notes(summary)]
    guided = guidance(store)
    if guided is not None:
        parts.append(Text(guided.sentence, style="dim"))
    if stopped := facts.STOPPED.get(store):
        parts.append(Text(f"the search ended: {stopped}", style="dim"))
    cost = summary.cost()
    if cost.candidates:
        parts.append(
            Text(
                f"per candidate: {cost.forward:.0f} ms forward passes, {cost.merge:.1f} ms merging, "
                f"{cost.scoring:.1f} ms scoring, {cost.search:.1f} ms search and store; "
                f"all but the forward passes {100 * cost.overhead:.0f} %  ({cost.candidates} candidates)",
                style="dim",
            )
        )
    if (passes := forward.stored(store)) is not None:
        parts.append(Text(passes.sentence, style="dim"))
    failures = store.failures()
    if failures:
        parts.append(Text(f"{len(failures)} failures, the last: {failures[-1][2].reason}", style="red"))
    return Group(*parts)


def _table(summary: Summary, rows: Sequence[Row], width: int) -> Table:
    table = Table(
        title="scores on `test`, % with 95 % intervals; mean: 0 = base, 100 = specialists",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    counted = [task for task in summary.shown_tasks if task.counted]
    narrow = width < 60 + 9 * len(counted)
    table.add_column("model", overflow="fold")
    for task in counted:
        table.add_column(_short(task.task, summary), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("retention", justify="right", no_wrap=True)
    best = summary.best_unsearched(rows)
    for row in rows:
        style = (
            "bold" if row.role == "winner" else "dim" if row.role == "baseline" and row is not best else ""
        )
        mark = " *" if row is best else ""
        retention = "-" if row.retention is None else f"{100 * row.retention:.1f}"
        found = [row.tasks[task.task] for task in counted]
        cells = [f"{100 * i.estimate:.0f}" if narrow else _plus_minus(i, digits=0) for i in found]
        label = f"winner ({row.name})" if row.role == "winner" else row.name + mark
        table.add_row(
            label,
            *cells,
            _plus_minus(row.mean, digits=1),
            retention,
            style=style,
            end_section=_ends(row, rows),
        )
    if best is not None:
        table.caption = "* the best baseline: the highest mean on `test` of all that were not searched"
        table.caption_justify = "left"
    return table


def _front(front: Front) -> Table:
    table = Table(
        title="the front on `select`",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="* the winner: the knee; - dominated there. Others: evomerge export --pick best:TASK, RECIPE",
        caption_justify="left",
    )
    table.add_column("candidate", overflow="fold")
    table.add_column("recipe", no_wrap=True)
    for name in front.objectives:
        table.add_column(objectives.axis(name), justify="right", overflow="fold")
    for point in front.searched:
        mark = " *" if point.role == "winner" else "" if point.on_front else " -"
        values = [percent(value) for value in point.values]
        style = "bold" if point.role == "winner" else "" if point.on_front else "dim"
        table.add_row(point.name + mark, point.recipe[:8], *values, style=style)
    return table


def _ends(row: Row, rows: Sequence[Row]) -> bool:
    after = rows[rows.index(row) + 1 :]
    return bool(after) and after[0].role != row.role and row.role != "base"


def _plus_minus(interval: Interval, *, digits: int) -> str:
    middle = round(100 * interval.estimate, digits) + 0.0  # never "-0.0"
    return f"{middle:.{digits}f} ±{50 * (interval.high - interval.low):.{digits}f}"


def kept_line(shares: Sequence[Share]) -> str | None:
    """Say in one line how much of the specialists' scores the winner keeps, and what costs nothing keeps."""
    found = []
    for name in ("winner", "baseline", "uniform"):
        values = [value for share in shares if (value := getattr(share, name)) is not None]
        if values:
            label = {"baseline": "best baseline", "uniform": "uniform average"}.get(name, name)
            found.append(f"{label} {100 * sum(values) / len(values):.0f} %")
    return f"of its specialist's score a task keeps, on average: {', '.join(found)}" if found else None


def luck_line(luck: Luck | None) -> str | None:
    """Return in one line what luck the best of the candidates may have had, and what became of the winner."""
    if luck is None:
        return None
    seen = [("search", luck.search), ("select", luck.select), ("test", luck.test)]
    part = blocks_text(luck.blocks, luck.of)
    course = ", ".join(
        f"{100 * value:.1f} on {split}{part if split == 'search' else ''}"
        for split, value in seen
        if value is not None
    )
    return (
        f"luck: the best of {luck.candidates} candidates is expected to look {100 * luck.expected:.1f} "
        f"points better than it is; the winner has {course}"
    )


def blocks_text(blocks: int, of: int) -> str:
    """Return on how many item blocks something was scored, nothing where it was all.

    >>> blocks_text(2, 8), blocks_text(8, 8)
    (' (2 of 8 item blocks)', '')
    """
    return "" if blocks == of else f" ({blocks} of {of} item blocks)"


def percent(share: float | None) -> str:
    """Return a share as a percentage for tables, without a sign on zero.

    >>> percent(0.1234), percent(-1e-9), percent(None)
    ('12.3', '0.0', '-')
    """
    return "-" if share is None else f"{round(100 * share, 1) + 0.0:.1f}"


def _short(task: str, summary: Summary) -> str:
    return task.removeprefix(f"{summary.suite.name}_")


def as_data(summary: Summary) -> dict[str, Any]:
    """Return the report as plain data for scripts (`report --json`)."""
    store = summary.store
    rows = summary.rows()
    verdict, cost, luck = summary.verdict(rows), summary.cost(), summary.luck()
    front, guided = objectives.front(summary), guidance(store)
    return {
        "run": str(store.folder),
        "digest": store.digest(),
        "stopped": facts.STOPPED.get(store),
        "verdict": None if verdict is None else _verdict_data(verdict),
        "claims": [
            {
                "task": claim.task,
                "against": claim.role,
                "rival": claim.rival,
                "points": 100 * claim.test.estimate,
                "low": 100 * claim.test.low,
                "high": 100 * claim.test.high,
                "p": claim.test.p,
                "p_holm": claim.adjusted,
            }
            for claim in summary.claims(rows)
        ],
        "kept": [asdict(share) for share in summary.shares(rows)],
        "luck": None if luck is None else asdict(luck),
        "rows": [
            {
                "role": row.role,
                "name": row.name,
                "recipe": row.recipe,
                "tasks": {t: [i.estimate, i.low, i.high] for t, i in row.tasks.items()},
                "normalised": row.normalised,
                "mean": [row.mean.estimate, row.mean.low, row.mean.high],
                "retention": row.retention,
            }
            for row in rows
        ],
        "milliseconds_per_candidate": {
            "forward": cost.forward,
            "merge": cost.merge,
            "scoring": cost.scoring,
            "search": cost.search,
            "overhead": cost.overhead,
        },
        "notes": notes(summary),
        "forward": facts.FORWARD.get(store),
        "surrogate": None if guided is None else guided.as_data(),
        "front": None if front is None else front.as_data(),
        "constraints": objectives.constraints(summary),
        "failures": [
            {"recipe": r, "split": s, "kind": f.kind, "reason": f.reason} for r, s, f in store.failures()
        ],
    }


def _verdict_data(verdict: Verdict) -> dict[str, Any]:
    return {
        "sentence": verdict.sentence,
        "helped": verdict.helped,
        "best_baseline": verdict.rival,
        "points": 100 * verdict.test.estimate,
        "low": 100 * verdict.test.low,
        "high": 100 * verdict.test.high,
        "p": verdict.test.p,
    }


def write_html(summary: Summary, out: Path) -> Path:
    """Write the report as one HTML file with everything inside, plots included, and return its path."""
    store = summary.store
    rows = summary.rows()
    template = files("evomerge.delivery").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": percent}
    front, guided, progress = objectives.front(summary), guidance(store), summary.progress()
    figures = {
        "progress": _progress(progress),
        "surrogate": None if guided is None else _dressed(guided.figure()),
        "tasks": _tasks(summary, rows),
        "genome": _genome(summary.winner),
    }
    if front is not None:
        figures["front"] = _dressed(front_plots.front_figure(front))
        figures["hypervolume"] = _dressed(front_plots.hypervolume_figure(front))
    page = environment.from_string(template).render(
        summary=summary,
        rows=rows,
        best=summary.best_unsearched(rows),
        verdict=summary.verdict(rows),
        weakest=summary.weakest(rows),
        claims=_claim_table(summary, summary.claims(rows)),
        shares=summary.shares(rows),
        luck=summary.luck(),
        notes=notes(summary),
        cost=summary.cost(),
        finalists=summary.finalists(),
        progress=progress,
        evaluations=summary.evaluations(),
        surrogate=guided,
        blocks_text=blocks_text,
        front=front,
        axes=[objectives.axis(name) for name in front.objectives] if front else [],
        failures=store.failures(),
        tasks=[(t.task, _short(t.task, summary)) for t in summary.shown_tasks],
        config=json.dumps(facts.CONFIG.require(store), indent=2),
        versions=store.versions(),
        passes=forward.stored(store),
        stopped=facts.STOPPED.get(store),
        folder=store.folder,
        winner_yaml=summary.winner.recipe.to_yaml() if summary.winner else None,
        plotly_js=plotly.offline.get_plotlyjs(),
        figures={name: json.loads(f.to_json()) for name, f in figures.items() if f is not None},
    )
    with drafted_file(out) as draft:
        draft.write_text(page, encoding="utf-8")
    return out


def _claim_table(summary: Summary, claims: Sequence[Claim]) -> list[tuple[str, list[Claim]]]:
    """Group claims by what they are about: the mean first, then task by task."""
    found: dict[str | None, list[Claim]] = {}
    for claim in claims:
        found.setdefault(claim.task, []).append(claim)
    return [("mean" if t is None else _short(t, summary), rows) for t, rows in found.items()]


def _progress(progress: Progress) -> go.Figure | None:
    """Best-so-far, best and median of each generation on `search`, beside the best baseline there."""
    if not progress.generations:
        return None
    x = list(progress.generations)
    figure = go.Figure()
    baseline = [None if value is None else 100 * value for value in progress.baseline]
    lines: list[tuple[str, list[float | None], dict[str, object]]] = [
        (
            "median of the generation",
            [100 * v for v in progress.median],
            {"color": _MUTED, "width": 1.5, "dash": "dot"},
        ),
        (
            "best of the generation",
            [100 * v for v in progress.best],
            {"color": _ACCENT, "width": 1.5, "dash": "dot"},
        ),
        ("best so far", [100 * v for v in progress.best_so_far], {"color": _ACCENT, "width": 3}),
        (f"best baseline: {progress.best_baseline_name}", baseline, {"color": "#d9822b", "width": 2}),
    ]
    hover = [f"{n} of {progress.of} item blocks" for n in progress.blocks]
    for name, values, line in lines:
        if any(value is not None for value in values):
            figure.add_scatter(
                x=x,
                y=values,
                mode="lines" if len(x) > 1 else "markers",
                name=name,
                line=line,
                text=hover,
                hovertemplate="%{y:.1f} (%{text})<extra>%{fullData.name}</extra>",
            )
    for place, (before, number) in enumerate(itertools.pairwise(x), start=1):
        there, here = progress.blocks[place - 1], progress.blocks[place]
        # A generation whose best were scored again stands out; the mark is where it stays.
        if there < here == min(progress.blocks[place:]):
            figure.add_vline(
                x=(before + number) / 2,
                line={"color": _MUTED, "width": 1, "dash": "dash"},
                annotation_text=f"{here} of {progress.of} item blocks",
                annotation_position="bottom right",
            )
    return _styled(figure, x="generation", y="mean normalised score on search")


def _tasks(summary: Summary, rows: Sequence[Row]) -> go.Figure | None:
    """Per task: base, specialist, best baseline and winner, raw, with intervals."""
    best = summary.best_unsearched(rows)
    winner = next((row for row in rows if row.role == "winner"), None)
    base = next((row for row in rows if row.role == "base"), None)
    if best is None or winner is None or base is None:
        return None
    names = [_short(t.task, summary) for t in summary.shown_tasks]
    parents = [row for row in rows if row.role == "parent"]
    tops = [max((p.tasks[t.task] for p in parents), key=lambda i: i.estimate) for t in summary.shown_tasks]
    figure = go.Figure()
    for label, intervals, color in (
        ("base", list(base.tasks.values()), "#c6ccd8"),
        (f"best baseline: {best.name}", list(best.tasks.values()), "#d9822b"),
        ("winner", list(winner.tasks.values()), _ACCENT),
        ("best parent on the task", tops, _INK),
    ):
        figure.add_bar(
            x=names,
            y=[100 * i.estimate for i in intervals],
            name=label,
            marker_color=color,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (i.high - i.estimate) for i in intervals],
                "arrayminus": [100 * (i.estimate - i.low) for i in intervals],
                "thickness": 1,
                "width": 3,
                "color": _MUTED,
            },
        )
    figure.update_layout(barmode="group", bargap=0.25)
    return _styled(figure, x="", y="score on test, %")


def _genome(winner: Any) -> go.Figure | None:
    """The winner's parameters as a heat map: tensor groups by source, for each per-source parameter."""
    if winner is None:
        return None
    names, rows, values = heat_map(winner.recipe)
    if not values:
        return None
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=rows,
            colorscale=[[0, "#c0392b"], [0.5, "#ffffff"], [1, _ACCENT]],
            zmid=0,
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}<br>%{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    styled = _styled(figure, x="", y="")
    styled.update_layout(height=max(260, 30 * len(rows) + 120))
    return styled


def heat_map(recipe: Recipe) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return column names (parameter and source), group labels, and the values, groups by columns."""
    columns: dict[str, None] = {}
    table: list[dict[str, float]] = []
    for group in recipe.groups:
        cells: dict[str, float] = {}
        for name, value in group.parameters.items():
            if isinstance(value, tuple):
                cells |= {
                    f"{source} {name}" if name != "weight" else source: float(v)
                    for source, v in zip(group.sources, value, strict=True)
                }
            elif not isinstance(value, bool):
                cells[name] = float(value)
        columns |= dict.fromkeys(cells)
        table.append(cells)
    varying = [c for c in columns if len(table) == 1 or len({row.get(c) for row in table}) > 1]
    labels = [_group_name(recipe, index) for index in range(len(recipe.groups))]
    return varying, labels, [[row.get(c) for c in varying] for row in table]


def _group_name(recipe: Recipe, index: int) -> str:
    """A group's label, short: its first filter, or `rest` where an earlier group took some names."""
    group = recipe.groups[index]
    place = group.label().split("|")[0]
    earlier = any(g.layers == group.layers and g.match for g in recipe.groups[:index])
    return f"{place} rest" if not group.match and earlier else place


def _dressed(figure: go.Figure | None) -> go.Figure | None:
    """The page's style, with the figure's own titles and height."""
    if figure is None:
        return None
    own = figure.layout
    height, x, y = own.height, own.xaxis.title.text, own.yaxis.title.text
    return _styled(figure, x=x, y=y).update_layout(height=height)


def _styled(figure: go.Figure, *, x: str | None, y: str | None) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": _INK, "size": 13},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.12},
        xaxis_title=x,
        yaxis_title=y,
        height=380,
    )
    figure.update_xaxes(gridcolor=_GRID)
    figure.update_yaxes(gridcolor=_GRID)
    return figure
