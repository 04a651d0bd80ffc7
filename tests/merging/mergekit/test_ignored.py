"""Keys that mergekit ignores are accepted with a note; what is misspelt stays an error."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.merging.mergekit import reader
from evomerge.merging.mergekit.ignored import UNWEIGHTED
from evomerge.merging.recipe import Recipe

TWO = [{"model": "m/a"}, {"model": "m/b"}]


def noted(data: dict[str, Any]) -> tuple[Recipe, list[str]]:
    notes: list[str] = []
    return reader.from_data({"dtype": "float32"} | data, say=notes.append), notes


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("arcee_fusion", "normalize", True),
        ("model_stock", "normalize", True),
        ("nuslerp", "normalize", False),
        ("multislerp", "normalize", False),
        ("slerp", "weight", 0.5),
        ("linear", "density", [0.1, 0.9]),
        ("task_arithmetic", "rescale", True),
        ("passthrough", "t", [{"filter": "mlp", "value": 1}, {"value": 0}]),
        ("ties", "epsilon", 0.1),
        ("karcher", "weight", 1),
        ("ram", "weight", 0.3),
        ("ramplus_tl", "weight", 0.3),
        ("ramplus_tl", "lambda", 2.0),
    ],
)
def test_parameters_of_other_methods_are_noted_once(method: str, name: str, value: Any) -> None:
    models = TWO[:1] if method in ("arcee_fusion", "slerp", "passthrough") else TWO
    listed = [{**model, "parameters": {name: value}} for model in models]
    plain = {"merge_method": method, "models": models}
    plain |= {"base_model": "m/base"} if method not in ("linear", "passthrough", "karcher") else {}
    recipe, notes = noted(plain | {"models": listed, "parameters": {name: value}})
    assert recipe == noted(plain)[0]
    owner = f"mergekit's {method}" if method in UNWEIGHTED else method  # ours has weights
    assert notes == [f"{owner} has no parameter {name}, so it has no effect, as in mergekit"]


def test_parameters_of_the_merge_below_a_model_are_noted() -> None:
    plain = {"merge_method": "ties", "base_model": "m/base", "models": TWO}
    models = [{**model, "parameters": {"lambda": 0.3, "normalize": False}} for model in TWO]
    recipe, notes = noted(plain | {"models": models})
    assert recipe == noted(plain)[0]
    assert [note.partition(" ")[0] for note in notes] == ["lambda", "normalize"]


@pytest.mark.parametrize("key", ["name", "normalize", "int8_mask", "layer_range", "weight"])
def test_keys_in_the_wrong_place_are_noted(key: str) -> None:
    plain = {"merge_method": "linear", "models": TWO}
    entry = [{**model, key: 1} for model in TWO]
    recipe, notes = noted(plain | {"models": entry, key: "x"})
    assert recipe == noted(plain)[0]
    assert len(notes) == (1 if key == "name" else 2)
    assert all(f"`{key}` has no effect" in note for note in notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"normalise": True}},
        {"parameters": {"densty": 0.5}},
        {"parameters": {"unheard_of": 0.5}},
        {"nme": "x"},
        {"models": [{"model": "m/a", "wieght": 1}]},
        {"models": [{"model": "m/a", "parameters": {"wieght": 1}}]},
    ],
)
def test_what_is_misspelt_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key|has no parameter"):
        noted({"merge_method": "ties", "base_model": "m/base", "models": TWO} | changes)
