"""Whatever is wrong with a candidate is its own recorded failure; what the run can't do without is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.prepare import Prepared, prepare
from evomerge.running.executors import Inline
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import Job, Worker
from tests.conftest import write_suite
from tests.running import quick

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def prepared(config: Callable[..., Path]) -> Prepared:
    return prepare(RunConfig.load(config(dtype="float16")))


def nan_logits(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_model: Any, _inputs: Any, output: Any) -> Any:
        output.logits.fill_(math.nan)
        return output

    monkeypatch.setattr(worker, "spoiler", worker._bench.model.register_forward_hook(spoil), raising=False)


def failing_metric(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = (t for t in worker._harness.items("search").tasks if t.name == "demo_reverse")
    process = task.task.process_results

    def fails_on_the_third(doc: Any, results: Any) -> Any:
        if doc is task.groups[2][0].doc:
            raise ZeroDivisionError("no words in the answer")
        return process(doc, results)

    monkeypatch.setattr(task.task, "process_results", fails_on_the_third)


def no_number(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = (t for t in worker._harness.items("search").tasks if t.name == "demo_reverse")
    monkeypatch.setattr(task.task, "process_results", lambda *_: {"acc": math.nan})


def nothing(*_: Any) -> None:
    """The weights are bad enough."""


def far_too_long(recipe: Recipe) -> Recipe:
    """Task vectors so long that their sum does not fit into float16."""
    group = dataclasses.replace(
        recipe.groups[0], method="task_arithmetic", parameters={"weight": 1e4, "lambda": 1e4}
    )
    return dataclasses.replace(recipe, groups=(group,))


@pytest.mark.parametrize(
    ("spoil", "change", "kind", "reason"),
    [
        (nothing, far_too_long, "non_finite", "is not finite"),
        (nan_logits, None, "non_finite", "the model's logits are not finite"),
        (failing_metric, None, "error", "metric 'acc' failed on item 2: ZeroDivisionError: no words"),
        (no_number, None, "error", "metric 'acc' of item 0 is not a finite number"),
    ],
    ids=["weights", "logits", "metric raises", "metric is NaN"],
)
def test_a_bad_candidate_is_a_failure_and_the_next_is_scored_as_ever(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Worker, pytest.MonkeyPatch], None],
    change: Callable[[Recipe], Recipe] | None,
    kind: str,
    reason: str,
) -> None:
    executor = Inline(prepared.worker)
    job = Job(recipe=prepared.template, split="search")
    (good,) = executor.run([job])
    assert isinstance(good.outcome, Scores)
    bad = job if change is None else dataclasses.replace(job, recipe=change(job.recipe))
    with monkeypatch.context() as patched:
        spoil(executor._worker, patched)
        (result,) = executor.run([bad])
        if spoil is nan_logits:
            executor._worker.spoiler.remove()  # type: ignore[attr-defined]
    assert isinstance(result.outcome, Failure)
    assert result.outcome.kind == kind
    assert reason in result.outcome.reason
    (again,) = executor.run([job])
    assert isinstance(again.outcome, Scores)
    assert again.outcome.same_as(good.outcome)


@pytest.fixture
def quick_run(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunStore]:
    """Run with a formula for a worker; return the store, open for reading."""
    monkeypatch.setattr(compose.executors, "build", quick.build(0))

    def run(**changes: Any) -> RunStore:
        path = config(**changes)
        write_suite(tmp_path, generate=False)
        compose.start(RunConfig.load(path), Silent())
        return RunStore.read(tmp_path / "run")

    return run


def test_a_generation_that_fails_as_a_whole_is_survived(
    quick_run: Callable[..., RunStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with quick_run(budget={"generations": 1}) as store:
        first = set(store.generations()[0].recipes)
    (tmp_path / "run").rename(tmp_path / "earlier")
    monkeypatch.setattr(quick, "_unlucky", lambda recipe: recipe.hash in first)
    with quick_run(budget={"generations": 3}) as store:
        generations, failures = store.generations(), store.failures()
        assert {recipe for recipe, _, _ in failures} == first == set(generations[0].recipes)
        assert len(generations) == 3
        losses = generations[0].losses
        assert losses is not None
        assert len(set(losses[:, 0].tolist())) == 1
        assert facts.STOPPED.get(store) == "budget of 3 generations used"
        assert store.entries("winner")[0].recipe.hash not in {recipe for recipe, _, _ in failures}


def test_a_run_whose_candidates_all_fail_says_so(
    quick_run: Callable[..., RunStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with quick_run(budget={"generations": 1}) as store:
        good = {entry.recipe.hash for role in ("base", "parent", "baseline") for entry in store.entries(role)}
    (tmp_path / "run").rename(tmp_path / "earlier")
    monkeypatch.setattr(quick, "_unlucky", lambda recipe: recipe.hash not in good)
    with pytest.raises(UserError, match="no candidate could be scored, so there is no winner") as error:
        quick_run(budget={"generations": 2})
    assert "failed candidates are tried again" in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    with RunStore.read(tmp_path / "run") as store:
        assert not store.failures()
    compose.resume(tmp_path / "run", Silent(), generations=4)
    with RunStore.read(tmp_path / "run") as store:
        assert store.entries("winner")


def test_a_search_that_only_repeats_itself_ends(quick_run: Callable[..., RunStore]) -> None:
    """Every generation after the first few is known already; each still uses up a little of the budget."""
    space = {
        "name": "few",
        "about": "two points",
        "method": "task_arithmetic",
        "genes": {"weight": {"choices": [0.3, 0.6], "per": []}},
    }
    with quick_run(
        space=space, optimizer={"name": "random", "population": 4}, budget={"items": 400}
    ) as store:
        recipes = {recipe for generation in store.generations() for recipe in generation.recipes}
        assert len(recipes) <= 2
        assert len(store.generations()) > 2
        assert "budget of 400 items used" in facts.STOPPED.get(store)


def test_a_parent_that_fails_is_named_and_can_be_mended(
    quick_run: Callable[..., RunStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(quick, "_unlucky", lambda recipe: recipe.groups[0].sources == ("upper",))
        with pytest.raises(UserError, match="upper could not be scored on search: RuntimeError") as error:
            quick_run()
    assert "remove the cause, then resume" in str(error.value)
    with RunStore.read(tmp_path / "run") as store:
        assert store.failures() == []  # it may be scored once its cause is gone
    compose.resume(tmp_path / "run", Silent(), generations=1)
    with RunStore.read(tmp_path / "run") as store:
        assert store.entries("winner")
