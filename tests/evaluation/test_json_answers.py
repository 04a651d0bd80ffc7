"""Answers in JSON: a right one scores 1, and every step towards it scores more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evomerge.evaluation.json_answers import DEEPEST, read, same, score_calls, score_value

OFFERED = [
    {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "who": {"type": "string"},
                "people": {"type": "integer"},
                "time": {"type": "string"},
            },
            "required": ["who", "people", "time"],
            "additionalProperties": False,
        },
    },
    {"name": "ring", "parameters": {"type": "object", "required": ["who"]}},
]
BOOK = {"name": "book", "arguments": {"who": "Anna", "people": 3, "time": "19:00"}}
RING = {"name": "ring", "arguments": {"who": "Ben"}}


def partial(answer: Any, *expected: Any) -> float:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return score_calls(text, list(expected), OFFERED)["partial"]


def changed(**arguments: Any) -> dict[str, Any]:
    return {"name": "book", "arguments": {**BOOK["arguments"], **arguments}}  # type: ignore[dict-item]


def test_every_step_towards_the_right_call_scores_more() -> None:
    steps: list[Any] = [
        "Sure, I will book it.",
        f"Of course: {json.dumps([changed(who='Ben', people=9, time='7')])}",
        [changed(who="Ben", people=9, time="7")],
        [changed(who="Ben", people=9)],
        [changed(who="Ben")],
        [BOOK],
    ]
    scores = [partial(step, BOOK) for step in steps]
    assert scores[0] == 0
    assert scores[-1] == 1
    assert scores == sorted(set(scores))


def test_calls_may_stand_in_any_order() -> None:
    assert partial([RING, BOOK], BOOK, RING) == 1
    assert partial([RING, RING], BOOK, RING) < 1
    assert partial([BOOK], BOOK, RING) < partial([BOOK, changed(who="Ben")], BOOK, changed(who="Carl")) < 1


def test_a_call_where_none_is_needed_is_wrong() -> None:
    assert score_calls("[]", [], OFFERED)["exact"] == 1
    assert score_calls(json.dumps([RING]), [], OFFERED) == {
        "exact": 0.0,
        "valid": 1.0,
        "function": 0.0,
        "arguments": 0.0,
        "partial": 1 / 3,
    }
    assert partial("Rome.", *[]) == 0
    assert partial([], BOOK) < partial([BOOK], BOOK)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[",
        "null",
        "3",
        "[3]",
        "[[]]",
        '[{"name": 3}]',
        '[{"name": "book"}]',
        '[{"name": "book", "arguments": "Anna"}]',
        '[{"name": "book", "arguments": {"who": NaN, "people": 3, "time": "19:00"}}]',
        '[{"name": "other", "arguments": {}}]',
        "[" * (DEEPEST + 1),
        "[" * 100_000,
    ],
)
def test_what_is_no_such_list_is_not_exact(answer: str) -> None:
    scores = score_calls(answer, [BOOK], OFFERED)
    assert scores["exact"] == 0
    assert all(0 <= value < 1 for key, value in scores.items() if key in ("arguments", "partial"))


def test_extra_keys_and_wrong_types_are_not_valid() -> None:
    assert score_calls(json.dumps([{**BOOK, "id": 1}]), [BOOK], OFFERED)["exact"] == 0
    assert score_calls(json.dumps([changed(people="3")]), [BOOK], OFFERED)["valid"] == 0
    assert score_calls(json.dumps([changed(note="x")]), [BOOK], OFFERED)["exact"] == 0
    assert score_calls(json.dumps(BOOK), [BOOK], OFFERED)["exact"] == 1


def test_texts_differ_neither_by_case_nor_by_space() -> None:
    assert same(" Anna  Lee", "anna lee")
    assert not same(True, 1)
    assert not same(None, 0)
    assert not same("2", 2)
    assert same(None, None)
    assert same({"a": [1.0]}, {"a": [1]})
    assert not same({"a": 1}, {"a": 1, "b": 2})


def test_the_first_value_among_other_words_counts() -> None:
    assert read("I call [not json] [1, 2] and [3]") == ([1, 2], False)
    assert read("```json\n{}\n```") == ({}, True)


def test_a_value_has_partial_credit_by_field() -> None:
    expected = {"a": 1, "b": [2], "c": None}
    answers = ["no", "[]", '{"a": 2}', '{"a": 1}', '{"a": 1, "b": [2]}', json.dumps(expected)]
    scores = [score_value(answer, expected)["partial"] for answer in answers]
    assert scores[0] == 0
    assert scores[-1] == 1
    assert scores == sorted(scores)
    assert score_value("Rome", "rome")["exact"] == 0
    assert score_value('"Rome"', "rome")["exact"] == 1
