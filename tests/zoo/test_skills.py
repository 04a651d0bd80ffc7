"""The items of zoos: right answers, honest splits, and a tokenizer with no boundary surprises."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from evomerge.zoo import skills
from evomerge.zoo.rules import DEMO_SKILLS, EASY_WORDS, LEXICON, RULES, Level
from evomerge.zoo.skills import EVAL_SPLITS, ZooSplit
from evomerge.zoo.tasks import (
    DEMO,
    EXTRA_COUNTS,
    SKILL_COUNTS,
    TEXT_COUNTS,
    ZooTasks,
    extra_items,
    skill_items,
    task_files,
    task_records,
    tasks_of,
    text_items,
)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("add 4 7 + 5 8 =", "5 0 1"),
        ("add 1 2 + 3 4 =", "6 4"),
        ("reverse a b c =", "c b a"),
        ("sort d a c a =", "a a c d"),
        ("upper q x =", "Q X"),
        ("translate bara =", LEXICON["bara"]),
        ("subtract 8 3 1 - 4 0 4 =", "7 2 4"),
        ("subtract 2 0 0 - 1 9 9 =", "1 0 0"),
        ("rotate a b c =", "b c a"),
        ("shift a y z =", "b z a"),
        ("count c a a c b =", "2 1 2 0"),
        ("interleave a b : c d =", "a c b d"),
        ("complement 0 9 4 =", "9 0 5"),
        ("cumulate 4 7 9 =", "4 1 0"),
        ("swap a b c d e =", "b a d c e"),
        ("double a b =", "a a b b"),
        ("skip a b c d e =", "a c e"),
    ],
)
def test_answers(prompt: str, answer: str) -> None:
    assert skills.solve(prompt) == answer


def test_the_lexicon_is_one_to_one() -> None:
    assert len(LEXICON) == 48
    assert len(set(LEXICON.values())) == 48
    assert not set(LEXICON) & set(LEXICON.values())


@pytest.mark.parametrize("skill", RULES)
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_drawn_items_are_of_their_level_and_split(skill: str, level: Level) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        item = skills.draw_item(rng, skill, level, "train")
        assert skills.split_of(item.prompt) == "train"
        assert skills.solve(item.prompt) == item.answer
        body = item.prompt.split(" ")[1:-1]
        if skill == "add":
            left, right = "".join(body).split("+")
            carries = any(int(a) + int(b) > 9 for a, b in zip(left, right, strict=True))
            assert carries == (level == "hard")
        elif skill == "subtract":
            left, right = "".join(body).split("-")
            assert int(left) >= int(right)
            assert any(a < b for a, b in zip(left, right, strict=True)) == (level == "hard")
        elif skill == "translate":
            assert all(word in EASY_WORDS for word in body) == (level == "easy")
        else:
            lengths = (2, 3, 4) if level == "easy" else (6, 7, 8)
            assert len([word for word in body if word != ":"]) in lengths


@pytest.mark.parametrize("tasks", [DEMO, tasks_of(("add", "shift", "count"))], ids=["demo", "other"])
def test_no_prompt_is_in_two_splits_or_two_tasks(tasks: ZooTasks) -> None:
    prompts = [
        record["prompt"]
        for task in tasks.names
        if task != tasks.text
        for split in EVAL_SPLITS
        for record in task_records(task, split, tasks)
    ]
    texts = [text for split in EVAL_SPLITS for text in text_items(split)]
    assert len(set(prompts)) == len(prompts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", EVAL_SPLITS)
def test_sizes_and_splits_of_the_tasks(split: ZooSplit) -> None:
    for skill in RULES if split == "test" else DEMO_SKILLS:  # the largest of the three
        items = skill_items(skill, split)
        assert len(items) == SKILL_COUNTS[split]
        assert {skills.split_of(item.prompt) for item in items} == {split}
    assert len(extra_items("upper", split)) == len(extra_items("translate", split)) == EXTRA_COUNTS[split]
    assert len(text_items(split)) == TEXT_COUNTS[split]
    assert {skills.split_of(text) for text in text_items(split)} == {split}


@pytest.mark.parametrize("skill", [skill for skill in RULES if skill != "add"])
def test_choices_hold_the_answer_once(skill: str) -> None:
    tasks = tasks_of(("upper" if skill != "upper" else "sort", skill))
    for record in task_records(f"zoo_{skill}_choice", "select", tasks):
        assert len(set(record["choices"])) == 4
        assert record["choices"][record["gold"]] == skills.solve(record["prompt"])


def unique_items(skill: str) -> Iterator[skills.Item]:
    rng = np.random.default_rng(7)
    return skills.unique(lambda: skills.draw_item(rng, skill, "hard", "train"))


def test_tokens_of_prompt_and_answer_join_without_a_seam() -> None:
    tokenizer = skills.make_tokenizer(RULES)
    vocab = skills.vocabulary()
    lines: list[tuple[str, str]] = [
        (item.prompt, f"{item.answer} {skills.END}")
        for skill in RULES
        for item in islice(unique_items(skill), 50)
    ]
    lines += [("=", text) for text in text_items("search")]
    for prompt, answer in lines:
        whole = tokenizer(f"{prompt} {answer}")["input_ids"]
        assert tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"] == whole
        assert tokenizer.unk_token_id not in whole
        assert skills.encode(f"{prompt} {answer}", vocab) == whole
        assert len(whole) < skills.CONTEXT
        assert tokenizer.decode(whole) == f"{prompt} {answer}"


def test_the_vocabulary_has_no_gaps() -> None:
    vocab = skills.vocabulary()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert [vocab[token] for token in (skills.UNKNOWN, skills.PAD, skills.END)] == [0, 1, 2]


def test_only_a_zoo_of_other_skills_has_their_tokens() -> None:
    demo = skills.vocabulary(DEMO_SKILLS)
    assert skills.vocabulary(["upper", "add"]) == demo
    assert "shift" not in demo
    assert demo.items() <= skills.vocabulary(["shift", "add"]).items()


def test_the_demo_never_changes() -> None:
    """Its vocabulary and its training draws are those that the shipped models were trained with."""
    rng = np.random.default_rng(5)
    levels: tuple[Level, ...] = ("easy", "hard")
    drawn: list[object] = [
        [skills.draw_item(rng, skill, level, "train").prompt for _ in range(100)]
        for skill in DEMO_SKILLS
        for level in levels
    ]
    drawn.append(skills.draw_text(rng, "train"))
    hashes = [
        hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]
        for x in (skills.vocabulary(DEMO_SKILLS), drawn)
    ]
    assert hashes == ["90290b166e675856", "0c4723d01214e06d"]


def test_texts_agree_in_number() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second, _ = skills.draw_text(rng, "train").split(" .")
        plural = first.split(" ")[0] in ("some", "many", "these")
        assert ("they" in second.split(" ")) == plural
        assert ("it" in second.split(" ")) != plural


def test_task_files_are_relative_and_know_three_splits() -> None:
    files = task_files()
    assert sorted(name for name in files if name.endswith(".yaml")) == sorted(f"{t}.yaml" for t in DEMO.names)
    for task in DEMO.names:
        for split in EVAL_SPLITS:
            assert f"{split}: data/{task}.{split}.jsonl" in files[f"{task}.yaml"]


def test_importing_the_room_costs_no_torch() -> None:
    code = "import sys, evomerge.zoo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
