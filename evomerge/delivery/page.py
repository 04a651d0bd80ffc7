"""Pages: a Jinja template and its charts as one HTML file that needs no network."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from evomerge.delivery.charts.chart import NARROW, WIDE, Chart
from evomerge.delivery.style import FILTERS
from evomerge.files import drafted_file
from evomerge.text import printable

TEMPLATES = jinja2.PackageLoader("evomerge", "delivery")
STYLE, SCRIPT, LIVE = "page.css", "page.js", "live.js"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a page needs that is served rather than a file.

    stamp: of the run when the page was made. events: address of the stream of stamps; "" where the page does
    not follow the run. run: address of the run's page, None for the list of runs. name, state: of the run.
    """

    stamp: str
    events: str
    run: str | None = None
    name: str = ""
    state: str = ""


@functools.cache
def _text(name: str) -> str:
    return resources.files("evomerge.delivery").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def content_policy() -> str:
    """Return the Content-Security-Policy of served pages: their own style and scripts, nothing else."""

    def hashes(*names: str) -> str:
        digests = (hashlib.sha256(_text(name).encode()).digest() for name in names)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes(SCRIPT, LIVE)}; style-src {hashes(STYLE)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


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
    live: Served | None = None,
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
        live: what a page needs that is served; None for a file.
        **values: the template's variables.
    """
    environment = jinja2.Environment(
        loader=TEMPLATES,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    environment.filters |= FILTERS | {"breakable": breakable, "coded": coded}
    drawn = {name: element(name, chart) for name, chart in figures.items() if chart is not None}
    return environment.get_template(template).render(
        figures=drawn,
        details=_written(details),
        live=live,
        style=Markup(_text(STYLE)),
        scripts=[Markup(_text(name)) for name in ((SCRIPT, LIVE) if live else (SCRIPT,))],
        **values,
    )


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


def coded(sentence: str) -> Markup:
    """Return a sentence with what stands between backticks set as code.

    >>> print(coded("no <scores> on `test`"))
    no &lt;scores&gt; on <code>test</code>
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(sentence)))))


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
