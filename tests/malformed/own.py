"""Malformed files of a suite's own data, entries with `data`, scorers and gate files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.malformed.workspace import CHECK, EVALUATE, SPECIAL, SUITE, Case, special, text

ROW = '{"q": "add 1 8 =", "a": "9", "options": ["9", "8"]}\n'
DRAWN = {"search": 2, "select": 2, "test": 2}
READING = ((*CHECK, "--trust-tasks"), (*EVALUATE, "--trust-tasks"))
GATES = tuple((*words, "--gate", "gate.yaml") for words in (("report", "run"), ("compare", "a", "b")))
SCORER = "def score(answer, row):\n    return 1.0\n"


def with_data(folder: Path, file: str = "own.jsonl", **changes: Any) -> None:
    """Add a task with `data` to the suite; None removes a key."""
    entry = {"data": file, "prompt": "q", "answer": "a", "splits": DRAWN} | changes
    entry = {key: value for key, value in entry.items() if value is not None}
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE | {"tasks": [*SUITE["tasks"], entry]}))


def own() -> Iterator[Case]:
    """Files of prompts and answers."""
    jsonl: dict[str, tuple[str | bytes, str]] = {
        "a row that is no JSON": (ROW + "no json\n", "line 2"),
        "a row of a list": (ROW + "[1]\n", "line 2"),
        "a column twice": ('{"q": "x", "q": "y", "a": "1"}\n', "line 1"),
        "NaN": ('{"q": NaN, "a": "1"}\n', "line 1"),
        "a lone surrogate": ('{"q": "\\ud800", "a": "1"}\n', "line 1"),
        "nested too deeply": ('{"q": ' + "[" * 100_000 + "\n", "line 1"),
        "no column": (ROW + '{"question": "x", "a": "1"}\n', "'q'"),
        "an empty prompt": (ROW + '{"q": " ", "a": "1"}\n', "line 2"),
        "no answer": (ROW + '{"q": "x", "a": null}\n', "line 2"),
        "two answers": (ROW + ROW.replace('"9",', '"8",', 1), "different answers"),
        "an id twice": (ROW.replace("{", '{"id": 1, ') + '{"q": "b", "a": "1", "id": 1}\n', "the id"),
        "blank lines": ("\n\n", "no items"),
        "too few items": (ROW, "too few items"),
        "UTF-16": (ROW.encode("utf-16"), "UTF-8"),
    }
    csvs = {
        "more cells": ("q,a\n1,2,3\n", "line 2"),
        "fewer cells": ("q,a\n1\n", "line 2"),
        "an open quote": ('q,a\n"1,2\n', "CSV"),
        "a column twice": ("q,a,a\n1,2,3\n", "stands twice"),
        "a header only": ("q,a\n", "no items"),
        "no header": ("1,2\n3,4\n", "'q'"),
        "NUL": ("q,a\n\0,\0\n", "task 'own'"),
    }
    for suffix, contents in (("jsonl", jsonl), ("csv", csvs)):
        for name, (content, message) in contents.items():

            def make(folder: Path, file: str = f"own.{suffix}", content: str | bytes = content) -> None:
                text(file, content)(folder)
                with_data(folder, file)

            yield Case(kind="own", name=f"{suffix}: {name}", make=make, commands=READING, message=message)
    for what in SPECIAL:

        def odd(folder: Path, what: str = what) -> None:
            special("own.jsonl", what)(folder)
            with_data(folder)

        yield Case(kind="own", name=what, make=odd, commands=READING, message="own.jsonl")


def entries() -> Iterator[Case]:
    """Entries with `data`, and what they name."""
    changes: dict[str, dict[str, Any]] = {
        "no prompt": {"prompt": None},
        "no answer": {"answer": None},
        "an unknown column": {"prompt": "question"},
        "a template that does not end": {"prompt": "{{ q"},
        "a template with an error": {"prompt": "{{ q / 0 }}"},
        "a template that leaves its sandbox": {"prompt": "{{ q.__class__.__mro__ }}"},
        "an unknown metric": {"metric": "f1"},
        "choices without a column": {"choices": "nothing"},
        "choices that are a text": {"choices": "q"},
        "choices with another metric": {"choices": "options", "metric": "exact"},
        "a number as metric of texts": {"metric": "number", "answer": "q"},
        "JSON that is none": {"metric": "json", "answer": "q"},
        "a regular expression that is none": {"metric": "regex", "answer": "{{ '(' }}"},
        "named splits": {"splits": {"search": "train", "select": "dev", "test": "test"}},
        "a file of another kind": {"data": "suite.yaml"},
        "no file": {"data": "nowhere.jsonl"},
        "a folder": {"data": "tasks"},
        "another user's home": {"data": "~nosuchuser/x.jsonl"},
        "a long name": {"data": "x" * 5000},
        "a list of files": {"data": ["own.jsonl"]},
        "of beside data": {"of": "demo_add"},
        "a role beside data": {"role": "coherence"},
        "retention with choices": {"role": "retention", "choices": "options"},
        "retention by another metric": {"role": "retention", "metric": "exact"},
        "a scorer without a function": {"scorer": "scorer.py"},
        "a scorer without a file": {"scorer": "nowhere.py:score"},
        "a scorer without a module": {"scorer": "no_such_module:score"},
        "a function that is not there": {"scorer": "scorer.py:other"},
        "a scorer beside choices": {"scorer": "scorer.py:score", "choices": "options"},
        "a number as scorer": {"scorer": 7},
    }
    rows = "".join(ROW.replace("1 8", f"{n} 8") for n in range(9))
    for name, change in changes.items():

        def make(folder: Path, change: dict[str, Any] = change) -> None:
            (folder / "own.jsonl").write_text(rows)
            (folder / "scorer.py").write_text(SCORER)
            with_data(folder, **change)

        yield Case(
            kind="entry",
            name=name,
            make=make,
            commands=READING,
            message="suite|own|task|scorer|nosuchuser|xxx",
        )
    for name, code in {
        "a scorer that is no Python": "def score(",
        "a scorer that fails at once": "raise SystemExit(0)\n",
        "a scorer that is no function": "score = 7\n",
    }.items():

        def broken(folder: Path, code: str = code) -> None:
            (folder / "own.jsonl").write_text(rows)
            (folder / "scorer.py").write_text(code)
            with_data(folder, scorer="scorer.py:score")

        yield Case(kind="entry", name=name, make=broken, commands=READING, message="scorer")


def gates() -> Iterator[Case]:
    """Gate files."""
    contents: dict[str, str | bytes] = {
        "no rule": "{}",
        "a list": "- max_loss\n",
        "a number": "7",
        "not YAML": "max_loss: {any: 2",
        "a key twice": "max_loss: {any: 2, any: 3}",
        "a misspelt key": "max_los: {any: 2}",
        "a negative loss": "max_loss: {any: -1}",
        "a loss without a number": "max_loss: {any: much}",
        "a loss that is no mapping": "max_loss: 2",
        "NaN": "max_loss: {any: .nan}",
        "infinity": "min_points: .inf",
        "too sure": "max_loss: {any: 2}\nconfidence: 1.0",
        "unsure": "max_loss: {any: 2}\nconfidence: 0.1",
        "against nobody": "max_loss: {any: 2}\nagainst: nobody",
        "a huge number": "min_points: 1" + "0" * 400,
        "no retention": "min_retention: 0",
        "an alias to itself": "max_loss: &a {any: *a}",
        "a tag": "max_loss: !!python/object/apply:os.system [ls]",
    }
    for name, content in contents.items():
        yield Case(
            kind="gate", name=name, make=text("gate.yaml", content), commands=GATES, message="gate.yaml"
        )
    for what in SPECIAL:
        yield Case(
            kind="gate", name=what, make=special("gate.yaml", what), commands=GATES, message="gate.yaml"
        )
