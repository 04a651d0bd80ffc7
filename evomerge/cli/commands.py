"""The command line: one thin command per verb.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge import __version__
from evomerge.cli.forms import COMPARED, check_form, say_adapter, say_file
from evomerge.cli.options import (
    ConfigArgument,
    DrawsOption,
    EvaluationsOption,
    FolderArgument,
    FormArgument,
    FormOption,
    FullHashOption,
    JsonOption,
    KeepRestOption,
    LabelsOption,
    LostConfigOption,
    ModelArgument,
    ModelsOption,
    MovedModelsOption,
    MovedSuiteOption,
    QuietOption,
    RankOption,
    RunArgument,
    SalvageOption,
    SeedOption,
    SplitOption,
)
from evomerge.cli.terminal import (
    as_program,
    command,
    complain,
    output,
    progress_bar,
    raise_swallowed,
    relative,
    warn,
)
from evomerge.errors import ClusterError, ConfigError, DiskError, UserError, nearest

if TYPE_CHECKING:
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Live, Silent
    from evomerge.delivery.tracking import Tracked

app = typer.Typer(
    help="Search for the best merge of language models: per-layer weights, densities and methods.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
zoo = typer.Typer(help="The demo models: a small base and its specialists.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
spaces = typer.Typer(help="The search-space presets, and the genes of one.")
app.add_typer(spaces, name="spaces")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"evomerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: QuietOption = False,
    json_: JsonOption = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    output.quiet, output.json = quiet, json_


@command(app, "check")
def check(config: ConfigArgument, permissions: Any = None) -> None:
    """Check a run config (models, space, suite, tasks); estimate time and cost. Starts nothing."""
    from evomerge.config import RunConfig
    from evomerge.delivery import check as delivery
    from evomerge.delivery.tracking import require_packages
    from evomerge.prepare import check_folder, prepare
    from evomerge.trial import probe

    loaded = RunConfig.load(config).permitting(permissions)
    require_packages(loaded.tracking)
    prepared = prepare(loaded)
    check_folder(prepared)
    estimate = probe(prepared)
    output.say(delivery.text(prepared, estimate))
    output.data(delivery.as_data(prepared, estimate))


@command(app, "run", budget=True)
def run(
    config: ConfigArgument,
    seed: SeedOption = None,
    limits: Any = None,
    out: Annotated[Path | None, typer.Option("--out", help="Replace the config's run folder.")] = None,
    full_hash: FullHashOption = False,
    permissions: Any = None,
) -> None:
    """Run a config: baselines, search, selection, test, report. Continues the run in its folder, if any."""
    from evomerge.config import RunConfig

    place = None if out is None else str(out)
    loaded = RunConfig.load(config, seed=seed, out=place, **limits).permitting(permissions)
    _run(loaded, full_hash=full_hash)


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
    from evomerge.stored import config_to_resume

    config = config_to_resume(run, models=_locations(model or []), suite=suite, **limits)
    _run(config.permitting(permissions), full_hash=full_hash)


def _locations(options: list[str]) -> dict[str, str]:
    """Return model name -> path from the values of `--model`."""
    for option in options:
        if not all(option.partition("=")[::2]):
            raise ConfigError(f"--model {option}: no path", expected="NAME=PATH, as in base=models/llama")
    return dict(option.split("=", 1) for option in options)


@command(app, "migrate")
def migrate(run: RunArgument) -> None:
    """Migrate a run stored by an older evomerge to the current format; the old store is kept as a copy."""
    from evomerge.running.store import migrations

    done = migrations.migrate(run)
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
    output.data({"run": str(run), "migrated": done is not None, **migrations.as_data(done)})


@command(app, "doctor")
def doctor(run: RunArgument, salvage: SalvageOption = None, config: LostConfigOption = None) -> None:
    """Check a run's store: every row by its checksum. Changes nothing; exit code 2 where it is damaged."""
    from evomerge.delivery import doctor as delivery

    diagnosis = delivery.examine(run)
    output.say(delivery.text(diagnosis))
    if salvage is None:
        output.data(delivery.as_data(diagnosis))
        diagnosis.refuse()
        output.say(f"{relative(run)}: whole")
        return
    saved = delivery.save(diagnosis, salvage, config)
    output.say(delivery.saved_text(saved))
    output.data(delivery.as_data(diagnosis, saved))


def _run(config: RunConfig, *, full_hash: bool = False) -> None:
    from evomerge import compose
    from evomerge.delivery.summary import Summary
    from evomerge.delivery.tracking import require_packages
    from evomerge.evaluation import sandbox
    from evomerge.merging.tensors import kernels
    from evomerge.running.observers import Observers, StopsAtPhases
    from evomerge.running.store import StoreReader
    from evomerge.stored import StoredRun, environment_note

    for note in (*kernels.notes(), *sandbox.notes(config.permissions)):
        output.say(f"note: {note}")
    folder = Path(config.out)
    require_packages(config.tracking)
    if (changed := environment_note(folder)) is not None:
        complain(f"note: {changed}", style="yellow")
    try:
        with _observer() as shown, _tracked(config) as tracked:
            everyone = Observers(StopsAtPhases(raise_swallowed), shown, tracked)
            compose.start(config, everyone, full_hash=full_hash)
            with StoredRun.read(folder) as stored:
                tracked.finish(Summary(stored), folder / "report.html")
        _report(folder)
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


def _tracked(config: RunConfig) -> Tracked:
    from evomerge.delivery.tracking import Tracked

    return Tracked(config.tracking, Path(config.out), warn=warn)


@command(app, "status")
def status(run: RunArgument) -> None:
    """Show the progress of a run; works while it runs."""
    from evomerge.delivery import status as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.stored import StoredRun

    with StoredRun.read(run) as stored:
        data = delivery.as_data(Summary(stored))
    output.say(delivery.text(data))
    output.data(data)


@command(app, "show")
def show(
    run: RunArgument,
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The start of a recipe hash, as in the log; or a row of the report."
        ),
    ],
    items: Annotated[
        str | None,
        typer.Option("--items", metavar="TASK", help="Also print every item of a task, with texts."),
    ] = None,
    split: SplitOption = None,
) -> None:
    """Show one candidate of a run: recipe, scores, times and failures, with --items also item by item."""
    from evomerge.delivery import candidate as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.evaluation.scores import named_split
    from evomerge.stored import StoredRun

    chosen = None if split is None else named_split(split)
    with StoredRun.read(run) as stored:
        data = delivery.as_data(Summary(stored), candidate, items=items, split=chosen)
    output.say(delivery.text(data))
    output.data(data)


@command(app, "samples")
def samples(
    run: RunArgument,
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The start of a recipe hash, as in the log; or a row of the report."
        ),
    ],
    task: Annotated[str, typer.Option(help="The task whose items are shown.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="ID", help="A second candidate; items on which it is better come first."),
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only items that ID answers wrong.")] = False,
    split: SplitOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Largest number of items; 0: all.")] = 10,
) -> None:
    """Show prompts, right answers and what candidates answered, item by item."""
    from evomerge.delivery import samples as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.evaluation.scores import named_split
    from evomerge.stored import StoredRun

    chosen = None if split is None else named_split(split)
    with StoredRun.read(run) as stored:
        data = delivery.as_data(
            Summary(stored), candidate, task, against=against, split=chosen, wrong=wrong, limit=limit
        )
    output.say(delivery.text(data))
    output.data(data)


@command(app, "report")
def report(run: RunArgument) -> None:
    """Print a run's tables and verdict, and write RUN/report.html."""
    _report(run)


def _report(folder: Path) -> None:
    from evomerge.delivery import report as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.stored import StoredRun

    with StoredRun.read(folder) as stored:
        summary = Summary(stored)
        output.say(delivery.terminal(summary, width=output.console.width))
        output.data(delivery.as_data(summary))
        try:
            page = delivery.write_html(summary, folder / "report.html")
        except DiskError as error:
            if os.access(folder, os.W_OK):  # a full disk, not a folder that may only be read
                raise
            complain(f"no report page: {error.what} ({error.got})")
        else:
            output.say(f"report: {relative(page)}")


@command(app, "export")
def export(
    run: RunArgument,
    out: FormArgument,
    pick: Annotated[
        str,
        typer.Option(
            help="winner, best-baseline, knee, best:TASK, weights:TASK=0.7,OTHER=0.3, a row of the report, "
            "or the start of a recipe hash."
        ),
    ] = "winner",
    form: FormOption = "model",
    rank: RankOption = None,
    keep_rest: KeepRestOption = False,
    accept_difference: Annotated[
        bool, typer.Option("--accept-difference", help="Write weights that differ from the scored ones.")
    ] = False,
    permissions: Any = None,
) -> None:
    """Write a run's winner: as a model with recipe and model card, as a LoRA adapter, or as a YAML file."""
    from evomerge.delivery import export as delivery
    from evomerge.delivery.rescore import comparison
    from evomerge.delivery.summary import Summary
    from evomerge.stored import StoredRun

    check_form(form, ("model", "adapter", "recipe", "mergekit"), rank, keep_rest)
    with StoredRun.read(run) as stored:
        summary = Summary(stored)
        if form == "adapter":
            made = delivery.export_adapter(
                summary, out, pick=pick, rank=rank, keep_rest=keep_rest, permissions=permissions
            )
            output.say(comparison(made))
            say_adapter(out, made.pick.recipe.hash, made.report, scores=made.rows())
            return
        if form != "model":
            written = delivery.export_text(summary, out, pick=pick, form=form)
            say_file(out, written.recipe.hash)
            return
        done = delivery.export(summary, out, pick=pick, accept_difference=accept_difference)
    output.say(f"exported {done.pick.name} to {relative(done.folder)}{COMPARED[done.equal]}")
    if done.no_mergekit:
        output.say(f"no mergekit.yaml: {done.no_mergekit}")
    output.data(
        {
            "folder": str(done.folder),
            "name": done.pick.name,
            "recipe": done.pick.recipe.hash,
            "equals_scored": done.equal,
        }
    )


@command(app, "merge")
def merge(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml, or a mergekit YAML.")],
    out: FormArgument,
    form: FormOption = "model",
    rank: RankOption = None,
    keep_rest: KeepRestOption = False,
) -> None:
    """Merge by a recipe or a mergekit YAML: write a model, a LoRA adapter, or mergekit YAML."""
    from evomerge.merging import mergekit
    from evomerge.merging.compatibility import check
    from evomerge.merging.export import writer
    from evomerge.merging.reading import read_recipe
    from evomerge.merging.sources.opening import open_used
    from evomerge.merging.tensors import kernels

    check_form(form, ("model", "adapter", "mergekit"), rank, keep_rest)
    recipe = read_recipe(file)
    if form == "adapter":
        from evomerge.merging.export.adapter import write_adapter

        report = write_adapter(recipe, out, rank=rank, keep_rest=keep_rest)
        say_adapter(out, recipe.hash, report)
        return
    if form == "mergekit":
        from evomerge.delivery.export import write_text

        write_text(out, mergekit.write(recipe))
        say_file(out, recipe.hash)
        return
    sources = open_used(recipe)
    for note in (*check(recipe, sources), *kernels.notes()):
        output.say(f"note: {note}")
    writer.write(recipe, out, sources=sources)
    output.say(f"wrote {relative(out)} (recipe {recipe.hash[:12]})")
    output.data({"folder": str(out), "recipe": recipe.hash})


@command(app, "predict")
def predict(
    run: RunArgument,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="recipe.yaml, a mergekit YAML, or the start of a recipe hash."),
    ],
) -> None:
    """Predict the score of a merge, with an interval, from a run's scores; nothing is merged."""
    from evomerge.delivery import predict as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.prepare import prepare
    from evomerge.stored import StoredRun

    with StoredRun.read(run) as stored:
        predicted = delivery.predict(Summary(stored), prepare(stored.config()), recipe)
    output.say(delivery.text(predicted))
    output.data(delivery.as_data(predicted))


@command(app, "analyze")
def analyze(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A run config, recipe.yaml or mergekit YAML.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base: a model of the file, or a location.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="An element counts as changed above this multiple of the tensor's mean |task vector|.",
        ),
    ] = 1.0,
    top: Annotated[float, typer.Option(help="Share of largest elements compared between models.")] = 0.2,
    shown: Annotated[str, typer.Option("--map", help="conflict, cosine, overlap or norm.")] = "conflict",
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with all maps.")] = None,
) -> None:
    """Show where fine-tunes agree or conflict, from their files alone, and which method to start from."""
    from evomerge.delivery.analyze import page as analysis_page
    from evomerge.delivery.analyze import terminal as delivery
    from evomerge.delivery.analyze.heat_map import MEASURES
    from evomerge.merging.analysis.advice import advise
    from evomerge.merging.analysis.interference import measure

    if shown not in MEASURES:
        raise ConfigError(f"unknown map {shown!r}", fix=nearest(shown, MEASURES))
    models, origin = delivery.read_models(config, base)
    with progress_bar("reading") as progress:
        interference = measure(models, origin, threshold=threshold, top=top, progress=progress)
    advice = advise(interference)
    output.say(delivery.terminal(interference, advice, measure=shown, width=output.console.width))
    if html is not None:
        written = analysis_page.write_html(interference, advice, html)
        output.say(f"page: {relative(written)}")
    output.data(delivery.as_data(interference, advice))


@command(app, "fisher")
def fisher(
    model: ModelArgument,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file, one sequence per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    labels: LabelsOption = "text",
    sequences: Annotated[int | None, typer.Option(min=1, max=10**9, help="Use only this many lines.")] = None,
    max_length: Annotated[int, typer.Option(min=2, max=2**24, help="Cut lines to this many tokens.")] = 512,
    seed: DrawsOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Estimate a model's diagonal Fisher information on a text, for merges with the method `fisher`."""
    from evomerge.merging.analysis.fisher import estimate
    from evomerge.running.executors import ExecutorSpec, resolve

    place, _, _ = resolve(ExecutorSpec(device=device))
    with progress_bar("sequences") as progress:
        done = estimate(
            model,
            text,
            out,
            labels=labels,
            sequences=sequences,
            max_length=max_length,
            seed=seed,
            device=place,
            progress=progress,
        )
    output.say(
        f"wrote {relative(out)} ({done.sequences} sequences, {done.tokens} tokens, mean {done.mean:.3g})"
    )
    output.data({"file": str(out), "sequences": done.sequences, "tokens": done.tokens, "mean": done.mean})


@command(app, "evaluate")
def evaluate(
    model: ModelArgument,
    suite: Annotated[
        str | None, typer.Option("--suite", help="A suite: a preset's name or a YAML file; default: RUN's.")
    ] = None,
    split: Annotated[str, typer.Option(help="search, select or test.")] = "test",
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Score as this run does: suite and settings.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Requests per forward pass; default: RUN's, or 64.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the forward pass: float32, bfloat16 or float16; default: RUN's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: RUN's, or a GPU if there is one.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=8, max=2**24, help="Longest input in tokens; default: RUN's, or the model's."),
    ] = None,
    permissions: Any = None,
) -> None:
    """Score one model on a suite."""
    from evomerge.delivery import single

    data = single.evaluate(
        model,
        suite,
        split,
        settings=single.Settings(batch_size=batch_size, dtype=dtype, device=device, max_length=max_length),
        run=run,
        permissions=permissions,
    )
    output.say(single.table(data))
    output.data(data)


@command(zoo, "build")
def zoo_build(
    out: FolderArgument,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the training.")] = 0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A two-layer variant for tests, in under a minute.")
    ] = False,
) -> None:
    """Train the demo models from scratch: a base and five specialists (about five minutes on two cores)."""
    from evomerge.zoo.build import build_zoo

    build_zoo(out, seed=seed, size="tiny" if tiny else "demo", progress=output.say)
    output.say(f"built {relative(out)}")


@command(spaces, "")
def spaces_list(context: typer.Context, models: ModelsOption = None) -> None:
    """List the search-space presets: number of genes, methods, purpose."""
    from evomerge.delivery import spaces as delivery

    if context.invoked_subcommand is not None:
        return
    rows = delivery.presets(models)
    output.say(delivery.presets_text(rows, models))
    output.data(rows)


@command(spaces, "show")
def spaces_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset's name, or a YAML file.")],
    models: ModelsOption = None,
) -> None:
    """Print the genes of a search space: kind, values, where each applies and when it has an effect."""
    from evomerge.delivery import spaces as delivery

    data = delivery.as_data(name, models)
    output.say(delivery.text(data))
    output.data(data)


@command(app, "demo")
def demo(
    seed: SeedOption = None,
    evaluations: EvaluationsOption = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Search, report, export and re-score on the models that come with evomerge (under five minutes)."""
    from evomerge.config import DEMO_CONFIG, RunConfig
    from evomerge.delivery import export as delivery
    from evomerge.delivery.rescore import rescore
    from evomerge.delivery.summary import Summary
    from evomerge.evaluation.scores import Scores
    from evomerge.prepare import prepare
    from evomerge.running.batches import scoring_alike
    from evomerge.stored import StoredRun

    config = RunConfig.load(DEMO_CONFIG, seed=seed, out=str(out), evaluations=evaluations)
    _run(config)
    with StoredRun.read(out) as run:
        summary = Summary(run)
        assert summary.winner is not None
        model = out / f"model-{summary.winner.recipe.hash[:8]}"
        if not model.exists():
            delivery.export(summary, model)
        scores = run.store.result(summary.winner.recipe.hash, "test")
        assert isinstance(scores, Scores)
        worker = scoring_alike(prepare(config).worker, run.store, "test")
        same = rescore(model, worker, "test").same_as(scores)
    if not same:
        raise UserError(
            f"{model}: the exported model's scores differ from the winner's",
            fix="please report this as a bug",
        )
    output.say(
        f"exported the winner to {relative(model)}; loaded back, it scores the same on every test item"
    )


def main() -> None:
    """Entry point of the `evomerge` command."""
    with as_program():
        app()
