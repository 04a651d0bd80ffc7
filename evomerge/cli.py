"""The command line: one thin command per verb.

A user's mistake prints one message and exits with code 2; Ctrl-C exits with 130 after saying how to go
on. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from evomerge import __version__
from evomerge.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Live, Silent
    from evomerge.delivery.tracking import Tracked
    from evomerge.merging.export.adapter import AdapterReport

app = typer.Typer(
    help="Evolve the configuration of a model merge, honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
zoo = typer.Typer(help="The demo models: a small base and its specialists.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
spaces = typer.Typer(help="The search-space presets, and the genes of one.")
app.add_typer(spaces, name="spaces")

INTERRUPTED = 130
PATIENCE = 30.0
"""Seconds in which another signal to end changes nothing: what a batch scheduler gives us to go."""


def _console() -> Console:
    """A console as wide as the terminal; piped into a file, as wide as the tables want."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)


@dataclass
class _Output:
    """How a command speaks: to people through `console`, to scripts as one JSON document."""

    console: Console
    quiet: bool = False
    json: bool = False

    def say(self, message: Any) -> None:
        if not (self.quiet or self.json):
            self.console.print(message, highlight=False, markup=False, soft_wrap=isinstance(message, str))

    def data(self, data: Any) -> None:
        if self.json:
            typer.echo(json.dumps(data, indent=2))


_out = _Output(console=_console())

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run config (YAML).")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
OutAs = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; of YAML forms the file.")]
Evaluations = Annotated[
    int | None,
    typer.Option("--evaluations", min=1, help="Replace this limit of the budget: full evaluations."),
]
Items = Annotated[
    int | None, typer.Option("--items", min=1, help="Replace this limit of the budget: scored items.")
]
Generations = Annotated[
    int | None, typer.Option("--generations", min=1, help="Replace this limit of the budget.")
]
Hours = Annotated[
    float | None, typer.Option("--hours", min=0.0, help="Replace this limit of the budget: hours of work.")
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until", help='Replace this limit of the budget: "08:00" (its next occurrence), or a date-time.'
    ),
]
Cost = Annotated[
    float | None,
    typer.Option("--cost", min=0.0, help="Replace this limit of the budget: money, for all hours."),
]
PerHour = Annotated[
    float | None, typer.Option("--per-hour", min=0.0, help="What the machine costs per hour.")
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience", min=1, help="Replace this limit of the budget: generations without improvement."
    ),
]
Failures = Annotated[
    int | None, typer.Option("--failures", min=1, help="Failures in a row that stop the run with an error.")
]
As = Annotated[
    str, typer.Option("--as", help="What to write: model, adapter or mergekit (`export`: also recipe).")
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        min=1,
        help="With --as adapter, where it can't be exact: cut each layer's change to this rank.",
    ),
]
KeepRest = Annotated[
    bool, typer.Option("--keep-rest", help="With --as adapter: store whole what a LoRA can't hold.")
]
ModelsOf = Annotated[
    Path | None,
    typer.Option("--models", metavar="CONFIG", help="Count the genes for the models of a run config."),
]
Moved = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=PATH", help="Where a model of the run lies now; may be repeated."),
]
MovedSuite = Annotated[
    str | None, typer.Option("--suite", metavar="PATH", help="Where the suite's file lies now.")
]
FullHash = Annotated[
    bool,
    typer.Option("--full-hash", help="Read every byte of the models: were they changed since last asked?"),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Replace the config's seed.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"evomerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: Quiet = False,
    json_: Json = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    _out.quiet, _out.json = quiet, json_


def _command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that also takes `--quiet` and `--json`, and turns UserError into exit code 2.

    Without a name it is what the group does by itself.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapped(*args: Any, quiet: bool, json_: bool, **kwargs: Any) -> None:
            _out.quiet, _out.json = _out.quiet or quiet, _out.json or json_
            _calm()
            with _signals():
                _guarded(function, *args, **kwargs)

        from inspect import Parameter, signature

        own = signature(function, eval_str=True)
        options = [
            Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
            Parameter("json_", Parameter.KEYWORD_ONLY, default=False, annotation=Json),
        ]
        wrapped.__signature__ = own.replace(parameters=[*own.parameters.values(), *options])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {**function.__annotations__, "quiet": Quiet, "json_": Json}
        (group.command(name) if name else group.callback(invoke_without_command=True))(wrapped)
        return function

    return register


def _guarded(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a command; what stops it is one message and an exit code."""
    try:
        function(*args, **kwargs)
    except UserError as error:
        _complain(f"error: {error}", style="red")
        raise typer.Exit(2) from None
    except OSError as error:  # a disk or folder that does not do what was asked of it
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"error: {where}{error.strerror or error}", style="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "stopped; nothing was stored")
        raise typer.Exit(getattr(interrupt, "exit_code", INTERRUPTED)) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch scheduler sends it, or SIGHUP of a terminal that is gone: handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def _signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end what is done in order.

    Only the first counts: schedulers send several, and what is left to do must not be cut short. A signal
    that is ignored (nohup) stays so.
    """
    raised: list[float] = []

    def end(number: int, _: object) -> None:
        now = time.monotonic()
        if not raised or now - raised[-1] > PATIENCE:
            raised.append(now)
            raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(message: str, *, style: str = "") -> None:
    """Speak to the user on standard error, also where `--quiet` or `--json` keep standard output clean."""
    Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)


def _calm() -> None:
    """Keep the libraries' own progress bars and advice out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


@_command(app, "check")
def check(config: Config) -> None:
    """Check a run config: models, space, suite, tasks and cost, without starting it."""
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery import check as delivery
    from evomerge.delivery.tracking import require_packages

    loaded = RunConfig.load(config)
    require_packages(loaded.tracking)
    prepared = compose.prepare(loaded)
    compose.check_folder(prepared)
    found = compose.probe(prepared)
    _out.say(delivery.text(prepared, found))
    _out.data(delivery.as_data(prepared, found))


@_command(app, "run")
def run(
    config: Config,
    seed: Seed = None,
    evaluations: Evaluations = None,
    items: Items = None,
    generations: Generations = None,
    hours: Hours = None,
    until: Until = None,
    cost: Cost = None,
    per_hour: PerHour = None,
    patience: Patience = None,
    failures: Failures = None,
    out: Annotated[Path | None, typer.Option("--out", help="Replace the config's run folder.")] = None,
    full_hash: FullHash = False,
) -> None:
    """Run a config: baselines, search, selection, test, report. Continues where its folder left off."""
    from evomerge.config import RunConfig

    place = None if out is None else str(out)
    limits = _limits(evaluations, items, generations, hours, until, cost, per_hour, patience, failures)
    _run(RunConfig.load(config, seed=seed, out=place, **limits), full_hash=full_hash)


@_command(app, "resume")
def resume(
    run: Run,
    evaluations: Evaluations = None,
    items: Items = None,
    generations: Generations = None,
    hours: Hours = None,
    until: Until = None,
    cost: Cost = None,
    per_hour: PerHour = None,
    patience: Patience = None,
    failures: Failures = None,
    model: Moved = None,
    suite: MovedSuite = None,
    full_hash: FullHash = False,
) -> None:
    """Continue a stored run after a crash, an interruption, or with a larger budget."""
    from evomerge import compose, identity
    from evomerge.running.store import RunStore

    limits = _limits(evaluations, items, generations, hours, until, cost, per_hour, patience, failures)
    RunStore.refuse_held(run)
    with RunStore.read(run) as store:
        identity.refuse_older(store)
    config = compose.stored_config(run, models=_places(model or []), suite=suite, **limits)
    identity.refuse_missing(config)
    _run(config, full_hash=full_hash)


def _limits(*values: float | str | None) -> dict[str, Any]:
    """Name the limits of a budget that were given, in the order of the options."""
    names = (
        "evaluations",
        "items",
        "generations",
        "hours",
        "until",
        "cost",
        "per_hour",
        "patience",
        "failures",
    )
    return dict(zip(names, values, strict=True))


def _places(given: list[str]) -> dict[str, str]:
    for each in given:
        if not all(each.partition("=")[::2]):
            raise ConfigError(
                f"--model {each}: no place in it", expected="NAME=PATH, as in base=models/llama"
            )
    return dict(each.split("=", 1) for each in given)


@_command(app, "migrate")
def migrate(run: Run) -> None:
    """Bring a run of an older evomerge up to date; a copy of its store is kept."""
    from evomerge.running.store.migrations import migrate as bring

    done = bring(run)
    if done is None:
        _out.say(f"{_shown(run)}: nothing to do, it is up to date")
    else:
        _out.say(
            f"{_shown(run)}: migrated from schema version {done.before}; {_shown(done.backup)} is the old"
        )
        if not done.continues:
            _out.say("its search can't be replayed by this version: it can be reported and exported")
    _out.data(
        {
            "run": str(run),
            "migrated": done is not None,
            "from": done.before if done else None,
            "backup": str(done.backup) if done else None,
            "continues": done.continues if done else True,
        }
    )


def _run(config: RunConfig, *, full_hash: bool = False) -> None:
    from evomerge import compose
    from evomerge.delivery.summary import Summary
    from evomerge.delivery.tracking import require_packages
    from evomerge.merging.tensors import kernels
    from evomerge.running.store import RunStore

    for note in kernels.notes():
        _out.say(f"note: {note}")
    folder = Path(config.out)
    require_packages(config.tracking)
    if (changed := compose.environment_note(folder)) is not None:
        _complain(f"note: {changed}", style="yellow")
    try:
        with _observer() as shown, _tracked(shown, config) as observer:
            compose.start(config, observer, full_hash=full_hash)
            with RunStore.read(folder) as store:
                observer.finish(Summary(store, compose.stored_suite(store)), folder / "report.html")
        _report(folder)
    except KeyboardInterrupt as interrupt:
        if RunStore.exists(folder):
            command = f"evomerge resume {shlex.quote(_shown(folder))}"
            interrupt.args = (f"stopped; everything scored so far is stored. Go on with:\n  {command}",)
        raise


def _observer() -> AbstractContextManager[Live | Silent]:
    from evomerge.delivery.progress import Live, Silent

    return Silent() if _out.quiet or _out.json else Live(_out.console)


def _tracked(observer: Live | Silent, config: RunConfig) -> Tracked:
    from evomerge.delivery.tracking import Tracked

    def warn(message: str) -> None:
        _complain(f"warning: {message}", style="yellow")

    return Tracked(observer, config.tracking, Path(config.out), warn=warn)


@_command(app, "status")
def status(run: Run) -> None:
    """Say where a run stands; works while it runs."""
    from evomerge import compose
    from evomerge.delivery import status as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.running.store import RunStore

    with RunStore.read(run) as store:
        data = delivery.as_data(store, Summary(store, compose.stored_suite(store)))
    _out.say(delivery.text(data))
    _out.data(data)


@_command(app, "show")
def show(
    run: Run,
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
    split: Annotated[
        str | None, typer.Option(help="Of the items: search, select or test; default the last it met.")
    ] = None,
) -> None:
    """Show one candidate of a run: recipe, scores, times, failures, and single items if asked."""
    from evomerge import compose
    from evomerge.delivery import candidate as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.evaluation.scores import SPLITS
    from evomerge.running.store import RunStore

    chosen = next((each for each in SPLITS if each == split), None)
    if split is not None and chosen is None:
        raise ConfigError(f"unknown split {split!r}", fix=nearest(split, SPLITS))
    with RunStore.read(run) as store:
        summary = Summary(store, compose.stored_suite(store))
        data = delivery.as_data(store, summary, candidate, items=items, split=chosen)
    _out.say(delivery.text(data))
    _out.data(data)


@_command(app, "report")
def report(run: Run) -> None:
    """Print a run's tables and verdict, and write RUN/report.html."""
    _report(run)


def _report(folder: Path) -> None:
    from evomerge import compose
    from evomerge.delivery import report as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.running.store import RunStore

    with RunStore.read(folder) as store:
        summary = Summary(store, compose.stored_suite(store))
        _out.say(delivery.terminal(store, summary, width=_out.console.width))
        _out.data(delivery.as_data(store, summary))
        page = delivery.write_html(store, summary, folder / "report.html")
        _out.say(f"report: {_shown(page)}")


@_command(app, "export")
def export(
    run: Run,
    out: OutAs,
    pick: Annotated[
        str,
        typer.Option(
            help="winner, best-baseline, knee, best:TASK, weights:TASK=0.7,OTHER=0.3, a row of the report, "
            "or the start of a recipe hash."
        ),
    ] = "winner",
    form: As = "model",
    rank: Rank = None,
    keep_rest: KeepRest = False,
) -> None:
    """Write a run's winner as a model with its recipe and card, as a LoRA adapter, or as a YAML file."""
    from evomerge import compose
    from evomerge.delivery import export as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.merging import mergekit
    from evomerge.running.store import RunStore

    _check_form(form, ("model", "adapter", "recipe", "mergekit"), rank, keep_rest)
    with RunStore.read(run) as store:
        summary = Summary(store, compose.stored_suite(store))
        if form == "adapter":
            made = delivery.export_adapter(store, summary, out, pick=pick, rank=rank, keep_rest=keep_rest)
            _out.say(delivery.comparison(made))
            _say_adapter(out, made.pick.recipe.hash, made.report, scores=made.rows())
            return
        if form != "model":
            recipe = delivery.find(store, summary, pick).recipe
            delivery.write_text(out, recipe.to_yaml() if form == "recipe" else mergekit.write(recipe))
            _say_file(out, recipe.hash)
            return
        done = delivery.export(store, summary, out, pick=pick)
    _out.say(f"exported {done.pick.name} to {_shown(done.folder)}")
    if done.no_mergekit:
        _out.say(f"no mergekit.yaml: {done.no_mergekit}")
    _out.data({"folder": str(done.folder), "name": done.pick.name, "recipe": done.pick.recipe.hash})


@_command(app, "merge")
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml, or a mergekit YAML.")],
    out: OutAs,
    form: As = "model",
    rank: Rank = None,
    keep_rest: KeepRest = False,
) -> None:
    """Write the merge a recipe (or a mergekit YAML) describes: a model, a LoRA adapter, or mergekit YAML."""
    from evomerge.merging import mergekit
    from evomerge.merging.compatibility import check
    from evomerge.merging.export import writer
    from evomerge.merging.reading import read_recipe
    from evomerge.merging.sources.opening import open_used
    from evomerge.merging.tensors import kernels

    _check_form(form, ("model", "adapter", "mergekit"), rank, keep_rest)
    found = read_recipe(recipe)
    if form == "adapter":
        from evomerge.merging.export.adapter import write_adapter

        report = write_adapter(found, out, rank=rank, keep_rest=keep_rest)
        _say_adapter(out, found.hash, report)
        return
    if form == "mergekit":
        from evomerge.delivery.export import write_text

        write_text(out, mergekit.write(found))
        _say_file(out, found.hash)
        return
    sources = open_used(found)
    for note in (*check(found, sources), *kernels.notes()):
        _out.say(f"note: {note}")
    writer.write(found, out, sources=sources)
    _out.say(f"wrote {_shown(out)} (recipe {found.hash[:12]})")
    _out.data({"folder": str(out), "recipe": found.hash})


@_command(app, "predict")
def predict(
    run: Run,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="recipe.yaml, a mergekit YAML, or the start of a recipe hash."),
    ],
) -> None:
    """Say how good a merge would be, and how sure that is, before it is merged; from a run's scores alone."""
    from evomerge import compose
    from evomerge.delivery import predict as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.running.store import RunStore

    with RunStore.read(run) as store:
        prepared = compose.prepare(compose.stored_config(run))
        summary = Summary(store, compose.stored_suite(store))
        found = delivery.predict(store, summary, prepared, recipe)
    _out.say(delivery.text(found))
    _out.data(delivery.as_data(found))


def _check_form(form: str, valid: tuple[str, ...], rank: int | None, keep_rest: bool) -> None:
    if form not in valid:
        raise ConfigError(f"--as {form}: no such form", fix=nearest(form, valid))
    for option, given in (("--rank", rank is not None), ("--keep-rest", keep_rest)):
        if given and form != "adapter":
            raise ConfigError(
                f"{option} is for adapters",
                got=f"--as {form}",
                fix=f"leave {option} out, or add --as adapter",
            )


def _say_adapter(
    out: Path, recipe: str, report: AdapterReport, scores: list[tuple[str, float, float]] | None = None
) -> None:
    _out.say(f"wrote {_shown(out)}, a LoRA adapter on {report.base} (recipe {recipe[:12]})")
    _out.say(report.summary())
    data: dict[str, Any] = {
        "folder": str(out),
        "recipe": recipe,
        "base": report.base,
        "exact": report.exact,
        "rank": report.rank,
        "energy": report.energy,
        "whole": list(report.whole),
        "lost": list(report.lost),
    }
    if scores is not None:
        data["test"] = [{"task": task, "merge": whole, "adapter": mine} for task, whole, mine in scores]
    _out.data(data)


def _say_file(out: Path, recipe: str) -> None:
    _out.say(f"wrote {_shown(out)} (recipe {recipe[:12]})")
    _out.data({"file": str(out), "recipe": recipe})


@_command(app, "analyze")
def analyze(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A run config, recipe.yaml or mergekit YAML.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base: a model of the file, or a location.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, help="Changed: |task vector| above this multiple of its mean in a tensor."),
    ] = 1.0,
    top: Annotated[float, typer.Option(help="Share of largest elements compared between models.")] = 0.2,
    shown: Annotated[str, typer.Option("--map", help="conflict, cosine, overlap or norm.")] = "conflict",
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with all maps.")] = None,
) -> None:
    """Say from the files alone where fine-tunes agree or conflict, and which method to start from."""
    from evomerge.delivery.analyze import page as analysis_page
    from evomerge.delivery.analyze import terminal as delivery
    from evomerge.merging.analysis.advice import advise
    from evomerge.merging.analysis.interference import measure

    if shown not in delivery.MEASURES:
        raise ConfigError(f"unknown map {shown!r}", fix=nearest(shown, delivery.MEASURES))
    models, origin = delivery.read_models(config, base)
    with _progress("reading") as progress:
        found = measure(models, origin, threshold=threshold, top=top, progress=progress)
    advised = advise(found)
    _out.say(delivery.terminal(found, advised, measure=shown, width=_out.console.width))
    if html is not None:
        written = analysis_page.write_html(found, advised, html)
        _out.say(f"page: {_shown(written)}")
    _out.data(delivery.as_data(found, advised))


@_command(app, "fisher")
def fisher(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or path+adapter.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file, one sequence per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    labels: Annotated[
        str, typer.Option(help="text: the empirical Fisher; model: tokens drawn from its own predictions.")
    ] = "text",
    sequences: Annotated[int | None, typer.Option(min=1, help="Use the first lines only.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a line that count.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn tokens, with --labels model.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Estimate a model's diagonal Fisher information on a text, for merges with the method `fisher`."""
    from evomerge.merging.analysis.fisher import estimate
    from evomerge.running.executors import ExecutorSpec, resolve

    place, _, _ = resolve(ExecutorSpec(device=device))
    with _progress("sequences") as progress:
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
    _out.say(f"wrote {_shown(out)} ({done.sequences} sequences, {done.tokens} tokens, mean {done.mean:.3g})")
    _out.data({"file": str(out), "sequences": done.sequences, "tokens": done.tokens, "mean": done.mean})


@_command(app, "evaluate")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or path+adapter.")],
    suite: Annotated[str, typer.Option("--suite", help="A suite: a preset's name or a YAML file.")],
    split: Annotated[str, typer.Option(help="search, select or test.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 64,
) -> None:
    """Score one model on a suite."""
    from evomerge.delivery import single

    data = single.evaluate(model, suite, split, batch_size=batch_size)
    _out.say(single.table(data))
    _out.data(data)


@_command(zoo, "build")
def zoo_build(
    out: Out,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other models.")] = 0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A two-layer variant for tests, in under a minute.")
    ] = False,
) -> None:
    """Train the demo models from scratch: a base and five specialists (about five minutes on two cores)."""
    from evomerge.zoo.build import build_zoo

    build_zoo(out, seed=seed, size="tiny" if tiny else "demo", progress=_out.say)
    _out.say(f"built {_shown(out)}")


@_command(spaces, "")
def spaces_list(context: typer.Context, models: ModelsOf = None) -> None:
    """List the search-space presets: how many genes, which methods, what for."""
    from evomerge.delivery import spaces as delivery

    if context.invoked_subcommand is not None:
        return
    rows = delivery.presets(models)
    _out.say(delivery.presets_text(rows, models))
    _out.data(rows)


@_command(spaces, "show")
def spaces_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset's name, or a YAML file.")],
    models: ModelsOf = None,
) -> None:
    """Print the genes of a search space: kind, values, where each applies and when it has an effect."""
    from evomerge.delivery import spaces as delivery

    data = delivery.as_data(name, models)
    _out.say(delivery.text(data))
    _out.data(data)


@_command(app, "demo")
def demo(
    seed: Seed = None,
    evaluations: Evaluations = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Search, report, export and re-score on the models that come with evomerge (under five minutes)."""
    from evomerge import compose
    from evomerge.config import DEMO_CONFIG, RunConfig
    from evomerge.delivery import export as delivery
    from evomerge.delivery.summary import Summary
    from evomerge.evaluation.scores import Scores
    from evomerge.running.batches import scoring_alike
    from evomerge.running.store import RunStore

    config = RunConfig.load(DEMO_CONFIG, seed=seed, out=str(out), evaluations=evaluations)
    _run(config)
    with RunStore.read(out) as store:
        summary = Summary(store, compose.stored_suite(store))
        assert summary.winner is not None
        model = out / f"model-{summary.winner.recipe.hash[:8]}"
        if not model.exists():
            delivery.export(store, summary, model)
        stored = store.result(summary.winner.recipe.hash, "test")
        assert isinstance(stored, Scores)
        worker = scoring_alike(compose.prepare(config).worker, store, "test")
        same = delivery.rescore(model, worker, "test").same_as(stored)
    if not same:
        raise UserError(
            f"{model}: the exported model does not score as the winner did", fix="please report this"
        )
    _out.say(f"exported the winner to {_shown(model)}; loaded back, it scores the same on every test item")


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what a long step tells how much of how much is done; a bar where somebody looks at it."""
    from rich.progress import Progress

    disabled = _out.quiet or _out.json or not _out.console.is_terminal
    with Progress(console=_out.console, transient=True, disable=disabled) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def _shown(path: Path) -> str:
    """A path as the user would type it from here."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def main() -> None:
    """Entry point of the `evomerge` command."""
    app()
