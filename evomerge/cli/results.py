"""Commands on a run: status, show, samples, report, compare, export, predict.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.forms import COMPARED, check_form, say_adapter, say_file, say_notes, shard_bytes
from evomerge.cli.groups import app
from evomerge.cli.options import (
    FormArgument,
    FormOption,
    GateOption,
    KeepRestOption,
    RankOption,
    RunArgument,
    ShardSizeOption,
    SplitOption,
)
from evomerge.cli.reports import show_comparison, show_report
from evomerge.cli.terminal import (
    command,
    output,
    relative,
)

if TYPE_CHECKING:
    pass


@command(app, "status")
def status(run: RunArgument) -> None:
    """Show the progress of a run; works while it runs."""
    from evomerge.api.runs import load

    output.show(load(run).status())


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
    from evomerge.api.runs import load

    output.show(load(run).show(candidate, items=items, split=split))


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
    from evomerge.api.runs import load

    found = load(run).samples(candidate, task, against=against, split=split, wrong=wrong, limit=limit)
    output.show(found)


@command(app, "report")
def report(
    run: RunArgument,
    gate: GateOption = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Also write every chart there (SVG, PNG, CSV), and a card to share."
        ),
    ] = None,
) -> None:
    """Print a run's tables and verdict, and write RUN/report.html."""
    show_report(run, gate, figures)


@command(app, "compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs on one suite.")],
    gate: GateOption = None,
) -> None:
    """Compare runs on shared `test` items: seeds of one config, or configs with the first one."""
    show_comparison(runs, gate)


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
    shard_size: ShardSizeOption = None,
    accept_difference: Annotated[
        bool, typer.Option("--accept-difference", help="Write weights that differ from the scored ones.")
    ] = False,
    permissions: Any = None,
) -> None:
    """Write a run's winner: as a model with recipe and model card, as a LoRA adapter, or as a YAML file."""
    from evomerge.api.runs import FORMS, load

    check_form(form, FORMS, rank, keep_rest, shard_size)
    done = load(run).export(
        out,
        pick=pick,
        form=form,
        rank=rank,
        keep_rest=keep_rest,
        max_shard_bytes=shard_bytes(shard_size),
        accept_difference=accept_difference,
        permissions=permissions,
    )
    if done.adapter is not None:
        output.say(done.comparison)
        say_adapter(done)
        return
    if form != "model":
        say_file(out, done.recipe)
        return
    output.say(f"exported {done.name} to {relative(done.place)}{COMPARED[done.equal]}")
    say_notes(done.notes)
    if done.no_mergekit:
        output.say(f"no mergekit.yaml: {done.no_mergekit}")
    output.data(
        {
            "folder": str(done.place),
            "name": done.name,
            "recipe": done.recipe,
            "equals_scored": done.equal,
        }
    )


@command(app, "predict")
def predict(
    run: RunArgument,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="recipe.yaml, a mergekit YAML, or the start of a recipe hash."),
    ],
) -> None:
    """Predict the score of a merge, with an interval, from a run's scores; nothing is merged."""
    from evomerge.api.runs import load

    output.show(load(run).predict(recipe))
