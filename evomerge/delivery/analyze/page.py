"""The page of `evomerge analyze --html`: one self-contained file that needs no network."""

from __future__ import annotations

import math
from pathlib import Path

from evomerge.delivery.analyze.heat_map import SHARES, HeatMapMeasure, grid, labels, measures, outside
from evomerge.delivery.analyze.terminal import CAVEAT
from evomerge.delivery.charts.chart import SERIES, Chart
from evomerge.delivery.charts.plots import Line, Plane, heat_map, stacked_rows
from evomerge.delivery.page import write_page
from evomerge.delivery.style import decimal
from evomerge.errors import DiskError
from evomerge.merging.analysis.advice import RULES, Advised
from evomerge.merging.analysis.interference import Interference, Tally

_SHARE_COLOURS = ("grey", "pale", "green", "red")
_CORNERS = {"cosine": "cosine", "conflict": "opposite %", "overlap": "overlap %"}
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
        figures=_pairs_figures(interference, total)
        | _map_figures(interference)
        | {
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


def _pairs_figures(interference: Interference, total: Tally) -> dict[str, Chart]:
    """Draw three matrices, models by models: cosine, conflict, overlap."""
    by_name, names = measures(interference), list(interference.models)
    found = {"cosine": total.cosine, "conflict": total.conflict, "overlap": total.overlap}
    return {
        f"pairs_{name}": _heat_map(
            by_name[name],
            f"{_MATRIX_TITLES[name]} of each pair of models",
            [[float(values[i][j]) if i > j else math.nan for j in range(i)] for i in range(1, len(names))],
            columns=names[:-1],
            rows=names[1:],
            corner=_CORNERS[name],
        )
        for name, values in found.items()
    }


def _map_figures(interference: Interference) -> dict[str, Chart]:
    """Draw layers by modules, a heat map per measure; tensors outside the layers have their own row."""
    kinds, short, cells = grid(interference)
    layers = sorted({layer for layer, _ in cells})
    rest = outside(interference)
    columns = [*short, *labels(list(rest))]
    charts = {}
    for name, measure in measures(interference).items():
        values = [
            [*(_value(measure, cells.get((layer, kind))) for kind in kinds), *(math.nan for _ in rest)]
            for layer in layers
        ]
        rows = [f"layer {layer}" for layer in layers]
        if rest:
            values.append([*(math.nan for _ in kinds), *(measure.of(tally) for tally in rest.values())])
            rows.append("outside")
        charts[f"map_{name}"] = _heat_map(measure, measure.title, values, columns=columns, rows=rows)
    return charts


def _heat_map(
    measure: HeatMapMeasure,
    title: str,
    values: list[list[float]],
    *,
    columns: list[str],
    rows: list[str],
    corner: str = "",
) -> Chart:
    return heat_map(
        title,
        columns,
        rows,
        [[None if math.isnan(value) else value for value in row] for row in values],
        tone=measure.tone,
        text=measure.text,
        corner=corner,
    )


def _norms_figure(interference: Interference) -> Chart:
    """Draw the norm of each model's task vector, layer by layer."""
    layers = {layer: t for layer, t in interference.by_layer().items() if layer is not None}
    lines = []
    for index, name in enumerate(interference.models):
        norms = [100 * float(tally.relative[index]) for tally in layers.values()]
        lines.append(
            Line(
                name=name,
                xs=list(layers),
                ys=[norm if math.isfinite(norm) else None for norm in norms],
                colour=SERIES[index % len(SERIES)],
                marked=True,
            )
        )
    highest = max((y for line in lines for y in line.ys if y is not None), default=1.0)
    return Plane(
        title="norm of each model's task vector, layer by layer",
        x="layer",
        y="norm, % of the base's",
        lines=lines,
        bounds=(0.0, 1.05 * highest or 1.0),
    ).chart()


def _shares_figure(interference: Interference) -> Chart:
    """Draw per layer the share of parameters that none, one or several models change."""
    by_layer = interference.by_layer()
    layers = ["outside" if layer is None else f"layer {layer}" for layer in by_layer]
    parts = [
        (
            name,
            colour,
            [100 * float(tally.shares[index]) / max(tally.count, 1) for tally in by_layer.values()],
        )
        for index, (name, colour) in enumerate(zip(SHARES, _SHARE_COLOURS, strict=True))
    ]
    return stacked_rows(
        "share of parameters that none, one or several models change, by layer",
        layers,
        parts,
        x="% of the parameters",
        text=lambda value: f"{value:.0f}",
    )


def _value(measure: HeatMapMeasure, tally: Tally | None) -> float:
    return math.nan if tally is None else measure.of(tally)
