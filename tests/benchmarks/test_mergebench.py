"""The public benchmark: its eleven runs are valid configs, and a dry run ends with a table."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from evomerge.config import RunConfig, load_suite

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "public" / "mergebench.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mergebench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_pairs_and_all_five_are_valid_runs(script: ModuleType, tmp_path: Path) -> None:
    groups = script.groups()
    assert [len(group) for group in groups] == [2] * 10 + [5]
    options = Namespace(evaluations=100, device="cpu", allow_code_execution=True, out=str(tmp_path))
    for group in (groups[0], groups[-1]):
        config = RunConfig.of(script.config(group, options), folder=tmp_path)
        assert config.budget.evaluations == 100
        suite = load_suite(config.suite)
        assert {task.specialist for task in suite.tasks} - {None} == set(group)


@pytest.mark.slow
def test_a_dry_run_ends_with_a_table(
    script: ModuleType,
    tiny_zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["dry-run", "--model", str(tiny_zoo / "base"), "--only", "math+coding"]
    words += ["--evaluations", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["mergebench", *words])
    script.main()
    assert "| math + coding |" in capsys.readouterr().out
