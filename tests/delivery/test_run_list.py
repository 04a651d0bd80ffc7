"""Folders of runs: what is found, and what a line says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.api import folders
from evomerge.delivery import run_list
from evomerge.errors import ConfigError


@pytest.fixture
def place(finished_run: Path, tmp_path: Path) -> Path:
    for name in ("a", "deep/er/b", ".hidden/c", "one/two/three/four/five/d"):
        shutil.copytree(finished_run, tmp_path / name)
    shutil.copytree(finished_run, tmp_path / "a" / "inside")
    (tmp_path / "link").symlink_to(tmp_path / "deep", target_is_directory=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.sqlite").write_bytes(b"")
    return tmp_path


def test_runs_are_found_below_a_folder(place: Path) -> None:
    assert [name for _, name in run_list.find_runs([place])] == ["a", "broken", "deep/er/b"]
    assert [name for _, name in run_list.find_runs([place / "a", place])] == ["a", "broken", "deep/er/b"]
    with pytest.raises(ConfigError, match="no such folder"):
        run_list.find_runs([place / "nothing"])
    (place / "empty").mkdir()
    with pytest.raises(ConfigError, match="no runs here"):
        run_list.find_runs([place / "empty"])
    assert run_list.find_runs([place / "empty"], none=True) == []


def test_a_line_has_state_best_verdict_age_and_size(place: Path) -> None:
    view = folders.runs(place)
    by_name = {run["name"]: run for run in view.data}
    run = by_name["a"]
    assert run["state"] == "finished"
    assert run["generations"] == 3
    assert run["best"] is not None
    gain, low, high = run["gain"]
    assert low <= gain <= high
    assert run["size"] > (place / "a" / "run.sqlite").stat().st_size
    assert by_name["broken"]["state"] == "unreadable"
    assert "empty" in by_name["broken"]["problem"]
    for width in (80, 120):
        text = view.text(width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "finished" in text
        assert "deep/er/b" in text
        assert f"broken: {by_name['broken']['problem']}" in text.replace("\n", " ")


def test_running_runs_come_first_then_the_latest() -> None:
    def line(name: str, state: run_list.State, changed: float) -> run_list.RunLine:
        return run_list.RunLine(folder=Path(name), name=name, state=state, changed=changed, size=1)

    made = {
        "old": line("old", "running", 1.0),
        "new": line("new", "finished", 3.0),
        "stopped": line("stopped", "stopped", 2.0),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_list, "line", lambda folder, name: made[name])
        found = run_list.lines([(Path(name), name) for name in ("stopped", "new", "old")])
    assert [run.name for run in found] == ["old", "new", "stopped"]
