"""Commands on suites: suite new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.groups import suite
from evomerge.cli.terminal import command, output


@command(suite, "new")
def suite_new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSONL or CSV file, one item per row.")],
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="COL", help="The column of the prompts, or a jinja text.")
    ],
    answer: Annotated[
        str, typer.Option("--answer", metavar="COL", help="The column of the right answers, or a jinja text.")
    ],
    choices: Annotated[
        str | None, typer.Option("--choices", metavar="COL", help="The column of the choices.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="exact, contains, regex, number, json or choice; default: exact, or choice with --choices.",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer", metavar="CODE", help="Score answers by file.py:function or module:function."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of suite and task; default: FILE's.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="YAML", help="The suite to write; default: beside FILE.")
    ] = None,
) -> None:
    """Write a suite of your own data, and say what differences its `test` items can show."""
    from evomerge.api.tools import new_suite

    written = new_suite(
        file,
        prompt=prompt,
        answer=answer,
        choices=choices,
        metric=metric,
        scorer=scorer,
        name=name,
        out=out,
    )
    output.say(written.text)
    output.data(written.as_data())
