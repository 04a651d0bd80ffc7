"""`evomerge init`: from models and data to a config that runs, with everything guessed that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import evomerge
from evomerge.cli import app
from evomerge.cli.questions import asked_for
from evomerge.delivery.new_run import guessed
from evomerge.errors import ConfigError, DiskError
from evomerge.schema import preset_folder

TASKS = preset_folder("benchmarks/suites").parent / "tasks" / "demo" / "data"


def own_file(folder: Path, skill: str = "upper", *, rows: int = 60) -> Path:
    """The demo's items of a skill as a data file of a user."""
    path = folder / f"{skill}.jsonl"
    lines = []
    for split in ("search", "select", "test"):
        for line in (TASKS / f"demo_{skill}.{split}.jsonl").read_text().splitlines()[:rows]:
            row = json.loads(line)
            lines.append(json.dumps({"question": row["prompt"], "answer": row["answer"]}))
    path.write_text("\n".join(lines))
    return path


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def sources(zoo: Path) -> dict[str, str]:
    return {"upper": str(zoo / "upper"), "reverse": str(zoo / "reverse")}


@pytest.mark.end_to_end
def test_a_config_of_own_data_runs_to_a_verdict(tiny_zoo: Path, tmp_path: Path) -> None:
    files = {skill: own_file(tmp_path, skill, rows=16) for skill in ("upper", "reverse")}
    out = tmp_path / "new" / "mine.yaml"
    run_folder = str(tmp_path / "run")
    done = evomerge.init(tiny_zoo / "base", sources(tiny_zoo), data=files, out=out, run_folder=run_folder)
    assert done.estimate is not None
    assert done.evaluations == 120
    assert f"next:   evomerge run {out}" in done.text
    data = yaml.safe_load(out.read_text())
    assert [task["specialist"] for task in data["suite"]["tasks"]] == ["upper", "reverse"]
    assert data["suite"]["tasks"][0]["gen_kwargs"]["max_gen_toks"] < 64
    assert not Path(data["models"]["base"]).is_absolute()
    run = evomerge.optimize(out, generations=1, workers=1)
    assert run.winner is not None
    assert set(run.winner.tasks) == {"upper", "reverse"}


def test_a_suite_needs_no_trial(tiny_zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    suite = {
        "name": "small",
        "tasks_dir": str(TASKS.parent),
        "tasks": [{"task": "demo_upper", "splits": {"search": 9, "select": 9, "test": 9}, "metric": "acc"}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    done = evomerge.init(
        tiny_zoo / "base",
        sources(tiny_zoo),
        suite=str(tmp_path / "suite.yaml"),
        out=out,
        evaluations=7,
        hours=2.0,
        try_out=False,
    )
    assert done.estimate is None
    assert yaml.safe_load(out.read_text())["budget"] == {"evaluations": 7, "hours": 2.0}
    assert "because the fine-tunes are" in done.text


def test_mistakes_write_nothing(tiny_zoo: Path, tmp_path: Path) -> None:
    out, base, fine = tmp_path / "run.yaml", tiny_zoo / "base", sources(tiny_zoo)
    file = own_file(tmp_path)
    for wrong, message in (
        ({"suite": "demo", "data": {"upper": file}}, "not both"),
        ({}, "something to score on"),
        ({"suite": "demoo"}, "demo"),
        ({"data": {"upper": tmp_path / "none.jsonl"}}, "can't be read"),
        ({"data": {"upper": file}, "prompt": "ask"}, "ask"),
        ({"data": {"upper": file}, "metric": "exactt"}, "exact"),
    ):
        with pytest.raises(ConfigError, match=message):
            evomerge.init(base, fine, out=out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(evomerge.UserError):
        evomerge.init(tmp_path / "no model", fine, data={"upper": file}, out=out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(DiskError, match="exists already"):
        evomerge.init(base, fine, data={"upper": file}, out=out)
    assert out.read_text() == "mine"


def test_what_measures_nothing_is_said_and_can_be_mended(tiny_zoo: Path, tmp_path: Path) -> None:
    file = table(tmp_path, [{"prompt": f"say {n}", "answer": "never"} for n in range(80)])
    out = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="hardly measures") as raised:
        evomerge.init(tiny_zoo / "base", sources(tiny_zoo), data={"upper": file}, out=out)
    assert f"the config to mend is written: {out}" in str(raised.value)
    assert yaml.safe_load(out.read_text())["suite"]["tasks"][0]["task"] == "upper"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"instruction": "a", "output": "b"}],
            {"prompt": "instruction", "answer": "output", "metric": "exact"},
        ),
        ([{"question": "2+2", "answer": 4}, {"question": "3", "answer": "1,000.5"}], {"metric": "number"}),
        ([{"prompt": "a", "target": '{"x": 1}'}], {"answer": "target", "metric": "json"}),
        (
            [{"question": "a", "choices": ["x", "y"], "answer": "x"}],
            {"choices": "choices", "metric": "choice"},
        ),
        ([{"input": "a", "response": "b", "label": "c"}], {"prompt": "input", "answer": "response"}),
    ],
)
def test_columns_and_metrics_are_guessed(
    rows: list[dict[str, Any]], expected: dict[str, str], tmp_path: Path
) -> None:
    found = guessed(table(tmp_path, rows))
    assert expected.items() <= found.items()


def test_columns_without_known_names_are_asked_for(tmp_path: Path) -> None:
    file = table(tmp_path, [{"frage": "a", "antwort": "b"}])
    with pytest.raises(ConfigError, match="which column is the prompt"):
        guessed(file)
    assert guessed(file, prompt="frage", answer="antwort")["metric"] == "exact"


def test_options_make_names() -> None:
    base, named, suite, files = asked_for(
        "b", ["x=models/x+adapter", "models/math"], None, ["x=a.jsonl", "more/plain.csv"]
    )
    assert (base, suite) == ("b", None)
    assert named == {"x": "models/x+adapter", "math": "models/math"}
    assert files == {"x": "a.jsonl", "plain": "more/plain.csv"}
    for wrong in (["=x"], ["x="], ["x=a", "x=b"], ["a/m", "b/m"]):
        with pytest.raises(ConfigError):
            asked_for("b", wrong, "demo", None)


def test_without_a_terminal_nothing_is_asked() -> None:
    result = CliRunner().invoke(app, ["init", "--base", "b"])
    assert result.exit_code == 2
    assert "give --source NAME=MODEL" in result.stderr
