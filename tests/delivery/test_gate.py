"""Gates: rules that the data show to be violated end in exit code 1, mistakes in 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.delivery import gate
from evomerge.delivery.gate import GateRules, Limit, verdicts
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError
from evomerge.stored import StoredRun


def rules(folder: Path, text: str) -> Path:
    path = folder / "gate.yaml"
    path.write_text(text)
    return path


def drawn(rng: np.random.Generator, lost: float, gained: float = 0.0, differ: float = 0.08) -> bool:
    drops = (lost, *[-gained] * 4)
    chances = [[(differ + drop) / 2, 1 - differ, (differ - drop) / 2] for drop in drops]
    limits = [
        Limit(
            rule="max_loss",
            samples=[rng.choice([-1.0, 0.0, 1.0], size=500, p=chance)],
            weights=np.ones(1),
            limit=0.0,
            spans=[(-1.0, 1.0)],
        )
        for chance in chances
    ]
    return gate.passed(verdicts(limits, 0.95))


def test_a_planted_loss_of_5_points_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([not drawn(rng, 0.05) for _ in range(200)]) >= 0.9
    assert np.mean([not drawn(rng, 0.0) for _ in range(400)]) <= 0.07


def test_rules_that_are_clearly_kept_make_no_other_loss_harder_to_find() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([not drawn(rng, 0.05, gained=0.05, differ=0.1) for _ in range(200)]) >= 0.93
    assert np.mean([not drawn(rng, 0.0, gained=0.05, differ=0.1) for _ in range(400)]) <= 0.07


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_los: {any: 2}", "max_los"),
        ("{}", "no rule"),
        ("max_loss: {any: -1}", "max_loss"),
        ("max_loss: {any: 2}\nagainst: nobody", "against"),
        ("confidence: 0.9", "no rule"),
    ],
)
def test_mistakes_in_a_gate_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GateRules.load(rules(tmp_path, text))


@pytest.mark.parametrize("against", ["base", "best_baseline", "parents"])
def test_every_reference_gives_a_result_for_every_task(
    finished_run: Path, tmp_path: Path, against: str
) -> None:
    losses = "max_loss: {any: 3, mean: 0, demo_upper: 100}"
    text = f"{losses}\nagainst: {against}\nmin_retention: 0.01\nmin_points: -900"
    with StoredRun.read(finished_run) as run:
        results = gate.check(GateRules.load(rules(tmp_path, text)), Summary(run))
    by_rule = {result.rule: result for result in results}
    assert {"max_loss demo_reverse", "max_loss demo_upper", "max_loss mean"} <= by_rule.keys()
    assert by_rule["max_loss demo_upper"].limit == -1
    assert by_rule["min_retention"].passed
    assert by_rule["min_points"].passed


@pytest.mark.end_to_end
def test_the_exit_code_is_the_gate_s(finished_run: Path, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    passing = rules(tmp_path, "max_loss: {any: 100}")
    done = invoke(app, ["report", str(finished_run), "--gate", str(passing)])
    assert done.exit_code == 0, done.output
    assert "gate: passed" in done.output
    failing = rules(tmp_path, "min_points: 900\nmin_retention: 1")
    done = invoke(app, ["report", str(finished_run), "--gate", str(failing)])
    assert done.exit_code == 1, done.output
    assert "gate: FAILED" in done.output
    done = invoke(app, ["report", str(finished_run), "--gate", str(failing), "--json"])
    assert done.exit_code == 1
    data = json.loads(done.stdout)["gate"]
    assert data["passed"] is False
    assert [rule["rule"] for rule in data["rules"]] == ["min_points", "min_retention"]
    wrong = rules(tmp_path, "max_loss: {demo_uper: 2}")
    done = invoke(app, ["report", str(finished_run), "--gate", str(wrong)])
    assert done.exit_code == 2
    assert "demo_upper" in done.stderr


def test_any_model_is_checked_in_place_of_the_winner(
    finished_run: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    invoke = CliRunner().invoke
    words = ["evaluate", str(tiny_zoo / "base"), "--run", str(finished_run)]
    keeping = rules(tmp_path, "max_loss: {any: 0, mean: 0}\nagainst: base")
    done = invoke(app, [*words, "--gate", str(keeping), "--json"])
    assert done.exit_code == 0, done.output
    assert all(rule["measured"] == 0 for rule in json.loads(done.stdout)["gate"]["rules"])
    failing = rules(tmp_path, "min_points: 900")
    done = invoke(app, [*words, "--gate", str(failing)])
    assert done.exit_code == 1, done.output
    assert "gate: FAILED" in done.output


def test_a_gate_that_cannot_be_checked_is_refused_before_the_model_is_opened(
    finished_run: Path, tmp_path: Path
) -> None:
    invoke = CliRunner().invoke
    good, wrong = rules(tmp_path, "max_loss: {any: 2}"), tmp_path / "wrong.yaml"
    wrong.write_text("max_loss: {demo_uper: 2}")
    run = ["--run", str(finished_run)]
    for words, message in (
        ([], "no suite to score on"),
        (["--suite", "demo"], "no --run"),
        ([*run, "--suite", "demo"], "got: --suite"),
        ([*run, "--split", "select"], "--split select"),
        ([*run, "--gate", str(wrong)], "demo_upper"),
    ):
        gated = words if "--gate" in words else [*words, "--gate", str(good)]
        done = invoke(app, ["evaluate", "no/such/model", *gated])
        assert done.exit_code == 2, done.output
        assert message in done.stderr
