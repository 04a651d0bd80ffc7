"""A run in optuna-dashboard, behind the guard."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import optuna
import pytest

from evomerge.api.runs import load
from evomerge.delivery.candidates import CandidateRow, Candidates, GeneOfRun
from evomerge.delivery.study import as_study

dashboard = pytest.importorskip("evomerge.serve.dashboard", reason="optuna-dashboard is not installed")


def test_a_run_is_a_study_of_its_candidates(finished_run: Path) -> None:
    with load(finished_run).opened() as summary:
        storage, count = dashboard.storage(summary)
    study = optuna.load_study(study_name="run", storage=storage)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE]
    assert study.metric_names == ["mean score on search"]
    assert len(study.trials) == count > 0
    assert study.best_value == max(trial.value for trial in study.trials if trial.value is not None)


def test_several_objectives_have_a_direction_each() -> None:
    def row(number: int, losses: tuple[float, ...] | None, failure: str | None = None) -> CandidateRow:
        return CandidateRow(
            recipe=f"{number:064x}",
            generation=0,
            position=number,
            names=(),
            genome=np.array([0.5]),
            losses=losses,
            mean=None if failure or losses is None else 0.5,
            tasks={},
            blocks=1,
            failure=failure,
        )

    rows = (row(0, (-0.5, 0.25)), row(1, (9.0, 9.0), "broken"), row(2, None))
    genes = (GeneOfRun(name="weight", facts={"kind": "real", "low": 0.0, "high": 2.0}),)
    study = as_study(
        Candidates(genes=genes, rows=rows, blocks=1), optuna.create_study(directions=["maximize"] * 2)
    )
    states = optuna.trial.TrialState
    assert [trial.state for trial in study.trials] == [states.COMPLETE, states.FAIL, states.WAITING]
    assert study.trials[0].values == [0.5, -0.25]
    assert study.trials[0].params == {"weight": 1.0}


@pytest.mark.end_to_end
def test_the_command_serves_it_behind_the_token(finished_run: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from evomerge.cli import main; main()",
        "dashboard",
        str(finished_run),
        "-q",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        base = address.split("/?")[0]
        with httpx.Client(timeout=60, follow_redirects=True) as client:
            assert client.get(f"{base}/api/studies").status_code == 403
            page = client.get(address)
            assert page.status_code == 200
            assert page.url.path == "/dashboard"
            assert page.headers["x-frame-options"] == "DENY"
            studies = client.get(f"{base}/api/studies").json()
            assert len(studies["study_summaries"]) == 1
            assert client.get(f"{base}/api/studies", headers={"Host": "example.com"}).status_code == 403
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
