"""Looks: how often one `test` was used, over all runs of a machine.

A `test` that many runs were compared on is no longer unseen: who keeps the best of ten runs selects on it.
Each use is a line of JSON in the user's state folder: EVOMERGE_STATE, else XDG_STATE_HOME/evomerge, else
~/.local/state/evomerge. Where it can't be written or read, nothing is counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.files import expanded, read_regular

_FILE = "test_looks.jsonl"
_LARGEST = 50_000_000
"""Bytes of the file that are read."""


def note(test: str, run: Path | str) -> None:
    """Note that a run scored `test`.

    test: `Suite.test_digest`. run: the run folder, or what else scored it.
    """
    name = str(run.absolute()) if isinstance(run, Path) else run
    if (test, name) in _looks():
        return
    with contextlib.suppress(OSError, ConfigError, RuntimeError):
        _folder().mkdir(parents=True, exist_ok=True)
        line = json.dumps({"test": test, "run": name, "time": round(time.time())})
        with (_folder() / _FILE).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def runs_on_the_test_of(folder: Path) -> int:
    """Return how many runs used the `test` that a run used, itself included; 0 if it is not noted."""
    looks = set(_looks())
    tests = {test for test, run in looks if run == str(folder.absolute())}
    return max((sum(other == test for other, _ in looks) for test in tests), default=0)


def _folder() -> Path:
    if place := os.environ.get("EVOMERGE_STATE"):
        return expanded(place)
    return expanded(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "evomerge"


def _looks() -> Iterator[tuple[str, str]]:
    """Yield what was used and by whom; lines of another form are left out."""
    try:
        content = read_regular(_folder() / _FILE, _LARGEST)
    except (OSError, ConfigError, RuntimeError):
        return
    for line in content.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            yield str(entry["test"]), str(entry["run"])
