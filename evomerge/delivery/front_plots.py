"""The plots of a Pareto run: the front on `select`, and its hypervolume generation by generation."""

from __future__ import annotations

import plotly.graph_objects as go

from evomerge.delivery.objectives import Front, Point, axis

_INK, _ACCENT, _MUTED, _WARM, _PALE = "#1d2433", "#2f6fed", "#8a94a6", "#d9822b", "#a9c3f8"


def groups(front: Front) -> list[tuple[str, list[Point], dict[str, object]]]:
    """Return what is drawn: legend entry, points, marker."""
    searched = [p for p in front.searched if p.role == "candidate"]
    found = [
        ("base", [p for p in front.points if p.role == "base"], {"symbol": "x", "color": _INK, "size": 9}),
        (
            "parents",
            [p for p in front.points if p.role == "parent"],
            {"symbol": "diamond", "color": _INK, "size": 9},
        ),
        ("hand-made merges", [p for p in front.points if p.role == "baseline"], {"color": _WARM, "size": 8}),
        (
            "dominated on select",
            [p for p in searched if not p.on_front],
            {"color": _PALE, "size": 8},
        ),
        ("front", [p for p in searched if p.on_front], {"color": _ACCENT, "size": 10}),
        (
            "winner: the knee",
            [p for p in front.searched if p.role == "winner"],
            {"symbol": "star", "color": _ACCENT, "size": 17, "line": {"color": _INK, "width": 1}},
        ),
    ]
    return [(name, points, marker) for name, points, marker in found if points]


def front_figure(front: Front) -> go.Figure | None:
    """Two objectives: one against the other, the front as a line. More: each against each."""
    if not front.searched:
        return None
    figure = go.Figure()
    labels = [axis(name) for name in front.objectives]
    if len(labels) > 2:
        for name, points, marker in groups(front):
            columns = [[100 * p.values[i] for p in points] for i in range(len(labels))]
            figure.add_splom(
                dimensions=[{"label": each, "values": v} for each, v in zip(labels, columns, strict=True)],
                name=name,
                text=[p.name for p in points],
                marker=marker,
                diagonal_visible=False,
                showupperhalf=False,
            )
        figure.update_layout(height=260 + 130 * len(labels))
        return figure
    line = sorted(p.values for p in front.searched if p.on_front)
    figure.add_scatter(
        x=[100 * x for x, _ in line],
        y=[100 * y for _, y in line],
        mode="lines",
        line={"color": _ACCENT, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, points, marker in groups(front):
        figure.add_scatter(
            x=[100 * p.values[0] for p in points],
            y=[100 * p.values[1] for p in points],
            mode="markers+text" if name in ("base", "parents") else "markers",
            name=name,
            text=[p.name for p in points],
            textposition="top center",
            textfont={"color": _MUTED, "size": 11},
            hovertemplate="%{text}<br>(%{x:.1f}, %{y:.1f})<extra></extra>",
            marker=marker,
        )
    figure.update_layout(xaxis_title=labels[0], yaxis_title=labels[1], height=480)
    return figure


def hypervolume_figure(front: Front) -> go.Figure | None:
    """The hypervolume of the front on `search` after each generation."""
    if len(front.generations) < 2:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[g.generation for g in front.generations],
        y=[g.hypervolume for g in front.generations],
        mode="lines",
        line={"color": _ACCENT, "width": 3},
        name="hypervolume",
    )
    figure.update_layout(xaxis_title="generation", yaxis_title="hypervolume on search", height=320)
    return figure
