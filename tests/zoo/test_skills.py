"""The demo's items: right answers, honest splits, and a tokenizer with no boundary surprises."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from evomerge.zoo import skills
from evomerge.zoo.skills import EVAL_SPLITS, LEXICON, SKILLS, Level, Skill, ZooSplit
from evomerge.zoo.tasks import (
    EXTRA_COUNTS,
    SKILL_COUNTS,
    TASKS,
    TEXT_COUNTS,
    extra_items,
    skill_items,
    task_files,
    task_records,
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
    ],
)
def test_answers(prompt: str, answer: str) -> None:
    assert skills.solve(prompt) == answer


def test_the_lexicon_is_one_to_one() -> None:
    assert len(LEXICON) == 48
    assert len(set(LEXICON.values())) == 48
    assert not set(LEXICON) & set(LEXICON.values())


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_drawn_items_are_of_their_level_and_split(skill: Skill, level: Level) -> None:
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
        elif skill == "translate":
            assert all(word in skills.EASY_WORDS for word in body) == (level == "easy")
        else:
            assert len(body) in ((2, 3, 4) if level == "easy" else (6, 7, 8))


def test_no_prompt_is_in_two_splits_or_two_tasks() -> None:
    prompts = [
        r["prompt"] for t in TASKS if t != "demo_text" for s in EVAL_SPLITS for r in task_records(t, s)
    ]
    texts = [text for split in EVAL_SPLITS for text in text_items(split)]
    assert len(set(prompts)) == len(prompts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", EVAL_SPLITS)
def test_sizes_and_splits_of_the_tasks(split: ZooSplit) -> None:
    for skill in SKILLS:
        items = skill_items(skill, split)
        assert len(items) == SKILL_COUNTS[split]
        assert {skills.split_of(item.prompt) for item in items} == {split}
    assert len(extra_items("upper", split)) == len(extra_items("translate", split)) == EXTRA_COUNTS[split]
    assert len(text_items(split)) == TEXT_COUNTS[split]
    assert {skills.split_of(text) for text in text_items(split)} == {split}


def test_choices_hold_the_answer_once() -> None:
    for record in task_records("demo_translate_choice", "test"):
        assert len(set(record["choices"])) == 4
        assert record["choices"][record["gold"]] == skills.solve(record["prompt"])


def test_tokens_of_prompt_and_answer_join_without_a_seam() -> None:
    tokenizer = skills.make_tokenizer()
    vocab = skills.vocabulary()
    lines: list[tuple[str, str]] = [
        (item.prompt, f"{item.answer} {skills.END}")
        for skill in SKILLS
        for item in skill_items(skill, "search")
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


def test_texts_agree_in_number() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second, _ = skills.draw_text(rng, "train").split(" .")
        plural = first.split(" ")[0] in ("some", "many", "these")
        assert ("they" in second.split(" ")) == plural
        assert ("it" in second.split(" ")) != plural


def test_task_files_are_relative_and_know_three_splits() -> None:
    files = task_files()
    assert sorted(name for name in files if name.endswith(".yaml")) == sorted(f"{t}.yaml" for t in TASKS)
    for task in TASKS:
        for split in EVAL_SPLITS:
            assert f"{split}: data/{task}.{split}.jsonl" in files[f"{task}.yaml"]


def test_importing_the_room_costs_no_torch() -> None:
    code = "import sys, evomerge.zoo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
