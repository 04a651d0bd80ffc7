"""Live progress of a run in the terminal: phase, best so far, failures, time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.running.budget import BudgetSpec
from evomerge.running.store import Timing


class Silent:
    """An observer that shows nothing (`--quiet`, `--json`)."""

    def phase(self, name: str, jobs: int, known: int) -> None: ...

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None: ...

    def generation_done(self, generation: int, evaluations: float, best: float) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Elapsed(ProgressColumn):
    """Time since the command began; rich's own column stops at the first full bar."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def render(self, task: Task) -> Text:
        """Return the time as m:ss or h:mm:ss."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}", style="dim")


class Live:
    """One line that tells where a run stands; on a dumb terminal or in a file, one line per phase."""

    def __init__(self, console: Console, budget: BudgetSpec) -> None:
        self._console, self._budget = console, budget
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Elapsed(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="loading models and tasks")
        self._fresh, self._failures = 0, 0
        self._told, self._spent = 0.0, 0.0
        """Evaluations used when the last generation was told, and when this session's work began."""
        self._pace: float | None = None
        self._best: float | None = None
        self._searching = False
        self._pace_since: float | None = None
        self._phase = ""

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Start a new bar: `known` of `jobs` are answered from the store."""
        generation = name.startswith("generation ")
        self._searching = generation
        label = "search" if generation else name
        if label != self._phase:
            self._phase = label
            if not self._console.is_terminal:
                self._console.print(f"{label}: {jobs} models" if not generation else "search started")
        self._bar.update(self._task, description=name, total=jobs, completed=known, note=self._note())

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """Advance by one scored recipe."""
        if isinstance(result, Failure):
            self._failures += 1
            self._console.print(f"failed: {recipe.hash[:12]}: {result.reason}", highlight=False, markup=False)
        if self._searching:
            self._fresh += 1
            self._pace_since = self._pace_since or time.monotonic()
        self._bar.update(self._task, advance=1, note=self._note())

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Note the best mean score so far, and how fast the budget is being used."""
        if self._fresh and self._pace_since is not None:
            spent = evaluations - self._spent
            self._pace = (time.monotonic() - self._pace_since) / spent if spent else None
        else:
            self._spent = evaluations
        self._told = evaluations
        self._best = best
        self._bar.update(self._task, note=self._note())
        if not self._console.is_terminal and (generation + 1) % 10 == 0:
            self._console.print(f"generation {generation + 1}: {self._note()}", highlight=False)

    def _note(self) -> str:
        parts = [] if self._best is None else [f"best so far {100 * self._best:.1f} points"]
        left = self._seconds_left()
        if left is not None:
            parts.append(f"search ends in about {_clock(left)}")
        if self._failures:
            parts.append(f"{self._failures} failed")
        return ", ".join(parts)

    def _seconds_left(self) -> float | None:
        """Time to the end of the search, from the pace of the generations scored in this session."""
        if self._pace is None or self._budget.evaluations is None:
            return None
        return max(0.0, self._pace * (self._budget.evaluations - self._told))


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
