"""mergekit's slices: which layers they take, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.merging import mergekit
from evomerge.merging.modules import layer_of, shifted
from evomerge.merging.recipe import Recipe
from tests.merging.mergekit.test_mergekit import TENSORS, read


def slices(*parts: Any, method: str = "linear", **changes: Any) -> str:
    """Return a file with one slice per part: lists of (model, first, end) or mappings."""
    written = []
    for part in parts:
        entries = part if isinstance(part, list) else part["sources"]
        sources = [{"model": f"m/{m}", "layer_range": [first, end]} for m, first, end in entries]
        written.append({**(part if isinstance(part, dict) else {}), "sources": sources})
    return yaml.safe_dump({"merge_method": method, "dtype": "float32", "slices": written} | changes)


def layers_of(recipe: Recipe, module: str = "mlp.up_proj.weight") -> list[list[str]]:
    """Return for each layer of the result what one of its tensors is made of, base first."""
    made = []
    for layer in range(recipe.num_layers or 4):
        name = f"model.layers.{layer}.{module}"
        group = recipe.group_for(name)
        base = recipe.base_of(group)
        reads = [(base, shifted(name, group.base_shift))] if base else []
        made.append([f"{source} {layer_of(tensor)}" for source, tensor in (*reads, *group.reads(name))])
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (slices([("a", 0, 2)], [("a", 1, 4)]), [["a 0"], ["a 1"], ["a 1"], ["a 2"], ["a 3"]]),  # repeated
        (slices([("a", 0, 1)], [("b", 3, 4)]), [["a 0"], ["b 3"]]),  # skipped
        (slices([("a", 2, 4)], [("b", 0, 2)]), [["a 2"], ["a 3"], ["b 0"], ["b 1"]]),  # swapped
        (slices([("a", 0, 2), ("b", 2, 4)]), [["a 0", "b 2"], ["a 1", "b 3"]]),  # shifted
        (slices([("a", 0, 2), ("a", 2, 4)]), [["a 0", "a 2"], ["a 1", "a 3"]]),  # the same model twice
        (slices([("a", 0, 4)], [("b", 0, 1)]), [*([f"a {i}"] for i in range(4)), ["b 0"]]),
        (
            slices([("a", 0, 1)], [("a", 1, 3), ("b", 0, 2)], method="slerp", base_model="m/b"),
            [["a 0"], ["b 0", "a 1"], ["b 1", "a 2"]],
        ),
        (
            slices([("base", 2, 4)], [("a", 1, 2)], method="ties", base_model="m/base"),
            [["base 2"], ["base 3"], ["base 1", "a 1"]],
        ),
    ],
)
def test_slices_say_which_layers(text: str, expected: list[list[str]]) -> None:
    assert layers_of(read(text, tensors=TENSORS)) == expected


def test_a_slice_has_its_own_base() -> None:
    part = {"base_model": "m/b", "sources": [("a", 2, 4), ("b", 0, 2)]}
    text = slices([("base", 0, 2), ("a", 0, 2)], part, method="ties", base_model="m/base")
    recipe = read(text, tensors=TENSORS)
    assert layers_of(recipe) == [["base 0", "a 0"], ["base 1", "a 1"], ["b 0", "a 2"], ["b 1", "a 3"]]
    assert (recipe.base, recipe.num_layers, recipe.tokenizer) == ("base", None, "base")
    outside = [recipe.base_of(recipe.group_for(n)) for n in ("model.embed_tokens.weight", "lm_head.weight")]
    assert outside == ["base", "b"]
    assert layers_of(read(mergekit.write(recipe, TENSORS), tensors=TENSORS)) == layers_of(recipe)


def test_filters_with_layer_numbers_mean_the_source_for_its_own_parameters_else_the_result() -> None:
    text = """
merge_method: ties
base_model: m/base
dtype: float32
slices:
- sources:
  - {model: m/base, layer_range: [0, 3]}
  - model: m/a
    layer_range: [1, 4]
    parameters: {weight: [{filter: layers.2.mlp, value: 0.1}, {value: 1}]}
parameters: {lambda: [{filter: layers.2., value: 0.3}, {value: 1}]}
"""
    recipe = read(text, tensors=TENSORS)
    found = {}
    for layer in range(3):
        for module in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
            values = recipe.group_for(f"model.layers.{layer}.{module}").parameters
            found[layer, module[:3]] = values["weight"], values["lambda"]
    assert {key: value for key, value in found.items() if value != ((1.0,), 1.0)} == {
        (1, "mlp"): ((0.1,), 1.0),
        (2, "mlp"): ((1.0,), 0.3),
        (2, "sel"): ((1.0,), 0.3),
    }


@pytest.mark.parametrize(
    ("embeddings", "norm", "head"),
    [
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight"),
        ("transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"),
    ],
)
def test_embeddings_are_the_first_slices_norm_and_head_the_last_ones(
    embeddings: str, norm: str, head: str
) -> None:
    tensors = [embeddings, "x.layers.0.mlp.weight", "x.layers.1.mlp.weight", norm, head]
    recipe = read(slices([("a", 0, 1)], [("b", 0, 1)]), tensors=tensors)
    assert [recipe.group_for(name).sources for name in tensors] == [("a",), ("a",), ("b",), ("b",), ("b",)]
    again = read(mergekit.write(recipe, tensors), tensors=tensors)
    assert again.groups == recipe.groups


def test_a_slice_without_layers_still_gives_embeddings_or_head() -> None:
    text = slices([("a", 0, 0)], [("b", 0, 2)], [("c", 1, 1)], [("b", 2, 4)], [("a", 4, 4)])
    recipe = read(text, tensors=TENSORS)
    assert recipe.num_layers is None
    made = {name: recipe.group_for(name).sources for name in TENSORS}
    outside = {name for name in TENSORS if layer_of(name) is None}
    assert {made[name] for name in outside} == {("a",)}
    assert {made[name] for name in set(TENSORS) - outside} == {("b",)}


def test_the_number_of_layers_is_said_only_where_it_is_another() -> None:
    plain = slices([("a", 0, 2)], [("a", 2, 4)])
    assert read(plain, tensors=TENSORS).num_layers is None
    assert read(plain).num_layers == 4  # the models are not at hand
    assert read(slices([("a", 0, 2)]), tensors=TENSORS).num_layers == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            slices([("a", 0, 4), ("b", 0, 3)]),
            "slices[0].sources: the sources of a slice have different numbers of layers\n"
            "  expected: layer_ranges of the same length\n  got: m/a [0, 4], m/b [0, 3]",
        ),
        (slices([("a", 0, 2)], [("a", 3, 5)]), "slices[1]: m/a has fewer layers than its layer_range needs"),
        (slices([("a", 2, 1)]), "layer_range\n  expected: [first, end] with 0 <= first <= end"),
        (slices([("a", 2, 2)]), "no layers in any slice"),
        (slices([("a", -1, 2)]), "layer_range\n  expected"),
        (slices([("a", 0, True)]), "layer_range\n  expected"),
        (
            slices([("base", 0, 2), ("base", 2, 4), ("a", 0, 2)], method="ties", base_model="m/base"),
            "the layers at which the base m/base is read are not clear",
        ),
        (
            slices([("b", 2, 4), ("a", 0, 2)], method="ties", base_model="m/base"),
            "the layers at which the base m/base is read are not clear",
        ),
        (slices([("a", 0, 4)], models=[{"model": "m/a"}]), "exactly one of models, slices, modules"),
        ("{", "not valid YAML"),
    ],
)
def test_slices_that_say_nothing_sound_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text, tensors=TENSORS)
    assert message in str(caught.value)


def test_a_base_models_do_not_list_is_averaged_too_as_in_mergekit() -> None:
    plain = {
        "merge_method": "linear",
        "dtype": "float32",
        "base_model": "m/base",
        "models": [{"model": "m/a"}],
    }
    assert read(yaml.safe_dump(plain | {"parameters": {"weight": 1}})).groups[0].sources == ("a", "base")
    with pytest.raises(ConfigError, match="linear averages base_model with the models"):
        read(yaml.safe_dump(plain))


def test_numbers_and_flags_may_be_written_as_mergekit_takes_them() -> None:
    text = """
merge_method: linear
dtype: float32
parameters: {normalize: [{filter: mlp, value: 0}, {value: 1.0}]}
models:
  - {model: m/a, parameters: &same {weight: [{filter: norm, value: 1e-3}, {value: 2}]}}
  - {model: m/b, parameters: {<<: *same}}
"""
    groups = read(text, tensors=TENSORS).groups
    found = {(group.parameters["weight"], group.parameters["normalize"]) for group in groups}
    assert found == {((0.001, 0.001), True), ((2.0, 2.0), True), ((2.0, 2.0), False)}
    for value in ("'2'", "2", "no way"):
        with pytest.raises(ConfigError, match="normalize"):
            read(text.replace("value: 0}", f"value: {value}}}"), tensors=TENSORS)


def test_models_may_be_mappings() -> None:
    entry = {"model": {"path": "m/a"}, "lora": {"path": "lora"}}
    data = {"merge_method": "linear", "dtype": "float32", "models": [{"model": entry}]}
    assert list(read(yaml.safe_dump(data)).models.values()) == ["m/a+lora"]
    data["models"] = [{"model": {"path": "m/a", "revision": "x"}}]
    assert dict(read(yaml.safe_dump(data)).models) == {"a": "m/a@x"}
    data["models"] = [{"model": {"path": "m/a", "revison": "x"}}]
    with pytest.raises(ConfigError, match="unknown key 'revison'"):
        read(yaml.safe_dump(data))
