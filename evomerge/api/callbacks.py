"""Callbacks: functions that a run tells its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.running.observers import Observer, Observers
from evomerge.running.store import ID, Timing

Callback = Callable[[str, Mapping[str, Any]], None]
"""Called as callback(event, values); see `Callbacks`."""


class Callbacks(Observer):
    """Passes the events of a run to a function.

    The events and their values: `phase` (name, jobs, known), `scored` (id, recipe, task -> score, or
    failure), `generation` (generation, evaluations, best) and `note` (text). An exception of the function
    ends the run as Ctrl-C would: what was scored is stored, and the run can go on later.
    """

    def __init__(self, function: Callback) -> None:
        self._function = function

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Pass on that a batch of recipes starts."""
        self._function("phase", {"name": name, "jobs": jobs, "known": known})

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """Pass on the scores of a recipe."""
        values: dict[str, Any] = {"id": recipe.hash[:ID], "recipe": recipe.hash}
        if isinstance(result, Failure):
            values["failure"] = result.reason
        else:
            values["split"] = result.split
            values["tasks"] = {scores.task: scores.mean for scores in result}
        self._function("scored", values)

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Pass on that a generation is complete."""
        self._function("generation", {"generation": generation, "evaluations": evaluations, "best": best})

    def noted(self, message: str) -> None:
        """Pass on a note."""
        self._function("note", {"text": message})


def observer(callbacks: Sequence[Callback | Observer]) -> Observer:
    """Return one observer for functions and observers."""
    return Observers(*(each if isinstance(each, Observer) else Callbacks(each) for each in callbacks))
