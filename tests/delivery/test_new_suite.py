"""`evomerge suite new` writes a suite that loads, says what its items can show, and overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.delivery.new_suite import write
from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.evaluation.own_data import read
from evomerge.evaluation.suite import Suite
from tests.test_cli import refuse, succeed


def data_file(folder: Path, count: int = 200) -> Path:
    path = folder / "facts.jsonl"
    rows: list[Any] = [{"question": f"What is {n} + 1?", "sum": n + 1} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_suite_refers_to_the_data_and_loads(tmp_path: Path) -> None:
    file = data_file(tmp_path)
    (tmp_path / "suites").mkdir()
    out = tmp_path / "suites" / "mine.yaml"
    written = write(file, prompt="question", answer="sum", metric="number", out=out)
    assert yaml.safe_load(out.read_text())["tasks"] == [
        {"task": "facts", "data": "../facts.jsonl", "prompt": "question", "answer": "sum", "metric": "number"}
    ]
    suite = Suite.load(out)
    (task,) = suite.tasks
    assert suite.data_files["../facts.jsonl"].resolve() == file
    assert read(file, task.columns, "number").counts() == written.counts
    assert sum(written.counts.values()) == 200


def test_the_command_says_what_test_can_show_and_what_comes_next(tmp_path: Path) -> None:
    file = data_file(tmp_path)
    text = succeed("suite", "new", file, "--prompt", "question", "--answer", "sum", "--metric", "number")
    assert f"wrote {tmp_path / 'facts.yaml'}" in text
    assert "shows a difference of" in text
    assert "too few `test` items" in text
    assert "next:   evomerge evaluate MODEL --suite" in text
    again = ("suite", "new", file, "--prompt", "question", "--answer", "sum")
    assert "exists already" in refuse(*again, folder=tmp_path)
    other = tmp_path / "other.yaml"
    data = json.loads(succeed(*again, "--out", other, "--json"))
    assert data["items"].keys() == {"search", "select", "test"}
    assert data["suite"] == str(other)


WRONG: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"prompt": "questoin"}, ConfigError, "did you mean 'question'"),
    ({"metric": "nmber"}, ConfigError, "did you mean 'number'"),
    ({"choices": "sum"}, ConfigError, "the choices in 'sum'"),
    ({"scorer": "x"}, ConfigError, "module:function or file.py:function"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_mistakes_write_nothing(
    tmp_path: Path, options: dict[str, Any], kind: type[UserError], message: str
) -> None:
    file = data_file(tmp_path)
    with pytest.raises(kind, match=message):
        write(file, **{"prompt": "question", "answer": "sum"} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


def test_a_missing_file_and_too_few_items_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data is not a file"):
        write(tmp_path / "none.jsonl", prompt="question", answer="sum")
    with pytest.raises(ConfigError, match="too few items for three splits"):
        write(data_file(tmp_path, 1), prompt="question", answer="sum")
    (tmp_path / "facts.yaml").write_text("")
    with pytest.raises(DiskError, match="exists already"):
        write(data_file(tmp_path), prompt="question", answer="sum")
