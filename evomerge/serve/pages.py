"""The pages of some runs, made again when a run has stored more, and seldom enough not to slow it down."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.delivery import candidate_page, report_page, run_list, runs_page
from evomerge.delivery.page import Served
from evomerge.delivery.run_list import RunLine
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError
from evomerge.running.store.file import FILE, content_state, holder
from evomerge.stored import StoredRun

PAUSE, SHARE = 2.0, 10.0
"""Between two pages of a run lie so many seconds, and so many times what the last one took to make."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Something made of a run: the run's stamp then, and the time from which on it may be made again."""

    stamp: str
    value: Any
    due: float


class Pages:
    """Index, reports and candidates of the runs in some folders. Runs have numbers, which they keep."""

    def __init__(self, places: Sequence[Path], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._places, self._clock = places, clock
        self._runs: list[tuple[Path, str]] = []
        self._there: set[Path] = set()
        self._looked = -math.inf
        self._kept: dict[tuple[str, Path], _Kept] = {}
        self._lock = threading.Lock()

    def runs(self) -> list[tuple[int, Path, str]]:
        """Return number, folder and name of all runs; those that began since are found."""
        with self._lock:
            if self._clock() >= self._looked + PAUSE:
                found = run_list.find_runs(self._places, none=True)
                known = {folder for folder, _ in self._runs}
                self._runs += [(folder, name) for folder, name in found if folder not in known]
                self._there, self._looked = {folder for folder, _ in found}, self._clock()
            return [(n, folder, name) for n, (folder, name) in enumerate(self._runs) if folder in self._there]

    def folder(self, number: int) -> tuple[Path, str]:
        """Return folder and name of a run; raise ConfigError where there is none."""
        for known, folder, name in self.runs():
            if known == number:
                return folder, name
        raise ConfigError(f"run {number}: no such run", fix="see the list of runs")

    def stamp(self, number: int | None = None) -> str:
        """Return what changes when the page of a run (None: the index) has something new to show."""
        if number is None:
            return "-".join([str(n) + self._stamp("line", folder) for n, folder, _ in self.runs()])
        return self._stamp("report", self.folder(number)[0])

    def _stamp(self, kind: str, folder: Path) -> str:
        kept = self._kept.get((kind, folder))
        return kept.stamp if kept is not None and self._clock() < kept.due else _state(folder)

    def _made(self, kind: str, folder: Path, make: Callable[[str], Any]) -> Any:
        """Return what `make` returns for the run's stamp, or returned before where that is recent enough."""
        with self._lock:
            stamp, key = self._stamp(kind, folder), (kind, folder)
            kept = self._kept.get(key)
            if kept is None or kept.stamp != stamp:
                began = self._clock()
                value = make(stamp)
                ended = self._clock()
                kept = _Kept(stamp, value, ended + max(PAUSE, SHARE * (ended - began)))
                self._kept[key] = kept
            return kept.value

    def index(self) -> str:
        """Return the page of all runs."""
        stamp, runs = self.stamp(), self.runs()
        lines: list[tuple[int, RunLine]] = [
            (number, self._made("line", folder, _line(folder, name))) for number, folder, name in runs
        ]
        return runs_page.page(lines, Served(stamp=stamp, events="/events"))

    def report(self, number: int) -> str:
        """Return the report of a run as it is now."""
        folder, name = self.folder(number)

        def make(stamp: str) -> str:
            with StoredRun.read(folder) as stored:
                return report_page.page(Summary(stored), live=_live(number, name, stored, stamp))

        made: str = self._made("report", folder, make)
        return made

    def candidates(self, number: int) -> str:
        """Return the table of all candidates of a run."""
        folder, name = self.folder(number)
        with self._lock, StoredRun.read(folder) as stored:
            return candidate_page.table(Summary(stored), _live(number, name, stored))

    def candidate(self, number: int, pick: str, task: str | None) -> str:
        """Return the page of a candidate; task: whose items it lists."""
        folder, name = self.folder(number)
        with self._lock, StoredRun.read(folder) as stored:
            return candidate_page.page(Summary(stored), pick, task, _live(number, name, stored))


def _line(folder: Path, name: str) -> Callable[[str], RunLine]:
    return lambda stamp: run_list.line(folder, name)


def _live(number: int, name: str, stored: StoredRun, stamp: str = "") -> Served:
    """Return what a page of a run needs; without a stamp it does not follow the run."""
    events = f"/run/{number}/events" if stamp else ""
    return Served(
        stamp=stamp, events=events, run=f"/run/{number}", name=name, state=run_list.state_of(stored.store)
    )


def _state(folder: Path) -> str:
    """Return what changes when a run stores something, or its process begins or ends."""
    return format(hash((content_state(folder / FILE), holder(folder) is not None)) & (2**64 - 1), "x")
