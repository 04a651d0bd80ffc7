"""The command line's groups of commands, and the options of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.options import (
    JsonOption,
    QuietOption,
)
from evomerge.cli.terminal import (
    output,
)
from evomerge.version import __version__

if TYPE_CHECKING:
    pass


app = typer.Typer(
    help="Search for the best merge of language models: per-layer weights, densities and methods.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
zoo = typer.Typer(help="The demo models: a small base and its specialists.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
spaces = typer.Typer(help="The search-space presets, and the genes of one.")
app.add_typer(spaces, name="spaces")
suite = typer.Typer(help="What models are scored on: a suite of your own data.", no_args_is_help=True)
app.add_typer(suite, name="suite")


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
