"""Something to look at: plain data, and the same for people in a terminal, a notebook or a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


class View:
    """A result with its text.

    Printing it shows the text that the command of the same name prints, and so does the last line of a
    notebook's cell.

    Attributes:
        data: the result as plain data, which JSON can hold: what `--json` prints.

    >>> print(View({"answer": 42}, lambda width: "the answer is 42"))
    the answer is 42
    """

    def __init__(self, data: Any, draw: Callable[[int], RenderableType]) -> None:
        self.data, self._draw = data, draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the text for a rich console, as wide as it is."""
        yield self.draw(options.max_width)

    def draw(self, width: int) -> RenderableType:
        """Return the text for a rich console of a width in characters; plain lines are not wrapped."""
        return self._draw(width)

    def text(self, width: int = 120) -> str:
        """Return the text without colours. width: in characters."""
        drawn, out = self.draw(width), io.StringIO()
        if isinstance(drawn, str):
            return drawn
        Console(file=out, width=width, markup=False, emoji=False, highlight=False).print(drawn)
        return out.getvalue().rstrip("\n")

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """Return the text for a notebook, in colours."""
        console = Console(
            file=io.StringIO(), width=120, record=True, markup=False, emoji=False, highlight=False
        )
        console.print(self)
        return console.export_html(
            inline_styles=True, code_format='<pre style="white-space:pre">{code}</pre>'
        )
