"""Where lm-eval's own tasks are: their folders by name, from the text of their files.

Its index of all tasks takes many seconds to build; the index of a few folders takes none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import lm_eval.tasks


def folders(names: Iterable[str]) -> list[str]:
    """Return the folders with the files of lm-eval's tasks of these names."""
    found = places()
    return sorted({folder for name in names for folder in found.get(name, ())})


def mentioned(name: str) -> bool:
    """Whether any file of lm-eval's tasks holds a name: a task, or a group of tasks."""
    if name in places():
        return True
    root = Path(lm_eval.tasks.__file__).parent
    return any(name.encode() in path.read_bytes() for path in root.rglob("*.yaml"))


@functools.cache
def places() -> dict[str, set[str]]:
    """Return the folders in which a file says the name of one of lm-eval's tasks, by name."""
    says = re.compile(rb"^['\"]?task['\"]?:\s*['\"]?([^'\"\s#]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)
    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.yaml"):
        for name in says.findall(path.read_bytes()):
            found.setdefault(name.decode(errors="replace"), set()).add(str(path.parent))
    return found
