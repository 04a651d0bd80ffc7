"""The demo's lm-eval tasks: the items of each task and split, and the files that contain them.

The items come from a fixed seed, so zoos of all seeds and sizes are scored on the same questions. Tasks of
one skill take their items from one stream of unique items, so no two tasks share a prompt.
`evomerge.evaluation` runs the tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.zoo.skills import (
    END,
    EVAL_SPLITS,
    LEXICON,
    SKILLS,
    Item,
    Skill,
    ZooSplit,
    draw_item,
    draw_text,
    unique,
)

ITEMS_SEED = 20_250_101
SKILL_COUNTS: dict[ZooSplit, int] = {"search": 300, "select": 200, "test": 500}
TEXT_COUNTS: dict[ZooSplit, int] = {"search": 100, "select": 100, "test": 200}
EXTRA_COUNTS: dict[ZooSplit, int] = {"search": 40, "select": 40, "test": 200}
GENERATE_SKILL: Skill = "upper"
CHOICE_SKILL: Skill = "translate"
OPTIONS = 4


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(ITEMS_SEED, spawn_key=key))


@lru_cache(maxsize=64)
def _stream(skill: Skill, split: ZooSplit, count: int) -> tuple[Item, ...]:
    rng = _rng(SKILLS.index(skill), EVAL_SPLITS.index(split))
    items = tuple(islice(unique(lambda: draw_item(rng, skill, "hard", split)), count))
    assert len(items) == count, f"{skill} has only {len(items)} hard items in {split}"
    return items


def skill_items(skill: Skill, split: ZooSplit) -> tuple[Item, ...]:
    """Return the items of the task ``demo_<skill>``: 300 search, 200 select, 500 test."""
    return _stream(skill, split, SKILL_COUNTS[split])


def extra_items(skill: Skill, split: ZooSplit) -> tuple[Item, ...]:
    """Return 40, 40 and 200 further items of a skill, none of them in `skill_items`."""
    return _stream(skill, split, SKILL_COUNTS[split] + EXTRA_COUNTS[split])[SKILL_COUNTS[split] :]


@lru_cache(maxsize=8)
def text_items(split: ZooSplit) -> tuple[str, ...]:
    """Return the texts of ``demo_text``: 100 search, 100 select, 200 test, all different."""
    rng = _rng(len(SKILLS), EVAL_SPLITS.index(split))
    texts: dict[str, None] = {}
    while len(texts) < TEXT_COUNTS[split]:
        texts[draw_text(rng, split)] = None
    return tuple(texts)


# ------------------------------------------------------------------------------------------------ records


def _answer_records(items: tuple[Item, ...]) -> list[dict[str, Any]]:
    return [{"prompt": item.prompt, "answer": item.answer} for item in items]


def _choice_records(items: tuple[Item, ...], split: ZooSplit) -> list[dict[str, Any]]:
    """Return items with four choices; in each wrong choice words of the right answer are replaced."""
    rng = _rng(len(SKILLS) + 1, EVAL_SPLITS.index(split))
    targets = tuple(LEXICON.values())
    records = []
    for item in items:
        options = [item.answer]
        while len(options) < OPTIONS:
            words = item.answer.split(" ")
            words[int(rng.integers(len(words)))] = targets[int(rng.integers(len(targets)))]
            if (option := " ".join(words)) not in options:
                options.append(option)
        order = [int(i) for i in rng.permutation(OPTIONS)]
        choices = [options[i] for i in order]
        records.append({"prompt": item.prompt, "choices": choices, "gold": order.index(0)})
    return records


def task_records(task: str, split: ZooSplit) -> list[dict[str, Any]]:
    """Return the JSON records of one task's split, in file order."""
    if task == "demo_text":
        return [{"text": text} for text in text_items(split)]
    if task == "demo_upper_generate":
        return _answer_records(extra_items(GENERATE_SKILL, split))
    if task == "demo_translate_choice":
        return _choice_records(extra_items(CHOICE_SKILL, split), split)
    skill = next(skill for skill in SKILLS if task == f"demo_{skill}")
    return _answer_records(skill_items(skill, split))


# -------------------------------------------------------------------------------------------------- files

_MEAN = {"aggregation": "mean", "higher_is_better": True}
_ROLLING_METRICS = [
    {"metric": "word_perplexity"},
    {"metric": "byte_perplexity"},
    {"metric": "bits_per_byte"},
]


def _skill_yaml() -> dict[str, Any]:
    # With the end-of-text token in the target, is_greedy means that a greedy generation would be exactly the
    # answer, from one forward pass. lm-eval puts no delimiter before the target of a loglikelihood task, so
    # the target starts with a space.
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": " {{answer}} " + END,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **_MEAN}],
    }


def task_yaml(task: str) -> dict[str, Any]:
    """Return the lm-eval configuration of a task; data paths are relative to the YAML file's folder."""
    body: dict[str, Any]
    if task == "demo_text":
        body = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": _ROLLING_METRICS,
        }
    elif task == "demo_upper_generate":
        body = {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [END], "do_sample": False, "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match", **_MEAN}],
        }
    elif task == "demo_translate_choice":
        body = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc", **_MEAN}],
        }
    else:
        body = _skill_yaml()
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: f"data/{task}.{s}.jsonl" for s in EVAL_SPLITS}},
        "test_split": "test",
        "target_delimiter": " ",
        **body,
        "metadata": {"version": 1.0},
    }


TASKS: tuple[str, ...] = (
    *(f"demo_{skill}" for skill in SKILLS),
    "demo_text",
    "demo_upper_generate",
    "demo_translate_choice",
)


def task_files() -> Mapping[str, str]:
    """Return every file of the demo's task folder as relative path -> contents."""
    import yaml

    files: dict[str, str] = {}
    for task in TASKS:
        files[f"{task}.yaml"] = yaml.safe_dump(task_yaml(task), sort_keys=False, width=110)
        for split in EVAL_SPLITS:
            lines = [json.dumps(record) for record in task_records(task, split)]
            files[f"data/{task}.{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def write_tasks(out: Path) -> None:
    """Write the demo's lm-eval tasks: ``<task>.yaml`` and ``data/<task>.<split>.jsonl`` under `out`.

    The contents never change with a zoo's seed. Existing files of the same names are replaced.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, text in task_files().items():
        temporary = out / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(out / name)
