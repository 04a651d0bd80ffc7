"""The commands that show runs while they go on, and those on folders of runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.test_cli import refuse, succeed


@pytest.fixture
def place(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "runs" / "a")
    return tmp_path


@pytest.mark.parametrize("width", [80, 120])
def test_watch_prints_a_frame(place: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("evomerge.cli.terminal.output.console.width", width)
    text = succeed("watch", "runs/a", "--once")
    assert text.startswith("runs/a  finished")
    assert "latest candidates" in text
    assert "best baseline" in text
    assert "3 of 3 generations" in text
    assert all(len(line) <= width for line in text.splitlines())
    data = json.loads(succeed("watch", "runs/a", "--once", "--json"))
    assert data["state"] == "finished"
    assert [row["generation"] for row in data["latest"]] == sorted(
        (row["generation"] for row in data["latest"]), reverse=True
    )


def test_watch_of_a_finished_run_ends(place: Path) -> None:
    assert "finished" in succeed("watch", place / "runs" / "a")


def test_runs_lists_diffs_and_prunes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    shutil.copytree("runs/a", "runs/diff")
    for words in (["runs"], ["runs", "runs"], ["runs", "./runs"]):
        assert [run["name"] for run in json.loads(succeed(*words, "--json"))] == ["a", "diff"]
    assert "the configs are equal" in succeed("runs", "diff", "runs/a", "runs/diff")
    assert json.loads(succeed("runs", "diff", "runs/a", "runs/diff", "--json"))["same_suite"]
    assert [run["name"] for run in json.loads(succeed("runs", "runs/diff", "--json"))] == ["diff"]
    assert "nothing to delete" in succeed("runs", "prune")
    assert Path("runs/a/run.sqlite").exists()
    assert "1 run.sqlite" not in succeed("runs", "prune", "--runs", "runs/diff")
    succeed("runs", "prune", "--runs", "runs/diff", "--yes")
    assert not Path("runs/diff").exists()
    assert Path("runs/a/run.sqlite").exists()


def test_mistakes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        ("watch", place),
        ("serve", place / "nothing"),
        ("dashboard", place),
        ("runs", place / "nothing"),
        ("runs", "diff", place / "runs" / "a", place),
        ("runs", "prune", place / "runs", "--runs", place, "--yes"),
    ):
        assert "no run here" in (said := refuse(*words, folder=place)) or "no such folder" in said
    monkeypatch.chdir(place / "runs" / "a")
    assert "runs: no such folder" in refuse("runs", folder=place)


@pytest.mark.parametrize(("command", "package"), [("serve", "starlette"), ("dashboard", "optuna_dashboard")])
def test_a_missing_extra_is_one_message(
    place: Path, command: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("evomerge.serve.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    said = refuse(command, place / "runs" / "a", folder=place)
    assert f"pip install 'evomerge[{command}]'" in said
