"""Folders of runs: what is there, what tells two runs apart, and what can be deleted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.api.runs import AnyPath, load
from evomerge.api.view import View
from evomerge.delivery import leftovers, run_diff, run_list


def runs(folder: AnyPath = "runs", *, progress: Callable[[int, int], None] = lambda done, of: None) -> View:
    """List the runs in and below a folder: name, state, best, verdict, age and size.

    Raises:
        ConfigError: there is no such folder, or no run is there.
    """
    found = run_list.lines(run_list.find_runs([Path(folder)]), progress)
    return View([run.as_data() for run in found], lambda width: run_list.text(found))


def diff(first: AnyPath, second: AnyPath) -> View:
    """Compare two runs: keys of the configs that differ, winners, their scores on `test` and verdicts."""
    with load(first).opened() as one, load(second).opened() as other:
        data = run_diff.as_data(one, other)
    return View(data, lambda width: run_diff.text(data))


def prune(
    folder: AnyPath = "runs", *, models: bool = False, runs: Sequence[AnyPath] = (), yes: bool = False
) -> View:
    """List what can be deleted in a folder of runs, and delete it with `yes`.

    Args:
        folder: a folder with runs, or a run folder.
        models: also models that were exported into run folders.
        runs: runs to delete although they have scores.
        yes: delete what is found.
    """
    place = Path(folder)
    found = leftovers.find(place, models=models, runs=[Path(run) for run in runs])
    if yes:
        leftovers.delete(found)
    data = leftovers.as_data(place, found, deleted=yes)
    return View(data, lambda width: leftovers.text(data))
