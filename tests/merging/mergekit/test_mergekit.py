"""mergekit's YAML: reference merges, its grammar, and what it can't say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging import mergekit, methods
from evomerge.merging.mergekit.ignored import UNWEIGHTED
from evomerge.merging.mergekit.reader import OURS
from evomerge.merging.modules import shifted
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.recipe_data import TokenRow
from evomerge.merging.sources.opening import open_used
from evomerge.merging.sources.source import Source
from evomerge.merging.stacking import output_headers, output_names
from evomerge.merging.tensors.inputs import FileInputs
from evomerge.merging.tensors.merge_tensor import merge_tensor
from tests.examples import examples

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.yml"))
MODULES = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
TENSORS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{module}" for layer in range(4) for module in MODULES),
    "model.norm.weight",
    "lm_head.weight",
)
MODELS = {"base": "m/base", "a": "m/a", "b": "m/b+lora"}


def read(text: str, **options: Any) -> Recipe:
    return mergekit.read(text, **options)


def made_of(recipe: Recipe) -> list[tuple[Any, ...]]:
    """What each tensor is made of, names of models aside."""
    made = []
    names = output_names(recipe, dict.fromkeys(recipe.models, TENSORS), recipe.num_layers or 4)
    for name in names:
        group = recipe.group_for(name)
        base = recipe.base_of(group)
        below = (recipe.models[base], shifted(name, group.base_shift)) if base else None
        reads = [(recipe.models[source], tensor) for source, tensor in group.reads(name)]
        made.append((name, group.method, below, reads, dict(group.parameters)))
    return made


@pytest.mark.parametrize("case", CASES)
def test_merges_equal_mergekits(case: str) -> None:
    recipe = read((GOLDEN / "cases" / f"{case}.yml").read_text(), root=GOLDEN)
    sources = open_used(recipe)
    inputs = FileInputs(sources)
    expected = load_file(GOLDEN / "expected" / f"{case}.safetensors")
    assert set(output_headers(recipe, open_used(recipe))) == set(expected)
    at_threshold = 0
    for name, tensor in expected.items():
        away = (merge_tensor(recipe, name, inputs).float() - tensor.float()).abs() > 1e-6
        if case == "arcee_fusion" and away.any():
            at_threshold += assert_at_threshold(recipe, name, sources, away)
        else:
            assert not away.any(), name
    assert at_threshold <= 4


def assert_at_threshold(recipe: Recipe, name: str, sources: Mapping[str, Source], away: Tensor) -> int:
    """mergekit's importances are float32: a few elements next to the threshold fall on its other side."""
    base, model = sources["base"].tensor(name), sources["m1"].tensor(name)
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (model, base))
    importance = (model - base).abs() * (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (high - low)
    assert ((importance[away] / threshold - 1).abs() < 1e-3).all(), name
    return int(away.sum())


@pytest.mark.parametrize("case", CASES)
def test_reference_cases_survive_the_round_trip(case: str) -> None:
    recipe = read((GOLDEN / "cases" / f"{case}.yml").read_text(), root=GOLDEN)
    again = read(mergekit.write(recipe))
    assert (again.dtype, again.num_layers) == (recipe.dtype, recipe.num_layers)
    for name in load_file(GOLDEN / "expected" / f"{case}.safetensors"):
        ours, theirs = recipe.group_for(name), again.group_for(name)
        assert theirs.parameters == ours.parameters
        assert again.models[theirs.sources[0]] == recipe.models[ours.sources[0]]
        assert [tensor for _, tensor in theirs.reads(name)] == [tensor for _, tensor in ours.reads(name)]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe of one method with the same sources everywhere."""
    method = methods.get(draw(st.sampled_from([name for name in methods.names() if name not in OURS])))
    sources = ("a", "b")[: method.max_sources]
    base = draw(st.sampled_from(["base", None])) if not method.needs_base else "base"
    number = st.integers(0, 4).map(lambda n: n / 4)
    num_layers = draw(st.sampled_from([None, None, 2, 3]))
    shift = tuple(draw(st.integers(0, 4 - (num_layers or 4))) for _ in sources)
    base_shift = draw(st.integers(0, 4 - (num_layers or 4))) if method.uses_base(base) else 0

    def group(layers: tuple[int, ...] | None, match: tuple[str, ...]) -> TensorGroup:
        parameters: dict[str, Any] = {}
        for p in method.parameters.values():
            one: st.SearchStrategy[Any] = st.booleans() if p.kind == "flag" else number
            if p.kind == "integer":
                one = st.integers(int(p.low), 9)
            if method.name in UNWEIGHTED and p.name in ("weight", "lambda"):
                one = st.just(1.0)
            parameters[p.name] = tuple(draw(one) for _ in sources) if p.per_source else draw(one)
        return TensorGroup(
            method=method.name,
            sources=sources,
            parameters=parameters,
            layers=layers,
            match=match,
            shift=shift,
            base_shift=base_shift,
        )

    places = st.one_of(
        st.none(),
        st.just(OUTSIDE),
        st.sets(st.integers(0, (num_layers or 4) - 1), min_size=1).map(sorted).map(tuple),
    )
    names = st.lists(st.sampled_from(["mlp", "q_proj", "norm", "embed"]), max_size=2, unique=True).map(tuple)
    groups = [group(draw(places), draw(names)) for _ in range(draw(st.integers(0, 4)))]
    return Recipe(
        models=MODELS,
        base=base,
        groups=(*groups, group(None, ())),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        tokenizer=draw(st.sampled_from(list(MODELS))),
        num_layers=num_layers,
    )


def test_methods_mergekit_does_not_have_are_refused_both_ways() -> None:
    for method in OURS:
        group = TensorGroup(method=method, sources=("a", "b"))
        files = {"a": "a.st", "b": "b.st"}
        recipe = Recipe(models=MODELS, base="base", groups=(group,), fisher=files, gram=files)
        with pytest.raises(
            ConfigError, match=f"can't be written as mergekit YAML[^$]*{method}[^$]*recipe.yaml"
        ):
            mergekit.write(recipe, TENSORS)
        with pytest.raises(ConfigError, match=f"mergekit has no method {method}"):
            read(f"merge_method: {method}\nmodels: [{{model: a}}, {{model: b}}]\ndtype: float32")


@pytest.mark.parametrize("changed", [{"weight": (1.0, 0.5)}, {"lambda": 2.0}])
def test_weights_that_mergekit_would_not_read_are_refused(changed: dict[str, Any]) -> None:
    group = TensorGroup(method="ram", sources=("a", "b"), parameters=changed)
    with pytest.raises(ConfigError, match="weights and lambda of 1"):
        mergekit.write(Recipe(models=MODELS, base="base", groups=(group,)), TENSORS)


@settings(max_examples=examples(150), deadline=None)
@given(recipes())
def test_what_we_write_we_read_back_exactly(recipe: Recipe) -> None:
    again = read(mergekit.write(recipe, TENSORS), tensors=TENSORS)
    assert made_of(again) == made_of(recipe)
    assert again.dtype == recipe.dtype
    assert again.models[again.tokenizer] == recipe.models[recipe.tokenizer]


def test_a_global_recipe_takes_the_plain_form() -> None:
    group = TensorGroup(method="ties", sources=("a", "b"), parameters={"weight": (0.1, 0.3), "density": 0.5})
    text = mergekit.write(Recipe(models=MODELS, base="base", groups=(group,), dtype="float16"))
    assert yaml.safe_load(text) == {
        "merge_method": "ties",
        "base_model": "m/base",
        "dtype": "float32",
        "out_dtype": "float16",
        "models": [
            {"model": "m/a", "parameters": {"weight": 0.1, "density": 0.5}},
            {"model": "m/b+lora", "parameters": {"weight": 0.3, "density": 0.5}},
        ],
        "parameters": {"normalize": True, "lambda": 1.0},
    }
    again = read(text)
    assert again.groups == (TensorGroup(method="ties", sources=("a", "lora"), parameters=group.parameters),)
    assert again.base == "base"


def test_layers_become_slices_and_names_become_filters() -> None:
    groups = (
        TensorGroup(method="linear", sources=("a", "b"), layers=(0, 1), parameters={"weight": (0.0, 1.0)}),
        TensorGroup(method="linear", sources=("a", "b"), match=("mlp",), parameters={"weight": (0.5, 1.0)}),
        TensorGroup(method="linear", sources=("a", "b")),
    )
    data = yaml.safe_load(mergekit.write(Recipe(models=MODELS, groups=groups), TENSORS))
    ranges = [[source["layer_range"] for source in part["sources"]] for part in data["slices"]]
    assert ranges == [[[0, 2]] * 2, [[2, 4]] * 2]
    assert data["slices"][1]["sources"][0]["parameters"]["weight"] == [
        {"filter": "mlp", "value": 0.5},
        {"value": 1.0},
    ]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            (
                TensorGroup(method="ties", sources=("a",), layers=(0,)),
                TensorGroup(method="linear", sources=("a", "b")),
            ),
            "one merge method per file\n  got: methods linear, ties",
        ),
        (
            (
                TensorGroup(method="linear", sources=("a",), match=("mlp",)),
                TensorGroup(method="linear", sources=("b",)),
            ),
            "the same sources for all tensors of a slice",
        ),
        ((TensorGroup(method="linear", sources=("a", "a")),), "each source once"),
        (
            (
                TensorGroup(method="slerp", sources=("a", "b"), layers=(0,)),
                TensorGroup(method="slerp", sources=("b", "a")),
            ),
            "the same sources for all tensors of a slice",
        ),
        ((TensorGroup(method="task_arithmetic", sources=("a", "base")),), "all tensors made by"),
        (
            (
                TensorGroup(method="linear", sources=("a",), layers=(0, 1)),
                TensorGroup(method="linear", sources=("a",), match=("embed",)),
                TensorGroup(method="linear", sources=("a", "b")),
            ),
            "no more sources in the last slice than in the first\n  got: 2 after 1",
        ),
        (
            (
                TensorGroup(method="linear", sources=("a", "b"), match=("mlp",), shift=(0, 1), layers=(0,)),
                TensorGroup(method="linear", sources=("a", "b")),
            ),
            "one shift for all tensors of a layer",
        ),
    ],
)
def test_what_one_file_can_not_say_is_refused(groups: tuple[TensorGroup, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mergekit.write(Recipe(models=MODELS, base="base", groups=groups), TENSORS)
    assert "this recipe can't be written as mergekit YAML" in str(caught.value)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize("parameters", [{}, {"weight": 2.0}, {"weight": 1.0, "normalize": False}])
def test_a_copy_of_the_base_fits_into_a_file_of_another_method(parameters: dict[str, Any]) -> None:
    """`linear` of one source is a copy as `passthrough` is, and both are written alike."""
    ties = TensorGroup(method="ties", sources=("a", "b"), parameters={"density": 0.5})
    copies = [
        TensorGroup(method="linear", sources=("base",), parameters=parameters, layers=(1, 2)),
        TensorGroup(method="passthrough", sources=("base",), layers=(1, 2)),
    ]
    written = [
        mergekit.write(Recipe(models=MODELS, base="base", groups=(copy, ties)), TENSORS) for copy in copies
    ]
    assert written[0] == written[1]
    again = read(written[0], tensors=TENSORS).group_for("model.layers.2.mlp.up_proj.weight")
    assert (again.method, again.copied_source) == ("passthrough", "base")


# Reading -------------------------------------------------------------------------------------------

LOOKUP = """
merge_method: ties
base_model: m/base
dtype: bfloat16
out_dtype: float16
tokenizer_source: m/a
parameters: {density: 0.9, lambda: [{filter: mlp, value: 0.5}, {value: 0.7}]}
modules:
  default:
    parameters: {weight: 0.8}
    slices:
      - sources:
          - {model: m/base, layer_range: [0, 2]}
          - {model: m/a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: [0.2, 0.4]}]}}
          - {model: m/b+lora, layer_range: [0, 2], parameters: {density: 0.1}}
        parameters: {density: 0.3}
      - sources:
          - {model: m/a, layer_range: [2, 4]}
          - {model: m/b+lora, layer_range: [2, 4]}
"""


def test_parameters_are_looked_up_from_the_inside_out() -> None:
    recipe = read(LOOKUP, seed=11, tensors=TENSORS)
    assert (recipe.dtype, recipe.tokenizer, recipe.base, recipe.seed) == ("float16", "a", "base", 11)
    assert recipe.models == {"base": "m/base", "a": "m/a", "lora": "m/b+lora"}

    def parameters(layer: int, module: str) -> dict[str, Any]:
        return dict(recipe.group_for(f"model.layers.{layer}.{module}").parameters)

    ends = {"density": (0.3, 0.1), "normalize": True}
    assert parameters(0, "mlp.up") == {"weight": (0.2, 0.8), "lambda": 0.5} | ends
    assert parameters(1, "mlp.up") == {"weight": (0.4, 0.8), "lambda": 0.5} | ends
    assert parameters(1, "self_attn.q") == {"weight": (0.8, 0.8), "lambda": 0.7} | ends
    assert parameters(3, "mlp.up")["density"] == (0.9, 0.9)


def test_tensors_outside_take_the_ends_of_the_stack_at_t_0(models: dict[str, str]) -> None:
    text = f"""
merge_method: linear
dtype: float32
slices:
  - sources:
      - {{model: {models["a"]}, layer_range: [0, 2], parameters: {{weight: [0.1, 0.2]}}}}
  - sources:
      - {{model: {models["a"]}, layer_range: [2, 3], parameters: {{weight: [0.3, 0.4]}}}}
"""
    recipe = read(text)
    weights = {
        name: recipe.group_for(name).parameters["weight"] for name in (*TENSORS[:1], "model.norm.weight")
    }
    assert weights == {"model.embed_tokens.weight": (0.1,), "model.norm.weight": (0.3,)}


def test_overlapping_filters_of_several_parameters_ask_the_tensors(models: dict[str, str]) -> None:
    text = f"""
merge_method: ties
base_model: {models["base"]}
models:
  - model: {models["a"]}
    parameters:
      weight: [{{filter: self_attn, value: 0.1}}, {{value: 0.2}}]
      density: [{{filter: q_proj, value: 0.3}}, {{value: 0.4}}]
"""
    recipe = read(text)
    assert recipe.dtype == "bfloat16"  # as stored

    def pair(name: str) -> tuple[Any, Any]:
        parameters = recipe.group_for(name).parameters
        return parameters["weight"], parameters["density"]

    assert pair("model.layers.1.self_attn.q_proj.weight") == ((0.1,), (0.3,))
    assert pair("model.layers.1.self_attn.k_proj.weight") == ((0.1,), (0.4,))
    assert pair("model.layers.1.mlp.up_proj.weight") == ((0.2,), (0.4,))
    assert pair("model.norm.weight") == ((0.2,), (0.4,))


def test_gradients_run_over_the_layers(models: dict[str, str]) -> None:
    text = f"""
merge_method: slerp
base_model: {models["b"]}
models: [{{model: {models["a"]}}}, {{model: {models["b"]}}}]
parameters: {{t: [0.0, 0.5, 0.6, 1.0]}}
dtype: float16
"""
    recipe = read(text)
    found = [recipe.group_for(f"model.layers.{layer}.x").parameters["t"] for layer in range(3)]
    assert found == pytest.approx([0.0, 0.55, 1.0])
    assert recipe.group_for("model.norm.weight").parameters["t"] == 0.0
    assert recipe.models[recipe.groups[0].sources[0]] == models["b"]


def test_short_names_are_kept_apart() -> None:
    entries = "[{model: x/m}, {model: y/m}, {model: org/other}]"
    assert dict(read(f"{{merge_method: linear, dtype: float32, models: {entries}}}").models) == {
        "m": "x/m",
        "m-2": "y/m",
        "other": "org/other",
    }


def test_one_model_twice_stays_two_sources() -> None:
    entries = "[{model: m/a, parameters: {weight: 1}}, {model: m/a, parameters: {weight: 2}}]"
    group = read(f"{{merge_method: linear, dtype: float32, models: {entries}}}").groups[0]
    assert group.sources == ("a", "a")
    assert group.parameters["weight"] == (1.0, 2.0)


PLAIN = {"merge_method": "ties", "base_model": "m/base", "dtype": "float32", "models": [{"model": "m/a"}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_methd": "x"}, "unknown key 'merge_methd'\n  do: did you mean 'merge_method'"),
        ({"merge_method": "tie"}, "unknown merge method 'tie'"),
        ({"merge_method": None}, "unknown merge method"),
        ({"slices": [{}]}, "expected: exactly one of models, slices, modules"),
        ({"models": []}, "expected: exactly one of models, slices, modules"),
        ({"models": {"model": "m/a"}}, "models\n  expected: a list"),
        ({"models": [{"modl": "m/a"}]}, "models[0]: unknown key 'modl'\n  do: did you mean 'model'"),
        ({"models": [{"model": 3}]}, "models[0]: model\n  expected: a path"),
        ({"models": [{"model": "m/base"}]}, "no sources"),
        ({"parameters": {"densty": 0.5}}, "has no parameter 'densty'\n  do: did you mean 'density'"),
        ({"parameters": {"rescale": True}}, "has no parameter 'rescale'"),
        ({"parameters": {"density": 2}}, "density is out of range"),
        ({"parameters": {"density": "half"}}, "density\n  expected: a number, a list of numbers, or filters"),
        ({"parameters": {"density": [{"filtr": "x", "value": 1}]}}, "unknown key 'filtr'"),
        ({"parameters": {"density": [{"filter": "x"}]}}, "a filter without value"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
        ({"chat_template": 7}, "mergekit file: chat_template\n  expected: base, a model"),
        ({"chat_template": "chatlm"}, "chat_template: 'chatlm' is no model"),
        ({"tokenizer_source": 3}, "tokenizer_source\n  expected: base, union, or a model"),
        ({"tokenizer": {"source": "base", "tokns": {}}}, "tokenizer: unknown key 'tokns'"),
        ({"tokenizer": {"tokens": {"a": {}}}}, "tokenizer.tokens['a']: no source"),
        ({"tokenizer": {"tokens": {"a": {"source": "m/a", "forc": True}}}}, "unknown key 'forc'"),
        ({"tokenizer": {"tokens": {"a": {"source": 3}}}}, "tokens['a']: model\n  expected: the name"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}}, "kind\n  expected: zero or model"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token"}}}}}, "one of token and token_id"),
        ({"tokenizer": {"tokens": ["a"]}}, "tokenizer.tokens\n  expected: a mapping"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of\n  expected: a whole"),
        ({"tokenizer": {"pad_to_multiple_of": "8"}}, "tokenizer.pad_to_multiple_of\n  expected: a whole"),
        ({"base_model": None}, "ties works on task vectors and needs a base model"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(yaml.safe_dump(PLAIN | changes))
    assert message in str(caught.value)


# The methods' own parameters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("breadcrumbs", {"gamma": 0.05, "rescale": False, "int8_mask": True}, {"gamma": (0.05,)}),
        ("della", {"epsilon": [0.1], "int8_mask": False}, {"epsilon": (0.1,)}),
        ("sce", {"select_topk": 0.3, "int8_mask": True}, {"select_topk": 0.3}),
        ("nearswap", {"t": 0.02}, {"t": 0.02}),
        ("karcher", {"max_iter": 7, "tol": 1e-6}, {"max_iter": 7, "tol": 1e-6}),
        ("multislerp", {"weight": 2, "normalize_weights": True}, {"weight": (2.0,)}),
        ("passthrough", {"scale": 0.5}, {"scale": (0.5,)}),
        ("multislerp", {"eps": 1e-8}, {"weight": (1.0,)}),
    ],
)
def test_parameters_of_every_method_are_read(
    method: str, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    (group,) = read(yaml.safe_dump(PLAIN | {"merge_method": method, "parameters": parameters})).groups
    assert {name: group.parameters[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("multislerp", "normalize_weights", False),
        ("multislerp", "eps", 1e-3),
        ("breadcrumbs", "rescale", True),
    ],
)
def test_parameters_we_do_not_know_are_refused_by_name(method: str, name: str, value: Any) -> None:
    models = [{"model": "m/a"}, {"model": "m/b"}]
    text = yaml.safe_dump(PLAIN | {"merge_method": method, "models": models, "parameters": {name: value}})
    with pytest.raises(ConfigError, match=f"method {method} has no parameter '{name}'"):
        read(text)


def test_a_base_model_makes_nuslerp_work_on_task_vectors() -> None:
    models = [{"model": "m/a"}, {"model": "m/b"}, {"model": "m/base"}]
    data = PLAIN | {"merge_method": "nuslerp", "models": models}
    recipe = read(yaml.safe_dump(data))
    assert recipe.groups[0].sources == ("a", "b")
    assert recipe.used_models() == ("base", "a", "b")
    assert yaml.safe_load(mergekit.write(recipe))["base_model"] == "m/base"
    alone = read(yaml.safe_dump(data | {"base_model": None, "models": models[:2]}))
    assert alone.used_models() == ("a", "b")
    assert "base_model" not in yaml.safe_load(mergekit.write(alone))


def test_passthrough_takes_each_layer_from_one_model() -> None:
    scale = [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    parts = [
        {"sources": [{"model": "m/a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "m/b", "layer_range": [2, 4], "parameters": {"scale": scale}}]},
    ]
    data = {"merge_method": "passthrough", "dtype": "float32", "slices": parts}
    recipe = read(yaml.safe_dump(data), tensors=TENSORS)
    made = {n: (g.sources, g.parameters["scale"]) for n in TENSORS for g in [recipe.group_for(n)]}
    assert made["model.layers.1.mlp.down_proj.weight"] == (("a",), (1.0,))
    assert made["model.layers.2.mlp.down_proj.weight"] == (("b",), (0.5,))
    assert made["model.layers.3.mlp.up_proj.weight"] == (("b",), (1.0,))
    assert made["model.embed_tokens.weight"][0] == ("a",)
    assert made["model.norm.weight"][0] == ("b",)


def test_arcs_of_vectors_and_negative_weights_are_read_and_written() -> None:
    models = [{"model": "m/a", "parameters": {"weight": -0.5}}, {"model": "m/b"}]
    plain = {"merge_method": "nuslerp", "dtype": "float32", "models": models}
    recipe = read(yaml.safe_dump(plain))
    by_row = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    changed = read(yaml.safe_dump(plain | {"parameters": by_row}))
    assert changed.groups[0].parameters == {"weight": (-0.5, 1.0), **by_row}
    assert changed.hash != recipe.hash
    assert Recipe.from_yaml(changed.to_yaml()) == changed
    assert read(mergekit.write(changed)).groups == changed.groups
    written = recipe.to_yaml() + mergekit.write(recipe)
    assert "nuslerp_" not in written  # recipes written before these parameters keep their hashes


def test_rows_of_single_tokens_are_read_and_written() -> None:
    tokens = {
        "x": {"source": "m/extra"},
        "y": {"source": {"kind": "zero"}, "force": True},
        "z": {"source": {"kind": "model_token", "model": "m/a", "token": "x"}},
        "w": {"source": {"kind": "model_token", "model": "m/a", "token_id": 7}, "force": True},
    }
    recipe = read(yaml.safe_dump(PLAIN | {"tokenizer": {"source": "union", "tokens": tokens}}))
    assert "extra" in recipe.models
    assert recipe.tokens == {
        "x": TokenRow(model="extra"),
        "y": TokenRow(force=True),
        "z": TokenRow(model="a", token="x"),
        "w": TokenRow(model="a", row=7, force=True),
    }
    written = yaml.safe_load(mergekit.write(recipe, tensors=["model.norm.weight"]))["tokenizer"]["tokens"]
    assert [written[token].get("force", False) for token in tokens] == [False, True, False, True]
    assert read(mergekit.write(recipe, tensors=["model.norm.weight"])).tokens == recipe.tokens
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    plain = dataclasses.replace(recipe, tokens={})
    assert "tokens" not in plain.to_data()
    assert plain.hash != recipe.hash
