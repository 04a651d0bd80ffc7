"""A real browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture
def opened_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page at a width and in light or dark; at the end nothing was fetched, and no script failed."""
    opened: list[Page] = []
    wrong: list[str] = []
    asked: list[str] = []

    def open_page(path: Path, *, width: int = 1280, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(path.as_uri())
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    wrong += [url for url in asked if not url.startswith(("file:", "data:"))]
    assert wrong == []
