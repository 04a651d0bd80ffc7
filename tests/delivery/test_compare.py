"""Comparing runs: seeds of one config, two configs on the same items, and runs that can't be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery import compare
from evomerge.delivery.progress import Silent
from evomerge.delivery.verdict import SIGNIFICANT
from evomerge.errors import StoreError
from evomerge.evaluation.statistics import across_runs, interval
from evomerge.running.store import RunStore, facts


def other(run: Path, folder: Path, **changes: Any) -> Path:
    """Return a copy of a run whose stored config differs."""
    shutil.copytree(run, folder)
    with RunStore.open(folder) as store:
        facts.CONFIG.set(store, {**facts.CONFIG.require(store), **changes})
    return folder


def test_seeds_of_one_config_are_one_row(finished_run: Path, tmp_path: Path) -> None:
    runs = [
        finished_run,
        other(finished_run, tmp_path / "two", seed=1),
        other(finished_run, tmp_path / "three", seed=2),
    ]
    with compare.opened(runs) as summaries:
        found = compare.compare(summaries)
        alone = summaries[0].verdict(summaries[0].rows())
    (config,) = found.configs
    assert [run.seed for run in config.runs] == [0, 1, 2]
    assert found.versus == ()
    assert alone is not None
    assert config.gain.estimate == pytest.approx(alone.test.estimate)
    assert config.gain.low < config.gain.estimate < config.gain.high


def test_two_configs_are_compared_per_task_with_holm(finished_run: Path, tmp_path: Path) -> None:
    second = other(finished_run, tmp_path / "second", finalists=3)
    done = CliRunner().invoke(app, ["compare", str(finished_run), str(second), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert len(data["configs"]) == 2
    assert [v["task"] for v in data["versus"]][:3] == [None, "demo_reverse", "demo_upper"]
    assert all(
        v["points"] == 0 and v["low"] < 0 < v["high"] and v["p_holm"] > SIGNIFICANT for v in data["versus"]
    )
    text = CliRunner().invoke(app, ["compare", str(finished_run), str(second)]).output
    assert "winners less those of" in text
    rules = tmp_path / "gate.yaml"
    rules.write_text("max_loss: {any: 0, mean: 0}\nmin_retention: 0.01")
    gated = CliRunner().invoke(app, ["compare", str(finished_run), str(second), "--gate", str(rules)])
    assert gated.exit_code == 0, gated.output
    assert "gate: passed" in gated.output
    single = CliRunner().invoke(app, ["compare", str(second), "--gate", str(rules)])
    assert single.exit_code == 2
    assert "a gate compares two runs" in single.stderr


def test_runs_on_other_items_are_refused(finished_run: Path, tmp_path: Path) -> None:
    second = other(finished_run, tmp_path / "second")
    with RunStore.open(second) as store:
        facts.SUITE_DIGEST.set(store, "2:" + "0" * 64)
    with pytest.raises(StoreError, match="other `test` items"), compare.opened([finished_run, second]):
        pass
    with pytest.raises(StoreError, match="named twice"), compare.opened([finished_run, finished_run]):
        pass


def test_a_run_without_a_winner_is_refused(finished_run: Path, tmp_path: Path) -> None:
    second = other(finished_run, tmp_path / "second")
    with RunStore.open(second) as store:
        facts.STOPPED.set(store, None)
    with pytest.raises(StoreError, match="no winner scored"), compare.opened([finished_run, second]):
        pass


def test_the_interval_over_items_and_seeds_covers(config: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        seeds, items = 0.1 * rng.normal(size=5), 0.5 * rng.normal(size=60)
        scores = seeds[:, None] + items + 0.2 * rng.normal(size=(5, 60))
        test = across_runs(
            [scores.mean(axis=0)], [scores.mean(axis=1)], [1.0], seed=trial, spans=[(-1.0, 1.0)]
        )
        covered += test.low <= 0 <= test.high
    assert 0.91 <= covered / 200 <= 1
    one = across_runs([scores[0]], [scores[:1].mean(axis=1)], [1.0], seed=0, spans=[(-1.0, 1.0)])
    plain = interval([scores[0]], [1.0], spans=[(-1.0, 1.0)])
    assert one.high - one.low == pytest.approx(plain.high - plain.low, rel=0.15)


@pytest.mark.end_to_end
def test_nothing_can_help_where_sources_are_the_base_with_noise(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    from benchmarks.perf.honesty import noisy

    models = {
        "base": str(tiny_zoo / "upper"),
        "sources": {n: noisy(tiny_zoo / "upper", tmp_path / n, [0, k]) for k, n in enumerate("ab")},
    }
    said: list[str] = []

    class Listens(Silent):
        def noted(self, message: str) -> None:
            said.append(message)

    suite = tmp_path / "suite.yaml"
    path = config(generate=False, models=models, budget={"generations": 1})
    suite.write_text(
        suite.read_text()
        .replace("specialist: reverse", "specialist: a")
        .replace("specialist: upper", "specialist: b")
    )
    compose.start(RunConfig.load(path), Listens())
    assert any("no specialist is shown to be better than the base" in message for message in said)
    report = CliRunner().invoke(app, ["report", str(tmp_path / "run")]).output
    assert "no specialist is shown to be better than the base" in " ".join(report.split())
    assert "search did not help" in report


def test_an_older_run_is_compared_where_it_stores_the_same_test_items(
    finished_run: Path, tmp_path: Path
) -> None:
    older = other(finished_run, tmp_path / "older", seed=1)
    with RunStore.open(older) as store:
        facts.SUITE_DIGEST.set(store, "a" * 64)  # over all files of tasks_dir
    for order in ([finished_run, older], [older, finished_run]):
        with compare.opened(order) as summaries:
            assert len(compare.compare(summaries).configs) == 1
    with RunStore.open(older) as store:
        stored = facts.SUITE.require(store)
        stored["tasks"][0]["weight"] = 3.0
        facts.SUITE.set(store, stored)
    with (
        pytest.raises(StoreError, match="scored on other `test` items"),
        compare.opened([finished_run, older]),
    ):
        pass
    with RunStore.open(older) as store:
        facts.SUITE_DIGEST.set(store, "2:" + "a" * 64)
    with (
        pytest.raises(StoreError, match="scored on other `test` items"),
        compare.opened([finished_run, older]),
    ):
        pass
