"""Before a run: a config for models and data at hand, and what this machine lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evomerge.api.runs import AnyPath
from evomerge.api.view import View
from evomerge.delivery import environment, new_run
from evomerge.delivery.convert import writer
from evomerge.delivery.convert.draft import ConvertOptions
from evomerge.delivery.convert.writer import Converted
from evomerge.delivery.new_run import NewRun, OwnTask
from evomerge.errors import UserError


def init(
    base: AnyPath,
    sources: Mapping[str, AnyPath],
    *,
    suite: str | None = None,
    data: Mapping[str, AnyPath] | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    choices: str | None = None,
    metric: str | None = None,
    out: AnyPath = "run.yaml",
    run_folder: str | None = None,
    evaluations: int | None = None,
    hours: float | None = None,
    try_out: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> NewRun:
    """Write a run config for some models, with everything chosen that can be chosen.

    Args:
        base: the model that the others are fine-tunes of: a folder, a hub id, or `path+adapter`.
        sources: name -> location of the fine-tunes.
        suite: a preset's name or a file that candidates are scored on.
        data: or name -> a .jsonl or .csv file of your own; the source of the same name is its specialist.
        prompt, answer, choices, metric: of the data files; None is guessed from their columns.
        out: the YAML to write, which must not exist.
        run_folder: where the run will be stored; None is `runs/` and the name of `out`.
        evaluations, hours: of the budget; None takes what ends within ten hours.
        try_out: score two candidates, which tells how long the run takes.
        progress: gets what is being done.

    Raises:
        UserError: models, suite or data have a mistake; nothing is written.
    """
    files = [(name, Path(file)) for name, file in (data or {}).items()]
    tasks: Sequence[OwnTask] = [
        OwnTask(name=name, file=file, prompt=prompt, answer=answer, choices=choices, metric=metric)
        for name, file in files
    ]
    return new_run.write(
        str(base),
        {name: str(place) for name, place in sources.items()},
        suite=suite,
        data=tasks,
        out=Path(out),
        run_folder=run_folder,
        evaluations=evaluations,
        hours=hours,
        try_out=try_out,
        progress=progress,
    )


def convert(
    file: AnyPath,
    *,
    out: AnyPath = "run.yaml",
    run_folder: str | None = None,
    evaluations: int | None = None,
    base: AnyPath | None = None,
    method: str | None = None,
    tasks_dir: AnyPath | None = None,
    suite: str | None = None,
    data: Mapping[str, AnyPath] | None = None,
) -> Converted:
    """Write the run config that a file of mergekit-evolve, mergenetic or mergekit stands for.

    Args:
        file: its config; a mergekit YAML becomes a warm start.
        out: the YAML to write, which must not exist.
        run_folder: where the run will be stored; None is `runs/` and a name of the file or of `out`.
        evaluations: of the budget; None takes what the file says, or its project's default.
        base: the base model, in place of the file's.
        method: the merge method of a mergenetic config, which does not name it.
        tasks_dir: the folder of lm-eval task files that the tasks come from.
        suite, data: what to score on, as in `init`, in place of the file's tasks.

    Raises:
        UserError: the file is none of these or not valid, or something of it has no counterpart; nothing is
            written.
    """
    options = ConvertOptions(
        out=Path(out),
        run_folder=run_folder,
        evaluations=evaluations,
        base=None if base is None else str(base),
        method=method,
        tasks_dir=None if tasks_dir is None else Path(tasks_dir),
        suite=suite,
        data=[OwnTask(name=name, file=Path(place)) for name, place in (data or {}).items()],
    )
    return writer.convert(Path(file), options)


def doctor(folder: AnyPath = ".") -> View:
    """Look at this machine and its libraries: devices, compiler, memory, extras, disk.

    folder: where runs would be written.
    """
    findings = environment.examine(Path(folder))
    return View(environment.as_data(findings), lambda width: environment.table(findings))


def refuse_faults(view: View) -> None:
    """Raise UserError where `doctor` found a fault."""
    if count := view.data["faults"]:
        raise UserError(f"{count} fault{'s' * (count > 1)}, listed above", fix="mend them before a run")
