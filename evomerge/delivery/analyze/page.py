"""The page of `evomerge analyze --html`: one self-contained file that needs no network."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline

from evomerge.delivery.analyze.terminal import CAVEAT, SHARES, Measure, grid, labels, measures, outside
from evomerge.errors import DiskError
from evomerge.files import drafted_file
from evomerge.merging.analysis.advice import RULES, Advised
from evomerge.merging.analysis.interference import Interference, Tally

_INK, _MUTED, _GRID = "#1d2433", "#667085", "#e6e9ef"
_MODELS = ("#2f6fed", "#d9822b", "#157347", "#8e44ad", "#c0392b", "#0e8a9a", "#7a6a00", "#667085")
_SHARES = ("#e6e9ef", "#9db8ee", "#40916c", "#c84b3c")


def write_html(found: Interference, advised: Advised, out: Path) -> Path:
    """Write the analysis as one HTML file with everything inside, and return its path.

    Raises DiskError where another kind of file has that name.
    """
    if out.exists() and not (out.is_file() and out.read_bytes()[:15].lower().startswith(b"<!doctype html")):
        raise DiskError(f"{out}: already exists and is not an HTML page", fix="choose another name")
    template = (
        files("evomerge.delivery.analyze").joinpath("interference.html.jinja").read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": _percent}
    total, kinds = found.total, found.by_kind()
    figures = {
        "pairs": _pairs(found, total),
        "map": _map(found),
        "norms": _norms(found),
        "shares": _shares(found),
    }
    page = environment.from_string(template).render(
        found=found,
        advised=advised,
        total=total,
        kinds=[
            (kind, tally, _mean(tally.relative), f"{round(tally.mean_cosine, 3) + 0.0:.3f}")
            for kind, tally in kinds.items()
        ],
        rules=RULES.values(),
        caveat=CAVEAT,
        shares=list(zip(SHARES, total.shares / max(total.count, 1), total.chance_shares, strict=True)),
        plotly_js=plotly.offline.get_plotlyjs(),
        figures={name: json.loads(figure.to_json()) for name, figure in figures.items()},
    )
    with drafted_file(out) as draft:
        draft.write_text(page, encoding="utf-8")
    return out


def _pairs(found: Interference, total: Tally) -> go.Figure:
    """Three matrices, models by models: cosine, conflict, overlap."""
    known = measures(found)
    names, count = list(found.models), len(found.models)
    figure = go.Figure()
    for index, (name, values) in enumerate(
        (("cosine", total.cosine), ("conflict", total.conflict), ("overlap", total.overlap))
    ):
        measure, axis = known[name], "" if index == 0 else str(index + 1)
        cells = [[float(values[i][j]) if i > j else math.nan for j in range(count)] for i in range(count)]
        figure.add_trace(_heat(measure, cells, names, names, xaxis=f"x{axis}", yaxis=f"y{axis}", shown=name))
        span = [index * 0.36, index * 0.36 + 0.28]
        figure.update_layout(
            {
                f"xaxis{axis}": {"domain": span, "showgrid": False, "range": [-0.5, count - 1.5]},
                f"yaxis{axis}": {
                    "showgrid": False,
                    "range": [count - 0.5, 0.5],
                    "anchor": f"x{axis}",
                },
            }
        )
        figure.add_annotation(
            text=f"<b>{_TITLES[name]}</b>",
            x=span[0],
            y=1.12,
            xref="paper",
            yref="paper",
            xanchor="left",
            showarrow=False,
        )
    return _styled(figure, height=max(230, 46 * count + 110))


_TITLES = {"cosine": "cosine", "conflict": "opposite, % of what both change", "overlap": "top overlap, %"}


def _map(found: Interference) -> go.Figure:
    """Layers by modules, one heat map per measure with a button each; the rest of the model on top."""
    kinds, short, cells = grid(found)
    layers = sorted({layer for layer, _ in cells})
    rest = outside(found)
    figure = go.Figure()
    known = measures(found)
    for index, measure in enumerate(known.values()):
        values = [[_value(measure, cells.get((layer, kind))) for kind in kinds] for layer in layers]
        rows = [f"layer {layer}" for layer in layers] or ["-"]
        values = values or [[]]
        columns = list(short)
        for label, tally in zip(labels(list(rest)), rest.values(), strict=True):
            columns.append(label)
            values = [[*row, math.nan] for row in values]
            values[0][-1] = measure.of(tally)
        trace = _heat(measure, values, columns, rows, shown=measure.name)
        trace.visible = index == 0
        figure.add_trace(trace)
    if rest:
        figure.add_vline(x=len(kinds) - 0.5, line={"color": _MUTED, "width": 1, "dash": "dot"})
        figure.add_annotation(
            text="outside the layers",
            x=len(kinds) - 0.45,
            y=min(1, len(layers) - 1),
            xanchor="left",
            yanchor="top",
            showarrow=False,
            font={"color": _MUTED, "size": 11},
        )
    figure.update_layout(
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": 30},
                "showactive": True,
                "buttons": [
                    {
                        "label": name,
                        "method": "update",
                        "args": [{"visible": [other == name for other in known]}],
                    }
                    for name in known
                ],
            }
        ]
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(side="top", showgrid=False, tickangle=0 if len(kinds) < 14 else -45)
    return _styled(figure, height=26 * len(layers) + 130, top=75)


def _heat(
    measure: Measure, values: list[list[float]], x: list[str], y: list[str], *, shown: str, **axes: str
) -> go.Heatmap:
    scale, low, high = _scale(measure)
    return go.Heatmap(
        z=[[None if math.isnan(value) else measure.unit * value for value in row] for row in values],
        text=[["" if math.isnan(value) else measure.text(value) for value in row] for row in values],
        x=x,
        y=y,
        texttemplate="%{text}",
        hovertemplate=f"%{{y}}, %{{x}}<br>{shown} %{{z:.4g}}<extra></extra>",
        colorscale=scale,
        zmin=low,
        zmax=high,
        showscale=False,
        xgap=1,
        ygap=1,
        **axes,
    )


def _scale(measure: Measure) -> tuple[list[list[Any]], float, float]:
    """Return plotly's colour scale of a measure with its ends: the terminal's colours."""
    low, high = measure.low, measure.high
    stops = [(low, measure.colour(low)), (measure.middle, measure.colour(measure.middle))]
    stops.append((high, measure.colour(high)))
    width = high - low
    colours = {
        round((value - low) / width, 6): f"rgb{colour}" for value, colour in stops
    }  # a middle at one of the ends is that end
    return [[place, colour] for place, colour in colours.items()], measure.unit * low, measure.unit * high


def _norms(found: Interference) -> go.Figure:
    """How far each model moved, layer by layer."""
    layers = {layer: tally for layer, tally in found.by_layer().items() if layer is not None}
    figure = go.Figure()
    for index, name in enumerate(found.models):
        figure.add_scatter(
            x=list(layers),
            y=[_finite(100 * float(tally.relative[index])) for tally in layers.values()],
            name=name,
            mode="lines+markers",
            line={"color": _MODELS[index % len(_MODELS)], "width": 2},
        )
    figure.update_xaxes(title="layer", dtick=1 if len(layers) < 20 else None)
    figure.update_yaxes(title="length, % of the base's", rangemode="tozero")
    return _styled(figure, height=340)


def _shares(found: Interference) -> go.Figure:
    """Per layer: untouched, one, several in one direction, several in opposite directions."""
    places = {_place(layer): tally for layer, tally in found.by_layer().items()}
    figure = go.Figure()
    for index, (name, colour) in enumerate(zip(SHARES, _SHARES, strict=True)):
        values = [100 * float(tally.shares[index]) / max(tally.count, 1) for tally in places.values()]
        figure.add_bar(
            y=list(places),
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
    figure.update_xaxes(title="% of the parameters", range=[0, 100])
    return _styled(figure, height=24 * len(places) + 130)


def _place(layer: int | None) -> str:
    return "outside" if layer is None else f"layer {layer}"


def _value(measure: Measure, tally: Tally | None) -> float:
    return math.nan if tally is None else measure.of(tally)


def _mean(values: Any) -> float:
    return float(values.mean())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(share: float) -> str:
    """Return a share as a percentage for tables.

    >>> _percent(0.1234), _percent(float("nan"))
    ('12.3', '-')
    """
    return f"{round(100 * float(share), 1) + 0.0:.1f}" if math.isfinite(share) else "-"


def _styled(figure: go.Figure, *, height: int, top: int = 40) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": _INK, "size": 13},
        margin={"l": 70, "r": 20, "t": top, "b": 45},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
        height=height,
    )
    figure.update_xaxes(gridcolor=_GRID, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, automargin=True)
    return figure
