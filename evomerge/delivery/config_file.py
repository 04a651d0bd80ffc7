"""A run config as a file: places of models relative to it, and a comment above each part."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

COMMENTS = {
    "models": "The base that task vectors are measured from, and the models to merge.",
    "space": "What the search may vary.",
    "suite": "What candidates are scored on. Each task has items for search, select and test.",
    "budget": "When the search ends.",
    "seed": "Another seed is another search.",
    "out": "The run folder. `evomerge resume` goes on from it.",
}
"""What stands above each part, where nothing else is said of it."""


def placed(location: str, out: Path) -> str:
    """Return a location as a config at `out` has it: local parts relative to it, hub ids as they are."""
    parts = []
    for part in location.split("+"):
        path = Path(part).expanduser()
        local = path.exists() or path.is_absolute()
        parts.append(os.path.relpath(path.absolute(), out.absolute().parent) if local else part)
    return "+".join(parts)


def annotated(
    document: Mapping[str, Any], comments: Mapping[str, str], head: str, notes: Sequence[str] = ()
) -> str:
    """Return a config as YAML.

    comments: key -> what stands above it. head: the first line. notes: below it.
    """
    parts = [f"# {head} All keys: docs/config.md.\n", *(_comment(f"- {note}", "  ") for note in notes)]
    for key, value in document.items():
        body = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=100)
        comment = comments.get(key) or COMMENTS.get(key)
        parts.append(f"\n{_comment(comment) if comment else ''}{body}")
    return "".join(parts)


def _comment(text: str, indent: str = "") -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent=f"# {indent}") + "\n"
