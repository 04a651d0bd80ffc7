"""A chart: an SVG drawing at any width, with the table of what it shows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from evomerge.text import printable

COLOURS = {
    "paper": "#ffffff",
    "ink": "#1d2433",
    "muted": "#5b6475",
    "grid": "#e6e9ef",
    "grey": "#b8bfcc",
    "pale": "#a9c3f8",
    "accent": "#2f6fed",
    "orange": "#c26d12",
    "sand": "#f3e3cf",
    "green": "#2f8058",
    "red": "#c0412f",
    "violet": "#8e44ad",
    "teal": "#0e8a9a",
    "olive": "#7a6a00",
}
"""Names of the colours that charts use, with their values on white paper. Pages set others in the dark."""

SERIES = ("accent", "orange", "green", "violet", "red", "teal", "olive", "muted")
"""Colours of series that differ in colour alone, in this order."""

WIDE, NARROW = 900, 350
"""Widths in pixels for which a page draws a chart: for a desk, and for a telephone."""

FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The inside of an SVG element, with its size in pixels. Colours are `var(--NAME)` of COLOURS."""

    body: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart.

    title: what it shows, in one sentence; read out to those who can't see it.
    columns, rows: the numbers it shows, as a table.
    draw: draws it for a width in pixels; the drawing may be wider where its cells need room.

    Example:
        >>> chart = Chart(
        ...     title="a square",
        ...     columns=("side",),
        ...     rows=[(3,)],
        ...     draw=lambda width: Drawing(body='<rect width="3" height="3"/>', width=width, height=9),
        ... )
        >>> chart.svg(9)[:42]
        '<svg viewBox="0 0 9 9" width="9" height="9'
        >>> print(chart.csv(), end="")
        side
        3
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    draw: Callable[[int], Drawing]

    def svg(self, width: int) -> str:
        """Return the drawing as an element of a page, which must define the colours."""
        drawing = self.draw(width)
        wide, high = drawing.width, drawing.height
        size = f'viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
        label = escape(printable(self.title))
        return f'<svg {size} role="img" aria-label="{label}">{drawing.body}</svg>'

    def file(self, width: int = WIDE) -> str:
        """Return the drawing as an SVG file on white paper, which needs no page."""
        drawing = self.draw(width)
        return standalone(drawing, self.title)

    def csv(self) -> str:
        """Return the table as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return out.getvalue()


def standalone(drawing: Drawing, title: str) -> str:
    """Return a drawing as an SVG file with a title, on white paper."""
    body = re.sub(r"var\(--(\w+)\)", lambda match: COLOURS[match[1]], drawing.body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width} {drawing.height}" '
        f'width="{drawing.width}" height="{drawing.height}" font-family="{FONT}">'
        f"<title>{escape(printable(title))}</title>"
        f'<rect width="100%" height="100%" fill="{COLOURS["paper"]}"/>{body}</svg>\n'
    )


def png(svg: str, *, scale: float = 2.0) -> bytes:
    """Return an SVG file as a PNG image, `scale` pixels for one of its own."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=round(scale)))
