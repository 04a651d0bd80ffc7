"""The page of `evomerge analyze --html`: one self-contained file that needs no network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from evomerge.delivery.analyze.heat_map import SHARES, HeatMapMeasure, grid, labels, measures, outside
from evomerge.delivery.analyze.terminal import CAVEAT
from evomerge.delivery.page import write_page
from evomerge.delivery.style import GREEN, GRID, MUTED, PALE, RED, SERIES, decimal, with_layout
from evomerge.errors import DiskError
from evomerge.merging.analysis.advice import RULES, Advised
from evomerge.merging.analysis.interference import Interference, Tally

_SHARE_COLOURS = (GRID, PALE, GREEN, RED)
_MATRIX_TITLES = {
    "cosine": "cosine",
    "conflict": "opposite, % of what both change",
    "overlap": "top overlap, %",
}


def write_html(interference: Interference, advised: Advised, out: Path) -> Path:
    """Write the analysis as one HTML file with everything inside, plots included.

    Args:
        interference: the measured interference.
        advised: the advice derived from it.
        out: the file to write; an existing HTML page is replaced.

    Returns:
        `out`.

    Raises:
        DiskError: another kind of file has that name, or the disk can't take it.
    """
    if out.exists() and not (out.is_file() and out.read_bytes()[:15].lower().startswith(b"<!doctype html")):
        raise DiskError(f"{out}: already exists and is not an HTML page", fix="choose another name")
    total = interference.total
    return write_page(
        "analyze/interference.html.jinja",
        out,
        figures={
            "pairs": _pairs_figure(interference, total),
            "map": _map_figure(interference),
            "norms": _norms_figure(interference),
            "shares": _shares_figure(interference),
        },
        interference=interference,
        advised=advised,
        total=total,
        kinds=[
            (kind, tally, float(tally.relative.mean()), decimal(tally.mean_cosine))
            for kind, tally in interference.by_kind().items()
        ],
        rules=RULES.values(),
        caveat=CAVEAT,
        shares=list(zip(SHARES, total.shares / max(total.count, 1), total.chance_shares, strict=True)),
    )


def _pairs_figure(interference: Interference, total: Tally) -> go.Figure:
    """Draw three matrices, models by models: cosine, conflict, overlap."""
    by_name = measures(interference)
    names, count = list(interference.models), len(interference.models)
    figure = go.Figure()
    for index, (name, values) in enumerate(
        (("cosine", total.cosine), ("conflict", total.conflict), ("overlap", total.overlap))
    ):
        axis = "" if index == 0 else str(index + 1)
        cells = [[float(values[i][j]) if i > j else math.nan for j in range(count)] for i in range(count)]
        axes = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
        figure.add_trace(_heat_map(by_name[name], cells, names, names, **axes))
        domain = [index * 0.36, index * 0.36 + 0.28]
        figure.update_layout(
            {
                f"xaxis{axis}": {"domain": domain, "showgrid": False, "range": [-0.5, count - 1.5]},
                f"yaxis{axis}": {
                    "showgrid": False,
                    "range": [count - 0.5, 0.5],
                    "anchor": f"x{axis}",
                },
            }
        )
        figure.add_annotation(
            text=_MATRIX_TITLES[name],
            font={"weight": "bold"},
            x=domain[0],
            y=1.0,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    return with_layout(figure, height=max(230, 46 * count + 110))


def _map_figure(interference: Interference) -> go.Figure:
    """Draw layers by modules, one heat map per measure with a button each; other tensors on the right."""
    kinds, short, cells = grid(interference)
    layers = sorted({layer for layer, _ in cells})
    rest = outside(interference)
    columns = [*short, *labels(list(rest))]
    figure = go.Figure()
    by_name = measures(interference)
    for index, measure in enumerate(by_name.values()):
        values = [[_value(measure, cells.get((layer, kind))) for kind in kinds] for layer in layers] or [[]]
        for tally in rest.values():
            values = [[*row, math.nan] for row in values]
            values[0][-1] = measure.of(tally)
        trace = _heat_map(measure, values, columns, [f"layer {layer}" for layer in layers] or ["-"])
        trace.visible = index == 0
        figure.add_trace(trace)
    if rest:
        figure.add_vline(x=len(kinds) - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"})
        figure.add_annotation(
            text="outside the layers",
            x=len(kinds) - 0.45,
            y=min(1, len(layers) - 1),
            xanchor="left",
            yanchor="top",
            showarrow=False,
            font={"color": MUTED, "size": 11},
        )
    figure.update_layout(updatemenus=[_buttons(list(by_name))])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(side="top", showgrid=False, tickangle=0 if len(kinds) < 14 else -45)
    return with_layout(figure, height=26 * len(layers) + 130, top=75)


def _buttons(names: list[str]) -> dict[str, Any]:
    """Return plotly's menu that shows one of several traces."""
    return {
        "type": "buttons",
        "direction": "right",
        "x": 0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 30},
        "showactive": True,
        "buttons": [
            {"label": name, "method": "update", "args": [{"visible": [other == name for other in names]}]}
            for name in names
        ],
    }


def _heat_map(
    measure: HeatMapMeasure, values: list[list[float]], x: list[str], y: list[str], **axes: str
) -> go.Heatmap:
    scale, low, high = _colour_scale(measure)
    return go.Heatmap(
        z=[[None if math.isnan(value) else measure.unit * value for value in row] for row in values],
        text=[["" if math.isnan(value) else measure.text(value) for value in row] for row in values],
        x=x,
        y=y,
        texttemplate="%{text}",
        hovertemplate=f"%{{y}}, %{{x}}<br>{measure.name} %{{z:.4g}}<extra></extra>",
        colorscale=scale,
        zmin=low,
        zmax=high,
        showscale=False,
        xgap=1,
        ygap=1,
        **axes,
    )


def _colour_scale(measure: HeatMapMeasure) -> tuple[list[list[Any]], float, float]:
    """Return plotly's colour scale of a measure and the values at its ends: the terminal's colours."""
    low, high = measure.low, measure.high
    colours = {  # a middle at one of the ends is that end
        round((value - low) / (high - low), 6): f"rgb{measure.colour(value)}"
        for value in (low, measure.middle, high)
    }
    return [[place, colour] for place, colour in colours.items()], measure.unit * low, measure.unit * high


def _norms_figure(interference: Interference) -> go.Figure:
    """Draw the norm of each model's task vector, layer by layer."""
    layers = {layer: t for layer, t in interference.by_layer().items() if layer is not None}
    figure = go.Figure()
    for index, name in enumerate(interference.models):
        norms = [100 * float(tally.relative[index]) for tally in layers.values()]
        figure.add_scatter(
            x=list(layers),
            y=[norm if math.isfinite(norm) else None for norm in norms],
            name=name,
            mode="lines+markers",
            line={"color": SERIES[index % len(SERIES)], "width": 2},
        )
    figure.update_xaxes(dtick=1 if len(layers) < 20 else None)
    figure.update_yaxes(rangemode="tozero")
    return with_layout(figure, height=340, x="layer", y="norm, % of the base's")


def _shares_figure(interference: Interference) -> go.Figure:
    """Draw per layer the share of parameters that none, one or several models change."""
    by_layer = interference.by_layer()
    layers = ["outside" if layer is None else f"layer {layer}" for layer in by_layer]
    figure = go.Figure()
    for index, (name, colour) in enumerate(zip(SHARES, _SHARE_COLOURS, strict=True)):
        values = [100 * float(tally.shares[index]) / max(tally.count, 1) for tally in by_layer.values()]
        figure.add_bar(
            y=layers,
            x=values,
            name=name,
            orientation="h",
            marker_color=colour,
            text=[f"{value:.0f}" for value in values],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            hovertemplate=f"%{{y}}: {name} %{{x:.1f}} %<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[0, 100])
    return with_layout(figure, height=24 * len(layers) + 130, x="% of the parameters")


def _value(measure: HeatMapMeasure, tally: Tally | None) -> float:
    return math.nan if tally is None else measure.of(tally)
