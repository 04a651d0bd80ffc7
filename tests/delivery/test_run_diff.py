"""What tells two runs apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.api import folders
from evomerge.delivery.run_diff import differences
from evomerge.running.store import RunStore, facts


@pytest.fixture
def other(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run with another seed and rank of candidates, without a winner."""
    folder = tmp_path / "other"
    shutil.copytree(finished_run, folder)
    store = RunStore.open(folder)
    config = facts.CONFIG.require(store)
    facts.CONFIG.set(store, {**config, "seed": 7, "optimizer": {**config["optimizer"], "population": 6}})
    facts.STOPPED.set(store, None)
    store.close()
    return folder


def test_nested_differences_have_dotted_names() -> None:
    first = {"a": {"b": [1, {"c": 2}], "d": 1}, "e": [1]}
    second = {"a": {"b": [1, {"c": 3}], "d": 1}, "e": [1, 2], "f": None}
    assert differences(first, second) == {"a.b[1].c": [2, 3], "e": [[1], [1, 2]]}


def test_a_run_is_equal_to_itself(finished_run: Path) -> None:
    view = folders.diff(finished_run, finished_run)
    assert (view.data["config"], view.data["recipe"]) == ({}, {})
    text = view.text(80)
    assert "the configs are equal" in text
    assert "the winners are one recipe" in text
    assert all(len(line) <= 80 or str(finished_run) in line for line in text.splitlines())


def test_configs_and_winners_are_compared(finished_run: Path, other: Path) -> None:
    view = folders.diff(finished_run, other)
    assert view.data["config"] == {"optimizer.population": [4, 6], "seed": [0, 7]}
    assert view.data["winners"][1] is None
    assert view.data["winners"][0]["verdict"] is not None
    assert "no winner yet" in view.text()
