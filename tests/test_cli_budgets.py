"""Budgets and guardrails on the command line: what stops a run, what it says, and how it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.running.store import RunStore
from evomerge.running.worker import GradientJob, Job, Result, Worker
from tests.test_cli import invoke, refuse, succeed


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("status", run, "--json"))
    return found


@pytest.fixture
def path(config: Callable[..., Path]) -> Path:
    return config(generate=False, budget={"generations": 3, "cost": {"per_hour": 6.0}})


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_a_run_that_its_time_ended_goes_on_only_with_more_of_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as slower:
        slower.setenv("EVOMERGE_TEST_NAP", "0.02")
        said = succeed("run", path, "--hours", "0.0001")
    assert "run ends about" in said
    data = status(run)
    assert data["generations"] == 1
    assert data["stopped"].startswith("budget of 0.0001 hours used")
    assert data["stopped_by_clock"]["limit"] == "hours"
    assert data["cost"] == pytest.approx(6.0 * data["hours"], abs=1e-3)
    text = succeed("status", run)
    assert f"to continue: evomerge resume {run} --hours N" in text
    assert "0.0001 hours, at 6 per hour" in text
    assert "budget of 0.0001 hours used" in (run / "report.html").read_text()
    winner = data["winner"]
    succeed("--quiet", "resume", run)
    assert (status(run)["generations"], status(run)["winner"]) == (1, winner)
    later = (datetime.now() + timedelta(hours=5)).isoformat()
    succeed("--quiet", "resume", run, "--hours", "5", "--until", later, "--cost", "30", "--patience", "50")
    data = status(run)
    assert (data["generations"], data["stopped"]) == (3, "budget of 3 generations used")
    assert data["stopped_by_clock"] is None
    assert data["budget"]["cost"] == {"per_hour": 6.0, "max": 30.0}
    assert datetime.fromisoformat(data["budget"]["until"]) == datetime.fromisoformat(later).astimezone()
    with RunStore.read(run) as store:
        courses = [g.genomes.tolist() for g in store.generations()]
    run.rename(tmp_path / "first")
    succeed("--quiet", "run", path)
    with RunStore.read(run) as store:
        assert [g.genomes.tolist() for g in store.generations()] == courses
        assert status(run)["winner"] == data["winner"]


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_status_of_a_run_under_way_says_when_it_will_be_done(path: Path, tmp_path: Path) -> None:
    seen: list[tuple[dict[str, Any], str]] = []

    class Looks(Silent):
        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            seen.append((status(tmp_path / "run"), succeed("status", tmp_path / "run")))

    until = datetime.now() + timedelta(hours=3)
    compose.start(RunConfig.load(path, until=until.isoformat()), Looks())
    data, text = seen[0]
    assert data["state"] == "running"
    assert data["estimate"]["ends"] > datetime.now().timestamp() - 600
    assert "run ends about" in text
    assert "cost 0.0" in text
    assert f"time limit: {until:%Y-%m-%d %H:%M}" in text
    assert "search ends in" not in seen[-1][1]
    assert "run ends" not in succeed("status", tmp_path / "run")


@pytest.mark.end_to_end
def test_when_everything_fails_the_command_does_and_a_resume_mends_it(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(generate=False, baselines=[], budget={"generations": 2})
    run, scored = tmp_path / "run", Worker._attempt
    succeed("--quiet", "run", path)
    run.rename(tmp_path / "whole")
    count = 0

    def unplugged(self: Worker, job: Job | GradientJob) -> Result:
        nonlocal count
        count += 1
        if count > 16:
            raise RuntimeError("the device is gone")
        return scored(self, job)

    monkeypatch.setattr(Worker, "_attempt", unplugged)
    result = invoke("run", path, "--failures", "3")
    assert result.exit_code == 2
    assert "the last 3 candidates all failed (3 of kind error)" in result.stderr
    assert "RuntimeError: the device is gone" in result.stderr
    assert "Traceback" not in result.output
    assert status(run)["failures"] == 0
    monkeypatch.undo()
    succeed("--quiet", "resume", run)
    with RunStore.read(run) as store, RunStore.read(tmp_path / "whole") as whole:
        assert store.digest() == whole.digest()


@pytest.mark.end_to_end
def test_check_says_when_a_run_begun_now_would_end_and_what_it_would_cost(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    until = datetime.now() + timedelta(hours=3)
    budget = {"evaluations": 40, "until": until.isoformat(), "cost": {"per_hour": 6.0}}
    data = json.loads(succeed("check", config(generate=False, budget=budget), "--json"))
    assert 0 < data["estimated_minutes"] < 180
    assert data["estimated_cost"] == pytest.approx(data["estimated_minutes"] / 10)
    assert data["enough_time"] is True
    ends = datetime.fromisoformat(data["ends"]) - datetime.now().astimezone()
    assert ends.total_seconds() / 60 == pytest.approx(data["estimated_minutes"], abs=0.5)
    text = succeed("check", config(generate=False, budget={"until": until.isoformat()}))
    assert f"started now it ends about {until:%Y-%m-%d}" in text
    late = succeed("check", config(generate=False, budget={"hours": 1e-4}))
    assert "the budget's time is too short" in late
    assert "cost:   unknown (the budget sets only `patience`)" in succeed(
        "check", config(generate=False, budget={"patience": 5})
    )
    assert not (tmp_path / "run").exists()


def test_mistakes_in_limits(path: Path, config: Callable[..., Path], tmp_path: Path) -> None:
    assert "has passed" in refuse("run", path, "--until", "2020-01-01T08:00", folder=tmp_path)
    assert "has passed" in refuse("check", config(budget={"until": "2020-01-01 08:00"}), folder=tmp_path)
    assert "a time of day" in refuse("run", path, "--until", "noon", folder=tmp_path)
    plain = config(budget={"generations": 1})
    message = refuse("run", plain, "--cost", "5", folder=tmp_path)
    assert "missing key 'budget.cost.per_hour'" in message
