"""Empty data files are said before anything reads them, and repeated ids are noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.task_data import refuse_empty, repeated_ids
from tests.evaluation.conftest import TASKS, MakeSuite, documents, entry, write_task

SPLITS = ("search", "select", "test")


@pytest.mark.parametrize(
    ("kind", "content", "empty"),
    [
        ("json", "", True),
        ("json", "\n \n", True),
        ("json", "{}\n", False),
        ("csv", "a,b\n", True),
        ("csv", "a,b\n1,2\n", False),
        ("text", "\n", True),
        ("text", "x", False),
        ("parquet", "", True),
        ("parquet", "PAR1", False),
        ("some/dataset", "", False),
    ],
)
def test_a_file_without_an_item_is_refused(tmp_path: Path, kind: str, content: str, empty: bool) -> None:
    (tmp_path / "x").write_text(content)
    for files in ({"test": "x"}, ["x"], "x", {"test": ["x*"]}, str(tmp_path / "x")):
        if empty:
            with pytest.raises(ConfigError, match="is empty"):
                refuse_empty(kind, files, tmp_path)
        else:
            refuse_empty(kind, files, tmp_path)


def test_one_empty_part_of_several_and_missing_files_are_left_to_their_reader(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "full").write_text("{}\n")
    for files in (["empty", "full"], "missing", "https://a.b/c", "", None, {"test": 7}, "no*"):
        refuse_empty("json", files, tmp_path)


def test_the_message_names_task_and_file(make_suite: MakeSuite, tmp_path: Path, tokenizer: Any) -> None:
    splits = {split: documents("first", split, 5) for split in SPLITS} | {"select": []}
    write_task(tmp_path, "first", TASKS["first"], **splits)
    with pytest.raises(ConfigError) as refused:
        Harness(make_suite(entry("first"), folder=tmp_path), tokenizer=tokenizer, batch_size=8, max_length=64)
    assert refused.value.what == "task 'first': the data file of the dataset split 'select' is empty"
    assert refused.value.got == str(tmp_path / "data" / "first_select.jsonl")


def test_repeated_ids_are_a_note(make_suite: MakeSuite, tmp_path: Path, tokenizer: Any) -> None:
    splits = {split: documents("first", split, 6) for split in SPLITS}
    for docs in splits.values():
        for number, document in enumerate(docs):
            document["id"] = f"q{number}"  # the same in every dataset split, as in many data sets
    write_task(tmp_path, "first", TASKS["first"], **splits)
    suite = make_suite(entry("first"), folder=tmp_path)
    assert Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=64).notes == []
    splits["search"][4]["id"] = splits["search"][1]["id"] = "q0"
    write_task(tmp_path, "first", TASKS["first"], **splits)
    (note,) = Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=64).notes
    assert note == ("task 'first': the id 'q0' of its data stands on 3 items; check that no rows were copied")


def test_what_is_no_id_is_not_counted() -> None:
    rows: list[Any] = [
        {"id": ""},
        {"id": ""},
        {"id": None},
        {"id": None},
        {},
        "text",
        {"id": [1]},
        {"id": [1]},
    ]
    assert repeated_ids("t", {"train": rows}) == []
    two = [{"id": 1}, {"id": 1}, {"id": "1"}, {"id": "a"}, {"id": "a"}]
    assert "(and 1 other ids on several)" in repeated_ids("t", {"train": two})[0]
