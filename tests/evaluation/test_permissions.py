"""Code of task files: nothing is imported before it is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.evaluation.live_lm import LiveLM
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.suite import Suite
from evomerge.evaluation.tasks import build
from tests.evaluation.conftest import EXACT, ITEMS, NAMED, documents, entry, new_tokenizer, write_task

LM = LiveLM(new_tokenizer(), batch_size=1, max_length=None)

TRUSTED = Permissions(trust_tasks=True)
GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{ prompt }} =",
    "doc_to_target": "{{ letters[0] }}",
    "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 1, "do_sample": False},
    "metric_list": EXACT,
}
CODE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def same(docs): return docs
def text(doc): return doc["prompt"]
def results(doc, answers): return {"exact_match": 1.0}
def metric(references, predictions, **_): return 1.0
def first(answers, docs): return [answer[0] for answer in answers]
class Sampler: ...
"""


def write(folder: Path, lines: str = "", **changes: Any) -> Path:
    """Write a task `write` with a module of code beside it; `lines` are added to its YAML."""
    splits = {split: documents("write", split, count) for split, count in ITEMS.items()}
    write_task(folder, "write", {**GENERATE, **changes}, **splits)
    (folder / "helpers.py").write_text(CODE)
    with (folder / "write.yaml").open("a") as file:
        file.write(lines)
    return folder


def suite(folder: Path) -> Suite:
    return Suite.from_mapping(
        {
            "name": "code",
            "tasks_dir": str(folder),
            "tasks": [entry("write", metric="exact_match", splits=NAMED)],
        },
        folder=folder,
        where="suite.yaml",
    )


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in GENERATE.items() if key not in keys}


CODES = {
    "process_docs": "process_docs: !function helpers.same\n",
    "a verbatim tag": "process_docs: !<!function> helpers.same\n",
    "doc_to_text": "gen_prefix: !function helpers.text\n",
    "process_results": "process_results: !function helpers.results\n",
    "a filter": "filter_list:\n- filter: [{function: custom, filter_fn: !function helpers.first}]\n",
    "a sampler": "fewshot_config: {sampler: !function helpers.Sampler}\n",
    "a nested value": "fewshot_config: {deep: [{deeper: !function helpers.same}]}\n",
    "a key": "fewshot_config: {!function helpers.same : 1}\n",
    "a class": "class: !function helpers.Sampler\n",
    "a data set": "custom_dataset: !function helpers.same\n",
    "a prompt": "use_prompt: promptsource:x\n",
}


@pytest.mark.parametrize("lines", CODES.values(), ids=CODES)
def test_code_of_a_task_file_is_refused_before_it_is_imported(lines: str, tmp_path: Path) -> None:
    write(tmp_path, lines)
    with pytest.raises(ConfigError, match=r"would run Python code(.|\n)*write\.yaml(.|\n)*--trust-tasks"):
        build(suite(tmp_path), lm=LM, seed=0)
    assert not (tmp_path / "imported").exists()


CHANGES: dict[str, dict[str, Any]] = {
    "a metric's script": {"metric_list": [{"metric": "./scripts", "aggregation": "mean"}]},
    "a script with the name of a metric": {"metric_list": [{**EXACT[0], "hf_evaluate": True}]},
    "custom generation": {"generation_kwargs": {**GENERATE["generation_kwargs"], "custom_generate": "./own"}},
    "remote code": {"generation_kwargs": {**GENERATE["generation_kwargs"], "trust_remote_code": True}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_ways_to_code_are_refused_too(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ConfigError, match="would run Python code"):
        build(suite(tmp_path), lm=LM, seed=0)


def test_trusted_code_runs(tmp_path: Path) -> None:
    write(tmp_path, CODES["process_results"])
    (builder,) = build(suite(tmp_path), lm=LM, seed=0, permissions=TRUSTED)
    assert (tmp_path / "imported").exists()
    assert builder.metric == "exact_match"


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("suffix", [".yaml", "_part"])
def test_included_files_are_checked(inside: bool, suffix: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks")
    elsewhere = (folder if inside else tmp_path / "elsewhere").resolve()
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "helpers.py").write_text(CODE)
    (elsewhere / f"second{suffix}").write_text("process_docs: !function helpers.same\n")
    (elsewhere / f"first{suffix}").write_text(f"include: [second{suffix}]\n")
    data = yaml.safe_load((folder / "write.yaml").read_text())
    (folder / "write.yaml").write_text(
        yaml.safe_dump(
            {**data, "include": str(elsewhere / f"first{suffix}") if not inside else f"first{suffix}"}
        )
    )
    with pytest.raises(ConfigError, match=f"second{suffix}"):
        build(suite(folder), lm=LM, seed=0)
    assert not (elsewhere / "imported").exists()
    build(suite(folder), lm=LM, seed=0, permissions=TRUSTED)


def test_a_link_is_judged_by_the_file_it_leads_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks")
    theirs = write(tmp_path / "theirs", CODES["process_docs"])
    (folder / "write.yaml").unlink()
    (folder / "write.yaml").symlink_to(theirs / "write.yaml")
    with pytest.raises(ConfigError, match="theirs"):
        build(suite(folder), lm=LM, seed=0)


def test_a_task_is_trusted_for_its_file_and_not_for_its_name(tmp_path: Path) -> None:
    """A user's folder can hold a task with the name of a task of lm-eval."""
    write(tmp_path, CODES["process_docs"])
    text = (tmp_path / "write.yaml").read_text().replace("task: write", "task: arc_easy")
    (tmp_path / "write.yaml").write_text(text)
    named = Suite.from_mapping(
        {
            "name": "code",
            "tasks_dir": str(tmp_path),
            "tasks": [{"task": "arc_easy", "metric": "exact_match", "splits": NAMED}],
        },
        folder=tmp_path,
        where="suite.yaml",
    )
    with pytest.raises(ConfigError, match="would run Python code"):
        build(named, lm=LM, seed=0)


def test_a_suite_cannot_allow_code(tmp_path: Path) -> None:
    write(tmp_path)
    for key in ("trust_tasks", "allow_code_execution"):
        with pytest.raises(ConfigError, match="unknown key"):
            Suite.from_mapping(
                {"name": "x", key: True, "tasks": [entry("write")]}, folder=tmp_path, where="suite.yaml"
            )


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"unsafe_code": True}, True),
        ({"unsafe_code": None}, True),  # as lm-eval reads it
        ({"unsafe_code": False}, False),
        ({"metric_list": [{"metric": "code_eval"}]}, True),
        ({"metric_list": EXACT}, False),
        ({}, False),
    ],
)
def test_tasks_that_execute_answers_are_recognised(config: dict[str, Any], code: bool) -> None:
    from evomerge.evaluation.permissions import executes_answers

    assert executes_answers(config) is code


def test_tasks_of_lm_eval_that_execute_answers_need_permission() -> None:
    """The refusal comes before their code is imported, so the hub is not asked for its metric."""
    human_eval = Suite.from_mapping(
        {
            "name": "code",
            "tasks": [{"task": "humaneval", "metric": "pass@1", "splits": dict.fromkeys(NAMED, 2)}],
        },
        folder=Path(),
        where="suite.yaml",
    )
    for permissions in (Permissions(), TRUSTED):
        with pytest.raises(ConfigError, match=r"executes the models' answers(.|\n)*--allow-code-execution"):
            build(human_eval, lm=LM, seed=0, permissions=permissions)
