"""A suite file is strict, portable, and known by its content."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.evaluation import suite as suite_module
from evomerge.evaluation.asking import Asking
from evomerge.evaluation.scores import SPLITS
from evomerge.evaluation.suite import Splits, Suite

ROOT = Path(__file__).parents[2]
NAMED = {"search": "a", "select": "b", "test": "c"}
DRAWN = {"search": 30, "select": 20, "test": 50}


def suite_file(folder: Path, **changes: Any) -> Path:
    """Write a suite beside a folder of tasks, and return its path."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    (tasks / "t.yaml").write_text("task: t\ndataset_kwargs: {data_files: '*.jsonl'}\n")
    (tasks / "t.jsonl").write_text('{"x": 1}\n')
    data = {"name": "s", "tasks_dir": "tasks", "tasks": [skill()]} | changes
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return path


def skill(**changes: Any) -> dict[str, Any]:
    entry = {"task": "t", "metric": "acc", "splits": NAMED} | changes
    return {key: value for key, value in entry.items() if value is not None}


def test_the_demo_suite_is_found_by_name() -> None:
    suite = Suite.load("demo")
    counted = {task.task: task.specialist for task in suite.tasks if task.role == "skill" and task.counted}
    assert counted == {f"demo_{name}": name for name in ("add", "reverse", "translate", "upper", "sort")}
    assert suite["demo_text"].role == "retention"
    assert [task.task for task in suite.of("search")] == [*counted, "demo_text"]
    assert {task.task for task in suite.of("test")} - {task.task for task in suite.of("search")} == {
        "demo_upper_generate",
        "demo_translate_choice",
    }


def test_an_installed_layout_gives_the_same_suite(tmp_path: Path) -> None:
    presets = tmp_path / "evomerge" / "presets"
    shutil.copytree(ROOT / "benchmarks" / "suites", presets / "benchmarks" / "suites")
    shutil.copytree(ROOT / "benchmarks" / "tasks", presets / "benchmarks" / "tasks")
    installed = Suite.load(presets / "benchmarks" / "suites" / "demo.yaml")
    assert installed.tasks_dir == (presets / "benchmarks" / "tasks" / "demo").resolve()
    assert installed.digest() == Suite.load("demo").digest()


def test_a_path_is_tried_beside_the_naming_file(tmp_path: Path) -> None:
    suite_file(tmp_path)
    assert Suite.load("s.yaml", beside=tmp_path).tasks_dir == (tmp_path / "tasks").resolve()


def test_defaults(tmp_path: Path) -> None:
    (task,) = Suite.load(suite_file(tmp_path)).tasks
    assert (task.role, task.weight, task.specialist, task.counted) == ("skill", 1.0, None, True)
    retention = skill(task="r", role="retention", metric=None)
    suite = Suite.load(suite_file(tmp_path, tasks=[skill(), retention]))
    assert suite["r"].metric == "loglikelihood"


def test_what_counts(tmp_path: Path) -> None:
    report_only = {"select": "b", "test": "c"}
    tasks = [skill(), skill(task="u", weight=0), skill(task="v", splits=report_only)]
    suite = Suite.load(suite_file(tmp_path, tasks=tasks))
    assert [task.counted for task in suite.tasks] == [True, False, False]
    assert [task.task for task in suite.of("search")] == ["t", "u"]


def test_splits_are_names_or_numbers() -> None:
    assert not Splits.model_validate(NAMED).drawn
    assert Splits.model_validate(DRAWN).drawn
    assert Splits.model_validate(DRAWN)["select"] == 20


def test_items_are_drawn_from_named_splits() -> None:
    train = {"from": "train", "items": 3}
    splits = Splits.model_validate({"search": train, "select": train, "test": "test"})
    assert not splits.drawn
    assert [splits.dataset_split(split) for split in SPLITS] == ["train", "train", "test"]
    assert splits.model_dump(mode="json") == {"search": train, "select": train, "test": "test"}
    assert Splits.model_validate(splits.model_dump()) == splits
    assert Splits.model_validate({"test": "test"}).select is None


def test_partial_credit_is_part_of_the_digest_where_it_is_said(tmp_path: Path) -> None:
    plain, partial = (Suite.load(suite_file(tmp_path, tasks=[skill(smooth=name)])) for name in (None, "part"))
    assert "smooth" not in json.dumps(suite_module._without_unset(plain.tasks[0].model_dump(mode="json")))
    assert plain.digest() != partial.digest()


ASKING = ", ".join(Asking.model_fields)
NOTHING = "file: a suite needs a skill task with search items and a weight above 0"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "unknown key",
        {"taks": 1},
        f"unknown key 'taks' (did you mean 'tasks'? Valid: {ASKING}, name, about, tasks_dir, "
        "near_duplicates, tasks)",
    ),
    (
        "unknown task key",
        {"tasks": [skill(wieght=1)]},
        "unknown key 'tasks.0.wieght' (did you mean 'weight'? "
        f"Valid: {ASKING}, task, of, metric, smooth, role, weight, specialist, splits, "
        "data, prompt, answer, choices, scorer, judge)",
    ),
    ("no metric", {"tasks": [skill(metric=None)]}, "missing key 'tasks.0.metric'"),
    (
        "negative weight",
        {"tasks": [skill(weight=-1)]},
        "tasks.0.weight: Input should be greater than or equal to 0 (got -1)",
    ),
    (
        "shared dataset split",
        {"tasks": [skill(splits=NAMED | {"test": "b"})]},
        "tasks.0.splits: the dataset split 'b' is used twice, but items that select a model can't test it; "
        "name different splits, or give numbers of items",
    ),
    (
        "names and numbers",
        {"tasks": [skill(splits=NAMED | {"test": 50})]},
        "tasks.0.splits: give names of dataset splits for all three, or numbers of items for all three; "
        "a number beside a name says where its items are from: {from: NAME, items: NUMBER}",
    ),
    (
        "a number beside a name, in words of its own",
        {"tasks": [skill(splits={"search": {"form": "train", "items": 3}, "select": "b", "test": "c"})]},
        "tasks.0.splits.search: drawn items: 2 problems\n  - missing key 'from'\n"
        "  - unknown key 'form' (did you mean 'from'? Valid: from, items)",
    ),
    (
        "no items drawn",
        {"tasks": [skill(splits={"search": {"from": "train", "items": 0}, "select": "b", "test": "c"})]},
        "tasks.0.splits.search: drawn items: items: Input should be greater than or equal to 1 (got 0)",
    ),
    (
        "drawn from a split that is used whole",
        {"tasks": [skill(splits={"search": {"from": "b", "items": 3}, "select": "b", "test": "c"})]},
        "tasks.0.splits: the dataset split 'b' is used twice, but items that select a model can't test it; "
        "name different splits, or give numbers of items",
    ),
    (
        "search without select",
        {"tasks": [skill(splits={"search": "a", "test": "c"})]},
        "tasks.0.splits: a task with search items needs select items: they choose the winner",
    ),
    (
        "partial credit of a text",
        {"tasks": [skill(), skill(task="r", role="retention", metric=None, smooth="x")]},
        "tasks.1: a retention task has no partial credit; remove smooth",
    ),
    (
        "no items",
        {"tasks": [skill(splits=DRAWN | {"select": 0})]},
        "tasks.0.splits.select: expected the name of a dataset split, a number of items (1 or more), or "
        "{from: NAME, items: NUMBER} (got 0)",
    ),
    (
        "no test split",
        {"tasks": [skill(splits={"search": 1, "select": 1})]},
        "missing key 'tasks.0.splits.test'",
    ),
    (
        "needs a skill task with search items",
        {"tasks": [skill(weight=0), skill(task="u", splits={"select": "b", "test": "c"})]},
        "file: a suite needs a skill task with search items and a weight above 0",
    ),
    (
        "no tasks",
        {"tasks": []},
        "file: a suite needs a skill task with search items and a weight above 0",
    ),
    ("a task twice", {"tasks": [skill(), skill()]}, "file: the task 't' is listed twice"),
    (
        "retention by accuracy",
        {"tasks": [skill(), skill(task="r", role="retention")]},
        "tasks.1: a retention task is measured by 'loglikelihood' (nats per token), not by 'acc'",
    ),
    (
        "retention with a specialist",
        {"tasks": [skill(), skill(task="r", role="retention", metric=None, specialist="x")]},
        "tasks.1: a retention task is compared with the base model; it has no specialist",
    ),
    (
        "coherence by accuracy",
        {"tasks": [skill(), skill(task="c", role="coherence")]},
        "tasks.1: a coherence task is measured by 'coherence', not by 'acc'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = suite_file(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        Suite.load(path)
    assert caught.value.what == f"{path}: {message}"


def test_weights_can_be_replaced(tmp_path: Path) -> None:
    coherence = skill(task="c", role="coherence", metric=None)
    suite = Suite.load(suite_file(tmp_path, tasks=[skill(), skill(task="u", weight=2), coherence]))
    other = suite.weighted({"u": 0, "c": 3})
    assert [task.weight for task in other.tasks] == [1, 0, 3]
    assert suite.weighted({}) == suite
    assert suite.digest() != other.digest()
    with pytest.raises(ConfigError, match="has no task 'v', whose weight was set"):
        suite.weighted({"v": 1})
    with pytest.raises(ConfigError, match="needs a skill task with search items"):
        suite.weighted({"t": 0, "u": 0})


def test_a_missing_task_folder_is_named(tmp_path: Path) -> None:
    path = suite_file(tmp_path, tasks_dir="../nowhere")
    with pytest.raises(ConfigError) as caught:
        Suite.load(path)
    assert caught.value.what == f"{path}: tasks_dir is not a folder"
    assert caught.value.got == str(tmp_path.parent / "nowhere")


def test_an_unknown_suite_names_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of the packaged suites"):
        Suite.load("dmeo")


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("a data file", lambda folder: (folder / "tasks" / "t.jsonl").write_text('{"x": 2}\n')),
    ("a task", lambda folder: (folder / "tasks" / "t.yaml").write_text("task: t \n")),
    ("a new data file", lambda folder: (folder / "tasks" / "u.jsonl").write_text("{}\n")),
    ("a file's name", lambda folder: (folder / "tasks" / "t.jsonl").rename(folder / "tasks" / "u.jsonl")),
    ("a weight", lambda folder: suite_file(folder, tasks=[skill(weight=2)])),
    ("a split", lambda folder: suite_file(folder, tasks=[skill(splits=DRAWN)])),
]


@pytest.mark.parametrize("change", [row[1] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_the_digest_notices(tmp_path: Path, change: Callable[[Path], object]) -> None:
    before = Suite.load(suite_file(tmp_path)).digest()
    change(tmp_path)
    assert Suite.load(tmp_path / "s.yaml").digest() != before


def test_the_digest_ignores_where_the_suite_lies_and_what_it_says_about_itself(tmp_path: Path) -> None:
    here = Suite.load(suite_file(tmp_path / "here"))
    there = Suite.load(suite_file(tmp_path / "there", about="the same"))
    (tmp_path / "there" / "tasks" / "__pycache__").mkdir()
    (tmp_path / "there" / "tasks" / "__pycache__" / "t.pyc").write_bytes(b"x")
    assert here.digest() == there.digest()


def test_a_suite_crosses_process_borders(tmp_path: Path) -> None:
    suite = Suite.load(suite_file(tmp_path))
    assert pickle.loads(pickle.dumps(suite)) == suite


def test_reading_a_suite_imports_no_torch_and_no_lm_eval() -> None:
    script = (
        "import sys\n"
        "import evomerge.evaluation.normalise, evomerge.evaluation.statistics\n"
        "from evomerge.evaluation.suite import Suite\n"
        "Suite.load('demo').digest()\n"
        "print([name for name in ('torch', 'lm_eval', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
