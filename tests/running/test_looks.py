"""How often one `test` was used on a machine is counted, and never an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.delivery import single
from evomerge.delivery.notes import notes
from evomerge.delivery.summary import Summary
from evomerge.evaluation.suite import Suite
from evomerge.running import looks
from evomerge.stored import StoredRun
from tests.conftest import write_suite


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOMERGE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_runs_of_one_test_are_counted_once_each(state: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert looks.runs_on_the_test_of(run) == 0
    for _ in range(2):
        looks.note("t", run)
    assert looks.runs_on_the_test_of(run) == 1
    looks.note("t", "evaluate model")
    looks.note("u", tmp_path / "other")
    assert looks.runs_on_the_test_of(run) == 2
    with (state / "test_looks.jsonl").open("a") as file:
        file.write("damaged\n[1]\n")
    assert looks.runs_on_the_test_of(run) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOMERGE_STATE", str(tmp_path / "file" / "state"))
    looks.note("t", tmp_path)
    assert looks.runs_on_the_test_of(tmp_path) == 0


def test_the_state_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVOMERGE_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    looks.note("t", "x")
    assert (tmp_path / "evomerge" / "test_looks.jsonl").is_file()


def test_the_report_says_it(state: Path, finished_run: Path) -> None:
    with StoredRun.read(finished_run) as run:
        looks.note("t", finished_run)
        assert not any("looked at by" in note for note in notes(Summary(run)))
        looks.note("t", "evaluate model")
        assert any("this `test` was looked at by 2 runs" in note for note in notes(Summary(run)))


def test_what_a_test_is() -> None:
    demo = Suite.load("demo")
    assert demo.test_digest() == demo.weighted({"demo_add": 2}).test_digest()
    assert demo.test_digest() != Suite.load("persona").test_digest()


def test_evaluate_on_test_counts_and_on_select_does_not(state: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    suite = str(write_suite(tmp_path, generate=False))
    single.evaluate(str(tiny_zoo / "base"), suite, "select")
    assert not (state / "test_looks.jsonl").exists()
    single.evaluate(str(tiny_zoo / "base"), suite, "test")
    (line,) = (state / "test_looks.jsonl").read_text().splitlines()
    assert json.loads(line)["test"] == Suite.load(suite).test_digest()
