"""Live progress of a run in the terminal: phase, best so far, failures, time left."""

from __future__ import annotations

import time
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from evomerge import steps
from evomerge.delivery.style import elapsed, points
from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.running.clock import brief, span
from evomerge.running.observers import Estimate, Observer
from evomerge.running.store import Timing

NARROW = 100
"""Columns of a terminal below which the line is shortened, so that bar, best score and end stay in it."""


class Silent(Observer):
    """An observer that shows nothing (`--quiet`, `--json`)."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Elapsed(ProgressColumn):
    """Time since the command began; rich's TimeElapsedColumn stops at the first full bar."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def render(self, task: Task) -> Text:
        """Return the time as m:ss or h:mm:ss."""
        return Text(elapsed(time.monotonic() - self._started), style="dim")


class Live(Observer):
    """Shows the state of a run in one line; on a dumb terminal or in a file, one line per phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._narrow = console.width < NARROW
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8 if self._narrow else 24),
            MofNCompleteColumn(),
            _Elapsed(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="loading models and tasks")
        self._failures = 0
        self._estimate: Estimate | None = None
        self._estimate_printed = False
        self._best: float | None = None
        self._phase = ""
        self._steps = ExitStack()

    def __enter__(self) -> Live:
        self._bar.start()
        self._steps.enter_context(steps.told(self._step))
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()
        self._bar.stop()

    def _step(self, text: str) -> None:
        if not self._phase:
            self._bar.update(self._task, note=text)

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Start a new bar; `known` of `jobs` are in the store already."""
        generation = name.startswith("generation ")
        label = "search" if generation else name
        if label != self._phase:
            self._phase = label
            if not self._console.is_terminal:
                models = f"{jobs} model{'s' * (jobs != 1)}"
                message = "search started" if generation else f"{label}: {models}"
                self._console.print(message, highlight=False, markup=False)
        self._bar.update(self._task, description=name, total=jobs, completed=known, note=self._note())

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """Advance by one scored recipe."""
        if isinstance(result, Failure):
            self._failures += 1
            self._console.print(f"failed: {recipe.hash[:12]}: {result.reason}", highlight=False, markup=False)
        self._bar.update(self._task, advance=1, note=self._note())

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Show the best mean score so far."""
        self._best = best
        self._bar.update(self._task, note=self._note())
        first = self._estimate is not None and not self._estimate_printed
        if not self._console.is_terminal and (first or (generation + 1) % 10 == 0):
            self._estimate_printed = True
            self._console.print(f"generation {generation}: {self._note()}", highlight=False)

    def expected(self, estimate: Estimate) -> None:
        """Keep the estimate of the run's end, to show it."""
        self._estimate = estimate

    def noted(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, highlight=False, markup=False)

    def _note(self) -> str:
        parts = [] if self._best is None else [f"best {points(self._best)}"]
        if self._failures:
            parts.append(f"{self._failures} failed")
        if self._estimate is not None:
            parts += outlook(self._estimate, short=self._narrow and self._console.is_terminal)
        return ", ".join(parts)


def outlook(estimate: Estimate, *, short: bool = False) -> list[str]:
    """Return the expected end and cost of a run as short phrases; those that are unknown are left out.

    short: only the end of the run.
    """
    phrases = []
    if short and estimate.ends is not None:
        return [f"ends {brief(estimate.ends, estimate.made)}"]
    if estimate.search_ends is not None and estimate.ends is not None:
        if (left := estimate.search_ends - estimate.made) > 0:
            phrases.append(f"search ends in about {span(left)}")
        phrases.append(f"run ends about {brief(estimate.ends, estimate.made)}")
    if estimate.spent is not None:
        total = "" if estimate.cost is None else f" of about {estimate.cost:.2f}"
        phrases.append(f"cost {estimate.spent:.2f}{total}")
    return phrases
