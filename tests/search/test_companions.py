"""Companions are measured against the exact metric, and dropped where they rank models differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.search.companions import FEWEST, companions, taught, without
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_merge_space import make

SPLITS = {"search": "a", "select": "b", "test": "c"}


def suite_of(**keys: Any) -> Suite:
    task = {"task": "t", "metric": "exact_match", "splits": SPLITS}
    other = {"task": "other", "metric": "acc", "splits": SPLITS}
    return Suite.model_validate({"name": "s", "tasks": [task | keys, other]})


def model(exact: float, smooth: float | None, *, tokens: bool = True) -> Scores:
    one = TaskScores(
        task="t",
        metric=np.full(4, exact),
        smooth=None if smooth is None else np.full(4, smooth),
        margin=None if smooth is None else np.full(4, smooth - 0.5),
        tokens=np.full(4, 3.0) if tokens else None,
    )
    return Scores(split="search", tasks=(one, TaskScores(task="other", metric=np.zeros(2))))


def models(exact: Sequence[float], smooth: Sequence[float]) -> list[Scores]:
    return [model(a, b) for a, b in zip(exact, smooth, strict=True)]


EXACT = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("smooth", "correlation", "dropped"),
    [
        ([0.2, 0.3, 0.35, 0.5, 0.6, 0.9], 1.0, False),
        ([0.9, 0.6, 0.5, 0.35, 0.3, 0.2], -1.0, True),
        ([0.5] * 6, 0.0, True),
        ([0.3, 0.1, 0.6, 0.2, 0.5, 0.4], 13 / 35, False),
        ([0.3, 0.2, 0.6, 0.1, 0.5, 0.4], 9 / 35, True),
    ],
)
def test_the_rank_correlation_decides(smooth: list[float], correlation: float, dropped: bool) -> None:
    (found,) = companions(suite_of(), models(EXACT, smooth))
    assert found.correlation == pytest.approx(correlation)
    assert found.dropped is dropped
    assert f"{found.correlation:.2f} (6 models)" in found.sentence
    assert ("has the exact metric alone" in found.sentence) is dropped


def test_gradients_follow_a_specialist_where_a_task_asks_for_it_and_generates() -> None:
    asked = suite_of(companion="distribution", specialist="p")
    tasks = ["t", "other"]
    assert taught(asked, model(0.5, None), tasks) == ["t"]
    assert taught(asked, model(0.5, None), ["other"]) == []
    assert taught(asked, model(0.5, None, tokens=False), tasks) == []
    assert taught(suite_of(companion="off", specialist="p"), model(0.5, None), tasks) == []
    assert taught(suite_of(specialist="p"), model(0.5, None), tasks) == []
    assert companions(asked, [model(0.5, None)]) == []  # it is no score


def test_a_few_different_models_decide_nothing() -> None:
    exact = [0.1] * 10 + EXACT[: FEWEST - 1]
    (found,) = companions(suite_of(), models(exact, [1 - value for value in exact]))
    assert (found.correlation, found.dropped) == (None, False)
    assert "unchecked" in found.sentence


def test_a_task_without_one_is_named() -> None:
    (found,) = companions(suite_of(), [model(a, None) for a in EXACT])
    assert not found.exists
    assert not found.dropped
    assert "not every gold answer is right" in found.sentence


@pytest.mark.parametrize("keys", [{"companion": "off"}, {"weight": 0}])
def test_tasks_that_have_none_on_purpose_are_not(keys: dict[str, Any]) -> None:
    assert companions(suite_of(**keys), [model(a, None) for a in EXACT]) == []
    assert companions(suite_of(), [model(a, a, tokens=False) for a in EXACT]) == []


def test_without_takes_away_both() -> None:
    scores = model(0.5, 0.5)
    assert without(scores, ()) is scores
    bare = without(scores, ["t"])
    assert bare["t"].smooth is None
    assert bare["t"].margin is None
    assert bare["t"].metric.tolist() == scores["t"].metric.tolist()
    assert scores["t"].smooth is not None


class Misled(FakeScorer):
    """Generates; the companion falls where the exact metric rises, or is not there at all."""

    def __init__(self, *, companion: bool) -> None:
        super().__init__()
        self._companion = companion

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        found: list[Scores | Failure] = []
        for result in super().score(recipes, split, phase, blocks):
            assert isinstance(result, Scores)
            tasks = []
            for task in result:
                wrong = 1.0 - task.metric if self._companion else None
                margin = None if wrong is None else wrong - 0.5
                tokens = np.ones(len(task.metric))
                changes = {"smooth": wrong, "margin": margin, "tokens": tokens}
                tasks.append(TaskScores(task=task.task, metric=task.metric, **changes))
            found.append(Scores(split=split, tasks=tuple(tasks)))
        return found


class Noting(Quiet):
    """Keeps what is announced."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, message: str) -> None:
        self.notes.append(message)


def searched(*, companion: bool) -> tuple[Outcome, FakeJournal, list[str]]:
    space, journal, observer = make("global_weights"), FakeJournal(), Noting()
    plan = SearchPlan(
        suite=SUITE,
        space=space,
        template=space.decode(np.full(2, 0.5)),
        norms={"a": 1.0, "b": 2.0},
        optimizer=OptimizerSpec(),
        objective=ObjectiveSpec(),
        finalists=3,
        seed=0,
        surrogate=SurrogateSpec(),
    )
    scorer = Misled(companion=companion)
    search = Search(plan, scorer=scorer, journal=journal, budget=FakeBudget(6), observer=observer)
    return search.run(), journal, observer.notes


def test_a_dropped_companion_changes_nothing_in_the_search() -> None:
    """Objective, surrogate and choice of the winner are those of a search that has none."""
    with_one, journal, notes = searched(companion=True)
    without_one, plain, other_notes = searched(companion=False)
    assert with_one.winner == without_one.winner
    for a, b in zip(journal.tells, plain.tells, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [note for note in notes if "below 0.3" in note] == notes[-2:]
    assert all("not every gold answer" in note for note in other_notes[-2:])
