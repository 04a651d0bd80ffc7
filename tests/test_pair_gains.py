"""Expected gains of pairs: the line through the slack, and who has no prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evomerge import pair_gains
from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.smooth_loss import Gradient
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.pair_gains import ERROR, FEWEST, ITEMS, LINEAR, OFFSET, SLOPE, foresee, ranked
from evomerge.running.worker import GradientJob, Job, Result

NAMES = ("a", "b", "c", "d", "e")
COUNT = 40
SUITE = Suite.model_validate(
    {
        "name": "fake",
        "tasks": [
            {
                "task": name,
                "metric": "acc",
                "specialist": name,
                "splits": {"search": "search", "select": "select", "test": "test"},
            }
            for name in NAMES[:4]
        ],
    }
)
MARGINS = {"a": 4.0, "b": 2.0, "c": 1.0}
SLOPES = {"a": (0.0, 1.0, 2.0, 0.5, 9.0), "b": (0.5, 0.0, 2.0, 0.5, 9.0), "c": (1.0, 1.0, 0.0, 1.0, 9.0)}


class FakeExecutor:
    """Five sources: a, b and c have a skill, d hardly gains anything, e is no specialist."""

    def __init__(self, fail: str | None = None, margin: bool = True, items: int = COUNT) -> None:
        self.fail, self.margin, self.items = fail, margin, items
        self.asked: list[GradientJob] = []

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        for job in jobs:
            if isinstance(job, GradientJob):
                self.asked.append(job)
                yield Result(job=job, outcome=self.gradient(job))
            else:
                yield Result(job=job, outcome=self.scores(job.recipe))

    def scores(self, recipe: Recipe) -> Scores | Failure:
        source = recipe.groups[0].sources[0] if len(recipe.groups[0].sources) == 1 else "base"
        if source == self.fail:
            return Failure(kind="error", reason="told to fail")
        tasks = []
        for name in NAMES[:4]:
            right = 1.0 if source == name and name != "d" else 0.1
            metric = (np.arange(self.items) < round(right * self.items)).astype(float)
            tasks.append(TaskScores(task=name, metric=metric, margin=metric - 0.5 if self.margin else None))
        return Scores(split="search", tasks=tuple(tasks))

    def gradient(self, job: GradientJob) -> Gradient:
        (part,) = job.loss.tasks
        share = 1 / (1 + np.exp(-MARGINS[part.task] / LINEAR))
        sign = 1.0 if part.items[0] % 2 else -1.0  # slopes of both signs; their squares count
        slopes = tuple(sign * s * share * (1 - share) / LINEAR for s in SLOPES[part.task])
        return Gradient(loss=0.0, groups=({"weight": slopes},), values={part.task: float(share)})


@contextmanager
def trial(executor: FakeExecutor) -> Iterator[FakeExecutor]:
    yield executor


def fake(monkeypatch: pytest.MonkeyPatch, executor: FakeExecutor) -> Any:
    monkeypatch.setattr(pair_gains.executors, "trial", lambda config, worker: trial(executor))
    template = Recipe(
        models={name: name for name in ("base", *NAMES)},
        base="base",
        groups=(TensorGroup(method="linear", sources=("a",), parameters={"weight": (1.0,)}),),
        dtype="float32",
    )
    return SimpleNamespace(
        suite=SUITE,
        template=template,
        space=SimpleNamespace(sources=NAMES),
        config=SimpleNamespace(executor=None),
        worker=SimpleNamespace(blocks_of=lambda split: (0,)),
    )


def test_the_pair_with_most_slack_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, steps = FakeExecutor(), []
    found = foresee(fake(monkeypatch, executor), lambda done, total: steps.append((done, total)))
    assert [pair.pair for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    slack = (np.log(4.0**2 / 1.0**2) + np.log(2.0**2 / 0.5**2)) / 2
    assert found.pairs[0].slack == pytest.approx(slack, rel=1e-3)
    assert found.pairs[0].gain == pytest.approx(OFFSET + SLOPE * slack, rel=1e-3)
    assert found.items == len(executor.asked) == 3 * COUNT
    assert steps[-1] == (3 * COUNT, 3 * COUNT)
    assert "hardly better than the base on d" in found.without["d"]
    assert "no task's specialist" in found.without["e"]
    assert 0 < ERROR < 1


def test_no_more_items_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor(items=200)
    assert foresee(fake(monkeypatch, executor)).items == 3 * ITEMS


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        (FakeExecutor(margin=False), "no likelihood of right answers"),
        (FakeExecutor(items=FEWEST - 1), f"fewer than {FEWEST}"),
        (FakeExecutor(fail="b"), "b can't be scored on `search`: told to fail"),
    ],
)
def test_what_can_not_be_predicted_is_said(
    monkeypatch: pytest.MonkeyPatch, executor: FakeExecutor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        foresee(fake(monkeypatch, executor))


def test_what_can_not_be_differentiated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor()
    monkeypatch.setattr(executor, "gradient", lambda job: Failure(kind="error", reason="no gradient"))
    with pytest.raises(UserError, match="a can't be differentiated on a: no gradient"):
        foresee(fake(monkeypatch, executor))


def test_a_slope_of_nothing_is_not_infinite_slack() -> None:
    tables = {name: np.array([[2.0, 0.0, 0.0]] * 3) for name in ("a", "b")}
    (pair,) = ranked(("a", "b"), tables)
    assert np.isfinite(pair.gain)
