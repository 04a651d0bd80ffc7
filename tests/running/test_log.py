"""The log: both files tell every event, survive a torn line, and lead to each candidate's scores."""

from __future__ import annotations

import doctest
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import UserError
from evomerge.running import log
from evomerge.running.log import _SENTENCES, JSON_LINES, TEXT, RunLog, read
from evomerge.running.store import ID, RunStore
from tests.conftest import write_suite
from tests.running import quick


@pytest.fixture
def logged_run(config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with failures and gradients, of two sessions."""
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    path = config(
        warm_start={"gradients": {"steps": 1, "share": 0.5}},
        optimizer={"population": 7},
        budget={"generations": 1},
    )
    write_suite(tmp_path, generate=False)
    compose.start(RunConfig.load(path), Silent())
    compose.resume(tmp_path / "run", Silent(), generations=2)
    return tmp_path / "run"


def test_every_event_is_told_twice(logged_run: Path) -> None:
    events = read(logged_run)
    assert events[0]["event"] == "session"
    assert events[0]["versions"]["evomerge"]
    assert events[0]["process"] == os.getpid()
    assert [e["event"] for e in events].count("session") == 2
    assert {e["event"] for e in events} == {
        *(
            "session",
            "phase",
            "entry",
            "gradient",
            "scored",
            "failed",
            "asked",
            "generation",
            "expected",
            "finished",
        )
    }
    with RunStore.read(logged_run) as store:
        scored = {
            (recipe, split) for split in ("search", "select", "test") for recipe in store.scored_blocks(split)
        }
        failures = store.failures()
        (winner,) = store.entries("winner")
        asked = [[recipe[:ID] for recipe in generation.recipes] for generation in store.generations()]
    assert {(e["id"], e["split"]) for e in events if e["event"] == "scored"} == {
        (recipe[:ID], split) for recipe, split in scored
    }
    assert [(e["id"], e["split"], e["kind"]) for e in events if e["event"] == "failed"] == [
        (recipe[:ID], split, failure.kind) for recipe, split, failure in failures
    ]
    assert [e["ids"] for e in events if e["event"] == "asked"] == asked
    assert events[-1]["event"] == "finished"
    assert events[-1]["id"] == winner.recipe.hash[:ID]
    assert events[-1]["reason"] == "budget of 2 generations used"
    lines = (logged_run / TEXT).read_text().splitlines()
    assert len(lines) == len(events)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    assert "winner" in lines[-1]


def test_the_example_in_the_docstring() -> None:
    found = doctest.testmod(log)
    assert found.attempted > 0
    assert not found.failed


def test_every_event_is_described_and_has_a_sentence() -> None:
    page = (Path(__file__).parents[2] / "runs" / "README.md").read_text()
    table = page[page.index("| event | meaning |") : page.index("A session without an end")]
    assert set(re.findall(r"^\| (\w+) \|", table, flags=re.MULTILINE)) - {"event"} == set(_SENTENCES)


def test_the_scores_of_an_event_are_those_of_the_store(logged_run: Path) -> None:
    event = next(e for e in read(logged_run) if e["event"] == "scored" and e["split"] == "test")
    with RunStore.read(logged_run) as store:
        found: Any = store.result(store.recipe(event["id"]).hash, "test")
        assert event["scores"] == {task.task: pytest.approx(task.mean, abs=1e-6) for task in found}
        assert event["items"] == found.items


def test_a_torn_line_is_skipped_and_the_next_stands_alone(tmp_path: Path) -> None:
    with RunLog(tmp_path) as opened:
        opened.event("one", a=1)
    for name in (JSON_LINES, TEXT):
        with (tmp_path / name).open("a") as file:
            file.write('{"at": "2026-01-01", "eve')
    with RunLog(tmp_path) as opened:
        opened.event("two", b=2)
    assert [e["event"] for e in read(tmp_path)] == ["one", "two"]
    assert (tmp_path / TEXT).read_text().splitlines()[-1].endswith("two: b 2")


def test_what_modules_say_is_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path):
        logging.getLogger("evomerge.merging.tensors.kernels").error("no compiler")
    logging.getLogger("evomerge").handlers.clear()
    (event,) = read(tmp_path)
    assert (event["event"], event["level"], event["text"]) == ("note", "error", "no compiler")


def test_why_a_session_ended_is_logged(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    path = config()
    write_suite(tmp_path, generate=False)
    monkeypatch.setattr(quick, "_unlucky", lambda recipe: recipe.groups[0].sources == ("upper",))
    with pytest.raises(UserError):
        compose.start(RunConfig.load(path), Silent())
    last = read(tmp_path / "run")[-1]
    assert (last["event"], last["kind"]) == ("stopped", "UserError")
    assert "upper could not be scored" in last["reason"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / JSON_LINES).mkdir()
    with RunLog(tmp_path) as opened:
        opened.event("one")
    assert "one" in (tmp_path / TEXT).read_text()


def show(run: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["show", str(run), *words, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_show_finds_what_the_log_names(logged_run: Path) -> None:
    events = read(logged_run)
    failed = next(e for e in events if e["event"] == "failed")
    found = show(logged_run, failed["id"])
    assert found["splits"][failed["split"]]["failure"] == {"kind": "error", "reason": failed["reason"]}
    asked = next(e for e in events if e["event"] == "asked")
    found = show(logged_run, asked["ids"][3])
    assert [(e["generation"], e["candidate"]) for e in found["asked"]] == [(asked["generation"], 3)]
    assert len(found["asked"][0]["genome"]) == 2
    assert len(found["asked"][0]["losses"]) == 1
    assert found["recipe"]["groups"]
    winner = show(logged_run, "winner")
    assert {"role": "winner", "name": winner["names"][-1]["name"]} in winner["names"]
    assert set(winner["splits"]) == {"search", "select", "test"}
    assert winner["splits"]["test"]["tasks"]["demo_upper"]["items"] == 40
    text = CliRunner().invoke(app, ["show", str(logged_run), winner["id"]]).output
    assert "method: task_arithmetic" in text
    assert "merging" in text


def test_show_prints_items_with_their_texts(finished_run: Path) -> None:
    """Of a real run: the text is the task's own, the numbers are those that are stored."""
    data = show(finished_run, "upper", "--items", "demo_reverse", "--split", "search")
    rows = data["items"]["rows"]
    assert len(rows) == 24
    assert [row["block"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    with RunStore.read(finished_run) as store:
        stored: Any = store.result(data["hash"], "search")
    assert [row["metric"] for row in rows] == stored["demo_reverse"].metric.tolist()
    assert len({row["prompt"] for row in rows}) > 20
    for row in rows:
        assert row["prompt"].startswith("reverse")
        assert len(row["answers"]) == 1
    generated = show(finished_run, "winner", "--items", "demo_upper_generate")
    assert generated["items"]["split"] == "test"
    assert generated["items"]["rows"][0]["prompt"]
    shown = CliRunner().invoke(app, ["show", str(finished_run), "winner", "--items", "demo_text"])
    assert "demo_text on test" in shown.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such"], "no recipe of this run is called 'no-such'"),
        (["winner", "--items", "demo_uper"], "did you mean 'demo_upper'?"),
        (
            ["winner", "--items", "demo_upper_generate", "--split", "search"],
            "no scores of demo_upper_generate on search",
        ),
        (["winner", "--split", "tset"], "did you mean 'test'?"),
    ],
)
def test_mistakes_of_show(finished_run: Path, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["show", str(finished_run), *words])
    assert done.exit_code == 2
    assert message in done.stderr
