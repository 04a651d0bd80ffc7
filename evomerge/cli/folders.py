"""Commands on folders of runs: runs, runs diff, runs prune.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.groups import runs
from evomerge.cli.terminal import command, output, progress_bar

RunsArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder with runs; default: runs.", show_default=False)
]


@command(runs, "")
def runs_list(context: typer.Context, folder: RunsArgument = Path("runs")) -> None:
    """List the runs in a folder: name, state, best, verdict, age and size."""
    if context.invoked_subcommand is not None:
        return
    from evomerge.api import folders

    with progress_bar("reading runs") as progress:
        found = folders.runs(folder, progress=progress)
    output.show(found)


@command(runs, "diff")
def runs_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another run folder.")],
) -> None:
    """Compare two runs: config keys that differ, winners' recipes, scores on test, verdicts."""
    from evomerge.api import folders

    output.show(folders.diff(first, second))


@command(runs, "prune")
def runs_prune(
    folder: RunsArgument = Path("runs"),
    models: Annotated[
        bool, typer.Option("--models", help="Also models that were exported into run folders.")
    ] = False,
    named: Annotated[
        list[Path] | None,
        typer.Option("--runs", metavar="RUN", help="Also this run, although it has scores; may be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what can be deleted: drafts of killed processes and runs without scores. Deletes with --yes."""
    from evomerge.api import folders

    output.show(folders.prune(folder, models=models, runs=named or [], yes=yes))
