"""Commands that search: init, convert, check, run, resume, migrate, doctor, demo.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge import steps
from evomerge.cli.groups import app
from evomerge.cli.options import (
    AnswerOption,
    BaseOption,
    ChoicesOption,
    ConfigArgument,
    DataOption,
    DeviceOption,
    EvaluationsOption,
    FullHashOption,
    HoursOption,
    LostConfigOption,
    MetricOption,
    MovedModelsOption,
    MovedSuiteOption,
    NewConfigOption,
    PromptOption,
    RunArgument,
    SalvageOption,
    ScoredOnOption,
    ScoresFromOption,
    SeedOption,
    SourceOption,
    TrialOption,
    WorkersOption,
)
from evomerge.cli.questions import asked_for, named_files
from evomerge.cli.reports import export_demo, show_report
from evomerge.cli.terminal import (
    command,
    complain,
    output,
    progress_line,
    raise_swallowed,
    relative,
    warn,
)
from evomerge.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Live, Silent


@command(app, "init")
def init(
    base: BaseOption = None,
    source: SourceOption = None,
    suite: ScoredOnOption = None,
    data: DataOption = None,
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    choices: ChoicesOption = None,
    metric: MetricOption = None,
    evaluations: EvaluationsOption = None,
    hours: HoursOption = None,
    trial: TrialOption = True,
    out: NewConfigOption = Path("run.yaml"),
) -> None:
    """Write a run config for your models and data: space, suite and budget are chosen and explained."""
    from evomerge.api.setup import init as write

    base, named, suite, files = asked_for(base, source, suite, data)
    with progress_line("reading the models") as progress, steps.told(progress):
        done = write(
            base,
            named,
            suite=suite,
            data=files,
            prompt=prompt,
            answer=answer,
            choices=choices,
            metric=metric,
            out=out,
            evaluations=evaluations,
            hours=hours,
            try_out=trial,
            progress=progress,
        )
    output.say(done.text)
    output.data(done.as_data())


@command(app, "convert")
def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A config of mergekit-evolve or mergenetic, or a mergekit YAML."),
    ],
    evaluations: Annotated[
        int | None, typer.Option("--evaluations", min=1, help="Full evaluations of the run's budget.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The base, in place of the file's.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="The merge method, which mergenetic's configs don't name.")
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option("--tasks-dir", metavar="FOLDER", help="The folder of lm-eval task files of your own."),
    ] = None,
    suite: ScoredOnOption = None,
    data: DataOption = None,
    out: NewConfigOption = Path("run.yaml"),
) -> None:
    """Write a run config from one of mergekit-evolve or mergenetic, or one that starts from a merge."""
    from evomerge.api.setup import convert as write

    done = write(
        file,
        out=out,
        evaluations=evaluations,
        base=base,
        method=method,
        tasks_dir=tasks_dir,
        suite=suite,
        data=named_files(data or []),
    )
    output.say(done.text)
    output.data(done.as_data())


@command(app, "check")
def check(config: ConfigArgument, permissions: Any = None) -> None:
    """Check a run config (models, space, suite, tasks); estimate time and cost. Starts nothing."""
    from evomerge.api.search import checked

    with progress_line("reading the models") as say, steps.told(say):
        view, refuse = checked(config, permissions=permissions)
    output.show(view)
    refuse()
    output.say("ready to run")


@command(app, "run", budget=True)
def run(
    config: ConfigArgument,
    seed: SeedOption = None,
    limits: Any = None,
    out: Annotated[Path | None, typer.Option("--out", help="Replace the config's run folder.")] = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    scores_from: ScoresFromOption = None,
    full_hash: FullHashOption = False,
    permissions: Any = None,
) -> None:
    """Run a config: baselines, search, selection, test, report. Continues the run in its folder, if any."""
    from evomerge.api.configs import read

    loaded = read(
        config, seed=seed, out=out, workers=workers, device=device, scores_from=scores_from, **limits
    )
    _run(loaded.permitting(permissions), full_hash=full_hash)


@command(app, "resume", budget=True)
def resume(
    run: RunArgument,
    limits: Any = None,
    model: MovedModelsOption = None,
    suite: MovedSuiteOption = None,
    full_hash: FullHashOption = False,
    permissions: Any = None,
) -> None:
    """Continue a stored run after a crash, an interruption, or with a larger budget."""
    from evomerge.api.search import resumed_config

    config = resumed_config(
        run, models=_locations(model or []), suite=suite, permissions=permissions, **limits
    )
    _run(config, full_hash=full_hash)


def _locations(options: list[str]) -> dict[str, str]:
    """Return model name -> path from the values of `--model`."""
    for option in options:
        if not all(option.partition("=")[::2]):
            raise ConfigError(f"--model {option}: no path", expected="NAME=PATH, as in base=models/llama")
    return dict(option.split("=", 1) for option in options)


@command(app, "migrate")
def migrate(run: RunArgument) -> None:
    """Migrate a run stored by an older evomerge to the current format; the old store is kept as a copy."""
    from evomerge.api import stores

    done = stores.migrate(run)
    if done is None:
        output.say(f"{relative(run)}: nothing to do, the store is up to date")
    else:
        output.say(
            f"{relative(run)}: migrated from schema version {done.before}; "
            f"the old store is kept at {relative(done.backup)}"
        )
        if not done.continues:
            output.say(
                "this version can't replay its search: `report`, `show` and `export` work, `resume` does not"
            )
    output.data({"run": str(run), "migrated": done is not None, **stores.migrated_data(done)})


@command(app, "doctor")
def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run folder; without it, this machine.")
    ] = None,
    salvage: SalvageOption = None,
    config: LostConfigOption = None,
) -> None:
    """Check this machine, or every row of a run's store. Changes nothing; exit code 2 for faults."""
    from evomerge.api import setup, stores

    if run is None:
        if salvage is not None or config is not None:
            raise ConfigError("doctor: --salvage and --config are for a run", fix="name the run folder")
        view = setup.doctor()
        output.show(view)
        setup.refuse_faults(view)
        return
    found = stores.examine(run)
    output.say(found.draw(output.console.width))
    if salvage is not None:
        output.show(found.salvage(salvage, config))
        return
    output.data(found.data)
    found.refuse()
    output.say(f"{relative(run)}: whole")


def _run(config: RunConfig, *, full_hash: bool = False) -> None:
    from evomerge.api.search import execute
    from evomerge.running.observers import Observers, StopsAtPhases
    from evomerge.running.store import StoreReader

    folder = Path(config.out)
    try:
        with _observer() as shown:
            execute(
                config,
                Observers(StopsAtPhases(raise_swallowed), shown),
                full_hash=full_hash,
                say=lambda note: output.say(f"note: {note}"),
                changed=lambda note: complain(f"note: {note}", style="yellow"),
                warn=warn,
            )
        show_report(folder)
    except ClusterError as error:
        if StoreReader.exists(folder):
            command = f"evomerge resume {shlex.quote(relative(folder))}{config.permissions.options}"
            raise error.with_more(f"then: {command}") from None
        raise
    except KeyboardInterrupt as interrupt:
        if StoreReader.exists(folder):
            command = f"evomerge resume {shlex.quote(relative(folder))}{config.permissions.options}"
            interrupt.args = (f"stopped; everything scored so far is stored. Go on with:\n  {command}",)
        raise


def _observer() -> AbstractContextManager[Live | Silent]:
    from evomerge.delivery.progress import Live, Silent

    return Silent() if output.quiet or output.json else Live(output.console)


@command(app, "demo")
def demo(
    seed: SeedOption = None,
    evaluations: EvaluationsOption = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Search, report, export and re-score on the models that come with evomerge (under five minutes)."""
    from evomerge.api.configs import read
    from evomerge.config import DEMO_CONFIG

    config = read(DEMO_CONFIG, seed=seed, out=out, evaluations=evaluations)
    _run(config)
    export_demo(out)
