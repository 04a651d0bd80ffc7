"""Charts: numbers are in drawing and table, names can't leave their texts, nothing is out of sight."""

from __future__ import annotations

import csv
import io
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.delivery.charts.canvas import Scale, spread
from evomerge.delivery.charts.chart import COLOURS, NARROW, WIDE, Chart, png
from evomerge.delivery.charts.plots import (
    Axis,
    GuideLine,
    Line,
    Plane,
    Points,
    Strand,
    Whisker,
    heat_map,
    interval_chart,
    parallel_coordinates,
    signed_tone,
    stacked_rows,
)

NAME = 'a <b>"name"</b> & \x1b more'


def charts(name: str = "name", value: float = 3.0) -> dict[str, Chart]:
    return {
        "plane": Plane(
            title=name,
            x=name,
            y=name,
            lines=[Line(name=name, xs=[0, 1, 2], ys=[1.0, None, value], colour="accent", marked=True)],
            points=[
                Points(
                    name=name, xs=[0.5], ys=[value], colour="red", labels=[name], written=True, symbol=symbol
                )
                for symbol in ("circle", "diamond", "cross", "star")
            ],
            rules=[GuideLine(at=value, label=name, axis="y"), GuideLine(at=1, label=name, axis="x")],
            shaded=[(0.2, 0.4)],
        ).chart(),
        "intervals": interval_chart(
            name, [name], [(name, "accent", [Whisker(value=value, low=value - 1, high=value + 1)])], x=name
        ),
        "heat map": heat_map(
            name,
            [name, "b"],
            [name],
            [[value, None]],
            tone=signed_tone(abs(value) or 1.0),
            text=lambda v: f"{v:.2f}",
        ),
        "rows": stacked_rows(
            name,
            [name],
            [(name, "accent", [abs(value)]), ("b", "red", [1.0])],
            x=name,
            text=lambda v: f"{v:.1f}",
        ),
        "parallel": parallel_coordinates(
            name,
            [Axis(name=name, ends=(name, "1")), Axis(name="b", ends=("0", "1"))],
            [Strand(name=name, at=[0.1, 0.9], colour="accent", opacity=0.5, key=3)],
        ),
    }


@pytest.mark.parametrize("kind", charts())
@pytest.mark.parametrize("width", [WIDE, NARROW, 60])
def test_names_stay_texts_and_files_are_whole(kind: str, width: int) -> None:
    chart = charts(NAME)[kind]
    for text in (chart.file(width), chart.svg(width)):
        root = ElementTree.fromstring(text)
        assert not [element for element in root.iter() if element.tag.endswith("}b") or element.tag == "b"]
        assert "\x1b" not in text
    assert "var(" not in chart.file(width)
    assert png(chart.file(width), scale=1).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", charts())
def test_colours_have_names_that_pages_know(kind: str) -> None:
    assert set(re.findall(r"var\(--(\w+)\)", charts()[kind].svg(WIDE))) <= set(COLOURS)


@pytest.mark.parametrize("kind", charts())
@settings(max_examples=20)
@given(value=st.floats(-1e6, 1e6, allow_nan=False))
def test_everything_lies_inside_the_drawing(kind: str, value: float) -> None:
    drawing = charts(value=value)[kind].draw(WIDE)
    for x in re.findall(r' (?:x|cx)="(-?[\d.]+)"', drawing.body):
        assert -1 <= float(x) <= drawing.width + 1
    for y in re.findall(r' (?:y|cy)="(-?[\d.]+)"', drawing.body):
        assert -1 <= float(y) <= drawing.height + 1


def test_the_table_has_the_numbers() -> None:
    rows = list(csv.reader(io.StringIO(charts(NAME)["plane"].csv())))
    assert rows[0] == ["series", "label", NAME, NAME]
    assert [row[2:] for row in rows[1:3]] == [["0", "1.0"], ["2", "3.0"]]


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6), count=st.integers(2, 12))
def test_ticks_are_round_inside_and_few(low: float, size: float, count: int) -> None:
    scale = Scale(low=low, high=low + size, start=0, end=100)
    ticks = scale.ticks(count)
    assert len(ticks) <= count + 2
    assert all(low - 1e-6 * size <= tick <= low + 1.000001 * size for tick in ticks)
    assert all(isinstance(tick, float) for tick in ticks)


def test_a_plane_of_one_value_has_a_scale() -> None:
    low, high = spread([7.0])
    assert low < 7 < high
    assert Scale(low=1, high=1, start=0, end=10).at(1) == 0
