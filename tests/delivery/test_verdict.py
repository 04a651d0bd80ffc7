"""The verdict: no green over a loss, the line that forbids it, and what few items can't show."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.config import RunConfig
from evomerge.delivery.style import plus_minus, points
from evomerge.delivery.summary import Summary
from evomerge.delivery.verdict import STYLES, TaskResult, Verdict, resolution
from evomerge.evaluation.statistics import Interval, PairedTest
from evomerge.evaluation.suite import Suite
from evomerge.running.store import facts
from evomerge.running.store.store import RunStore
from evomerge.search.objective import ConstraintsSpec
from evomerge.stored import StoredRun


def task(name: str, winner: float, rival: float, **changes: Any) -> TaskResult:
    difference = winner - rival
    fields: dict[str, Any] = {
        "task": f"s_{name}",
        "name": name,
        "winner": winner,
        "rival": rival,
        "test": PairedTest(estimate=difference, low=difference - 0.02, high=difference + 0.02, p=0.001),
        "adjusted": 0.004,
        "kept": winner,
        "held": rival,
        "p_kept": 1.0,
        "limited": True,
    }
    return TaskResult(**fields | changes)


def verdict(*tasks: TaskResult, low: float = 0.1, **changes: Any) -> Verdict:
    fields: dict[str, Any] = {
        "rival": "TIES",
        "test": PairedTest(estimate=0.182, low=low, high=0.204, p=0.0001),
        "items": 100,
        "tasks": tasks,
        "scaled": True,
        "share": 0.5,
        "constraints": ConstraintsSpec(),
        "counted": tuple(t.task for t in tasks),
    }
    return Verdict(**fields | changes)


BETTER = [task(name, 0.8, 0.5) for name in ("add", "sort", "upper", "translate")]
LOST = task("reverse", 0.018, 0.206)


def test_a_loss_is_counted_named_and_not_green() -> None:
    found = verdict(*BETTER, LOST)
    assert found.sentence == (
        "search helped: +18.2 points [10.0, 20.4] over the best baseline (TIES); "
        "better on 4 tasks, worse on 1: reverse 1.8 against 20.6"
    )
    assert found.level == "amber"
    assert found.as_data()["worse"] == ["s_reverse"]
    assert len(found.as_data()["better"]) == 4


def test_green_only_where_nothing_is_lost_and_every_specialist_is_kept() -> None:
    assert verdict(*BETTER).level == "green"
    assert verdict(*BETTER).losses == []
    assert verdict(*BETTER, LOST).level == "amber"
    low = task(
        "low", 0.4, 0.38, adjusted=0.6, p_kept=0.01
    )  # not worse than the baseline, but most of the skill is gone
    assert verdict(*BETTER, low).level == "amber"
    assert verdict(*BETTER, low).warning is not None
    assert verdict(*BETTER, scaled=False).level == "amber"
    assert verdict(*BETTER, low=-0.01).level == "red"
    assert set(STYLES) == {"green", "amber", "red"}


def test_a_task_of_weight_0_can_be_lost_but_not_won() -> None:
    assert "better on no task" in verdict(task("shown", 0.9, 0.5, counted=False)).sentence
    assert verdict(task("shown", 0.1, 0.5, counted=False, kept=None)).level == "amber"


def test_a_difference_within_error_is_no_loss() -> None:
    found = verdict(task("a", 0.7, 0.75, adjusted=0.2))
    assert found.level == "green"
    assert found.sentence.endswith("better on no task, worse on none")


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, {"tasks": {"s_reverse": 0.2}}),
        (
            {"tasks": {"s_add": 0.9}, "retention": 0.8},
            {"tasks": {"s_add": 0.9, "s_reverse": 0.2}, "retention": 0.8},
        ),
        ({"tasks": 0.1}, {"tasks": {**{t.task: 0.1 for t in BETTER}, "s_reverse": 0.2}}),
        ({"tasks": {"s_reverse": 0.5}}, {"tasks": {"s_reverse": 0.5}}),
    ],
)
def test_the_forbidding_line_is_a_config_and_keeps_earlier_constraints(
    before: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = verdict(*BETTER, LOST, constraints=ConstraintsSpec.model_validate(before))
    assert found.forbidding is not None
    models = {"base": "b", "sources": {"a": "a", "c": "c"}}
    text = f"{yaml.safe_dump({'models': models, 'space': 'global_weights', 'suite': 'demo', 'out': 'o'})}"
    config = RunConfig.model_validate(yaml.safe_load(f"{text}{found.forbidding}\nbudget: {{generations: 1}}"))
    assert config.objective.constraints.model_dump(exclude_none=True) == expected
    assert found.forbidding in found.losses[-1]


def test_a_task_that_keeps_too_little_is_limited_to_the_stated_share() -> None:
    found = verdict(task("low", 0.4, 0.38, adjusted=0.6, p_kept=0.05), share=0.6)
    assert found.forbidding == "objective: {constraints: {tasks: {s_low: 0.6}}}"
    assert found.warning == "kept less than 60 % of what the specialist gained over the base: low 40 %"


def test_a_share_that_is_missed_within_error_is_no_loss() -> None:
    found = verdict(*BETTER, task("low", 0.4, 0.38, adjusted=0.6, p_kept=0.2))
    assert found.level == "green"
    assert found.losses == []


def test_what_no_constraint_can_name_is_left_out_of_the_line() -> None:
    dud = task("reverse", 0.0, 0.2, kept=None, held=None, limited=False)
    assert verdict(*BETTER, dud).forbidding is None
    assert verdict(*BETTER, dud).level == "amber"


def test_many_losses_are_counted() -> None:
    found = verdict(*(task(f"t{i}", 0.1, 0.5) for i in range(9)))
    assert "worse on 9: t0 10.0 against 50.0" in found.sentence
    assert found.sentence.endswith("and 4 more")


def test_scores_that_the_data_cannot_resolve_are_not_shown_as_numbers() -> None:
    assert "100.0" not in plus_minus(Interval(estimate=1.0, low=0.0, high=2.0))
    assert plus_minus(Interval(estimate=0.5, low=0.3, high=0.7)) == "50 ±20"
    assert points(2.222) == "more than 150 points"


def test_check_says_what_test_can_show() -> None:
    splits = {"search": 10, "select": 10, "test": 20}
    suite = Suite.model_validate(
        {"name": "s", "tasks": [{"task": f"s_{n}", "metric": "acc", "splits": splits} for n in ("a", "b")]}
    )
    small, large = resolution(suite, {"s_a": 20, "s_b": 500}), resolution(suite, {"s_a": 500, "s_b": 500})
    assert large.notes == []
    assert "6 points of raw score on a task, 4 in the mean" in large.sentence
    assert small.notes[0].startswith("too few `test` items to show a difference of 10 points")
    assert "a (31)" in small.notes[0]
    assert "197 items or more" in small.notes[0]


def test_the_planned_difference_is_found_as_often_as_planned() -> None:
    from evomerge.evaluation.statistics import interval, smallest_difference

    rng, n = np.random.default_rng(0), 200
    size = smallest_difference([n], [1.0])
    # A variance of 1/4 per item: 1/4 + size^2 of the items differ.
    differing = 0.25 + size**2
    chances = [(differing - size) / 2, 1 - differing, (differing + size) / 2]
    draws = rng.choice([-1.0, 0.0, 1.0], size=(400, n), p=chances)
    found = np.mean([interval([draw], [1.0], spans=[(-1.0, 1.0)]).low > 0 for draw in draws])
    assert 0.74 <= found <= 0.86


def test_the_share_is_the_config_s_and_older_runs_have_the_default(
    finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    identities, shares = set(), []
    for changes in ({"verdict": {"kept": 1.0}}, {}):
        with RunStore.open(folder) as store:
            stored = facts.CONFIG.require(store)
            stored.pop("verdict")
            facts.CONFIG.set(store, stored | changes)
        with StoredRun.read(folder) as run:
            summary = Summary(run)
            found = summary.verdict(summary.rows())
            assert found is not None
            shares.append(found.as_data()["share"])
            identities.add(run.config().identity())
            assert all(t.p_kept is not None for t in found.tasks if t.kept is not None)
    assert shares == [1.0, 0.5]
    assert len(identities) == 1
