"""The plots of the report page: convergence, tasks, genome, Pareto front, hypervolume, surrogate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from evomerge.delivery.course import Convergence
from evomerge.delivery.guidance import Guidance, consecutive
from evomerge.delivery.objectives import Front, Point
from evomerge.delivery.style import (
    ACCENT,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PALE,
    RED,
    SAND,
    short_task,
    with_layout,
)
from evomerge.delivery.summary import Row, Summary
from evomerge.evaluation.statistics import Interval
from evomerge.merging.recipe import Recipe
from evomerge.search.surrogate.guide import TRUSTED, WINDOW


def convergence_figure(course: Convergence) -> go.Figure | None:
    """Draw best so far, best and median of each generation on `search`, with the best baseline."""
    if not course.generations:
        return None
    generations = list(course.generations)
    lines: list[tuple[str, Sequence[float | None], dict[str, object]]] = [
        ("median of the generation", course.median, {"color": MUTED, "width": 1.5, "dash": "dot"}),
        ("best of the generation", course.best, {"color": ACCENT, "width": 1.5, "dash": "dot"}),
        ("best so far", course.best_so_far, {"color": ACCENT, "width": 3}),
        (f"best baseline: {course.best_baseline_name}", course.baseline, {"color": ORANGE, "width": 2}),
    ]
    figure = go.Figure()
    for name, scores, line in lines:
        if any(score is not None for score in scores):
            figure.add_scatter(
                x=generations,
                y=[None if score is None else 100 * score for score in scores],
                mode="lines" if len(generations) > 1 else "markers",
                name=name,
                line=line,
                text=[f"{count} of {course.of} item blocks" for count in course.blocks],
                hovertemplate="%{y:.1f} (%{text})<extra>%{fullData.name}</extra>",
            )
    for index, (before, number) in enumerate(itertools.pairwise(generations), start=1):
        blocks_before, blocks = course.blocks[index - 1], course.blocks[index]
        # Generations whose best were re-scored have more blocks for once: only lasting changes are marked.
        if blocks_before < blocks == min(course.blocks[index:]):
            figure.add_vline(
                x=(before + number) / 2,
                line={"color": MUTED, "width": 1, "dash": "dash"},
                annotation_text=f"{blocks} of {course.of} item blocks",
                annotation_position="bottom right",
            )
    _integer_ticks(figure, generations)
    return with_layout(figure, height=380, x="generation", y="mean normalised score on search")


def tasks_figure(summary: Summary, rows: Sequence[Row]) -> go.Figure | None:
    """Draw the raw `test` scores per task of base, best baseline, winner and best parent, with intervals."""
    best = summary.best_baseline(rows)
    winner = next((row for row in rows if row.role == "winner"), None)
    base = next((row for row in rows if row.role == "base"), None)
    if best is None or winner is None or base is None:
        return None
    tasks = [task.task for task in summary.shown_tasks]
    parents = [row for row in rows if row.role == "parent"]
    best_parents = [max((p.tasks[t] for p in parents), key=lambda i: i.estimate) for t in tasks]
    bars: list[tuple[str, list[Interval], str]] = [
        ("base", list(base.tasks.values()), GREY),
        (f"best baseline: {best.name}", list(best.tasks.values()), ORANGE),
        ("winner", list(winner.tasks.values()), ACCENT),
        ("best parent on the task", best_parents, INK),
    ]
    figure = go.Figure()
    for name, intervals, color in bars:
        figure.add_bar(
            x=[short_task(task, summary.suite.name) for task in tasks],
            y=[100 * i.estimate for i in intervals],
            name=name,
            marker_color=color,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (i.high - i.estimate) for i in intervals],
                "arrayminus": [100 * (i.estimate - i.low) for i in intervals],
                "thickness": 1,
                "width": 3,
                "color": MUTED,
            },
        )
    figure.update_layout(barmode="group", bargap=0.25)
    return with_layout(figure, height=380, y="score on test, %")


def genome_figure(recipe: Recipe) -> go.Figure | None:
    """Draw a recipe's parameters as a heat map: tensor groups by source; None without any."""
    names, groups, values = parameter_table(recipe)
    if not names or not values:
        return None
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=groups,
            colorscale=[[0, RED], [0.5, "#ffffff"], [1, ACCENT]],
            zmid=0,
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}<br>%{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    return with_layout(figure, height=max(180, 30 * len(groups) + 120))


def parameter_table(recipe: Recipe) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return the parameters that differ between a recipe's tensor groups, or all if none does, as a table.

    Returns:
        Column names (a parameter, or a parameter and its source), labels of the tensor groups, and the
        values, one list per group; None where a group lacks the parameter.
    """
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
    varying = [c for c in columns if len({row.get(c) for row in table}) > 1]
    shown = varying or list(columns)
    labels = [_group_label(recipe, index) for index in range(len(recipe.groups))]
    return shown, labels, [[row.get(c) for c in shown] for row in table]


def _group_label(recipe: Recipe, index: int) -> str:
    """Return a short label of a group: its first filter, `... rest` where an earlier group has some of it."""
    group = recipe.groups[index]
    label = group.label().split("|")[0]
    earlier = any(g.layers == group.layers and g.match for g in recipe.groups[:index])
    return f"{label} rest" if not group.match and earlier else label


def front_figure(front: Front) -> go.Figure | None:
    """Draw the front on `select`: two objectives as a scatter plot, more as all pairs."""
    if not front.searched:
        return None
    labels = front.axes
    figure = go.Figure()
    if len(labels) > 2:
        for name, points, marker in _point_groups(front):
            columns = [[100 * p.values[i] for p in points] for i in range(len(labels))]
            figure.add_splom(
                dimensions=[{"label": label, "values": v} for label, v in zip(labels, columns, strict=True)],
                name=name,
                text=[p.name for p in points],
                marker=marker,
                diagonal_visible=False,
                showupperhalf=False,
            )
        return with_layout(figure, height=260 + 130 * len(labels))
    line = sorted(p.values for p in front.searched if p.on_front)
    figure.add_scatter(
        x=[100 * x for x, _ in line],
        y=[100 * y for _, y in line],
        mode="lines",
        line={"color": ACCENT, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, points, marker in _point_groups(front):
        figure.add_scatter(
            x=[100 * p.values[0] for p in points],
            y=[100 * p.values[1] for p in points],
            mode="markers+text" if name in ("base", "parents") else "markers",
            name=name,
            text=[p.name for p in points],
            textposition="top center",
            textfont={"color": MUTED, "size": 11},
            hovertemplate="%{text}<br>(%{x:.1f}, %{y:.1f})<extra></extra>",
            marker=marker,
        )
    return with_layout(figure, height=480, x=labels[0], y=labels[1])


def _point_groups(front: Front) -> list[tuple[str, list[Point], Mapping[str, object]]]:
    """Return what the front's plot shows: legend entry, points, marker."""
    candidates = [p for p in front.searched if p.role == "candidate"]
    by_role = {role: [p for p in front.points if p.role == role] for role in ("base", "parent", "baseline")}
    groups: list[tuple[str, list[Point], Mapping[str, object]]] = [
        ("base", by_role["base"], {"symbol": "x", "color": INK, "size": 9}),
        ("parents", by_role["parent"], {"symbol": "diamond", "color": INK, "size": 9}),
        ("baselines", by_role["baseline"], {"color": ORANGE, "size": 8}),
        ("dominated on select", [p for p in candidates if not p.on_front], {"color": PALE, "size": 8}),
        ("front", [p for p in candidates if p.on_front], {"color": ACCENT, "size": 10}),
        (
            "winner (knee)",
            [p for p in front.searched if p.role == "winner"],
            {"symbol": "star", "color": ACCENT, "size": 17, "line": {"color": INK, "width": 1}},
        ),
    ]
    return [(name, points, marker) for name, points, marker in groups if points]


def hypervolume_figure(front: Front) -> go.Figure | None:
    """Draw the hypervolume of the front on `search` after each generation."""
    if len(front.generations) < 2:
        return None
    generations = [generation.generation for generation in front.generations]
    figure = go.Figure()
    figure.add_scatter(
        x=generations,
        y=[generation.hypervolume for generation in front.generations],
        mode="lines",
        line={"color": ACCENT, "width": 3},
        name="hypervolume",
    )
    _integer_ticks(figure, generations)
    figure.update_yaxes(rangemode="tozero")
    return with_layout(figure, height=320, x="generation", y="hypervolume on search")


def surrogate_figure(guidance: Guidance) -> go.Figure | None:
    """Draw the surrogate's rank correlation after each generation; generations that ignored it are shaded."""
    points = [(g, c) for g, c in enumerate(guidance.correlations) if c is not None]
    if len(points) < 2:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[generation for generation, _ in points],
        y=[correlation for _, correlation in points],
        mode="lines+markers",
        line={"color": ACCENT, "width": 2},
        name=f"rank correlation (last {WINDOW} candidates)",
    )
    for first, last in consecutive(guidance.off):
        figure.add_vrect(
            x0=first - 0.5, x1=last + 0.5, fillcolor=SAND, opacity=0.6, line_width=0, layer="below"
        )
    figure.add_hline(
        y=TRUSTED,
        line={"color": ORANGE, "width": 1.5, "dash": "dot"},
        annotation_text=f"ignored below {TRUSTED:g}",
        annotation_position="top right",
    )
    lowest = min(-0.1, *(correlation - 0.1 for _, correlation in points))
    figure.update_layout(yaxis_range=[lowest, 1.05])
    _integer_ticks(figure, [generation for generation, _ in points])
    return with_layout(figure, height=260, x="generation", y="rank correlation")


def _integer_ticks(figure: go.Figure, generations: Sequence[int]) -> None:
    """Label only whole generations: plotly marks halves where there are few."""
    if generations[-1] - generations[0] < 15:
        figure.update_xaxes(dtick=1)
