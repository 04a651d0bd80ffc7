"""The kinds of charts: lines and points, intervals in rows, heat maps, stacked rows, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from evomerge.delivery.charts.canvas import (
    Canvas,
    Scale,
    dash_of,
    shortened,
    spread,
    stroke,
    swatch,
    symbol,
    text_width,
    tipped,
)
from evomerge.delivery.charts.chart import NARROW, Chart, Drawing

Style = Literal["solid", "dotted", "dashed"]
Symbol = Literal["circle", "diamond", "cross", "star"]
Cells = Sequence[Sequence[float | None]]
Toned = Callable[[float], tuple[str, float]]
"""Value of a cell -> name of its colour, and how much of it shows, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line through points; None in `ys` breaks it. marked: also a dot at each point."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: str
    width: float = 2
    style: Style = "solid"
    marked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Markers of one kind.

    labels: what a tip says, one per point. written: whether labels are written beside the points, too.
    keys: of the page's candidates, whose tips and details it shows instead of labels.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    labels: Sequence[str] = ()
    symbol: Symbol = "circle"
    radius: float = 4
    written: bool = False
    keys: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideLine:
    """A line across the plot at a value of one axis, with a label."""

    at: float
    label: str
    axis: Literal["x", "y"]
    colour: str = "muted"
    style: Style = "dashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Lines and points over two axes.

    whole: the x axis has whole numbers. shaded: ranges of x. bounds: of the y axis, None: around the data.
    height: in pixels.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line] = ()
    points: Sequence[Points] = ()
    rules: Sequence[GuideLine] = ()
    shaded: Sequence[tuple[float, float]] = ()
    bounds: tuple[float, float] | None = None
    whole: bool = True
    height: int = 340

    def chart(self) -> Chart:
        """Return the chart; its table has one row per point."""
        rows: list[tuple[object, ...]] = []
        for line in self.lines:
            rows += [(line.name, "", x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
        for group in self.points:
            labels = group.labels or [""] * len(group.xs)
            rows += [
                (group.name, label, x, y) for label, x, y in zip(labels, group.xs, group.ys, strict=True)
            ]
        return Chart(title=self.title, columns=("series", "label", self.x, self.y), rows=rows, draw=self.draw)

    def draw(self, width: int) -> Drawing:
        """Draw it."""
        canvas = Canvas(width)
        across, up = self._scales(canvas, width)
        for low, high in self.shaded:
            x = max(across.at(low), across.start)
            canvas.rectangle(
                x, up.end, min(across.at(high), across.end) - x, up.start - up.end, "sand", opacity=0.6
            )
        self._axes(canvas, across, up)
        for rule in self.rules:
            self._rule(canvas, rule, across, up)
        for line in self.lines:
            places = [
                None if y is None or not math.isfinite(y) else (across.at(x), up.at(y))
                for x, y in zip(line.xs, line.ys, strict=True)
            ]
            canvas.polyline(places, line.colour, width=line.width, dash=dash_of(line.style))
            for place, x, y in zip(places, line.xs, line.ys, strict=True):
                alone = len(line.xs) == 1
                if place is not None and y is not None and (line.marked or alone):
                    tip = tipped(f"{line.name}: {number(y)} at {self.x} {number(x)}")
                    canvas.raw(symbol("circle", *place, 3, line.colour, tip))
        for group in self.points:
            self._points(canvas, group, across, up)
        return canvas.drawing(up.start + 42)

    def _scales(self, canvas: Canvas, width: int) -> tuple[Scale, Scale]:
        xs = [x for line in self.lines for x in line.xs] + [x for group in self.points for x in group.xs]
        ys = [y for line in self.lines for y in line.ys if y is not None]
        ys += [y for group in self.points for y in group.ys]
        ys += [rule.at for rule in self.rules if rule.axis == "y"]
        low, high = self.bounds or spread(ys)
        labels = [number(tick) for tick in Scale(low=low, high=high, start=0, end=1).ticks(5)]
        left = 26 + max((text_width(label) for label in labels), default=0)
        entries = [
            (line.name, stroke(line.colour, width=line.width, style=line.style)) for line in self.lines
        ]
        entries += [
            (group.name, symbol(group.symbol, 8, 5, 4, group.colour)) for group in self.points if group.name
        ]
        top = canvas.legend(entries, left=left) + 8
        height = self.height if width > NARROW else min(self.height, 260)
        bounds = spread(xs, margin=0.02 if self.lines else 0.04)
        return (
            Scale(low=bounds[0], high=bounds[1], start=left, end=width - 12),
            Scale(low=low, high=high, start=max(height - 42, top + 140), end=top),
        )

    def _axes(self, canvas: Canvas, across: Scale, up: Scale) -> None:
        for tick in up.ticks(5):
            canvas.line(across.start, up.at(tick), across.end, up.at(tick), "grid")
            canvas.text(across.start - 6, up.at(tick) + 4, number(tick), colour="muted", anchor="end")
        count = max(2, int((across.end - across.start) / 70))
        for tick in across.ticks(count, whole=self.whole):
            canvas.text(across.at(tick), up.start + 16, number(tick), colour="muted", anchor="middle")
            canvas.line(across.at(tick), up.start, across.at(tick), up.start + 4, "muted")
        canvas.line(across.start, up.start, across.end, up.start, "muted")
        middle = (across.start + across.end) / 2
        room = across.end - across.start
        canvas.text(middle, up.start + 34, shortened(self.x, room), colour="muted", anchor="middle")
        label = shortened(self.y, up.start - up.end + 10)
        canvas.text(12, (up.start + up.end) / 2, label, colour="muted", anchor="middle", turned=True)

    def _rule(self, canvas: Canvas, rule: GuideLine, across: Scale, up: Scale) -> None:
        dash = dash_of(rule.style)
        if rule.axis == "y":
            y = up.at(rule.at)
            canvas.line(across.start, y, across.end, y, rule.colour, width=1.5, dash=dash)
            canvas.text(across.end - 4, y - 5, rule.label, colour="muted", anchor="end", size=11)
            return
        x = across.at(rule.at)
        canvas.line(x, up.end, x, up.start, rule.colour, dash=dash)
        canvas.text(x + 4, up.start - 6, rule.label, colour="muted", size=11)

    def _points(self, canvas: Canvas, group: Points, across: Scale, up: Scale) -> None:
        canvas.raw(f'<g fill="var(--{group.colour})" stroke="var(--{group.colour})" stroke-width="0">')
        labels = group.labels or [""] * len(group.xs)
        for index, (x, y, label) in enumerate(zip(group.xs, group.ys, labels, strict=True)):
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            if group.keys:
                attributes = f' data-i="{group.keys[index]}"'
            else:
                attributes = tipped(f"{label}: {number(x)}, {number(y)}" if label else "")
            place = across.at(x), up.at(y)
            canvas.raw(symbol(group.symbol, *place, group.radius, attributes=attributes))
            if group.written:
                canvas.text(place[0], place[1] - 9, label, colour="muted", anchor="middle", size=11)
        canvas.raw("</g>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def interval_chart(
    title: str,
    categories: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[Whisker]]],
    *,
    x: str,
) -> Chart:
    """Return a chart with one row per category, in it a dot and its interval per series.

    series: name, colour, and one interval per category.
    """
    rows = [
        (category, name, values[row].value, values[row].low, values[row].high)
        for row, category in enumerate(categories)
        for name, _, values in series
    ]

    def draw(width: int) -> Drawing:
        canvas, step = Canvas(width), 13
        room = min(0.34 * width, 12 + max((text_width(c) for c in categories), default=0))
        top = canvas.legend([(name, swatch(colour)) for name, colour, _ in series], left=4) + 6
        ends = [end for _, _, values in series for i in values for end in (i.low, i.high)]
        low, high = spread([0.0, *ends], margin=0.03)
        pitch = step * len(series) + 14
        bottom = top + pitch * len(categories)
        across = Scale(low=low, high=high, start=room, end=width - 14)
        for tick in across.ticks(max(2, int((width - room) / 70))):
            canvas.line(across.at(tick), top, across.at(tick), bottom, "grid")
            canvas.text(across.at(tick), bottom + 16, number(tick), colour="muted", anchor="middle")
        for row, category in enumerate(categories):
            y = top + pitch * row
            canvas.line(0, y, width, y, "grid")
            canvas.text(room - 8, y + pitch / 2 + 4, shortened(category, room - 10), anchor="end")
            for index, (name, colour, values) in enumerate(series):
                interval, line = values[row], y + 7 + step * (index + 0.5)
                start, end = across.at(interval.low), across.at(interval.high)
                canvas.line(start, line, end, line, colour, width=2)
                tip = f"{category}, {name}: {interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
                canvas.raw(symbol("circle", across.at(interval.value), line, 4.5, colour, tipped(tip)))
        canvas.text((room + width) / 2, bottom + 34, x, colour="muted", anchor="middle")
        return canvas.drawing(bottom + 40)

    columns = ("category", "series", x, "low", "high")
    return Chart(title=title, columns=columns, rows=rows, draw=draw)


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Cells,
    *,
    tone: Toned,
    text: Callable[[float], str],
    corner: str = "",
) -> Chart:
    """Return a heat map with the text of each value in its cell; cells without a value stay empty.

    Cells keep their width, so a map of many columns is wider than it was asked to be.
    """

    def draw(width: int) -> Drawing:
        label = min(0.4 * width, 12 + max((text_width(row) for row in rows), default=0))
        widest = max((text_width(text(v), 11) for row in values for v in row if v is not None), default=20)
        cell = max(widest + 8, min(70, (width - label) / max(len(columns), 1)))
        turned = any(text_width(column) > cell - 4 for column in columns)
        top = 12 + min(130, max((text_width(column) for column in columns), default=0)) if turned else 24
        canvas = Canvas(math.ceil(max(width, label + cell * len(columns) + 4)))
        if corner:
            canvas.text(label - 8, top - 8, shortened(corner, label - 8), colour="muted", anchor="end")
        for index, column in enumerate(columns):
            x, shown = label + cell * (index + 0.5), shortened(column, 130 if turned else cell)
            at = (x + 4, top - 6) if turned else (x, top - 8)
            canvas.text(*at, shown, colour="muted", anchor="start" if turned else "middle", turned=turned)
        for number_, (row, cells) in enumerate(zip(rows, values, strict=True)):
            y = top + 24 * number_
            canvas.text(label - 8, y + 16, shortened(row, label - 10), anchor="end")
            for index, value in enumerate(cells):
                if value is None or not math.isfinite(value):
                    continue
                colour, strength = tone(value)
                x, tip = label + cell * index, f"{row}, {columns[index]}: {text(value)}"
                canvas.rectangle(x, y, cell - 1, 23, colour, opacity=strength, tip=tip)
                canvas.raw('<g pointer-events="none">')
                canvas.text(x + cell / 2 - 0.5, y + 16, text(value), anchor="middle", size=11)
                canvas.raw("</g>")
        return canvas.drawing(top + 24 * len(rows) + 6)

    table = [(row, *cells) for row, cells in zip(rows, values, strict=True)]
    return Chart(title=title, columns=(corner or "row", *columns), rows=table, draw=draw)


def stacked_rows(
    title: str,
    categories: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    *,
    x: str,
    text: Callable[[float], str],
) -> Chart:
    """Return horizontal bars made of parts: (name, colour, one value per category)."""

    def draw(width: int) -> Drawing:
        canvas = Canvas(width)
        room = min(0.36 * width, 12 + max((text_width(c) for c in categories), default=0))
        several = [(name, swatch(colour)) for name, colour, _ in parts] if len(parts) > 1 else []
        top = canvas.legend(several, left=4) + 8
        total = max((sum(values[row] for *_, values in parts) for row in range(len(categories))), default=1)
        across = Scale(low=0, high=total or 1.0, start=room, end=width - 10)
        for row, category in enumerate(categories):
            y, reached = top + 28 * row, 0.0
            canvas.text(room - 8, y + 16, shortened(category, room - 10), anchor="end")
            for name, colour, values in parts:
                value = values[row]
                if not value > 0:
                    continue
                start, end = across.at(reached), across.at(reached + value)
                tip = f"{category}, {name}: {text(value)}"
                canvas.rectangle(start, y, end - start - 1, 22, colour, opacity=0.55, tip=tip)
                if text_width(text(value), 11) < end - start - 6:
                    canvas.raw('<g pointer-events="none">')
                    canvas.text((start + end) / 2, y + 15, text(value), anchor="middle", size=11)
                    canvas.raw("</g>")
                reached += value
        bottom = top + 28 * len(categories)
        canvas.text((room + width) / 2, bottom + 16, x, colour="muted", anchor="middle")
        return canvas.drawing(bottom + 24)

    rows = [(category, *(values[row] for *_, values in parts)) for row, category in enumerate(categories)]
    return Chart(title=title, columns=("category", *(name for name, *_ in parts)), rows=rows, draw=draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis of parallel coordinates. ends: texts at its lower and upper end."""

    name: str
    ends: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strand:
    """A line through all axes at positions in [0, 1], None where it has none."""

    name: str
    at: Sequence[float | None]
    colour: str
    opacity: float
    width: float = 1
    key: int | None = None


def parallel_coordinates(title: str, axes: Sequence[Axis], strands: Sequence[Strand]) -> Chart:
    """Return parallel coordinates, drawn in the order of the strands."""

    def draw(width: int) -> Drawing:
        need = 58 * (len(axes) - 1) + 90
        canvas = Canvas(max(width, need))
        longest = min(150.0, max((text_width(axis.name) for axis in axes), default=0))
        top, bottom = longest + 26, longest + 246
        places = [45 + (canvas.width - 90) * n / max(len(axes) - 1, 1) for n in range(len(axes))]
        for strand in strands:
            points = [
                None if at is None else (x, bottom - at * (bottom - top))
                for x, at in zip(places, strand.at, strict=True)
            ]
            key = "" if strand.key is None else f' data-i="{strand.key}"'
            canvas.polyline(points, strand.colour, width=strand.width, opacity=strand.opacity, attributes=key)
        for x, axis in zip(places, axes, strict=True):
            canvas.line(x, top, x, bottom, "muted")
            canvas.text(
                x, bottom + 16, shortened(axis.ends[0], 58, 11), anchor="middle", size=11, colour="muted"
            )
            canvas.text(x, top - 6, shortened(axis.ends[1], 58, 11), anchor="middle", size=11, colour="muted")
            canvas.text(x + 4, top - 20, shortened(axis.name, 150), turned=True)
        return canvas.drawing(bottom + 24)

    rows = [(strand.name, *strand.at) for strand in strands]
    return Chart(title=title, columns=("candidate", *(axis.name for axis in axes)), rows=rows, draw=draw)


def number(value: float) -> str:
    """Return a number as short as it can be read.

    >>> number(20.0), number(0.25), number(1234567)
    ('20', '0.25', '1234567')
    """
    text = f"{value:.6g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def signed_tone(reach: float) -> Toned:
    """Return the tone of signed values: red below 0, blue above, full at `reach`."""

    def tone(value: float) -> tuple[str, float]:
        return ("accent" if value >= 0 else "red", min(0.75, 0.75 * abs(value) / (reach or 1.0)))

    return tone
