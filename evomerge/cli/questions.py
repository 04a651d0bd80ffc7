"""What `init` needs: from its options, or asked for on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from evomerge.errors import ConfigError


def asked_for(
    base: str | None, source: list[str] | None, suite: str | None, data: list[str] | None
) -> tuple[str, dict[str, str], str | None, dict[str, str]]:
    """Return base, sources by name, suite and data files by name.

    What is missing is asked for on a terminal.

    Raises:
        ConfigError: something is missing, and there is no terminal to ask on.
    """
    sources, files = _pairs(source or [], "--source"), named_files(data or [])
    if base is None:
        base = _ask("base model (a folder or a hub id)", "--base MODEL")
    while not sources:
        given = _ask("fine-tunes to merge (NAME=MODEL, separated by spaces)", "--source NAME=MODEL")
        sources = _pairs(given.split(), "--source")
    if suite is None and not files:
        given = _ask(
            "what to score on: a suite, or a .jsonl or .csv file of yours", "--suite NAME, or --data FILE"
        )
        own = given.endswith((".jsonl", ".csv"))
        suite, files = (None, named_files([given])) if own else (given, {})
    return base, sources, suite, files


def _ask(question: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(f"init: the {question} is missing", fix=f"give {option}")
    return str(typer.prompt(question)).strip()


def _pairs(given: list[str], option: str) -> dict[str, str]:
    """Return name -> location; a location alone is named like its last part."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            place, name = text, Path(text.partition("@")[0]).name
        if not name or not place:
            raise ConfigError(f"{option} {text}: no such form", expected="NAME=MODEL, as in math=models/math")
        if name in pairs:
            raise ConfigError(f"{option}: the name {name!r} stands twice", fix="give each model its own name")
        pairs[name] = place
    return pairs


def named_files(given: list[str]) -> dict[str, str]:
    """Return name -> data file; a file alone is named like itself."""
    return {
        (name if equals else Path(text).stem): (place if equals else text)
        for text in given
        for name, equals, place in (text.partition("="),)
    }
