"""Questions and answers of items: what is shown is what the model saw and said, from the store alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery import samples
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError
from evomerge.evaluation.scores import Scores
from evomerge.running.store import RunStore
from evomerge.stored import StoredRun


def invoke(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def opened(finished_run: Path) -> Summary:
    return Summary(StoredRun(RunStore.read(finished_run)))


def test_generated_answers_are_shown_with_prompt_right_answer_and_scores(opened: Summary) -> None:
    data = samples.as_data(opened, "reverse", "demo_upper_generate", against="upper")
    assert [model["name"] for model in data["models"]] == ["reverse", "upper"]
    assert data["listed"] == data["items"] == len(data["samples"]) > 0
    for sample in data["samples"]:
        (right,) = sample["right"]
        word = sample["prompt"].split()[-2] if sample["prompt"].strip() else ""
        assert right.replace(" ", "").lower() in sample["prompt"].replace(" ", "").lower(), word
        for answer in sample["answers"]:
            (text,) = answer["texts"]
            assert (answer["metric"] == 1.0) == (text.strip() == right.strip())
            assert answer["tokens"] is not None
            assert (answer["tokens"] > 0) == bool(text)
    leads = [sample["answers"][1]["metric"] - sample["answers"][0]["metric"] for sample in data["samples"]]
    assert leads == sorted(leads, reverse=True)


def test_only_wrong_ones_and_no_more_than_asked(opened: Summary) -> None:
    everything = samples.as_data(opened, "base", "demo_upper", split="search")
    wrong = samples.as_data(opened, "base", "demo_upper", split="search", wrong=True, limit=2)
    expected = sum(sample["answers"][0]["metric"] < 1 for sample in everything["samples"])
    assert wrong["listed"] == expected > 2
    assert len(wrong["samples"]) == 2
    assert all(sample["answers"][0]["metric"] < 1 for sample in wrong["samples"])


def test_a_retention_task_has_no_wrong_answers(opened: Summary) -> None:
    assert samples.as_data(opened, "base", "demo_text", limit=1)["samples"][0]["prompt"]
    with pytest.raises(ConfigError, match="no wrong answers"):
        samples.as_data(opened, "base", "demo_text", wrong=True)


def test_the_command_needs_neither_models_nor_tasks(finished_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "run.sqlite").write_bytes((finished_run / "run.sqlite").read_bytes())
    code, said = invoke("samples", elsewhere, "winner", "--task", "demo_upper_generate", "--limit", 3)
    assert code == 0, said
    assert "3 of" in said
    assert "prompt" in said
    assert "right" in said
    code, said = invoke("samples", elsewhere, "winner", "--task", "demo_uper")
    assert code == 2
    assert "demo_upper" in said
    code, said = invoke("samples", elsewhere, "winner", "--task", "demo_upper", "--split", "tset")
    assert code == 2
    assert "test" in said
    rows = json.loads(invoke("show", elsewhere, "winner", "--items", "demo_upper_generate", "--json")[1])
    assert all(row["texts"] is not None for row in rows["items"]["rows"])


def test_the_page_shows_answers_that_differ(opened: Summary) -> None:
    sections = samples.on_page(opened, "base")
    assert [task for task, _ in sections] == ["demo_upper_generate"]
    for _, items in sections:
        assert 0 < len(items) <= 2 * samples.ON_PAGE
    assert samples.on_page(opened, None) == []


@pytest.mark.slow
def test_nothing_is_stored_where_the_config_says_so(config: Callable[..., Path]) -> None:
    runs: dict[int, Any] = {}
    for characters in (0, 3):
        place = config(
            budget={"generations": 1}, stored_text=characters, executor={"name": "inline", "batch_size": 32}
        )
        loaded = RunConfig.load(place, out=str(place.parent / f"run-{characters}"))
        compose.start(loaded, Silent())
        with StoredRun.read(Path(loaded.out)) as run:
            (base,) = run.store.entries("base")
            scores = run.store.result(base.recipe.hash, "test")
            assert isinstance(scores, Scores)
            runs[characters] = (loaded, scores["demo_upper_generate"], run.store.questions("test", 0))
    config_off, off, asked_off = runs[0]
    config_on, on, asked_on = runs[3]
    assert off.texts is None
    assert asked_off == {}
    assert {len(text) for texts in on.texts for text in texts} <= {0, 1, 2, 3}
    assert all(len(question.prompt) <= 3 for questions in asked_on.values() for question in questions)
    assert off.tokens.tobytes() == on.tokens.tobytes()
    assert config_off.identity() == config_on.identity()  # it may change when a run goes on
