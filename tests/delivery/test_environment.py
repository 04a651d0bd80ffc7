"""`evomerge doctor` without a run: what it finds on this machine, and faults that are made here."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import evomerge
from evomerge.cli import app
from evomerge.delivery import environment
from evomerge.merging.tensors import kernels


def test_this_machine_has_no_fault(tmp_path: Path) -> None:
    view = evomerge.doctor(tmp_path)
    assert view.data["faults"] == 0
    found = {finding["what"] for finding in view.data["findings"]}
    assert {"python", "libraries", "processor", "memory", "extras", "disk, runs"} <= found
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["evomerge"] == evomerge.__version__


def test_a_missing_library_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "not installed: peft" in result.stdout
    assert result.stderr.startswith("error: 1 fault, listed above")


def test_a_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "notes", lambda: ("no compiler",))
    (finding,) = [f for f in environment.examine(Path()) if f.what == "compiler"]
    assert (finding.level, finding.found) == ("note", "no compiler")
    assert "install a C++ compiler" in finding.fix


def test_too_many_threads_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    (finding,) = [f for f in environment.examine(Path()) if f.what == "threads"]
    assert finding.level == "note"


def test_options_for_a_run_need_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--salvage", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "name the run folder" in result.stderr
