"""Searches: begin a run, go on with one, check a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import compose
from evomerge.api.callbacks import Callback, observer
from evomerge.api.configs import Answers, AnyConfig, read
from evomerge.api.runs import AnyPath, Run
from evomerge.api.view import View
from evomerge.config import RunConfig
from evomerge.delivery import check as check_delivery
from evomerge.delivery.summary import Summary
from evomerge.delivery.tracking import Tracked, require_packages
from evomerge.evaluation import sandbox
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.merging.tensors import kernels
from evomerge.prepare import check_folder, prepare, with_judges
from evomerge.running.observers import Observer, Observers
from evomerge.stored import StoredRun, config_to_resume, environment_note
from evomerge.trial import probe, refuse_nothing


def optimize(
    config: AnyConfig,
    *,
    scorer: Answers | None = None,
    callbacks: Sequence[Callback | Observer] = (),
    seed: int | None = None,
    out: AnyPath | None = None,
    permissions: Permissions = NOTHING,
    full_hash: bool = False,
    **budget: Any,
) -> Run:
    """Run a config to its end: baselines, search, selection, test. A stored run of the config is continued.

    Scripts that use worker processes need `if __name__ == "__main__":`, as all that start processes do; in
    notebooks and without it, set `executor: {name: inline}`.

    Args:
        config: the path of a YAML file, or a dict with the same keys; relative paths of a dict start in the
            working directory.
        scorer: scores generated answers of your own data: (answer, row) -> a number, or several by name. For
            tasks of a suite that is written out in the config, with `data`, without `scorer` and `choices`.
        callbacks: functions that are called with the events of the run, as callback(event, values); or
            observers.
        seed, out: replace those of the config.
        permissions: which code of the suite's tasks may run.
        full_hash: hash every byte of the models, and compare with the last such check.
        **budget: `scores_from`, and limits that replace those of the config, like `evaluations=60` or
            `hours=8`.

    Returns:
        The finished run.

    Raises:
        UserError: the config, the models, the data or the run folder have a mistake; its text says which.

    Example:
        >>> def overnight() -> None:
        ...     run = optimize("run.yaml", hours=8, callbacks=[print])
        ...     print(run.report())
        ...     run.export("merged")
    """
    loaded = read(config, scorer=scorer, seed=seed, out=out, **budget).permitting(permissions)
    return execute(loaded, observer(callbacks), full_hash=full_hash)


def resume(
    folder: AnyPath,
    *,
    models: Mapping[str, str] | None = None,
    suite: str | None = None,
    callbacks: Sequence[Callback | Observer] = (),
    permissions: Permissions = NOTHING,
    full_hash: bool = False,
    **budget: Any,
) -> Run:
    """Go on with a stored run, after a crash, an interruption, or with a larger budget.

    Args:
        folder: the run folder.
        models: new places of models that were moved. suite: of the suite's file.
        callbacks, permissions, full_hash: as in `optimize`.
        **budget: limits that replace the stored ones.

    Raises:
        UserError: the run can't go on; its text says why.
    """
    config = resumed_config(folder, models=models, suite=suite, permissions=permissions, **budget)
    return execute(config, observer(callbacks), full_hash=full_hash)


def resumed_config(
    folder: AnyPath,
    *,
    models: Mapping[str, str] | None = None,
    suite: str | None = None,
    permissions: Permissions = NOTHING,
    **budget: Any,
) -> RunConfig:
    """Return the config with which `resume` goes on."""
    return config_to_resume(Path(folder), models=models, suite=suite, **budget).permitting(permissions)


def execute(
    config: RunConfig,
    shown: Observer,
    *,
    full_hash: bool = False,
    say: Callable[[str], None] = lambda note: None,
    changed: Callable[[str], None] = lambda note: None,
    warn: Callable[[str], None] = lambda note: None,
) -> Run:
    """Run a config that was read, and tell trackers and an observer.

    say: gets notes on the environment. changed: gets what changed in it since the run began. warn: gets what
    trackers complain about.
    """
    for text in (*kernels.notes(), *sandbox.notes(config.permissions)):
        say(text)
    folder = Path(config.out)
    require_packages(config.tracking)
    if (note := environment_note(folder)) is not None:
        changed(note)
    with Tracked(config.tracking, folder, warn=warn) as tracked:
        compose.start(config, Observers(shown, tracked), full_hash=full_hash)
        with StoredRun.read(folder) as stored:
            tracked.finish(Summary(stored), folder / "report.html")
    return Run(folder)


def check(config: AnyConfig, *, permissions: Permissions = NOTHING, **replaced: Any) -> View:
    """Check a config, its models and tasks, and estimate time and cost; nothing is stored.

    Args:
        config, permissions: as in `optimize`.
        **replaced: scorer, seed, out and limits, as there.

    Raises:
        UserError: the run could not start, or would measure hardly anything.
    """
    view, refuse = checked(config, permissions=permissions, **replaced)
    refuse()
    return view


def checked(
    config: AnyConfig, *, permissions: Permissions = NOTHING, **replaced: Any
) -> tuple[View, Callable[[], None]]:
    """Return what `check` says, and what raises where the run would measure hardly anything."""
    loaded = read(config, **replaced).permitting(permissions)
    require_packages(loaded.tracking)
    prepared = with_judges(prepare(loaded))
    check_folder(prepared)
    items = check_delivery.asked(prepared)
    estimate = probe(prepared)
    view = View(
        check_delivery.as_data(prepared, estimate, items),
        lambda width: check_delivery.text(prepared, estimate, items),
    )
    return view, lambda: refuse_nothing(prepared, estimate)
