"""What can be deleted in a folder of runs, and what never is."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from evomerge.api import folders
from evomerge.errors import ConfigError, StoreError
from evomerge.files import drafted_file
from evomerge.running.store import RunStore, facts


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def place(finished_run: Path, tmp_path: Path) -> Path:
    """A run with an exported model, an empty run, an abandoned draft, and files of somebody else."""
    place = tmp_path / "runs"
    shutil.copytree(finished_run, place / "good")
    model = place / "good" / "model-1"
    model.mkdir()
    (model / "recipe.yaml").write_text("x")
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    (place / "good" / "notes").mkdir()
    (place / "good" / "notes" / "mine.safetensors").write_bytes(b"x")
    RunStore.create(place / "empty", {facts.BLOCKS: 1}).close()
    (place / "mine.txt").write_text("mine")
    draft = place / f".report.html.partial-{socket.gethostname()}-abc"
    draft.mkdir()
    (draft / "report.html").write_text("half")
    return place


def kinds(data: Any) -> list[tuple[str, str]]:
    return sorted((found["kind"], Path(found["path"]).name[:12]) for found in data["found"])


def test_nothing_is_deleted_without_yes(place: Path) -> None:
    before = everything(place)
    view = folders.prune(place)
    assert kinds(view.data) == [("draft", ".report.html"), ("empty run", "empty")]
    assert view.data["deleted"] is False
    assert "--yes deletes" in view.text(80)
    assert everything(place) - before <= {f".report.html.partial-{socket.gethostname()}-abc/held"}


def test_yes_deletes_what_was_listed_and_no_more(place: Path) -> None:
    view = folders.prune(place, yes=True)
    assert "freed" in view.text()
    assert sorted(path.name for path in place.iterdir()) == ["good", "mine.txt"]
    assert (place / "good" / "model-1" / "model.safetensors").exists()
    assert folders.prune(place).text() == f"{place}: nothing to delete"


def test_models_only_on_request(place: Path) -> None:
    assert ("model", "model-1") in kinds(folders.prune(place, models=True, yes=True).data)
    assert not (place / "good" / "model-1").exists()
    assert (place / "good" / "run.sqlite").exists()
    assert (place / "good" / "notes" / "mine.safetensors").exists()


def test_a_run_with_scores_only_by_name(place: Path) -> None:
    view = folders.prune(place, runs=[place / "good"], yes=True)
    assert ("run", "good") in kinds(view.data)
    assert everything(place / "good") == {"notes", "notes/mine.safetensors"}
    with pytest.raises(ConfigError, match="no run here"):
        folders.prune(place, runs=[place / "nothing"])


def test_a_run_that_is_worked_on_is_never_touched(place: Path) -> None:
    for name in ("empty", "good"):
        store = RunStore.open(place / name)
        assert name not in [each for _, each in kinds(folders.prune(place, models=False).data)]
        with pytest.raises(StoreError, match="another process is working"):
            folders.prune(place, runs=[place / name], yes=True)
        store.close()


def test_a_draft_whose_process_lives_stays(place: Path) -> None:
    with drafted_file(place / "good" / "report.html") as draft:
        assert kinds(folders.prune(place).data).count(("draft", ".report.html")) == 1
        draft.write_text("whole")
    assert (place / "good" / "report.html").read_text() == "whole"


def test_links_are_not_followed(place: Path, finished_run: Path) -> None:
    (place / "linked").symlink_to(finished_run, target_is_directory=True)
    (place / "good" / "model-2").symlink_to(place / "good" / "model-1", target_is_directory=True)
    with pytest.raises(ConfigError, match="no run here"):
        folders.prune(place, runs=[place / "linked"], yes=True)
    found = kinds(folders.prune(place, models=True).data)
    assert ("model", "model-2") not in found
    assert (finished_run / "run.sqlite").exists()
