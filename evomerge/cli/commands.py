"""The command line: one thin command per verb, in the order in which `--help` lists them."""

from __future__ import annotations

# isort: off
from evomerge.cli.groups import app
from evomerge.cli import runs, results, live, models, suites, folders  # noqa: F401  (their commands register themselves)

# isort: on
from evomerge.cli.terminal import as_program

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `evomerge` command."""
    with as_program():
        app()
