"""The command line's groups of commands, and the options of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

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


class FolderGroup(TyperGroup):
    """A group that takes a folder, or one of its commands: `runs FOLDER`, `runs diff A B`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Let the name of a command be no folder."""
        first = next((word for word in args if not word.startswith("-")), None)
        if first is not None and first in self.commands:
            place = args.index(first)
            args = [*args[:place], ".", *args[place:]]
        else:
            ctx.allow_interspersed_args = True  # options after the folder
        return super().parse_args(ctx, args)


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
runs = typer.Typer(help="The runs in a folder: a list, differences, what can be deleted.", cls=FolderGroup)
app.add_typer(runs, name="runs")


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
