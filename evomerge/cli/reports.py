"""What `report` and `compare` print, the exit code of a failed gate, and the end of the demo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from evomerge.cli.terminal import complain, output, relative
from evomerge.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from evomerge.api.gates import Gate

GATE_FAILED = 1
"""The exit code of a failed gate; mistakes have 2."""


def show_report(folder: Path, rules_file: Path | None = None, figures: Path | None = None) -> None:
    """Print a run's report, write its page, and check its winner against the rules of a gate file.

    figures: a folder for all charts as files, None for none.
    """
    from evomerge.api.runs import load

    run = load(folder)
    results = None if rules_file is None else run.gate(rules_file)
    found = run.report()
    output.say(found.draw(output.console.width))
    output.data(found.data | _gated(results))
    try:
        page = found.save()
    except DiskError as error:
        if os.access(folder, os.W_OK):  # a full disk, not a folder that may only be read
            raise
        complain(f"no report page: {error.what} ({error.got})")
    else:
        output.say(f"report: {relative(page)}")
    if figures is not None:
        files = found.figures(figures)
        output.say(f"figures: {len(files)} files in {relative(figures)}")
    if results is not None:
        show_gate(results)


def _gated(results: Gate | None) -> dict[str, Any]:
    return {} if results is None else {"gate": results.data}


def show_comparison(folders: Sequence[Path], rules_file: Path | None = None) -> None:
    """Print a comparison of runs, and check the last one's winner against the first one's."""
    from evomerge.api.runs import compare

    if rules_file is not None and len(folders) != 2:
        raise ConfigError(
            "compare --gate: a gate compares two runs",
            expected="evomerge compare OLD NEW --gate FILE",
            got=f"{len(folders)} runs",
            fix="name two runs; for the rules of a single run use `evomerge report RUN --gate FILE`",
        )
    found = compare(folders, gate=rules_file)
    output.say(found.draw(output.console.width))
    output.data(found.data | _gated(found.gate))
    if found.gate is not None:
        show_gate(found.gate)


def show_gate(results: Gate) -> None:
    """Print a gate's results, and exit where a rule is violated."""
    output.say(results.draw(output.console.width))
    if not results.passed:
        raise typer.Exit(GATE_FAILED)


def export_demo(out: Path) -> None:
    """Export the demo's winner, load it back and compare its scores."""
    from evomerge.api.runs import load

    model = load(out).check_export()
    output.say(
        f"exported the winner to {relative(model)}; loaded back, it scores the same on every test item"
    )
