"""Observers: displays, logs and trackers that receive the events of a run; one base class, one fan-out.

An observer derives from `Observer` and defines only the events it shows. `Observers` passes every event on to
several, in order, so none of them has to know another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.running.store import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """When a run is expected to end, in epoch seconds, and what it will have cost; None: not known.

    search_ends: when no further generation starts. made: when the estimate was made. spent: the cost so far.
    """

    made: float
    search_ends: float | None
    ends: float | None
    cost: float | None
    spent: float | None

    def as_data(self) -> dict[str, Any]:
        """Return it as a fact of the store."""
        return dataclasses.asdict(self)


class Observer:
    """Receives the events of a run. All methods do nothing; override those you need.

    >>> class Best(Observer):
    ...     def generation_done(self, generation: int, evaluations: float, best: float) -> None:
    ...         print(f"generation {generation}: {best:.2f}")
    >>> everyone = Observers(Observer(), Best())
    >>> everyone.phase("generation 0", 8, 0)
    >>> everyone.generation_done(0, 8.0, 0.75)
    generation 0: 0.75
    """

    def phase(self, name: str, jobs: int, known: int) -> None:
        """A batch of `jobs` recipes starts, of which `known` are answered from the store."""

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """A recipe was just scored, or failed."""

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """The losses of a generation were passed to the optimizer.

        evaluations: spent so far, all generations. best: the highest mean normalised `search` score so far.
        """

    def expected(self, estimate: Estimate) -> None:
        """A new estimate of the run's end, after every generation that was scored rather than replayed."""

    def noted(self, message: str) -> None:
        """Something worth a line, such as a candidate that had to be tried again."""

    def recorded(self, event: str, values: Mapping[str, Any]) -> None:
        """The store committed an event (asked, scored, failed, entry, gradient); values: plain JSON data."""


class StopsAtPhases(Observer):
    """Asks before every phase, and after every candidate, whether the run should have stopped.

    check: raises an exception to stop the run.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Ask."""
        self._check()

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """Ask."""
        self._check()


class Observers(Observer):
    """Passes every event on to several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.phase(name, jobs, known)

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.scored(recipe, result, timing)

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.generation_done(generation, evaluations, best)

    def expected(self, estimate: Estimate) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.expected(estimate)

    def noted(self, message: str) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.noted(message)

    def recorded(self, event: str, values: Mapping[str, Any]) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.recorded(event, values)
