"""Near duplicates across splits and tasks are left out of search and select, never of test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.contamination import near_duplicates, summary, without
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.suite import Suite

LETTERS = "abcdefgh"


def text(seed: int, words: int = 20) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(words))


def test_near_copies_of_a_later_split_are_found_in_any_task() -> None:
    near = text(1) + " more"
    texts: Any = {
        "a": {"search": [text(0), near, text(2)], "select": [text(3)], "test": [text(4)]},
        "b": {"select": [text(2).upper() + "?"], "test": [text(1), text(3)]},
    }
    found = {(item.task, item.split, item.index) for item in near_duplicates(texts)}
    assert found == {("a", "search", 1), ("a", "search", 2), ("a", "select", 0)}
    assert len(summary(near_duplicates(texts))) == 2


def test_short_texts_and_common_instructions_are_not_compared() -> None:
    assert not near_duplicates({"a": {"search": ["sort c b a now"], "test": ["sort c b a now"]}})
    shared = text(0, 60)
    prompts = [f"{shared} {n} and {n + 1}" for n in range(300)]
    assert not near_duplicates({"a": {"search": prompts[:200], "test": prompts[200:]}})


def test_many_items_are_compared() -> None:
    texts: Any = {"a": {"search": [text(n, 40) for n in range(2000)], "test": [text(7, 40), text(9, 40)]}}
    assert sorted(item.index for item in near_duplicates(texts)) == [7, 9]


def suite(folder: Path, **keys: Any) -> Suite:
    rng = random.Random(0)
    rows = [{"q": " ".join(rng.choices(LETTERS, k=14)), "a": "a"} for _ in range(60)]
    rows += [{"q": row["q"] + " a", "a": "a"} for row in rows[:30]]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"data": "items.jsonl", "prompt": "q", "answer": "a"}
    data = {"name": "own", "gen_kwargs": {"max_gen_toks": 2}, "tasks": [task], **keys}
    return Suite.from_mapping(data, folder=folder, where="suite.yaml")


def test_a_suite_drops_keeps_or_refuses_them(tmp_path: Path, tokenizer: Any) -> None:
    def harness(**keys: Any) -> Harness:
        return Harness(suite(tmp_path, **keys), tokenizer=tokenizer, batch_size=16, max_length=None)

    dropped, kept = harness(), harness(near_duplicates="keep")
    assert dropped.items("test").total == kept.items("test").total
    assert dropped.items("search").total < kept.items("search").total
    assert "near duplicates of items in a later split, so they are left out" in dropped.notes[0]
    assert kept.notes == []
    with pytest.raises(ConfigError, match="items of the suite are near duplicates of items in a later split"):
        harness(near_duplicates="refuse")


def test_a_run_stored_before_keeps_its_items() -> None:
    demo = Suite.load("demo")
    assert demo.near_duplicates == "drop"
    assert demo.as_stored({}).near_duplicates == "keep"
    assert demo.as_stored(demo.model_dump()).near_duplicates == "drop"


def test_a_split_of_near_duplicates_alone_is_refused() -> None:
    texts: Any = {"a": {"search": [text(1), text(2)], "test": [text(1), text(2)]}}
    found = near_duplicates(texts)
    assert without({"search": ["x", "y"], "test": ["z"]}, found[:1]) == {"search": ["y"], "test": ["z"]}
    with pytest.raises(ConfigError, match="all 2 search items are near duplicates"):
        without({"search": ["x", "y"], "test": ["z"]}, found)
