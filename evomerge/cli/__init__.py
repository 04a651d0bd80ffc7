"""The command line."""

from evomerge.cli.commands import app, main

__all__ = ["app", "main"]
