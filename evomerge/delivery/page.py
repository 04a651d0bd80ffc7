"""Pages: a Jinja template and its plots as one HTML file that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup, escape

from evomerge.delivery.style import FILTERS
from evomerge.files import drafted_file
from evomerge.text import printable

TEMPLATES = jinja2.PackageLoader("evomerge", "delivery")


def write_page(template: str, out: Path, *, figures: Mapping[str, go.Figure | None], **values: Any) -> Path:
    """Render a template and write it complete or not at all.

    Every template extends `page.html.jinja`, which holds the style sheet, plotly's code and the call that
    draws the figures. The filters of `evomerge.delivery.style` write numbers as the terminal does.

    Args:
        template: path of the template inside `evomerge/delivery`.
        out: the file to write; missing folders are made.
        figures: id of the element that shows it -> figure; None leaves one out.
        **values: the template's variables. `figures` holds the ids of the figures that exist.

    Returns:
        `out`.
    """
    environment = jinja2.Environment(
        loader=TEMPLATES,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    environment.filters |= FILTERS | {"breakable": breakable}
    text = environment.get_template(template).render(
        figures={
            name: _without_tags(json.loads(figure.to_json()))
            for name, figure in figures.items()
            if figure is not None
        },
        plotly_js=plotly.offline.get_plotlyjs(),
        **values,
    )
    with drafted_file(out) as draft:
        draft.write_text(text, encoding="utf-8")
    return out


def breakable(name: str) -> Markup:
    """Return a name that may be broken after its underscores, in narrow columns.

    >>> print(breakable("<a>_b"))
    &lt;a&gt;_<wbr>b
    """
    return escape(printable(name)).replace("_", Markup("_<wbr>"))


def _shown(value: Any) -> Any:
    """Return a value of a template with its control characters written out."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _without_tags(data: Any) -> Any:
    """Return a figure's data with all texts escaped, because plotly obeys tags in names."""
    if isinstance(data, dict):
        return {key: value if key == "hovertemplate" else _without_tags(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_tags(value) for value in data]
    return html.escape(printable(data), quote=False) if isinstance(data, str) else data
