"""MkDocs hooks: pages from outside docs/, and links that work on the site as in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "run_folder.md": "runs/README.md",
    "log.md": "benchmarks/perf/LOG.md",
}
"""Name on the site -> place in the repository."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:#]+\.\w+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `OUTSIDE`."""
    for name, place in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / place).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's pages; a link to any other file of the repository becomes its text."""
    here = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(here, f"docs/{here}"))
    moved = {place: name for name, place in OUTSIDE.items()} | {"README.md": "index.md"}

    def linked(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(folder, target))
        if place.startswith("docs/"):
            return f"[{text}]({place.removeprefix('docs/')}{anchor})"
        return f"[{text}]({moved[place]}{anchor})" if place in moved else text

    return LINK.sub(linked, markdown)
