"""Drawing in SVG: shapes, texts, scales, axes and legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from evomerge.delivery.charts.chart import Drawing
from evomerge.text import printable

SIZE = 12
"""Height of texts, in pixels."""


def text_width(text: str, size: float = SIZE) -> float:
    """Return about how wide a text is, in pixels: fonts of systems differ.

    >>> text_width("abc")
    21.6
    """
    return round(0.6 * size * len(text), 2)


def shortened(text: str, width: float, size: float = SIZE) -> str:
    """Return a text that fits a width in pixels; its middle gives way, because names differ at both ends.

    >>> shortened("weight of layer 3", 80)
    'weigh…yer 3'
    """
    if text_width(text, size) <= width:
        return text
    room = max(2, int(width / text_width("x", size)) - 1)
    return f"{text[: room - room // 2]}…{text[len(text) - room // 2 :]}"


def coordinate(value: float) -> str:
    """Return a position with at most one decimal: more can't be seen and take room.

    >>> coordinate(3.04), coordinate(3.14159), coordinate(-0.01)
    ('3', '3.1', '0')
    """
    text = f"{value + 0.0:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear scale: values from `low` to `high` lie at positions from `start` to `end`.

    >>> Scale(low=0, high=10, start=100, end=0).at(2.5)
    75.0
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the position of a value."""
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, count: int, *, whole: bool = False) -> list[float]:
        """Return about `count` round values on the scale. whole: only whole numbers."""
        step = _step((self.high - self.low) / max(count, 1), whole=whole)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(number * step, 10) + 0.0 for number in range(first, last + 1)]


def _step(rough: float, *, whole: bool) -> float:
    if not rough > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return max(1.0, step) if whole else step


def spread(values: Iterable[float], *, margin: float = 0.05) -> tuple[float, float]:
    """Return bounds around values with some room; of nothing 0 and 1.

    >>> spread([0.0, 10.0]), spread([3.0]), spread([])
    ((-0.5, 10.5), (2.5, 3.5), (0.0, 1.0))
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if low == high:
        return low - 0.5, high + 0.5
    room = margin * (high - low)
    return low - room, high + room


@dataclass(slots=True)
class Canvas:
    """SVG elements, collected in the order they are drawn. Texts are escaped here and nowhere else."""

    width: int
    parts: list[str] = field(default_factory=list)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = ""
    ) -> None:
        """Draw a line."""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="M{coordinate(x1)} {coordinate(y1)}L{coordinate(x2)} {coordinate(y2)}" '
            f'stroke="var(--{colour})" stroke-width="{width:g}"{dashed}/>'
        )

    def polyline(
        self,
        points: Sequence[tuple[float, float] | None],
        colour: str,
        *,
        width: float = 1,
        dash: str = "",
        opacity: float = 1.0,
        attributes: str = "",
    ) -> None:
        """Draw straight lines through points; None breaks them."""
        path, pen = [], "M"
        for point in points:
            if point is not None:
                path.append(f"{pen}{coordinate(point[0])} {coordinate(point[1])}")
            pen = "M" if point is None else "L"
        if not path:
            return
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        faint = f' stroke-opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(
            f'<path d="{"".join(path)}" fill="none" stroke="var(--{colour})" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{dashed}{faint}{attributes}/>'
        )

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        *,
        opacity: float = 1.0,
        tip: str = "",
    ) -> None:
        """Draw a filled rectangle. tip: shown when the pointer is on it."""
        faint = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        self.parts.append(
            f'<rect x="{coordinate(x)}" y="{coordinate(y)}" width="{coordinate(max(width, 0))}" '
            f'height="{coordinate(max(height, 0))}" fill="var(--{colour})"{faint}{tipped(tip)}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = "ink",
        anchor: str = "start",
        size: float = SIZE,
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """Write a text on its base line. anchor: start, middle or end. turned: it runs upwards."""
        place = f' transform="rotate(-90 {coordinate(x)} {coordinate(y)})"' if turned else ""
        placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{coordinate(x)}" y="{coordinate(y)}" fill="var(--{colour})" font-size="{size:g}"'
            f"{placed}{weight}{place}>{escape(printable(text))}</text>"
        )

    def raw(self, element: str) -> None:
        """Add an element as it is."""
        self.parts.append(element)

    def legend(self, entries: Sequence[tuple[str, str]], *, left: float, top: float = 4) -> float:
        """Write a legend of (text, shape) in rows; shape: an SVG fragment of 16 x 10 pixels.

        Returns:
            The position below it.
        """
        x, y = left, top
        for text, shape in entries:
            shown = shortened(text, self.width - left - 30)
            need = 22 + text_width(shown) + 14
            if x > left and x + need > self.width:
                x, y = left, y + 18
            self.raw(f'<g transform="translate({coordinate(x)} {coordinate(y + 3)})">{shape}</g>')
            self.text(x + 22, y + 12, shown, colour="muted")
            x += need
        return y + 22 if entries else top

    def drawing(self, height: float) -> Drawing:
        """Return all that was drawn."""
        return Drawing(body="".join(self.parts), width=self.width, height=math.ceil(height))


def tipped(tip: str) -> str:
    """Return the attribute with the text of a tip, nothing for none."""
    return f' data-t="{escape(printable(tip), quote=True)}"' if tip else ""


def swatch(colour: str) -> str:
    """Return a legend's square."""
    return f'<rect x="3" width="10" height="10" rx="2" fill="var(--{colour})"/>'


def dash_of(style: str) -> str:
    """Return the dash pattern of a line style: solid, dotted or dashed."""
    return {"solid": "", "dotted": "2 3", "dashed": "6 4"}[style]


def stroke(colour: str, *, width: float, style: str) -> str:
    """Return a legend's line."""
    dash = dash_of(style)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M0 5H16" stroke="var(--{colour})" stroke-width="{width:g}"{dashed}/>'


def symbol(
    kind: str, x: float, y: float, radius: float, colour: str | None = None, attributes: str = ""
) -> str:
    """Return a marker: circle, diamond, cross or star. colour: None takes that of the group around it."""
    fill = "" if colour is None else f' fill="var(--{colour})"'
    if kind == "circle":
        return f'<circle cx="{coordinate(x)}" cy="{coordinate(y)}" r="{radius:g}"{fill}{attributes}/>'
    if kind == "cross":
        r = radius * 0.8
        d = f"M{coordinate(x - r)} {coordinate(y - r)}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}"
        drawn = "" if colour is None else f' stroke="var(--{colour})"'
        return f'<path d="{d}"{drawn} stroke-width="2"{attributes}/>'
    corners = 4 if kind == "diamond" else 10
    points = []
    for corner in range(corners):
        reach = radius * (1.25 if kind == "diamond" else (1.5, 0.65)[corner % 2])
        angle = math.pi * (2 * corner / corners - 0.5)
        points.append(f"{coordinate(x + reach * math.cos(angle))} {coordinate(y + reach * math.sin(angle))}")
    edge = ' stroke="var(--ink)" stroke-width="1"' if kind == "star" else ""
    return f'<path d="M{"L".join(points)}Z"{fill}{edge}{attributes}/>'
