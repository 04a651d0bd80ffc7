"""Only the files that a suite's tasks use belong to it, and what changed is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation import task_files
from evomerge.evaluation.suite import Suite

TASK = """
task: one
include: _shared.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: data/one.jsonl, train: ["data/train-*.jsonl"]}}
doc_to_text: template.jinja
process_results: !function metrics.score
fewshot_config: {samples: !function package.samples.list_samples}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a task, what it uses, and what it does not use."""
    contents = {
        "one.yaml": TASK,
        "_shared.yaml": "include: deeper/_base.yaml\nmetric_list: []\n",
        "deeper/_base.yaml": "output_type: generate_until\n",
        "data/one.jsonl": "{}\n",
        "data/train-1.jsonl": "{}\n",
        "data/unused.jsonl": "{}\n",
        "template.jinja": "{{x}}",
        "metrics.py": "import helper\nWORDS = 'words.txt'\nfrom json import loads\n",
        "helper.py": "",
        "words.txt": "",
        "unused.py": "",
        "package/__init__.py": "",
        "package/samples.py": "",
        "two.yaml": "task: two\n",
        "group.yaml": "group: g\ntask: [{task: three, dataset_path: ./rows}, other]\n",
        "rows/rows.json": "[]",
        "broken.yaml": "task: [\n",
        "__pycache__/metrics.pyc": "",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_files_of_a_task(folder: Path) -> None:
    assert set(task_files.used(folder, ["one"])) == {
        *("one.yaml", "_shared.yaml", "deeper/_base.yaml", "data/one.jsonl", "data/train-1.jsonl"),
        *("template.jinja", "metrics.py", "helper.py", "words.txt", "package/samples.py"),
    }
    assert set(task_files.used(folder, ["two"])) == {"two.yaml"}
    assert set(task_files.used(folder, ["three"])) == {"group.yaml", "rows/rows.json"}
    assert task_files.used(folder, ["none"]) == {}


def test_files_outside_the_folder_belong_to_it_too(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "rows.jsonl"
    outside.write_text("{}\n")
    inner = folder / "inner"
    inner.mkdir()
    text = f"task: four\ndataset_kwargs: {{data_files: [../data/one.jsonl, {outside}]}}\n"
    (inner / "four.yaml").write_text(text)
    assert set(task_files.used(inner, ["four"])) == {"four.yaml", "../data/one.jsonl", str(outside)}


def test_files_of_lm_eval_are_its_versions(folder: Path) -> None:
    import lm_eval.tasks

    (folder / "five.yaml").write_text(
        f"task: five\ninclude: {Path(lm_eval.tasks.__file__).parent}/gsm8k/gsm8k.yaml\n"
    )
    assert set(task_files.used(folder, ["five"])) == {"five.yaml"}


def test_an_unused_file_changes_no_digest(folder: Path) -> None:
    tasks = [{"task": "one", "metric": "acc", "splits": {"search": 1, "select": 1, "test": 1}}]
    data = {"name": "s", "tasks_dir": str(folder), "tasks": tasks}
    suite = Suite.from_mapping(data, folder=folder, where="s.yaml")
    before, older = suite.digest(), suite.digest(like="0" * 64)
    (folder / "new.yaml").write_text("task: new\n")
    (folder / "data" / "unused.jsonl").unlink()
    assert suite.digest() == before
    assert suite.digest(like="0" * 64) != older  # a run that was stored before is compared as it was begun
    (folder / "helper.py").write_text("X = 1\n")
    assert suite.digest() != before


def test_changes_are_named(folder: Path) -> None:
    before = task_files.hashes(task_files.used(folder, ["one"]))
    (folder / "data" / "train-2.jsonl").write_text("{}\n")
    (folder / "words.txt").write_text("more\n")
    (folder / "helper.py").unlink()
    now = task_files.hashes(task_files.used(folder, ["one"]))
    assert task_files.changes(before, now) == (
        "data/train-2.jsonl (new), helper.py (missing), words.txt (other contents)"
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone: can't be read"):
        task_files.hashes({"gone": tmp_path / "gone"})
