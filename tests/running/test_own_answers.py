"""The specialists' own right answers: whose, of which tasks, the same in every session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.notes import notes
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import UserError
from evomerge.evaluation.distributions import Distributions, unpacked
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running import own_answers
from evomerge.running.executors import ExecutorSpec
from evomerge.running.slopes import PHASE
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import DistributionsJob, Job, Result, WorkerSpec, WrittenAnswers
from evomerge.stored import StoredRun
from tests.conftest import config_data, write_suite

ROW = Distributions(answer=(1,), ids=np.zeros((1, 2), np.int32), logs=np.zeros((1, 2), np.float32))
SPLITS = {"search": "a", "select": "b", "test": "c"}


def suite_of(companion: str = "specialist") -> Suite:
    tasks: list[dict[str, Any]] = [
        {"task": "a", "specialist": "p"},
        {"task": "b", "specialist": "q"},
        {"task": "plain", "specialist": "q"},
        {"task": "gold"},
        {"task": "off", "specialist": "q", "companion": "off"},
        {"task": "reported", "specialist": "q", "weight": 0},
    ]
    tasks = [{"metric": "exact_match", "splits": SPLITS} | task for task in tasks]
    return Suite.model_validate({"name": "s", "companion": companion, "tasks": tasks})


def recipe(name: str) -> Recipe:
    group = TensorGroup(method="linear", sources=(name,), parameters={"weight": 1.0})
    return Recipe(models={"base": "b", "p": "p", "q": "q"}, base="base", groups=(group,), dtype="float32")


class Writing:
    """An executor that answers with the name of the model; right on items of an even number."""

    def __init__(self, spec: WorkerSpec, outcome: Failure | None = None) -> None:
        assert spec.blocks == 1
        self.outcome, self.closed = outcome, False
        self.asked: list[str] = []

    def run(self, jobs: Sequence[Job | DistributionsJob]) -> Iterator[Result]:
        for job in reversed(jobs):  # as they complete
            (name,) = job.recipe.groups[0].sources
            self.asked.append(name)
            if isinstance(job, DistributionsJob):
                rows = {task: [ROW] for task in job.tasks if task != "plain"}
                yield Result(job=job, outcome=self.outcome or WrittenAnswers(rows=rows))
                continue
            metric = np.array([1.0, 0.0, 1.0])
            texts = ((f"{name} 0",), (f"{name} 1",), (f"{name} 2",))
            rows = [TaskScores(task=t, metric=metric, texts=texts) for t in ("a", "b", "gold", "off")]
            rows += [TaskScores(task=t, metric=metric) for t in ("plain", "reported")]
            yield Result(job=job, outcome=self.outcome or Scores(split="search", tasks=tuple(rows)))

    def close(self) -> None:
        self.closed = True


def generated(
    monkeypatch: pytest.MonkeyPatch, outcome: Failure | None = None, companion: str = "specialist"
) -> tuple[Any, Writing]:
    suite = suite_of(companion)
    spec = WorkerSpec(
        models={}, base="base", suite=suite, batch_size=1, dtype="float32", device="cpu", threads=1, blocks=4
    )
    built: list[Writing] = []

    def build(_: ExecutorSpec, worker: WorkerSpec) -> Writing:
        built.append(Writing(worker, outcome))
        return built[0]

    monkeypatch.setattr(own_answers, "build", build)
    try:
        make = own_answers.expect if companion == "distribution" else own_answers.generate
        found: Any = make(spec, ExecutorSpec(), {name: recipe(name) for name in ("p", "q")})
    finally:
        assert built[0].closed
    return found, built[0]


def test_right_answers_of_the_tasks_specialists(monkeypatch: pytest.MonkeyPatch) -> None:
    found, executor = generated(monkeypatch)
    assert found == {"a": ["p 0", None, "p 2"], "b": ["q 0", None, "q 2"]}
    assert sorted(executor.asked) == ["p", "q"]


def test_a_specialist_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="q could not answer the items of search: broken"):
        generated(monkeypatch, Failure(kind="error", reason="broken"))


def test_distributions_of_the_tasks_specialists(monkeypatch: pytest.MonkeyPatch) -> None:
    found, executor = generated(monkeypatch, companion="distribution")
    assert found == {"a": [ROW], "b": [ROW]}  # `plain` generates nothing
    assert sorted(executor.asked) == ["p", "q"]
    with pytest.raises(UserError, match="q could not answer the items of search: broken") as error:
        generated(monkeypatch, Failure(kind="error", reason="broken"), companion="distribution")
    assert "set `companion: off`" in str(error.value)


@pytest.mark.parametrize("companion", ["specialist", "distribution"])
def test_a_task_that_asks_for_it_names_its_specialist(companion: str) -> None:
    task = {"task": "a", "metric": "exact_match", "splits": SPLITS, "companion": companion}
    with pytest.raises(ValueError, match=f"`companion: {companion}`, but it names no `specialist`"):
        Suite.model_validate({"name": "s", "tasks": [task]})


def test_nobody_answers_unless_a_suite_asks_for_it() -> None:
    assert own_answers.followed(suite_of()) == {"a": "p", "b": "q", "plain": "q", "reported": "q"}
    assert own_answers.followed(suite_of("auto")) == {}
    assert own_answers.followed(suite_of("distribution")) == {}
    assert own_answers.followed(suite_of("distribution"), "distribution") == {
        "a": "p",
        "b": "q",
        "plain": "q",
    }


def test_a_run_keeps_the_answers(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a second session generates none, and ends alike."""
    suite = yaml.safe_load(write_suite(tmp_path).read_text())
    (task,) = (task for task in suite["tasks"] if task["metric"] == "exact_match")
    keys = {"weight": 1, "specialist": "upper", "companion": "specialist"}
    task |= keys | {"splits": {"search": 12, "select": 8, "test": 8}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | {"tasks": [task]}))
    data = config_data(tiny_zoo, tmp_path, baselines=[], budget={"generations": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    compose.start(RunConfig.load(tmp_path / "config.yaml"), Silent())
    with RunStore.read(tmp_path / "run") as store:
        answers, digest = facts.ANSWERS.require(store), store.digest()
        said = notes(Summary(StoredRun(store)))
    (row,) = answers.values()
    assert len(row) == 12
    right = len(row) - row.count(None)
    assert any(
        f"{right} of the 12 answers of the specialist (upper) on `search` are right" in s for s in said
    )
    monkeypatch.setattr(own_answers, "generate", None)
    compose.resume(tmp_path / "run", Silent())
    with RunStore.read(tmp_path / "run") as store:
        assert store.digest() == digest


def distribution_config(zoo: Path, folder: Path, out: str) -> RunConfig:
    suite = yaml.safe_load(write_suite(folder).read_text())
    (task,) = (task for task in suite["tasks"] if task["metric"] == "exact_match")
    keys = {"weight": 1, "specialist": "upper", "companion": "distribution"}
    task |= keys | {"splits": {"search": 12, "select": 8, "test": 8}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | {"tasks": [task]}))
    changes: dict[str, Any] = {"baselines": [], "budget": {"generations": 1}}
    changes |= {"warm_start": {"gradients": {"steps": 3, "share": 0.5}}}
    data = config_data(zoo, folder, **changes, out=str(folder / out))
    (folder / f"{out}.yaml").write_text(yaml.safe_dump(data))
    return RunConfig.load(folder / f"{out}.yaml")


class Killed(Silent):
    """Ends the run at the second step of the gradients."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        if name == PHASE and done == 1:
            raise KeyboardInterrupt


@pytest.mark.end_to_end
def test_gradients_follow_the_distributions_that_a_run_keeps(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed among its gradients computes none again, and ends in the same bits."""
    compose.start(distribution_config(tiny_zoo, tmp_path, "whole"), Silent())
    with pytest.raises(KeyboardInterrupt):
        compose.start(distribution_config(tiny_zoo, tmp_path, "cut"), Killed())
    monkeypatch.setattr(own_answers, "expect", None)
    compose.resume(tmp_path / "cut", Silent())
    with RunStore.read(tmp_path / "whole") as store, RunStore.read(tmp_path / "cut") as cut:
        assert cut.digest() == store.digest()
        assert store.gradient_items() == 3 * 3 * 6
        (data,) = facts.DISTRIBUTIONS.require(store).values()
        assert len(unpacked(data)) == 12
        assert store.entries("descent")
        (said,) = (note for note in notes(Summary(StoredRun(store))) if "gradients follow" in note)
    assert "the specialist (upper) expects at each token of its 12 answers" in said
