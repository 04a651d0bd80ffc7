"""What all commands do alike: output, errors, exit codes, signals, progress bars.

A user's mistake prints one message and exits with code 2; Ctrl-C exits with 130, SIGTERM with 143, SIGHUP
with 129.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from evomerge.cli.options import BUDGET, PERMISSIONS, JsonOption, QuietOption
from evomerge.errors import UserError
from evomerge.text import in_texts, printable, redacted

INTERRUPTED, BROKEN_PIPE = 130, 141
PATIENCE = 30.0
"""Seconds in which a second signal is ignored: the time that batch schedulers leave for an orderly end."""


class SafeConsole(Console):
    """A console that prints names and messages as they are: without markup, control characters or secrets.

    Everything that it prints passes through `render`; texts also pass through `render_str`, which comes
    before columns are measured.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text as rich's Text."""
        return super().render_str(printable(redacted(text)), **settings)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Yield the segments of something to print; only rich's own control codes stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(redacted(segment.text)))


def _console() -> Console:
    """Return a console as wide as the terminal, or 120 columns wide where output goes to a file."""
    console = SafeConsole()
    return console if console.is_terminal or "COLUMNS" in os.environ else SafeConsole(width=120)


@dataclass
class Output:
    """The output of a command: text for people through `console`, or one JSON document for scripts."""

    console: Console
    quiet: bool = False
    json: bool = False

    def say(self, message: Any) -> None:
        """Print text or a rich renderable, unless `--quiet` or `--json`."""
        if not (self.quiet or self.json):
            self.console.print(message, soft_wrap=isinstance(message, str))

    def show(self, view: Any) -> None:
        """Print a view: its text for people, its data for scripts."""
        self.say(view.draw(self.console.width))
        self.data(view.data)

    def data(self, data: Any) -> None:
        """Print the JSON document, with `--json`."""
        if self.json:
            typer.echo(json.dumps(in_texts(redacted, data), indent=2))


output = Output(console=_console())


def command(
    group: typer.Typer, name: str, *, budget: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that also takes `--quiet` and `--json`, and turns UserError into exit code 2.

    name: "" for the group itself. budget: the parameter `limits` becomes the options of BUDGET; the function
    receives them as a mapping. A parameter `permissions` becomes the options of PERMISSIONS; the function
    receives a Permissions.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapped(*args: Any, quiet: bool, json_: bool, **kwargs: Any) -> None:
            output.quiet, output.json = output.quiet or quiet, output.json or json_
            if budget:
                kwargs["limits"] = {limit: kwargs.pop(limit) for limit in BUDGET}
            if "permissions" in signature.parameters:
                from evomerge.evaluation.permissions import Permissions

                kwargs["permissions"] = Permissions(**{name: kwargs.pop(name) for name in PERMISSIONS})
            _silence_libraries()
            with orderly_shutdown():
                _guarded(function, *args, **kwargs)

        signature = inspect.signature(function, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if budget and parameter.name == "limits":
                parameters += [_parameter(limit, annotation, None) for limit, annotation in BUDGET.items()]
            elif parameter.name == "permissions":
                parameters += [_parameter(name, option, False) for name, option in PERMISSIONS.items()]
            else:
                parameters.append(parameter)
        parameters += [_parameter("quiet", QuietOption, False), _parameter("json_", JsonOption, False)]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        (group.command(name) if name else group.callback(invoke_without_command=True))(wrapped)
        return function

    return register


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _guarded(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a command; an error of the user or the disk becomes one message and an exit code."""
    try:
        function(*args, **kwargs)
    except UserError as error:
        complain(f"error: {error}", style="red")
        raise typer.Exit(2) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise typer.Exit(BROKEN_PIPE) from None
        where = f"{error.filename}: " if error.filename else ""
        complain(f"error: {where}{error.strerror or error}", style="red")
        raise typer.Exit(2) from None
    except MemoryError as error:
        complain(
            f"error: out of memory{f': {error}' if str(error) else ''}\n  do: give this process more memory",
            style="red",
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "stopped; nothing was stored")
        raise typer.Exit(getattr(interrupt, "exit_code", INTERRUPTED)) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM (sent by batch schedulers) or SIGHUP (the terminal was closed), handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def orderly_shutdown() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into an orderly shutdown.

    Only the first signal counts: schedulers and impatient people send several, and the shutdown must not be
    cut short. A library may swallow the exception (`except:`), so long work calls `raise_swallowed` now and
    then. A signal that was ignored before (nohup) stays ignored.
    """
    raised: list[float] = []

    def end(number: int, _: object) -> None:
        now = time.monotonic()
        if not raised or now - raised[-1] > PATIENCE:
            raised.append(now)
            _process.signalled = number
            raise_swallowed()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        _process.signalled = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if raised and _process.alone else handler)


def raise_swallowed() -> None:
    """Raise KeyboardInterrupt if a signal came that should have ended the command."""
    if (number := _process.signalled) is not None:
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(number)


@contextmanager
def as_program() -> Iterator[None]:
    """Run the command line as a process of its own: what its callers and further signals expect of one.

    Where the reader of the output went away (`| head`), exit with 141, as programs do that SIGPIPE ends; the
    signal itself stays ignored, because it would also end a run whose worker died. After a first signal
    ended a command, later ones are ignored until the process is gone.
    """
    _process.alone = True
    with suppress(OSError):  # closed by the caller
        _process.stdout = os.dup(1)  # click and rich replace a broken one
    try:
        yield
    except SystemExit as stop:
        if stop.code == 1 and _reader_is_gone():  # what click and rich exit with then
            raise SystemExit(BROKEN_PIPE) from None
        raise


@dataclass
class _Process:
    """What only the command's own process knows: that it is one, and its first standard output.

    signalled: the number of the signal that ends the command.
    """

    alone: bool = False
    stdout: int | None = None
    signalled: int | None = None


_process = _Process()


def _reader_is_gone() -> bool:
    if _process.stdout is None:
        return False
    poll = select.poll()
    poll.register(_process.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def complain(message: str, *, style: str = "") -> None:
    """Print a message on standard error, also with `--quiet` or `--json`."""
    SafeConsole(stderr=True).print(message, style=style, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    complain(f"warning: {message}", style="yellow")


class _Complaints(logging.Handler):
    """Prints the errors that libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def _silence_libraries() -> None:
    """Turn off the libraries' own progress bars, warnings and advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    logging.lastResort = _Complaints(logging.WARNING)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (steps done, steps in all) that moves a progress bar, visible on terminals only."""
    from rich.progress import Progress

    disabled = output.quiet or output.json or not output.console.is_terminal
    with Progress(console=output.console, transient=True, disable=disabled) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_line(label: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that says what is being done, visible on terminals only."""
    from rich.status import Status

    if output.quiet or output.json or not output.console.is_terminal:
        yield lambda text: None
        return
    with Status(label, console=output.console) as status:
        yield status.update


def relative(path: Path) -> str:
    """Return a path relative to the working directory where it lies below it, else absolute."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
