"""Malformed YAML is one message with its line, in every kind of file that users write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.evaluation.suite import Suite
from evomerge.merging import mergekit
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.schema import load_yaml, parse_yaml

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
