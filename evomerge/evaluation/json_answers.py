"""JSON answers: how much of a generated JSON text is right, as metrics of one item.

A right answer counts 1 and most merges are far from it, so `exact` alone gives a search no direction. The
other metrics give partial credit: for valid JSON, for the right functions, and for each right argument.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
from scipy.optimize import linear_sum_assignment

_FENCE = re.compile(r"^```[a-zA-Z]*\s*\n(.*?)\n?```$", re.DOTALL)
_START = re.compile(r"[\[{]")
DEEPEST = 200
"""Brackets that an answer may open before it counts as unreadable."""


def read(answer: str) -> tuple[Any, bool]:
    """Return the JSON value in an answer, and whether the answer is nothing else; (None, False) without one.

    A code fence around the value is allowed. Where there are other words, the first JSON array or object
    counts.

    >>> read('[1]'), read('```json\\n[1]\\n```'), read('Sure: [1]'), read('no')
    (([1], True), ([1], True), ([1], False), (None, False))
    """
    text = answer.strip()
    if text.count("[") + text.count("{") > DEEPEST:
        return None, False
    fenced = _FENCE.match(text)
    whole = fenced[1].strip() if fenced else text
    try:
        return _parsed(whole), True
    except ValueError:
        pass
    for start in (match.start() for match in _START.finditer(text)):
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        return value, False
    return None, False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def same(a: Any, b: Any) -> bool:
    """Say whether two JSON values mean the same: texts without regard to case and outer space, 2 equals 2.0.

    >>> same({"a": " Rome "}, {"a": "rome"}), same(2, 2.0), same(True, 1), same([1, 2], [2, 1])
    (True, True, False, False)
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, str) and isinstance(b, str):
        return " ".join(a.split()).casefold() == " ".join(b.split()).casefold()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b if a is None or b is None else bool(a == b)


def score_value(answer: str, expected: Any) -> dict[str, float]:
    """Score an answer that should be one JSON value.

    Args:
        answer: the generated text.
        expected: the right value.

    Returns:
        `exact`: the answer is the value and nothing else. `valid`: it is JSON and nothing else. `fields`: for
        an object the share of its keys with the right value, less for keys that are too many; else whether
        the value is right. `partial`: the mean of `valid` and `fields`.

    >>> score_value('{"a": 1, "b": 3}', {"a": 1, "b": 2})
    {'exact': 0.0, 'valid': 1.0, 'fields': 0.5, 'partial': 0.75}
    """
    value, whole = read(answer)
    fields = _share(value, expected) if isinstance(expected, Mapping) else float(same(value, expected))
    valid = float(whole)
    return {
        "exact": float(whole and same(value, expected)),
        "valid": valid,
        "fields": fields,
        "partial": (valid + fields) / 2,
    }


def score_calls(
    answer: str, expected: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Score an answer that should be a JSON list of function calls.

    Args:
        answer: the generated text; a single call need not stand in a list.
        expected: the right calls, each `{"name": ..., "arguments": {...}}`, in any order; empty where no
            function should be called.
        functions: what may be called, each `{"name": ..., "parameters": JSON schema}`.

    Returns:
        `exact`: the right calls and nothing else. `valid`: the answer is such a list and nothing else, every
        function is offered, and all arguments fit its schema. `function`: how far the names agree (the number
        of common ones, divided by the larger number of calls). `arguments`: the mean over calls of the share
        of right arguments; 0 for a call too many or too few. `partial`: the mean of `valid`, `function` and
        `arguments`.

    >>> offered = [{"name": "add", "parameters": {"type": "object", "required": ["a"]}}]
    >>> call = {"name": "add", "arguments": {"a": 1}}
    >>> score_calls(json.dumps([call]), [call], offered)
    {'exact': 1.0, 'valid': 1.0, 'function': 1.0, 'arguments': 1.0, 'partial': 1.0}
    """
    value, whole = read(answer)
    calls = _calls(value)
    if calls is None:
        return {"exact": 0.0, "valid": 0.0, "function": 0.0, "arguments": 0.0, "partial": 0.0}
    schemas = {function["name"]: function.get("parameters", {}) for function in functions}
    valid = float(whole and all(_fits(call, schemas) for call in calls))
    most = max(len(calls), len(expected))
    common = Counter(c["name"] for c in calls) & Counter(c["name"] for c in expected)
    function = common.total() / most if most else 1.0
    arguments = _matched(calls, expected) / most if most else 1.0
    return {
        "exact": float(valid == function == arguments == 1.0),
        "valid": valid,
        "function": function,
        "arguments": arguments,
        "partial": (valid + function + arguments) / 3,
    }


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """Return the calls of a JSON value, None where it is something else."""
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        return None
    right = all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    return calls if right else None


def _fits(call: Mapping[str, Any], schemas: Mapping[str, Any]) -> bool:
    if call.keys() != {"name", "arguments"} or call["name"] not in schemas:
        return False
    return bool(jsonschema.Draft202012Validator(schemas[call["name"]]).is_valid(call["arguments"]))


def _matched(calls: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> float:
    """Return the largest sum of right shares over pairs of a call and an expected one."""
    if not calls or not expected:
        return 0.0
    table = np.array([[_right(call, one) for one in expected] for call in calls])
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum())


def _right(call: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    if call["name"] != expected["name"]:
        return 0.0
    return _share(call.get("arguments"), expected["arguments"])


def _share(value: Any, expected: Mapping[str, Any]) -> float:
    """Return the share of right fields: those that are right, divided by all that either side has."""
    if not isinstance(value, Mapping):
        return 0.0
    keys = value.keys() | expected.keys()
    right = sum(key in value and key in expected and same(value[key], expected[key]) for key in keys)
    return right / len(keys) if keys else 1.0
