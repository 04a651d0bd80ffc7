"""Gradients in a run: jobs, stored step by step; warm starts resolved once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.course import Course
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss, SmoothTask
from evomerge.prepare import prepare
from evomerge.running import warm_start
from evomerge.running.batches import Batches
from evomerge.running.executors import LocalProcesses
from evomerge.running.slopes import Slopes
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import GradientJob, Job, Worker
from evomerge.search.warm_start import GradientSpec, WarmStartSpec
from evomerge.stored import StoredRun
from tests.conftest import write_suite
from tests.running.fakes import recipe

GRADIENTS = {"gradients": {"steps": 3, "share": 0.5}}
ITEMS = tuple(range(24))


class Answers:
    """An executor that answers each job with what it was given, and counts."""

    def __init__(self, outcome: Gradient | Failure) -> None:
        self.outcome, self.count = outcome, 0

    def run(self, jobs: Any) -> Any:
        for job in jobs:
            self.count += 1
            yield compose.executors.Result(job=job, outcome=self.outcome)

    def close(self) -> None: ...


class InOrder:
    """An executor of one worker that answers the last job first."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, jobs: Any) -> Any:
        for job in reversed(list(jobs)):
            yield self._worker.run(job)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "outcome",
    [
        Gradient(loss=-0.1234567890123, groups=({"weight": (0.1, 1 / 3)}, {})),
        Failure(kind="non_finite", reason="too large"),
    ],
)
def test_a_gradient_is_computed_once_in_the_life_of_a_run(
    outcome: Gradient | Failure, tmp_path: Path
) -> None:
    loss = SmoothLoss(tasks=(SmoothTask(task="skill", gain=1.0, items=(0, 2)),), price=0.2, softness=1.0)
    other = dataclasses.replace(loss, softness=2.0)
    executor = Answers(outcome)
    for _ in range(2):
        create = RunStore.open if RunStore.exists(tmp_path) else lambda f: RunStore.create(f, {})
        with create(tmp_path) as store:
            slopes = Slopes(store, executor, Silent(), Batches(store, 32))
            assert slopes.gradient(recipe(1), loss, step=0, steps=2) == outcome
            assert slopes.gradient(recipe(1), other, step=1, steps=2) == outcome
            assert slopes.gradient(recipe(2), loss, step=1, steps=2) == outcome
            failed = store.gradient_failures()
            assert failed == ([(0, "too large")] * 3 if isinstance(outcome, Failure) else [])
    assert executor.count == 3


def test_a_step_in_parts_is_the_step_and_a_run_keeps_their_number(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    prepared = prepare(RunConfig.load(config(generate=False)))
    tasks = (
        SmoothTask(task="demo_upper", gain=0.7, items=(0, 2, 3)),
        SmoothTask(task="demo_reverse", gain=0.3, items=(1,)),
        SmoothTask(task="demo_text", gain=1.0, items=(0, 1), base=9.0),  # text that is lost
    )
    loss = SmoothLoss(tasks=tasks, price=0.5, softness=1.0, limit=(2.0, 0.1))
    parts = loss.parts(2)
    assert [[(t.task, t.items, t.gain) for t in part.tasks] for part in parts] == [
        [("demo_upper", (0, 3), pytest.approx(0.7 * 2 / 3))],
        [
            ("demo_upper", (2,), pytest.approx(0.7 / 3)),
            ("demo_reverse", (1,), 0.3),
            ("demo_text", (0, 1), 1.0),
        ],
    ]
    assert loss.parts(1) == [loss]
    assert len(dataclasses.replace(loss, tasks=tasks[1:2]).parts(2)) == 1
    found = {}
    point = prepared.space.decode(np.full(prepared.space.dimension, 0.4))
    for name, wanted in (("whole", 1), ("parts", 2)):
        worker = Worker(prepared.worker)
        with RunStore.create(tmp_path / name, {}) as store:
            slopes = Slopes(store, InOrder(worker), Silent(), Batches(store, 32), parts=wanted)
            found[name] = slopes.gradient(point, loss, step=0, steps=1)
            again = Slopes(store, InOrder(worker), Silent(), Batches(store, 32), parts=3)
            again.gradient(point, dataclasses.replace(loss, price=0.4), step=0, steps=1)
            assert facts.GRADIENT_PARTS.require(store) == wanted
    whole, parted = found["whole"], found["parts"]
    assert isinstance(whole, Gradient)
    assert isinstance(parted, Gradient)
    assert parted.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parted.values == pytest.approx(whole.values, rel=1e-6)
    for a, b in zip(parted.groups, whole.groups, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_where_gradients_end_too_early_is_said(tmp_path: Path) -> None:
    loss = SmoothLoss(tasks=(SmoothTask(task="skill", gain=1.0, items=(0,)),), price=0.2, softness=1.0)
    said: list[str] = []

    class Listening(Silent):
        def noted(self, message: str) -> None:
            said.append(message)

    with RunStore.create(tmp_path, {}) as store:
        found = Gradient(loss=-0.1, groups=({"weight": (0.1,)},))
        Slopes(store, Answers(found), Listening(), Batches(store, 32)).gradient(
            recipe(1), loss, step=0, steps=9
        )
        bad = Answers(Failure(kind="non_finite", reason="too large"))
        Slopes(store, bad, Listening(), Batches(store, 32)).gradient(recipe(2), loss, step=1, steps=9)
        assert store.gradient_failures() == [(1, "too large")]
    assert said == ["gradients end at step 2 of 9: too large"]


@pytest.mark.parametrize("limit", [None, (0.9, 2.0)])
def test_a_worker_differentiates_what_it_scores(
    config: Callable[..., Path], limit: tuple[float, float] | None
) -> None:
    """The loss is the scores' own, its derivative that of the loss; the live model is left as it was."""
    prepared = prepare(RunConfig.load(config(dtype="float32", racing="off")))
    worker = Worker(prepared.worker)
    space = prepared.space
    tasks = (
        SmoothTask(task="demo_reverse", gain=0.7, items=ITEMS),
        SmoothTask(task="demo_upper", gain=0.4, items=ITEMS[::2]),
        SmoothTask(task="demo_text", gain=1.0, items=ITEMS, base=0.0),
    )
    loss = SmoothLoss(tasks=tasks, price=0.3, softness=2.0, limit=limit)

    def expected(scores: Scores) -> float:
        kept = np.exp(scores["demo_text"].metric.mean())
        value = 0.3 * (1 - kept) + (2.0 * (0.9 - kept) if limit else 0.0)
        for task in tasks[:2]:
            margin = scores[task.task].margin
            assert margin is not None
            value -= task.gain * float(np.mean(1 / (1 + np.exp(-margin[list(task.items)] / 2.0))))
        return float(value)

    at = np.array([0.4, 0.55])
    result = worker.run(GradientJob(recipe=space.decode(at), loss=loss)).outcome
    assert isinstance(result, Gradient), result
    scored = worker.run(Job(recipe=space.decode(at), split="search")).outcome
    assert isinstance(scored, Scores)
    assert result.loss == pytest.approx(expected(scored), rel=1e-5)
    for task in tasks[:2]:
        margin = scored[task.task].margin
        assert margin is not None
        soft = np.mean(1 / (1 + np.exp(-margin[list(task.items)] / 2.0)))
        assert result.values[task.task] == pytest.approx(soft, rel=1e-4)
    again = worker.run(GradientJob(recipe=space.decode(at), loss=loss)).outcome
    assert again == result
    for index in range(2):
        ends = []
        for by in (-5e-3, 5e-3):
            moved = at.copy()
            moved[index] += by
            found = worker.run(Job(recipe=space.decode(moved), split="search")).outcome
            assert isinstance(found, Scores)
            ends.append(expected(found))
        slope = (ends[1] - ends[0]) / (1e-2 * 2)  # the gene's range is 2 wide
        of_gene = sum(group["weight"][index] for group in result.groups)  # the groups share the gene
        assert of_gene == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in worker._bench.model.parameters())


def test_a_gradient_that_is_not_finite_is_a_failure(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(RunConfig.load(config()))
    worker = Worker(prepared.worker)
    monkeypatch.setattr(worker._bench, "derivatives", lambda recipe: [{"weight": (0.1, float("nan"))}])
    task = SmoothTask(task="demo_upper", gain=1.0, items=(0,))
    loss = SmoothLoss(tasks=(task,), price=0.0, softness=1.0)
    found = worker.run(GradientJob(recipe=prepared.template, loss=loss)).outcome
    assert isinstance(found, Failure)
    assert found.kind == "non_finite"


@pytest.mark.end_to_end
def test_a_worker_process_answers_it_too(config: Callable[..., Path]) -> None:
    prepared = prepare(RunConfig.load(config()))
    task = SmoothTask(task="demo_upper", gain=1.0, items=ITEMS)
    unknown = SmoothTask(task="no_such_task", gain=1.0, items=(0,))
    loss = SmoothLoss(tasks=(task,), price=0.0, softness=1.0)
    jobs = [
        GradientJob(recipe=prepared.template, loss=loss),
        GradientJob(recipe=prepared.template, loss=dataclasses.replace(loss, tasks=(unknown,))),
    ]
    executor = LocalProcesses(prepared.worker, workers=1, timeout=120)
    try:
        good, bad = (result.outcome for result in executor.run(jobs))
    finally:
        executor.close()
    assert isinstance(good, Gradient)
    assert good == Worker(prepared.worker).run(jobs[0]).outcome
    assert isinstance(bad, Failure)


@pytest.mark.usefixtures("formula")
def test_recipes_and_runs_are_read_once_and_kept(
    config: Callable[..., Path], finished_run: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(finished_run, earlier)
    data = RunConfig.load(config())
    written = {
        "models": {"b": data.models.base, "x": data.models.sources["reverse"]},
        "base": "b",
        "groups": [{"method": "task_arithmetic", "sources": ["x"], "parameters": {"weight": 0.5}}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(written))
    path = config(warm_start={"run": str(earlier), "recipes": ["own.yaml"]}, budget={"generations": 1})
    compose.start(RunConfig.load(path), Silent())
    shutil.rmtree(earlier)
    (tmp_path / "own.yaml").unlink()
    compose.resume(tmp_path / "run", Silent())
    with RunStore.read(tmp_path / "run") as store:
        starts = store.entries("start")
        assert [start.name.partition(":")[0] for start in starts] == ["recipe own.yaml", *["earlier"] * 5]
        assert starts[0].recipe.groups[0].sources == ("reverse",)  # matched by its place
        for start in starts:
            for split in ("search", "test"):
                assert isinstance(store.result(start.recipe.hash, split), Scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"models": {"x": "elsewhere"}, "groups": [{"method": "linear", "sources": ["x"]}]},
            "none of this run's models",
        ),
        (
            {"models": {"reverse": "r", "upper": "u"}, "base": "upper",
             "groups": [{"method": "task_arithmetic", "sources": ["reverse"]}]},
            "another base",
        ),
        (
            {"models": {"reverse": "r"}, "num_layers": 5,
             "groups": [{"method": "linear", "sources": ["reverse"]}]},
            "no group makes layer 2",
        ),
    ],
)  # fmt: skip
def test_recipes_over_something_else_are_refused(
    config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(changes))
    path = config(warm_start={"recipes": ["own.yaml"]})
    with pytest.raises(ConfigError, match=message):
        prepare(RunConfig.load(path))
    assert not (tmp_path / "run").exists()


def test_a_run_that_the_space_can_not_express_is_refused(
    config: Callable[..., Path], finished_run: Path
) -> None:
    path = config(warm_start={"run": str(finished_run)}, space="ties_layers")
    with pytest.raises(ConfigError, match="lies in this run's search space"):
        prepare(RunConfig.load(path))


def test_stacked_layers_are_scored_beside_any_search(config: Callable[..., Path], tmp_path: Path) -> None:
    groups = [
        {"method": "passthrough", "sources": ["upper"], "layers": [0]},
        {"method": "passthrough", "sources": ["reverse"], "layers": [1, 2], "shift": [-1]},
        {"method": "passthrough", "sources": ["upper"]},
    ]
    stack = {"models": {"reverse": "r", "upper": "u"}, "groups": groups, "num_layers": 3}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(stack))
    changes = {"warm_start": {"recipes": ["own.yaml"]}, "budget": {"generations": 1}, "racing": "off"}
    changes |= {"baselines": [], "generate": False}
    paths = {"kind": "layer_path", "name": "paths", "about": "", "longest": 1.5}
    prepared = prepare(RunConfig.load(config(**changes, space=paths, optimizer={})))
    assert prepared.space.encode(prepared.warm.recipes[0].recipe) is not None
    compose.start(RunConfig.load(config(**changes)), Silent())  # a space of weights has no genome for it
    with RunStore.read(tmp_path / "run") as store:
        (start,) = store.entries("start")
        assert start.recipe.num_layers == 3
        for split in ("search", "test"):
            assert isinstance(store.result(start.recipe.hash, split), Scores)  # type: ignore[arg-type]


@pytest.mark.usefixtures("formula")
def test_gradients_count_among_the_evaluations_of_a_run(config: Callable[..., Path], tmp_path: Path) -> None:
    counted: list[float] = []

    class Hears(Silent):
        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            counted.append(evaluations)

    path = config(warm_start=GRADIENTS, budget={"generations": 1})
    write_suite(tmp_path, generate=False)
    compose.start(RunConfig.load(path), Hears())
    with RunStore.read(tmp_path / "run") as store:
        assert store.gradient_items() == 3 * 3 * 36  # steps, passes, half of the items
        assert Course(Summary(StoredRun(store))).evaluations() == pytest.approx(counted[-1])


def test_gradients_need_a_method_with_a_slope(config: Callable[..., Path]) -> None:
    space = {"name": "s", "about": "", "method": "sce", "genes": {"select_topk": {"low": 0.1, "high": 1.0}}}
    with pytest.raises(ConfigError, match="sce can't be differentiated"):
        prepare(RunConfig.load(config(space=space, warm_start={"gradients": True})))


def test_runs_from_before_kinds_and_gradients_go_on_as_they_began(
    config: Callable[..., Path], finished_run: Path, tmp_path: Path
) -> None:
    old = RunConfig.load(config(warm_start={"gradients": False}, objective={"kind": "mean"}))
    data = old.model_dump(mode="json")
    del data["warm_start"], data["objective"]["kind"]
    shutil.copytree(finished_run, tmp_path / "old")
    with RunStore.open(tmp_path / "old") as store:
        facts.CONFIG.set(store, data)
    with StoredRun.read(tmp_path / "old") as run:
        found = run.config()
        run.refuse_older()
        assert Summary(run).objective.kind == "mean"
    assert (found.objective.kind, found.warm_start.gradients) == ("mean", "off")
    assert found.identity() == old.identity()
    data["objective"]["constraints"] = {**data["objective"]["constraints"], "tasks": 0.5}
    with RunStore.open(tmp_path / "old") as store:
        facts.CONFIG.set(store, data)
    with StoredRun.read(tmp_path / "old") as run, pytest.raises(StoreError, match="by their constraints"):
        run.refuse_older()


def test_gradients_are_part_of_a_runs_identity(config: Callable[..., Path]) -> None:
    assert WarmStartSpec().gradients == "auto"
    plain = RunConfig.load(config())
    assert plain.identity() != RunConfig.load(config(warm_start=GRADIENTS)).identity()
    assert RunConfig.load(config(warm_start=GRADIENTS)).warm_start.gradients == GradientSpec(
        steps=3, share=0.5
    )
    assert warm_start.to_data(prepare(plain).warm) == []
