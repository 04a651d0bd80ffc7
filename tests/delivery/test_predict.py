"""`evomerge predict`: what it says is what the store says; it does not peek at the recipe it predicts."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evomerge.delivery import predict, report, report_page, status
from evomerge.delivery.course import Course
from evomerge.delivery.guidance import guidance
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError
from evomerge.merging import mergekit
from evomerge.prepare import Prepared, prepare
from evomerge.running.store import RunStore
from evomerge.search.ports import GuideState
from evomerge.search.surrogate import prediction
from evomerge.search.surrogate.guide import TRUSTED
from evomerge.stored import StoredRun

Opened = tuple[RunStore, Summary, Prepared]


@pytest.fixture(scope="module")
def opened(finished_run: Path) -> Opened:
    store = RunStore.read(finished_run)
    summary = Summary(StoredRun(store))
    return store, summary, prepare(summary.run.config())


def said(predicted: predict.Prediction) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(predict.text(predicted))
    return " ".join(console.export_text().split())


def test_a_file_and_the_start_of_a_hash_are_the_same_recipe(opened: Opened, tmp_path: Path) -> None:
    _store, summary, prepared = opened
    assert summary.winner is not None
    recipe = summary.winner.recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "mergekit.yaml").write_text(mergekit.write(recipe))
    by_hash = predict.predict(summary, prepared, recipe.hash[:10])
    for name in ("recipe.yaml", "mergekit.yaml"):
        assert predict.predict(summary, prepared, str(tmp_path / name)) == by_hash
    course = Course(summary)
    assert by_hash.measured == course.score(recipe.hash)
    assert by_hash.baseline == course.convergence().best_baseline_name


def test_all_that_was_scored_is_learnt_but_the_recipe_itself(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, summary, prepared = opened
    asked = store.generations()[-1].recipes[0]
    seen: list[str] = []
    real = prediction.predict_score

    def spy(genome: Any, examples: Any, **rest: Any) -> prediction.PredictedScore:
        seen.extend(e.recipe for e in examples)
        return real(genome, examples, **rest)

    monkeypatch.setattr(prediction, "predict_score", spy)
    predict.predict(summary, prepared, asked)
    every = {e.recipe for e in predict.scored(summary, Course(summary), prepared)}
    named = {n.recipe.hash for n in (*summary.parents, *summary.baselines)}
    assert asked in every
    assert asked not in seen
    assert set(seen) <= every
    assert set(seen) & named
    assert {summary.parents[0].recipe.hash, summary.parents[1].recipe.hash} <= every


def test_text_and_data_say_the_same(opened: Opened) -> None:
    store, summary, prepared = opened
    predicted = predict.predict(summary, prepared, store.generations()[0].recipes[0])
    text, data = said(predicted), json.loads(json.dumps(predict.as_data(predicted)))
    assert data["low"] < data["mean"] < data["high"]
    assert set(data["tasks"]) == {"demo_reverse", "demo_upper"}
    assert f"{100 * data['mean']:.1f} points" in text
    assert f"fitted to {data['recipes']} recipes" in text
    assert data["measured"]["of"] == 3
    assert "measured" in text
    assert predicted.baseline is not None
    assert f"best baseline ({predicted.baseline})" in text


@pytest.mark.parametrize("known", [True, False])
def test_where_nothing_near_was_scored_no_score_is_printed(known: bool) -> None:
    forecast = prediction.PredictedScore(
        mean=0.4321,
        low=0.3,
        high=0.5642,
        tasks={"t": 0.4321},
        values={"t": 0.2109},
        retention=0.9876,
        learnt=30,
        blocks=(0, 1),
        error=0.0766,
        correlation=0.5,
        uncertainty=0.97,
        lowest=0.1234,
        highest=0.6543,
        known=known,
    )
    asked = predict.Prediction(
        recipe="0123456789abcdef",
        forecast=forecast,
        measured=None,
        baseline="TIES",
        baseline_mean=0.2,
        baseline_tasks={"t": 0.2},
        ranked=None,
        blocks=2,
    )
    text, data = said(asked), predict.as_data(asked)
    assert ("the model knows nothing about this merge" in text) is not known
    for shown in ("43.2", "98.8", "7.7 points", "better than the best baseline"):
        assert (shown in text) is known
    for shown in ("12.3 to 65.4 points", "only scoring it can tell"):
        assert (shown in text) is not known
    assert data["known"] is known
    for name in ("mean", "low", "high", "tasks", "values", "retention"):
        assert (data[name] is None) is not known
    assert data["learnt_from"] == {"lowest": 0.1234, "highest": 0.6543}


@pytest.mark.parametrize("asked", ["no-such-file.yaml", "abc", "ABCDEF12"])
def test_what_is_neither_file_nor_hash(opened: Opened, asked: str) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        predict.predict(*opened[1:], asked)


def test_a_recipe_outside_the_space_or_over_other_models(opened: Opened, tmp_path: Path) -> None:
    _store, summary, prepared = opened
    slerp = next(b.recipe for b in summary.baselines if b.name == "SLERP")
    with pytest.raises(ConfigError, match="outside the run's search space"):
        predict.predict(summary, prepared, slerp.hash)
    (tmp_path / "other.yaml").write_text(slerp.to_yaml().replace("upper", "unknown"))
    with pytest.raises(ConfigError, match=r"other\.yaml: 'unknown' is none of this run's models"):
        predict.predict(summary, prepared, str(tmp_path / "other.yaml"))


STATES = [(None, 0, 2), (TRUSTED - 0.1, 2, 2), (TRUSTED - 0.2, 0, 2), (TRUSTED + 0.5, 0, 4)]


@pytest.fixture
def guided(finished_run: Path, tmp_path: Path) -> RunStore:
    """A copy of the run whose surrogate had low correlations and was ignored for two generations."""
    shutil.copytree(finished_run, tmp_path / "run")
    store = RunStore.open(tmp_path / "run")
    for number, (correlation, proposed, blocks) in enumerate(STATES):
        state = GuideState(correlation=correlation, proposed=proposed, blocks=blocks, radius=0.3)
        store.record_guide(number, state)
    return store


def test_all_outputs_describe_the_surrogate_alike(guided: RunStore, tmp_path: Path) -> None:
    surrogate = guidance(guided)
    assert surrogate is not None
    assert surrogate.off == (2, 3)
    assert surrogate.blocks == (2, 2, 2, 2)
    assert sum(surrogate.proposed) == 2
    for part in (
        "proposed 2 of 12 candidates",
        "on 2 of 3 item blocks",
        "ignored in 2 of 4 generations (2-3; rank correlation below 0.1)",
    ):
        assert part in surrogate.sentence
    summary = Summary(StoredRun(guided))
    assert surrogate.sentence in status.text(status.as_data(summary))
    data = report.as_data(summary)["surrogate"]
    assert data["correlation"] == pytest.approx(TRUSTED + 0.5)
    assert data["off"] == [2, 3]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.terminal(summary, width=200))
    assert surrogate.sentence in " ".join(console.export_text().split())
    page = report_page.write_html(summary, tmp_path / "page.html").read_text()
    assert "<h2>Surrogate</h2>" in page
    assert 'id="surrogate"' in page


def test_a_run_without_a_surrogate_says_nothing_of_one(guided: RunStore, tmp_path: Path) -> None:
    guided._db.execute("DELETE FROM guide")
    guided._db.commit()
    summary = Summary(StoredRun(guided))
    assert guidance(guided) is None
    assert report.as_data(summary)["surrogate"] is None
    assert "surrogate:" not in status.text(status.as_data(summary))
    assert "<h2>Surrogate" not in report_page.write_html(summary, tmp_path / "page.html").read_text()


def test_convergence_is_on_the_items_that_were_scored(opened: Opened) -> None:
    _, summary, _ = opened
    course = Course(summary)
    convergence = course.convergence()
    assert convergence.of == 3
    assert len(convergence.generations) == len(convergence.blocks) == len(convergence.baseline) == 3
    assert all(1 <= n <= 3 for n in convergence.blocks)
    assert all(b <= s for b, s in zip(convergence.best, convergence.best_so_far, strict=True))
    best_so_far = list(zip(convergence.blocks, convergence.best_so_far, strict=True))
    assert all(b >= a for (blocks, a), (next_blocks, b) in pairwise(best_so_far) if blocks == next_blocks)
    for finalist in course.finalists():
        score = course.score(finalist.recipe)
        assert score is not None
        assert (finalist.search, finalist.blocks) == (score.mean, score.blocks)
