"""The page of several runs side by side: their best scores so far, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from evomerge.delivery.charts.chart import SERIES, Chart
from evomerge.delivery.charts.plots import Line, Plane
from evomerge.delivery.page import Served, render
from evomerge.delivery.run_list import RunLine


def page(runs: Sequence[tuple[int, RunLine]], live: Served) -> str:
    """Return the page as HTML. runs: each with its number."""
    shown = sorted(runs, key=lambda entry: (entry[1].state != "running", -entry[1].changed))
    return render(
        "runs.html.jinja",
        figures={"curves": curves_figure([run for _, run in shown])},
        live=live,
        runs=shown,
        at={run.folder: datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M") for _, run in shown},
    )


def curves_figure(runs: Sequence[RunLine]) -> Chart | None:
    """Draw the best score so far after each generation, one line per run; of many runs the first ones."""
    curves = [run for run in runs if run.curve][: len(SERIES)]
    if not curves:
        return None
    return Plane(
        title="best score so far of each run",
        x="generation",
        y="best on search, points",
        lines=[
            Line(
                name=run.name,
                xs=list(range(len(run.curve))),
                ys=[100 * score for score in run.curve],
                colour=colour,
                width=2.5,
            )
            for run, colour in zip(curves, SERIES, strict=False)
        ],
    ).chart()
