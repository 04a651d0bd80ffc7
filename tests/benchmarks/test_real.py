"""The data of the benchmark on a real model: nothing is trained on that is asked later."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from evomerge.config import load_suite

FOLDER = Path(__file__).parents[2] / "benchmarks" / "real"


@pytest.fixture
def skills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module of data."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("skills")


def test_no_item_of_the_suite_is_trained_on(skills: ModuleType, tmp_path: Path) -> None:
    skills.write(tmp_path / "tasks")
    parts = {
        "persona": ("message", "Message: ", "\nReply:"),
        "tools": ("request", "Request: ", "\nAnswer:"),
        "dates": ("ask", "", "\n"),
    }
    rows = [
        json.loads(line)
        for file in tmp_path.rglob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    for name, (key, before, after) in parts.items():
        asked = {row[key] for row in rows if key in row}
        trained = {
            prompt.rpartition(before)[2].partition(after)[0] if before else prompt
            for prompt, _ in skills.TRAINING[name]()
        }
        assert min(len(asked), len(trained)) > 90
        assert not asked & trained


def test_the_same_data_every_time(skills: ModuleType) -> None:
    for make in skills.TRAINING.values():
        assert make() == make()
    assert list(skills.chat()) == list(skills.chat())
    choices = [row for row in skills.chat() if row["answer"] not in row["choices"]]
    assert not choices


def test_the_suite_is_a_valid_one(skills: ModuleType, tmp_path: Path) -> None:
    sys.modules.pop("run", None)
    benchmark = importlib.import_module("run")
    skills.write(tmp_path / "tasks")
    options = argparse.Namespace(out=tmp_path, evaluations=4)
    data = benchmark.config(options, "seed-1")
    assert data["seed"] == 1
    assert [task.task for task in load_suite(data["suite"]).tasks] == [
        "persona_choice",
        "tool_single",
        "dates",
        "chat",
        "chat_answers",
        "prose",
    ]
