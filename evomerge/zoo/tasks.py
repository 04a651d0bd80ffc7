"""The lm-eval tasks of the demo and of other zoos: the items of each task and split, and the files of them.

The items come from a fixed seed, so zoos of all seeds and sizes are scored on the same questions. Tasks of
one skill take their items from one stream of unique items, so no two tasks share a prompt.
`evomerge.evaluation` runs the tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.zoo.rules import DEMO_SKILLS, LEXICON, RULES
from evomerge.zoo.skills import END, EVAL_SPLITS, Item, ZooSplit, draw_item, draw_text, unique

ITEMS_SEED = 20_250_101
SKILL_COUNTS: dict[ZooSplit, int] = {"search": 300, "select": 200, "test": 500}
TEXT_COUNTS: dict[ZooSplit, int] = {"search": 100, "select": 100, "test": 200}
EXTRA_COUNTS: dict[ZooSplit, int] = {"search": 40, "select": 40, "test": 200}
OPTIONS = 4
_TEXT_KEY, _CHOICE_KEY, _NEW_SKILLS_KEY = 5, 6, 10
"""Seeds of texts, wrong choices and the skills that the demo lacks; the demo's skills have 0 to 4."""


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(ITEMS_SEED, spawn_key=key))


@lru_cache(maxsize=64)
def _stream(skill: str, split: ZooSplit, count: int) -> tuple[Item, ...]:
    place = list(RULES).index(skill)
    key = place if skill in DEMO_SKILLS else _NEW_SKILLS_KEY + place
    rng = _rng(key, EVAL_SPLITS.index(split))
    items = tuple(islice(unique(lambda: draw_item(rng, skill, "hard", split)), count))
    assert len(items) == count, f"{skill} has only {len(items)} hard items in {split}"
    return items


def skill_items(skill: str, split: ZooSplit) -> tuple[Item, ...]:
    """Return the items of the task of a skill: 300 search, 200 select, 500 test."""
    return _stream(skill, split, SKILL_COUNTS[split])


def extra_items(skill: str, split: ZooSplit) -> tuple[Item, ...]:
    """Return 40, 40 and 200 further items of a skill, none of them in `skill_items`."""
    return _stream(skill, split, SKILL_COUNTS[split] + EXTRA_COUNTS[split])[SKILL_COUNTS[split] :]


@lru_cache(maxsize=8)
def text_items(split: ZooSplit) -> tuple[str, ...]:
    """Return the texts of a zoo: 100 search, 100 select, 200 test, all different."""
    rng = _rng(_TEXT_KEY, EVAL_SPLITS.index(split))
    texts: dict[str, None] = {}
    while len(texts) < TEXT_COUNTS[split]:
        texts[draw_text(rng, split)] = None
    return tuple(texts)


# ------------------------------------------------------------------------------------------------ records


def _answer_records(items: tuple[Item, ...]) -> list[dict[str, Any]]:
    return [{"prompt": item.prompt, "answer": item.answer} for item in items]


def _choice_records(skill: str, split: ZooSplit) -> list[dict[str, Any]]:
    """Return items with four choices; in each wrong choice words of the right answer are replaced."""
    rng = _rng(_CHOICE_KEY, EVAL_SPLITS.index(split))
    items = extra_items(skill, split)
    answered = sorted({word for item in items for word in item.answer.split(" ")})
    targets = tuple(LEXICON.values()) if skill == "translate" else tuple(answered)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooTasks:
    """A zoo's tasks: one per skill, its texts, and two skills in lm-eval's other request types."""

    prefix: str
    skills: tuple[str, ...]
    generate_skill: str | None
    choice_skill: str | None

    def task_of(self, skill: str) -> str:
        """Return the name of a skill's task."""
        return f"{self.prefix}_{skill}"

    @property
    def text(self) -> str:
        """The task of the texts."""
        return f"{self.prefix}_text"

    @property
    def generate(self) -> str:
        """The task that generates its answers."""
        return f"{self.prefix}_{self.generate_skill}_generate"

    @property
    def choice(self) -> str:
        """The task that chooses among four answers."""
        return f"{self.prefix}_{self.choice_skill}_choice"

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks, in the order of the suite."""
        names = [*(self.task_of(skill) for skill in self.skills), self.text]
        names += [self.generate] if self.generate_skill else []
        return (*names, *([self.choice] if self.choice_skill else []))


DEMO = ZooTasks(prefix="demo", skills=DEMO_SKILLS, generate_skill="upper", choice_skill="translate")


def tasks_of(skills: Sequence[str]) -> ZooTasks:
    """Return the tasks of a zoo with these skills."""
    # Hard additions are so few that none are left for a second task.
    second = [*(skill for skill in skills if skill != "add"), None, None]
    return ZooTasks(prefix="zoo", skills=tuple(skills), generate_skill=second[0], choice_skill=second[1])


def task_records(task: str, split: ZooSplit, tasks: ZooTasks = DEMO) -> list[dict[str, Any]]:
    """Return the JSON records of one task's split, in file order."""
    if task == tasks.text:
        return [{"text": text} for text in text_items(split)]
    if tasks.generate_skill and task == tasks.generate:
        return _answer_records(extra_items(tasks.generate_skill, split))
    if tasks.choice_skill and task == tasks.choice:
        return _choice_records(tasks.choice_skill, split)
    skill = next(skill for skill in tasks.skills if task == tasks.task_of(skill))
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


def _longest_answer(tasks: ZooTasks) -> int:
    """Return the number of tokens that the answers of the generating task need, with the end of text."""
    assert tasks.generate_skill
    items = extra_items(tasks.generate_skill, "test")
    return max(12, *(len(item.answer.split(" ")) + 1 for item in items))


def task_yaml(task: str, tasks: ZooTasks = DEMO) -> dict[str, Any]:
    """Return the lm-eval configuration of a task; data paths are relative to the YAML file's folder."""
    body: dict[str, Any]
    if task == tasks.text:
        body = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": _ROLLING_METRICS,
        }
    elif task == tasks.generate:
        body = {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [END], "do_sample": False, "max_gen_toks": _longest_answer(tasks)},
            "metric_list": [{"metric": "exact_match", **_MEAN}],
        }
    elif task == tasks.choice:
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


def task_files(tasks: ZooTasks = DEMO) -> Mapping[str, str]:
    """Return every file of the task folder of the demo, or of another zoo, as relative path -> contents."""
    import yaml

    files: dict[str, str] = {}
    for task in tasks.names:
        files[f"{task}.yaml"] = yaml.safe_dump(task_yaml(task, tasks), sort_keys=False, width=110)
        for split in EVAL_SPLITS:
            lines = [json.dumps(record) for record in task_records(task, split, tasks)]
            files[f"data/{task}.{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def write_tasks(out: Path, tasks: ZooTasks = DEMO) -> None:
    """Write lm-eval tasks, the demo's or a zoo's: ``<task>.yaml`` and ``data/<task>.<split>.jsonl``.

    The contents never change with a zoo's seed. Existing files of the same names are replaced.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, text in task_files(tasks).items():
        temporary = out / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(out / name)
