"""The charts of the report: what a search did, and what its winner is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from evomerge.delivery.candidates import CandidateRow, Candidates, most_important
from evomerge.delivery.charts.chart import SERIES, Chart
from evomerge.delivery.charts.plots import (
    Axis,
    GuideLine,
    Line,
    Plane,
    Points,
    Strand,
    Style,
    Symbol,
    Whisker,
    heat_map,
    interval_chart,
    parallel_coordinates,
    signed_tone,
    stacked_rows,
)
from evomerge.delivery.course import Convergence
from evomerge.delivery.guidance import Guidance, consecutive
from evomerge.delivery.objectives import Front, Point
from evomerge.delivery.spending import Spending
from evomerge.delivery.style import short_task
from evomerge.delivery.summary import Row, Summary
from evomerge.evaluation.statistics import Interval
from evomerge.merging.recipe import Recipe
from evomerge.search.surrogate.guide import TRUSTED, WINDOW

STRANDS, AXES, BARS = 150, 12, 15
"""Most candidates and genes in parallel coordinates, most genes among the importances."""
RIGHT = 0.999
"""Metric of an item from which on it counts as answered right."""


def convergence_figure(course: Convergence) -> Chart | None:
    """Draw best so far, best and median of each generation on `search`, with the best baseline."""
    if not course.generations:
        return None
    generations = list(course.generations)

    def line(
        name: str, scores: Sequence[float | None], colour: str, width: float, style: Style = "solid"
    ) -> Line:
        ys = [None if score is None else 100 * score for score in scores]
        return Line(name=name, xs=generations, ys=ys, colour=colour, width=width, style=style)

    lines = [
        line("median of the generation", course.median, "muted", 1.5, "dotted"),
        line("best of the generation", course.best, "accent", 1.5, "dotted"),
        line("best so far", course.best_so_far, "accent", 3),
        line(f"best baseline: {course.best_baseline_name}", course.baseline, "orange", 2),
    ]
    rules = []
    for index, (before, generation) in enumerate(itertools.pairwise(generations), start=1):
        blocks_before, blocks = course.blocks[index - 1], course.blocks[index]
        # Generations whose best were re-scored have more blocks for once: only lasting changes are marked.
        if blocks_before < blocks == min(course.blocks[index:]):
            label = f"{blocks} of {course.of} item blocks"
            rules.append(GuideLine(at=(before + generation) / 2, label=label, axis="x"))
    return Plane(
        title="best and median score of each generation on the search items",
        x="generation",
        y="mean score on search, points",
        lines=[line for line in lines if any(y is not None for y in line.ys)],
        rules=rules,
    ).chart()


def tasks_figure(summary: Summary, rows: Sequence[Row]) -> Chart | None:
    """Draw the raw `test` scores per task of base, best baseline, winner and best parent, with intervals."""
    best = summary.best_baseline(rows)
    winner = next((row for row in rows if row.role == "winner"), None)
    base = next((row for row in rows if row.role == "base"), None)
    if best is None or winner is None or base is None:
        return None
    tasks = [task.task for task in summary.shown_tasks]
    parents = [row for row in rows if row.role == "parent"]
    best_parents = [max((p.tasks[t] for p in parents), key=lambda i: i.estimate) for t in tasks]
    series: list[tuple[str, str, Sequence[Whisker]]] = [
        ("base", "grey", _percents(base.tasks.values())),
        (f"best baseline: {best.name}", "orange", _percents(best.tasks.values())),
        ("winner", "accent", _percents(winner.tasks.values())),
        ("best parent on the task", "ink", _percents(best_parents)),
    ]
    return interval_chart(
        "scores of base, best baseline, winner and parents by task on test, with 95 % intervals",
        [short_task(task, summary.suite.name) for task in tasks],
        series,
        x="score on test, %",
    )


def _percents(intervals: Iterable[Interval]) -> list[Whisker]:
    return [Whisker(value=100 * i.estimate, low=100 * i.low, high=100 * i.high) for i in intervals]


def outcomes_figure(summary: Summary, rival: Row | None) -> Chart | None:
    """Draw per task on how many `test` items the winner, the best baseline, both or none are right."""
    if summary.winner is None or rival is None:
        return None
    mine = summary.scores(summary.winner.recipe.hash, "test")
    theirs = summary.scores(rival.recipe, "test")
    if mine is None or theirs is None:
        return None
    names: list[str] = []
    counts: list[tuple[float, float, float, float]] = []
    for task in summary.shown_tasks:
        ours, others = (scores[task.task].metric >= RIGHT for scores in (mine, theirs))
        names.append(short_task(task.task, summary.suite.name))
        counts.append(
            (
                float(np.sum(ours & ~others)),
                float(np.sum(ours & others)),
                float(np.sum(~ours & ~others)),
                float(np.sum(~ours & others)),
            )
        )
    labels = ("only the winner right", "both", "neither", f"only {rival.name}")
    colours = ("accent", "pale", "grid", "orange")
    return stacked_rows(
        f"test items that the winner and {rival.name} answer right, by task",
        names,
        [(label, colours[n], [row[n] for row in counts]) for n, label in enumerate(labels)],
        x="test items",
        text=lambda value: f"{value:.0f}",
    )


def genome_figure(recipe: Recipe) -> Chart | None:
    """Draw a recipe's parameters as a heat map: tensor groups by source; None without any."""
    names, groups, values = parameter_table(recipe)
    if not names or not values:
        return None
    reach = max((abs(v) for row in values for v in row if v is not None), default=1.0)
    return heat_map(
        "the winner's parameters by tensor group",
        names,
        groups,
        values,
        tone=signed_tone(reach),
        text=lambda value: f"{value:.2f}",
        corner="tensor group",
    )


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
    labels = [group_label(recipe, index) for index in range(len(recipe.groups))]
    return shown, labels, [[row.get(c) for c in shown] for row in table]


def group_label(recipe: Recipe, index: int) -> str:
    """Return a short label of a group: its first filter, `... rest` where an earlier group has some of it."""
    group = recipe.groups[index]
    label = group.label().split("|")[0]
    earlier = any(g.layers == group.layers and g.match for g in recipe.groups[:index])
    return f"{label} rest" if not group.match and earlier else label


def candidates_figure(
    table: Candidates, keys: Mapping[str, int], course: Convergence, winner: tuple[str, float] | None
) -> Chart | None:
    """Draw the score of every candidate against its generation, with the best baseline's.

    keys: recipe -> number of the page's details. winner: name and score of a winner that no generation asked
    for, which is drawn behind the last one.
    """
    rows = table.scored
    if not rows:
        return None
    of = table.blocks
    groups = [
        ("scored on some item blocks", "pale", 2.5, [r for r in rows if r.blocks < of and not _ended(r)]),
        ("scored on all", "accent", 3, [r for r in rows if r.blocks >= of and not _ended(r)]),
        ("finalist", "violet", 5, [r for r in rows if _ended(r) and "winner" not in r.names]),
        ("winner", "accent", 7, [r for r in rows if "winner" in r.names]),
    ]
    baseline, name = course.best_baseline, course.best_baseline_name
    others = []
    if winner is not None:
        last = max(row.generation for row in rows) + 1
        label = f"winner: {winner[0]}"
        place = {"xs": [last], "ys": [100 * winner[1]], "labels": [label]}
        others.append(Points(name=label, colour="accent", radius=7, symbol="star", **place))  # type: ignore[arg-type]
    return Plane(
        title="score of every candidate against its generation",
        x="generation",
        y="mean score on search, points",
        points=[
            Points(
                name=label,
                xs=[row.generation for row in members],
                ys=[100 * row.mean for row in members if row.mean is not None],
                colour=colour,
                radius=radius,
                symbol="star" if label == "winner" else "circle",
                labels=[row.recipe[:8] for row in members],
                keys=[keys[row.recipe] for row in members],
            )
            for label, colour, radius, members in groups
            if members
        ]
        + others,
        rules=[]
        if baseline is None
        else [GuideLine(at=100 * baseline, label=f"best baseline: {name}", axis="y", colour="orange")],
    ).chart()


def _ended(row: CandidateRow) -> bool:
    return bool(row.names)


def task_curves_figure(table: Candidates, summary: Summary) -> Chart | None:
    """Draw the scores by task of the best candidate so far, generation by generation."""
    best: CandidateRow | None = None
    by_generation: dict[int, CandidateRow] = {}
    for row in table.scored:
        if best is None or (row.mean or 0.0) > (best.mean or 0.0):
            best = row
        by_generation[row.generation] = best
    if len(by_generation) < 2:
        return None
    generations = list(by_generation)
    tasks = [
        task.task for task in summary.shown_tasks if task.task in next(iter(by_generation.values())).tasks
    ]
    return Plane(
        title="scores by task of the best candidate so far",
        x="generation",
        y="score on search, points",
        lines=[
            Line(
                name=short_task(task, summary.suite.name),
                xs=generations,
                ys=[100 * by_generation[generation].tasks[task] for generation in generations],
                colour=SERIES[number % len(SERIES)],
                style="solid" if number < len(SERIES) else "dashed",
            )
            for number, task in enumerate(tasks)
        ],
    ).chart()


def importance_figure(table: Candidates, found: Sequence[tuple[int, float]]) -> Chart | None:
    """Draw the importances of the genes that matter most."""
    if not found:
        return None
    shown = found[:BARS]
    return stacked_rows(
        "how much each gene decides whether a candidate is among the best",
        [table.genes[gene].name for gene, _ in shown],
        [("share of the importance", "accent", [100 * share for _, share in shown])],
        x="share of the importance",
        text=lambda value: f"{value:.1f} %",
    )


def parallel_figure(
    table: Candidates, found: Sequence[tuple[int, float]], keys: Mapping[str, int]
) -> Chart | None:
    """Draw the best candidates as lines through their most important genes and their score."""
    rows = sorted(table.scored, key=lambda row: row.mean or 0.0)[-STRANDS:]
    if len(rows) < 2 or not table.genes:
        return None
    genes = most_important(table, found, AXES)
    low, high = rows[0].mean or 0.0, rows[-1].mean or 0.0
    span = (high - low) or 1.0
    strands = []
    for rank, row in enumerate(rows):
        score = ((row.mean or 0.0) - low) / span
        winner = "winner" in row.names
        strands.append(
            Strand(
                name=row.recipe[:8],
                at=[*(float(row.genome[gene]) for gene in genes), score],
                colour="red" if winner else "accent" if 4 * rank >= 3 * len(rows) else "grey",
                opacity=1.0 if winner else 0.5,
                width=2.5 if winner else 1,
                key=keys[row.recipe],
            )
        )
    strands.sort(key=lambda strand: strand.width)
    axes = [Axis(name=table.genes[gene].name, ends=table.genes[gene].ends) for gene in genes]
    axes.append(Axis(name="score, points", ends=(f"{100 * low:.0f}", f"{100 * high:.0f}")))
    return parallel_coordinates(
        f"the {len(rows)} best candidates by their most important genes", axes, strands
    )


def spending_figure(spent: Spending) -> Chart | None:
    """Draw the share of items and of working time that each part of the run took."""
    if not spent.parts:
        return None
    items = sum(part.items - part.copied for part in spent.parts) or 1
    seconds = sum(part.seconds or 0.0 for part in spent.parts) or 1.0
    return stacked_rows(
        "shares of scored items and working time by part of the run",
        ["items", "time"],
        [
            (
                part.part,
                SERIES[number % len(SERIES)],
                [100 * (part.items - part.copied) / items, 100 * (part.seconds or 0.0) / seconds],
            )
            for number, part in enumerate(spent.parts)
        ],
        x="%",
        text=lambda value: f"{value:.0f} %",
    )


def front_figures(front: Front) -> dict[str, Chart]:
    """Draw the front on `select`, two objectives at a time: id -> chart."""
    if not front.searched:
        return {}
    pairs = list(itertools.combinations(range(len(front.axes)), 2))
    return {
        "front" if len(pairs) == 1 else f"front-{first}-{second}": _front_plane(front, first, second).chart()
        for first, second in pairs
    }


def _front_plane(front: Front, first: int, second: int) -> Plane:
    lines = []
    if len(front.axes) == 2:
        stairs = sorted(p.values for p in front.searched if p.on_front)
        lines.append(
            Line(
                name="front",
                xs=[100 * x for x, _ in stairs],
                ys=[100 * y for _, y in stairs],
                colour="accent",
                width=1.5,
                style="dotted",
            )
        )
    candidates = [p for p in front.searched if p.role == "candidate"]
    by_role = {role: [p for p in front.points if p.role == role] for role in ("base", "parent", "baseline")}
    winner = [p for p in front.searched if p.role == "winner"]
    groups: list[tuple[str, list[Point], str, Symbol, float, bool]] = [
        ("base", by_role["base"], "ink", "cross", 5, True),
        ("parents", by_role["parent"], "ink", "diamond", 4, True),
        ("baselines", by_role["baseline"], "orange", "circle", 4, False),
        ("dominated on select", [p for p in candidates if not p.on_front], "pale", "circle", 4, False),
        ("on the front", [p for p in candidates if p.on_front], "accent", "circle", 5, False),
        ("winner (knee)", winner, "accent", "star", 7, False),
    ]
    return Plane(
        title=f"Pareto front on select: {front.axes[first]} against {front.axes[second]}",
        x=front.axes[first],
        y=front.axes[second],
        whole=False,
        height=440,
        lines=lines,
        points=[
            Points(
                name=name,
                xs=[100 * p.values[first] for p in points],
                ys=[100 * p.values[second] for p in points],
                colour=colour,
                symbol=symbol,
                radius=radius,
                labels=[p.name for p in points],
                written=written,
            )
            for name, points, colour, symbol, radius, written in groups
            if points
        ],
    )


def hypervolume_figure(front: Front) -> Chart | None:
    """Draw the hypervolume of the front on `search` after each generation."""
    if len(front.generations) < 2:
        return None
    volumes = [generation.hypervolume for generation in front.generations]
    return Plane(
        title="hypervolume of the front after each generation",
        x="generation",
        y="hypervolume on search",
        lines=[
            Line(
                name="hypervolume",
                xs=[generation.generation for generation in front.generations],
                ys=volumes,
                colour="accent",
                width=3,
            )
        ],
        bounds=(0.0, 1.05 * max(volumes) or 1.0),
        height=300,
    ).chart()


def surrogate_figure(guidance: Guidance) -> Chart | None:
    """Draw the surrogate's rank correlation after each generation; generations that ignored it are shaded."""
    points = [(g, c) for g, c in enumerate(guidance.correlations) if c is not None]
    if len(points) < 2:
        return None
    lowest = min(-0.1, *(correlation - 0.1 for _, correlation in points))
    return Plane(
        title="rank correlation of the surrogate's predictions with measured scores",
        x="generation",
        y="rank correlation",
        lines=[
            Line(
                name=f"rank correlation (last {WINDOW} candidates)",
                xs=[generation for generation, _ in points],
                ys=[correlation for _, correlation in points],
                colour="accent",
                marked=True,
            )
        ],
        rules=[GuideLine(at=TRUSTED, label=f"ignored below {TRUSTED:g}", axis="y", colour="orange")],
        shaded=[(first - 0.5, last + 0.5) for first, last in consecutive(guidance.off)],
        bounds=(lowest, 1.05),
        height=280,
    ).chart()
