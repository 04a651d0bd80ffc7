"""A group or tag of lm-eval in a suite stands for its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.evaluation.suite import Suite

ENTRY = {"metric": "acc", "splits": {"search": 1, "select": 1, "test": 1}}
FILES: dict[str, Any] = {
    "one.yaml": {"task": "one", "include": "shared.yaml"},
    "two.yaml": {"task": "two", "tag": ["odd", "small"]},
    "deep/three.yaml": {"task": "three", "include": "../_template_yaml"},
    "four.yaml": {"task": "four", "class": "module.Four", "group": "old"},
    "shared.yaml": {"tag": "small"},
    "_template_yaml": {"tag": "small", "num_fewshot": 1},
    "all.yaml": {"group": "all", "group_alias": "everything", "task": ["small", "four"]},
    "nested.yaml": {"group": "nested", "task": ["all", {"group": "inside", "task": ["hellaswag"]}]},
    "keys.yaml": {
        "group": "keys",
        "num_fewshot": 2,
        "aggregate_metric_list": [{"metric": "acc"}],
        "task": [{"task": "one", "task_alias": "first"}, {"task": "two", "num_fewshot": 3}],
    },
}


def suite(folder: Path, *entries: Mapping[str, Any], **files: Any) -> Suite:
    for name, content in (FILES | {f"{n}.yaml": c for n, c in files.items()}).items():
        (folder / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tasks" / name).write_text(yaml.safe_dump(content))
    rows = [ENTRY | dict(entry) for entry in entries]
    data = {"name": "s", "tasks_dir": "tasks", "tasks": rows}
    return Suite.from_mapping(data, folder=folder, where="s.yaml")


def names(found: Suite) -> list[str]:
    return [task.task for task in found.tasks]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("small", ["one", "three", "two"]),
        ("odd", ["two"]),
        ("all", ["one", "three", "two", "four"]),
        ("nested", ["one", "three", "two", "four", "hellaswag"]),
        ("ai2_arc", ["arc_challenge", "arc_easy"]),
    ],
)
def test_a_group_or_tag_stands_for_its_tasks(tmp_path: Path, name: str, tasks: list[str]) -> None:
    found = suite(tmp_path, {"task": name, "weight": 0.5})
    assert names(found) == tasks
    assert {task.weight for task in found.tasks} == {0.5}
    assert found.groups == {name: tuple(tasks)}
    assert found.weighted({tasks[0]: 2.0}).groups == found.groups


def test_mmlu_has_57_tasks(tmp_path: Path) -> None:
    found = suite(tmp_path, {"task": "mmlu"})
    assert len(found.tasks) == 57
    assert "mmlu_anatomy" in names(found)


def test_tasks_stay_as_they_are(tmp_path: Path) -> None:
    found = suite(tmp_path, {"task": "one"}, {"task": "hellaswag"}, {"task": "unknown"})
    assert names(found) == ["one", "hellaswag", "unknown"]
    assert found.groups == {}


def test_the_entry_s_keys_come_before_the_group_s(tmp_path: Path) -> None:
    assert [task.num_fewshot for task in suite(tmp_path, {"task": "keys"}).tasks] == [2, 3]
    assert [task.num_fewshot for task in suite(tmp_path, {"task": "keys", "num_fewshot": 0}).tasks] == [0, 0]


def test_the_members_files_belong_to_the_suite(tmp_path: Path) -> None:
    found = suite(tmp_path, {"task": "small"})
    assert {"one.yaml", "shared.yaml", "two.yaml", "deep/three.yaml"} <= found.files().keys()
    before = found.digest()
    assert suite(tmp_path, {"task": "small"}).digest() == before
    assert suite(tmp_path, {"task": "small"}, five={"task": "five", "tag": "small"}).digest() != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": []}, "the group 'bad' has no tasks"),
        ({"task": None}, "the group 'bad' has no tasks"),
        ({}, "the group 'bad' has no tasks"),
        ({"task": 7}, "the group 'bad' has no tasks"),
        ({"task": [7]}, "has the member '7'"),
        ({"task": [""]}, "has the member"),
        ({"task": [{"name": "x"}]}, "has the member"),
        ({"task": ["one", "no_such_task"]}, "holds 'no_such_task', which is no task, tag or group"),
        ({"task": ["bad"]}, "holds the group 'bad', which holds it"),
        ({"task": ["circle"]}, "the group 'circle' holds the group 'bad', which holds it"),
        ({"task": ["one", "small"]}, "the task 'one' of the group 'bad' is listed twice"),
        ({"task": ["two", "two"]}, "the task 'two' of the group 'bad' is listed twice"),
        ({"task": ["one"], "doc_to_text": "x"}, "changes its tasks by 'doc_to_text'"),
        ({"task": [{"task": "one", "dataset_name": "x"}]}, "changes its tasks by 'dataset_name'"),
    ],
)
def test_what_no_suite_can_hold_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    circle = {"group": "circle", "task": ["bad"]}
    with pytest.raises(ConfigError) as refused:
        suite(tmp_path, {"task": "bad"}, bad={"group": "bad", **config}, circle=circle)
    assert message in refused.value.what
    assert refused.value.what.startswith("s.yaml: ")


def test_a_task_beside_its_group_is_listed_twice(tmp_path: Path) -> None:
    for entries in ([{"task": "odd"}, {"task": "two"}], [{"task": "odd"}, {"task": "odd"}]):
        with pytest.raises(ConfigError, match="the task 'two' of the group 'odd' is listed twice"):
            suite(tmp_path, *entries)
