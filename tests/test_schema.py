"""Malformed YAML is one message with its line, in every kind of file that users write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from evomerge.config import RunConfig
from evomerge.errors import ConfigError, ModelError
from evomerge.evaluation.suite import Suite
from evomerge.merging import mergekit
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.schema import Strict, load_json, load_yaml, parse, parse_json, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MALFORMED = {
    "{{ x }}: 1": "line 1, column 1: a key is a list or a mapping",
    "a: {{ x }}": "a key is a list or a mapping",
    "a: 1\nb: 2001-99-99": "line 2, column 4: '2001-99-99' is no valid timestamp",
    "2001-99-99": "'2001-99-99' is no valid timestamp",
    "a: !!int abc": "'abc' is no valid int",
    "a: !!int ''": "'' is no valid int",
    "a: !!float x": "'x' is no valid float",
    "a: !!bool maybe": "'maybe' is no valid bool",
    "a: !!map [1]": "a list is not a mapping",
    "a: 0x_": "'0x_' is no valid int",
    "a: " + "9" * 5000: "is no valid int",
    "a: 0x" + "f" * 5000: "is an integer of more than 64 bits",
    'a: "\\ud800"': "line 1, column",
    BOMB: "its aliases expand to 1,234,567,909 values",
    "a: &a [*a]": "an alias contains itself",
    "a: &a {b: *a}": "an alias contains itself",
    "a: 1\na: 2": "line 2, column 1: duplicate key 'a'",
    "a: " + "[" * 3000: "line 1: nested more than 100 levels deep",
    "a: !!python/object/apply:os.system [ls]": "could not determine a constructor",
    "a: *b": "found undefined alias",
    "a: \x00": "characters are not allowed",
}


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:24]))
def test_malformed_yaml_is_one_message(text: str, tmp_path: Path) -> None:
    expected = MALFORMED[text]
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (
        lambda: RunConfig.load(path),
        lambda: Suite.load(path),
        lambda: load_yaml(path),
        lambda: read_recipe(path),
        lambda: Recipe.from_yaml(text),
        lambda: mergekit.read(text),
    ):
        with pytest.raises(ConfigError) as error:
            read()
        assert expected in str(error.value)
        assert "not valid YAML" in str(error.value)


def test_aliases_of_moderate_size_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: 1}, e: *a}") == {
        "a": [1, 2],
        "b": [[1, 2], [1, 2]],
        "c": {"d": 1, "e": [1, 2]},
    }


@given(st.text(alphabet="ab:-?[]{}&*!<>|'\"%#,\n 019.x_eE+~\\@`", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        assert parse_yaml(text) is not Ellipsis


MALFORMED_JSON = {
    b"{": "Expecting property name",
    b'{"a": 1} x': "Extra data",
    b'{"a": NaN}': "NaN is not a finite number (line 1, column 7)",
    b'{\n"a": [1, -Infinity]}': "-Infinity is not a finite number (line 2, column 10)",
    b'{"a": 1e999}': "1e999 is not a finite number",
    b'{"a": ' + b"9" * 5000 + b"}": "is a number of 5000 digits",
    b'{"a": 1, "b": 2, "a": {}}': '"a" is a duplicate key',
    b"[" * 100_000: "nested too deeply",
    b"[" * 101 + b"]" * 101: "nested too deeply",
    b'"\\ud800"': "is half of a character",
    b'"\xff"': "not UTF-8 text: invalid start byte at byte 1",
    b"\xef\xbb\xbf{}": "BOM",
}


@pytest.mark.parametrize("content", MALFORMED_JSON, ids=lambda content: repr(content[:24]))
def test_malformed_json_is_one_message(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        parse_json(content)
    assert MALFORMED_JSON[content] in str(error.value)
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_json(path)


def test_json_that_models_of_the_hub_have_is_read() -> None:
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 2**64
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', infinity=True)["time_step_limit"][1] > 1e308
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json(b"[" * 100 + b"]" * 100)


class _Numbers(Strict):
    count: int = 1
    factors: dict[str, float] = Field(default_factory=dict)
    name: str = ""
    switch: bool | int = False


def test_a_flag_is_no_number() -> None:
    for data in ({"count": True}, {"name": False}):
        with pytest.raises(ConfigError, match="not a flag"):
            parse(_Numbers, data, "file")
    assert parse(_Numbers, {"switch": True}, "file").switch is True


def test_a_message_lists_a_part_of_many_problems() -> None:
    with pytest.raises(ConfigError) as error:
        parse(_Numbers, {"factors": {f"f{i}": "x" for i in range(100)}}, "file")
    assert len(str(error.value).splitlines()) == 22
    assert "100 problems" in str(error.value)
    assert "and 80 more" in str(error.value)
