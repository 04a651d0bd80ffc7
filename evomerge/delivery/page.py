"""Pages: a Jinja template and its charts as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from evomerge.delivery.charts.chart import NARROW, WIDE, Chart
from evomerge.delivery.style import FILTERS
from evomerge.files import drafted_file
from evomerge.text import printable

TEMPLATES = jinja2.PackageLoader("evomerge", "delivery")


def write_page(template: str, out: Path, *, figures: Mapping[str, Chart | None], **values: Any) -> Path:
    """Render a template and write it complete or not at all.

    Args:
        template: path of the template inside `evomerge/delivery`.
        out: the file to write; missing folders are made.
        figures, **values: as for `render`.

    Returns:
        `out`.
    """
    text = render(template, figures=figures, **values)
    with drafted_file(out) as draft:
        draft.write_text(text, encoding="utf-8")
    return out


def render(
    template: str,
    *,
    figures: Mapping[str, Chart | None],
    details: Mapping[str, Any] | None = None,
    **values: Any,
) -> str:
    """Return a page as text.

    Every template extends `page.html.jinja`, which holds the style sheet and the script. The filters of
    `evomerge.delivery.style` write numbers as the terminal does.

    Args:
        template: path of the template inside `evomerge/delivery`.
        figures: id of the element that shows it -> chart; None leaves one out. The template's variable
            `figures` holds the elements of those that exist.
        details: candidates that charts point to with their numbers, for tips and the dialog.
        **values: the template's variables.
    """
    environment = jinja2.Environment(
        loader=TEMPLATES,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    environment.filters |= FILTERS | {"breakable": breakable}
    drawn = {name: element(name, chart) for name, chart in figures.items() if chart is not None}
    return environment.get_template(template).render(figures=drawn, details=_written(details), **values)


def element(name: str, chart: Chart) -> Markup:
    """Return the element of a chart: drawn for a desk, and for a telephone where that differs."""
    wide, narrow = chart.draw(WIDE), chart.draw(NARROW)
    if narrow.width > 0.8 * WIDE:
        drawings = f'<div class="scroll" tabindex="0">{chart.svg(WIDE)}</div>'
    else:
        scroll = ' class="wide scroll" tabindex="0"' if wide.width > WIDE else ' class="wide"'
        drawings = f"<div{scroll}>{chart.svg(WIDE)}</div>"
        inner = ' scroll" tabindex="0' if narrow.width > NARROW else ""
        drawings += f'<div class="narrow{inner}">{chart.svg(NARROW)}</div>'
    return Markup(f'<figure id="{escape(name)}">{drawings}</figure>')


def breakable(name: str) -> Markup:
    """Return a name that may be broken after its underscores, in narrow columns.

    >>> print(breakable("<a>_b"))
    &lt;a&gt;_<wbr>b
    """
    return escape(printable(name)).replace("_", Markup("_<wbr>"))


def _shown(value: Any) -> Any:
    """Return a value of a template with its control characters written out."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _written(data: Any) -> Any:
    """Return plain data with the control characters of all texts written out."""
    if isinstance(data, Mapping):
        return {key: _written(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_written(value) for value in data]
    return printable(data) if isinstance(data, str) else data
