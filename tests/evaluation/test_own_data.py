"""A file of prompts and answers is read strictly, its splits are stable, and it is scored like a task."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import ConfigError
from evomerge.evaluation.gradient import differentiable
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.own_data import Columns, read, scorer
from evomerge.evaluation.scores import Scores
from evomerge.evaluation.smooth_loss import SmoothLoss, SmoothTask
from evomerge.evaluation.suite import Suite

QA = Columns(prompt="q", answer="a")
LETTERS = "abcdefgh"


def jsonl(folder: Path, rows: Sequence[Any], name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows(count: int) -> list[dict[str, Any]]:
    """Different prompts of known letters."""
    found = []
    for n in range(count):
        word = " ".join(LETTERS[n // 8**k % 8] for k in range(4))
        found.append({"q": word, "a": word[0], "options": ["a", "b"], "right": n % 2})
    return found


def test_columns_jinja_and_csv_give_the_same_items(tmp_path: Path) -> None:
    data = [{"q": 'two "quoted"\nlines', "a": "x"}, {"q": "next", "a": "1"}]
    path = tmp_path / "items.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(data)
    of_csv = read(path, QA, "exact").items
    of_jsonl = read(jsonl(tmp_path, data), QA, "exact").items
    assert [(i.prompt, i.answer) for i in of_csv] == [(i.prompt, i.answer) for i in of_jsonl]
    text = Columns(prompt="Q: {{q}}", answer="{{a}}!")
    assert [(i.prompt, i.answer) for i in read(path, text, "exact").items][1] == ("Q: next", "1!")


WRONG = [
    ("bad JSON", ['{"q": 1,}'], "line 1: not valid JSON"),
    ("no object", ["[1]"], "line 1: not an object"),
    ("missing column", [{"q": "x", "a": "y"}, {"q": "z"}], "line 2: no column 'a'"),
    ("empty answer", [{"q": "x", "a": " "}], "line 1: the answer is empty"),
    ("null answer", [{"q": "x", "a": None}], "line 1: the answer is empty"),
    ("empty prompt", [{"q": "", "a": "y"}], "line 1: the prompt is empty"),
    (
        "id twice",
        [{"q": "x", "a": "y", "id": 1}, {"q": "z", "a": "y", "id": 1}],
        "line 2: the id '1' is that of line 1",
    ),
    ("two answers", [{"q": "x", "a": "y"}, {"q": "x", "a": "z"}], "lines 1 and 2 ask the same"),
    ("no items", [], "no items"),
    ("blank lines only", ["", " "], "no items"),
    ("NaN", ['{"q": NaN, "a": 1}'], "line 1: not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_mistakes_name_the_line(tmp_path: Path, content: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(jsonl(tmp_path, content), QA, "exact")


WRONG_CSV = [
    ("cells", "q,a\n1\n", "line 2: 1 cells"),
    ("column twice", "q,q\n1,2\n", "line 1: the column 'q' stands twice"),
    ("open quote", 'q,a\n"1,2\n', "not valid CSV"),
    ("header only", "q,a\n", "no items"),
    ("empty", "", "no items"),
]


@pytest.mark.parametrize(
    ("text", "message"), [row[1:] for row in WRONG_CSV], ids=[row[0] for row in WRONG_CSV]
)
def test_mistakes_in_csv_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "items.csv", QA, "exact")


@pytest.mark.parametrize(
    ("metric", "answer"),
    [("number", "twelve"), ("json", "{"), ("regex", "(")],
    ids=["number", "json", "regex"],
)
def test_an_answer_must_fit_its_metric(tmp_path: Path, metric: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=f"line 1: the answer does not fit the metric {metric}"):
        read(jsonl(tmp_path, [{"q": "x", "a": answer}]), QA, metric)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("x")
    (tmp_path / "items.jsonl").write_bytes(b"\xff")
    for name, message in (
        ("items.txt", "unknown kind"),
        ("items.jsonl", "not UTF-8"),
        ("no.csv", "can't be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / name, QA, "exact")


def test_choices(tmp_path: Path) -> None:
    columns = Columns(prompt="q", answer="a", choices="c")
    for answer in ("red", "A", 0):
        (item,) = read(
            jsonl(tmp_path, [{"q": "x", "a": answer, "c": ["red", "blue"]}]), columns, "choice"
        ).items
        assert (item.answer, item.choices) == ("red", ("red", "blue"))
    (item,) = read(jsonl(tmp_path, [{"q": "x", "a": "blue", "c": "red|blue"}]), columns, "choice").items
    assert item.answer == "blue"
    for answer, choices, message in (
        ("green", ["red", "blue"], "none of the choices"),
        (2, ["red", "blue"], "none of the choices"),
        ("red", ["red"], "the choices in 'c'"),
        ("red", ["red", "red"], "the choices in 'c'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(jsonl(tmp_path, [{"q": "x", "a": answer, "c": choices}]), columns, "choice")


def test_new_rows_move_no_others_and_repeated_ones_are_counted(tmp_path: Path) -> None:
    some = read(jsonl(tmp_path, rows(300)), QA, "exact")
    more = read(jsonl(tmp_path, rows(100)[::-1] + rows(900)), QA, "exact")
    assert (some.repeated, more.repeated, len(more.items)) == (0, 100, 900)
    splits = {item.prompt: item.split for item in more.items}
    assert all(splits[item.prompt] == item.split for item in some.items)
    counts = more.counts()
    assert abs(counts["search"] - 450) < 60
    assert abs(counts["select"] - 180) < 50


@pytest.mark.parametrize(
    ("metric", "answer", "right", "value"),
    [
        ("exact", " Rome \n", "Rome", 1),
        ("exact", "rome", "Rome", 0),
        ("contains", "It is  ROME.", "rome", 1),
        ("regex", "in 1987", r"\b19\d\d\b", 1),
        ("regex", "a" * 40 + "!", r"(a|aa)+$", 0),
        ("number", "3 apples and 4 pears: 1,007.0 in all", "1007", 1),
        ("number", "none", "7", 0),
        ("json", '{"a": 1}', '{"a": 1}', 1),
        ("json", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.75),
    ],
)
def test_metrics(metric: str, answer: str, right: str, value: float) -> None:
    assert scorer(metric)(answer, right)[metric] == value
    assert scorer(metric)("", right)[metric] in (0, 1)


def suite(folder: Path, **entry: Any) -> Suite:
    data = {
        "name": "own",
        "gen_kwargs": {"max_gen_toks": 2},
        "tasks": [{"data": "items.jsonl", "prompt": "q", **entry}],
    }
    return Suite.from_mapping(data, folder=folder, where="suite.yaml")


@pytest.mark.parametrize(
    "entry",
    [
        {"answer": "a"},
        {"answer": "a", "metric": "contains", "splits": {"search": 20, "select": 10, "test": 10}},
        {"answer": "right", "choices": "options"},
        {"answer": "{{ {'x': a} | tojson }}", "metric": "json"},
    ],
    ids=["exact", "numbers", "choice", "json"],
)
def test_own_data_are_scored(tmp_path: Path, tokenizer: Any, model: Any, entry: dict[str, Any]) -> None:
    jsonl(tmp_path, rows(120))
    harness = Harness(suite(tmp_path, **entry), tokenizer=tokenizer, batch_size=16, max_length=None)
    for split in ("search", "select", "test"):
        (scores,) = harness.evaluate(model, harness.items(split))  # type: ignore[arg-type]
        assert scores.task == "items"
        assert len(scores.metric) >= 10
        assert ((scores.metric >= 0) & (scores.metric <= 1)).all()


def test_too_few_items_for_three_splits_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    jsonl(tmp_path, rows(1))
    with pytest.raises(ConfigError, match="too few items for three splits"):
        Harness(suite(tmp_path, answer="a"), tokenizer=tokenizer, batch_size=16, max_length=None)


def test_retention_of_answers_is_their_likelihood_per_token(
    tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    """The base's chat answers, for example: what must not be lost, and no text to read from its start."""
    jsonl(tmp_path, rows(120))
    skill = {"data": "items.jsonl", "prompt": "q", "answer": "right", "choices": "options"}
    kept = {
        "task": "kept",
        "data": "items.jsonl",
        "prompt": "q",
        "answer": "{{ options[right] }}",
        "role": "retention",
    }
    data = {"name": "own", "tasks": [skill, kept]}
    own = Suite.from_mapping(data, folder=tmp_path, where="suite.yaml")
    assert own["kept"].metric == "loglikelihood"
    harness = Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None)
    items = harness.items("search")
    scores = harness.evaluate(model, items)
    (task,) = (task for task in items.tasks if task.name == "kept")
    expected = []
    for context, answer in task.pairs:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
        tokens = range(len(context), len(context) + len(answer))
        expected.append(np.mean([float(logits[at - 1, (*context, *answer)[at]]) for at in tokens]))
    np.testing.assert_allclose(scores["kept"].metric, expected, atol=1e-5)
    better = replace(scores["items"], metric=scores["items"].metric + 1)
    parent = Scores(split="search", tasks=(better, scores["kept"]))
    normaliser = Normaliser(own, base=scores, parents={"p": parent})
    lower = replace(scores["kept"], metric=scores["kept"].metric - 1)
    worse = Scores(split="search", tasks=(scores["items"], lower))
    assert normaliser.retention(scores) == pytest.approx(1)
    assert normaliser.retention(worse) == pytest.approx(np.exp(-1))


def test_retention_of_answers_has_a_gradient(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    jsonl(tmp_path, rows(120))
    entry = {"task": "kept", "answer": "{{ options[right] }}", "role": "retention"}
    skill = {"task": "skill", "data": "items.jsonl", "prompt": "q", "answer": "right", "choices": "options"}
    text = {"data": "items.jsonl", "prompt": "q"}
    data = {"name": "own", "tasks": [skill, text | entry, text | entry | {"task": "gained"}]}
    own = Suite.from_mapping(data, folder=tmp_path, where="suite.yaml")
    harness = Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None)
    before = harness.evaluate(model, harness.items("search"))["kept"].metric
    mean = float(before[[0, 2, 5]].mean())
    part = SmoothTask(task="kept", gain=0.75, items=(0, 2, 5), base=mean + 0.5)
    gained = SmoothTask(task="gained", gain=0.25, items=(1,), base=mean - 20)  # makes up for nothing
    loss = SmoothLoss(tasks=(part, gained), price=2.0, softness=1.0)
    weight = model.lm_head.weight
    with differentiable(model):
        value, _ = harness.backward(model, "search", loss)
        slope = weight.grad.clone()
    assert value == pytest.approx(1.5 * (1 - np.exp(-0.5)), rel=1e-4)
    step = 1e-3 * slope / slope.norm()
    with torch.no_grad():
        weight += step
    with differentiable(model):
        above, _ = harness.backward(model, "search", loss)
    with torch.no_grad():
        weight -= step
    assert above - value == pytest.approx(float((slope * step).sum()), rel=0.02)


ENTRIES = [
    ({}, "needs answer"),
    ({"answer": "a", "metric": "exactly"}, "did you mean 'exact'"),
    ({"answer": "a", "metric": "choice"}, "need each other"),
    ({"answer": "a", "of": "gsm8k"}, "without `of`"),
    ({"answer": "a", "role": "coherence"}, "is a skill or measures retention"),
    ({"answer": "right", "role": "retention", "choices": "options"}, "remove choices"),
    ({"answer": "a", "role": "retention", "metric": "exact"}, "measured by 'loglikelihood'"),
    ({"answer": "a", "role": "retention", "scorer": "a:b"}, "remove scorer"),
    ({"answer": "a", "splits": {"search": "x", "select": "y", "test": "z"}}, "numbers of items, or left out"),
    ({"answer": "a", "scorer": "mine"}, "module:function or file.py:function"),
    ({"answer": "a", "data": "other.jsonl"}, "data is not a file"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES, ids=[row[1] for row in ENTRIES])
def test_mistakes_of_an_entry(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    jsonl(tmp_path, rows(3))
    with pytest.raises(ConfigError, match=message):
        suite(tmp_path, **entry)


def test_the_file_belongs_to_the_suite_at_any_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name, rows(30))
    here, there = suite(tmp_path / "here", answer="a"), suite(tmp_path / "there", answer="a")
    assert here.digest() == there.digest()
    assert here.weighted({}).files() == here.files()
    jsonl(tmp_path / "there", rows(31))
    assert here.digest() != there.digest()
    assert Suite.from_store(here.model_dump(mode="json"), "stored")["items"].prompt == "q"
