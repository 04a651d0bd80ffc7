"""The runs of a folder, one line each: state, best, verdict, age and size; read from their stores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.course import Course
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, UserError
from evomerge.running.store import StoreReader, facts
from evomerge.running.store.file import FILE
from evomerge.stored import StoredRun

DEPTH = 4
"""How many folders deep runs are looked for."""
State = Literal["running", "finished", "stopped", "unreadable"]
COLOURS = {"green": "green", "amber": "yellow", "red": "red", "running": "cyan", "unreadable": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run in a list of runs.

    name: its path below the folder that was searched. problem: why its store can't be read. best, baseline:
    mean normalised score on `search` of the best candidate and of the best baseline, 0 = base, 1 =
    specialists. gain: of the winner over the best baseline on `test`, with its 95 % interval. changed: when
    something was last stored, in epoch seconds. size: of the whole folder, in bytes. curve: the best so far
    after each generation.
    """

    folder: Path
    name: str
    state: State
    changed: float
    size: int
    problem: str | None = None
    best: float | None = None
    baseline: float | None = None
    gain: tuple[float, float, float] | None = None
    level: str | None = None
    sentence: str | None = None
    generations: int = 0
    candidates: int = 0
    evaluations: float = 0.0
    failures: int = 0
    curve: tuple[float, ...] = ()

    @property
    def verdict(self) -> str | None:
        """The gain and the colour of the verdict in few words; None before there is one."""
        if self.gain is None:
            return None
        gain, low, high = self.gain
        return f"{style.difference(gain)} {style.bounds(low, high)} {self.level}"

    def age(self, now: float) -> str:
        """Return how long ago something was stored."""
        return style.age(now - self.changed)

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {
            "folder": str(self.folder),
            "changed": datetime.fromtimestamp(self.changed).astimezone().isoformat(timespec="seconds"),
        }


def find_runs(places: Iterable[Path], *, none: bool = False) -> list[tuple[Path, str]]:
    """Return the run folders among and below some folders, each with its name.

    Hidden folders, links to folders and what lies in a run folder are left out. none: whether a folder
    without runs is fine.

    Raises:
        ConfigError: a place is no folder, or no run is there.
    """
    found: dict[Path, str] = {}
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: no such folder", expected="a run folder, or a folder with runs")
        runs = _below(place)
        if not runs and not none:
            raise ConfigError(
                f"{place}: no runs here",
                expected=f"run folders at most {DEPTH} folders deep",
                fix="check the path, or begin a run: evomerge run CONFIG",
            )
        for folder in runs:
            name = str(folder.relative_to(place)) if folder != place else folder.absolute().name
            found.setdefault(folder.absolute(), name)
    return list(found.items())


def _below(place: Path) -> list[Path]:
    runs: list[Path] = []
    for path, folders, _ in os.walk(place):
        here = Path(path)
        if StoreReader.exists(here):
            runs.append(here)
        deep = len(here.relative_to(place).parts) >= DEPTH
        folders[:] = [] if StoreReader.exists(here) or deep else sorted(f for f in folders if f[0] != ".")
    return runs


def lines(
    runs: Sequence[tuple[Path, str]], progress: Callable[[int, int], None] = lambda done, of: None
) -> list[RunLine]:
    """Return the lines of runs, running ones first, then the latest."""
    read = []
    for number, (folder, name) in enumerate(runs):
        progress(number, len(runs))
        read.append(line(folder, name))
    return sorted(read, key=lambda run: (run.state != "running", -run.changed))


def line(folder: Path, name: str) -> RunLine:
    """Return the line of a run, also of one whose store can't be read."""
    common: dict[str, Any] = {
        "folder": folder,
        "name": name,
        "changed": last_change(folder),
        "size": size_of(folder),
    }
    try:
        with StoredRun.read(folder) as stored:
            return RunLine(**common, **_facts(Summary(stored)))
    except (UserError, OSError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        what = what.removeprefix(f"{folder / FILE}: ").removeprefix(f"{folder}: ")
        return RunLine(**common, state="unreadable", problem=what)


def _facts(summary: Summary) -> dict[str, Any]:
    store, course = summary.store, Course(summary)
    told = [generation for generation in store.generations() if generation.losses is not None]
    convergence, verdict = course.convergence(), summary.verdict(summary.rows())
    test = None if verdict is None else verdict.test
    return {
        "state": state_of(store),
        "best": convergence.best_so_far[-1] if convergence.best_so_far else None,
        "baseline": convergence.best_baseline,
        "gain": None if test is None else (test.estimate, test.low, test.high),
        "level": None if verdict is None else verdict.level,
        "sentence": None if verdict is None else verdict.sentence,
        "generations": len(told),
        "candidates": sum(len(generation.recipes) for generation in told),
        "evaluations": round(course.evaluations(), 2),
        "failures": len(store.failures()),
        "curve": convergence.best_so_far,
    }


def state_of(store: StoreReader) -> State:
    """Say whether a run is finished, worked on, or neither."""
    return "finished" if facts.STOPPED.get(store) else "running" if store.held() else "stopped"


def last_change(folder: Path) -> float:
    """Return when a run's store was last written, in epoch seconds."""
    files = [folder / FILE, folder / f"{FILE}-wal"]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def size_of(folder: Path) -> int:
    """Return the size of all files in a folder, or of a file, in bytes; links are not followed."""
    if not folder.is_dir() or folder.is_symlink():
        return folder.lstat().st_size
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(path) / file).lstat().st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


def text(runs: Sequence[RunLine], now: float | None = None) -> RenderableType:
    """Return a table for a rich console. now: in epoch seconds."""
    at = time.time() if now is None else now
    table = style.table(
        style.words("run"),
        style.words("state"),
        style.numbers("best"),
        style.words("verdict"),
        style.numbers("age"),
        style.numbers("size"),
    )
    for run in runs:
        table.add_row(
            Text(run.name),
            Text(run.state, style=COLOURS.get(run.state, "")),
            style.percent(run.best),
            Text(run.verdict or style.MISSING, style=COLOURS.get(run.level or "", "")),
            run.age(at),
            style.size(run.size),
        )
    parts: list[RenderableType] = [table]
    if any(run.best is not None for run in runs):
        about = "best: points on search (0 = base, 100 = specialists)"
        about += "; verdict: gain over the best baseline on test" if any(run.gain for run in runs) else ""
        parts.append(Text(about, style="dim"))
    parts += [Text(f"{run.name}: {run.problem}", style="red") for run in runs if run.problem]
    return Group(*parts)
