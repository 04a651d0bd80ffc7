"""Commands that show runs while they go on: watch, serve, dashboard.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.groups import app
from evomerge.cli.options import RunArgument
from evomerge.cli.terminal import command, output

STOPPED = 1
"""Exit code of `watch` for a run that is not finished and that no process works on."""

PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="The port on 127.0.0.1; 0: a free one.")
]


@command(app, "watch")
def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Show a run while another process works on it, until it ends. Exit code 1: it stopped unfinished."""
    from rich.live import Live

    from evomerge.api import live

    if once or output.quiet or output.json:
        view = live.frame(run) if once else live.watch(run, lambda _: None)
        output.show(view)
    else:
        try:
            with Live(console=output.console, auto_refresh=False) as display:
                width = output.console.width
                view = live.watch(run, lambda view: display.update(view.draw(width), refresh=True))
        except KeyboardInterrupt as interrupt:
            interrupt.args = ("no longer watched; the run itself goes on",)
            raise
    if not once and view.data["state"] == "stopped":
        raise typer.Exit(STOPPED)


@command(app, "serve")
def serve(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="Run folders, and folders with runs; default: runs.",
            show_default=False,
        ),
    ] = None,
    port: PortOption = 0,
) -> None:
    """Show runs side by side in the browser of this machine, while they go on. Ctrl-C ends it."""
    from evomerge.api import live

    live.serve(places or [Path("runs")], port=port, say=lambda address, runs: _invite(address, "runs", runs))


@command(app, "dashboard")
def dashboard(run: RunArgument, port: PortOption = 0) -> None:
    """Show a run's candidates in optuna-dashboard, as they are now. Ctrl-C ends it."""
    from evomerge.api import live

    live.dashboard(run, port=port, say=lambda address, count: _invite(address, "candidates", count))


def _invite(address: str, what: str, count: int) -> None:
    """Print an address as it is: elsewhere tokens are hidden. With --quiet nothing but the address."""
    if output.json:
        typer.echo(json.dumps({"address": address, what: count}))
        return
    output.say(f"{what}: {count}; Ctrl-C ends. Open in a browser of this machine:")
    typer.echo(address)
