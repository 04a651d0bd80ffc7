"""A run on tasks with code of their own: refused without permission, and with it in workers and inline."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.test_cli import invoke, succeed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")
CODE = """
def results(doc, answers):
    scope = {}
    try:
        exec(answers[0], scope)
    except (SyntaxError, NameError):
        scope["answer"] = 0.5
    return {"runs": scope["answer"]}
"""
TASK = {
    "include": "copied.yaml",
    "task": "code",
    "unsafe_code": True,
    "metric_list": [{"metric": "runs", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def code(config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a run config whose suite has a task that executes the answers; arguments as in `config`."""

    def write(**changes: object) -> Path:
        path = config(generate=False, budget={"generations": 1}, **changes)
        suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
        demo = Path(suite["tasks_dir"])
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        for file in demo.glob("*.yaml"):
            (folder / file.name).write_text(file.read_text().replace("data/", f"{demo}/data/"))
        (folder / "copied.yaml").write_text((folder / "demo_upper_generate.yaml").read_text())
        (folder / "code.yaml").write_text(
            yaml.safe_dump(TASK) + "process_results: !function helpers.results\n"
        )
        (folder / "helpers.py").write_text(CODE)
        splits = {"select": 4, "test": 4}
        suite["tasks"].append({"task": "code", "metric": "runs", "weight": 0, "splits": splits})
        suite["tasks_dir"] = "tasks"
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        return path

    return write


@pytest.mark.slow
def test_a_run_executes_answers_only_with_permission(code: Callable[..., Path], tmp_path: Path) -> None:
    path = code(executor={"name": "local", "workers": 1, "threads": 1, "batch_size": 32})
    run = tmp_path / "run"
    refused = invoke("run", path)
    assert refused.exit_code == 2
    assert "would run Python code" in refused.output
    assert not run.exists()
    succeed("run", path, "--trust-tasks", "--allow-code-execution")
    assert '"code"' in succeed("report", run, "--json")
    # The permission is not stored: who continues a run, perhaps one of somebody else, gives it again.
    refused = invoke("resume", run)
    assert "--trust-tasks" in refused.output
    succeed("resume", run, "--trust-tasks", "--allow-code-execution")


@pytest.mark.end_to_end
def test_a_config_gives_permission(code: Callable[..., Path]) -> None:
    assert "would run Python code" in invoke("check", code()).output
    assert "executes the models' answers" in invoke("check", code(trust_tasks=True)).output
    assert "ready to run" in succeed("check", code(trust_tasks=True, allow_code_execution=True))


@pytest.mark.end_to_end
def test_one_model_is_scored_in_this_process(
    code: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    code()
    words = ("evaluate", tiny_zoo / "base", "--suite", tmp_path / "suite.yaml", "--split", "select")
    assert "would run Python code" in invoke(*words).output
    assert "runs" in succeed(*words, "--trust-tasks", "--allow-code-execution")
