"""Recipes as data: validation, identity, YAML."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.merging import mergekit, methods
from evomerge.merging.methods.selection import boundary
from evomerge.merging.modules import layer_of
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import DTYPES, OUTSIDE, Recipe, TensorGroup
from evomerge.merging.tensors.kernels import Operand
from evomerge.merging.tensors.merge_tensor import merge_array
from evomerge.search.spaces.layer_path import LayerPathSpace, LayerPathSpec
from evomerge.search.spaces.merge_space import SearchSpace, SpaceSpec

MODELS = {"base": "m/base", "a": "m/a", "b": "m/b+lora"}


def recipe(method: str = "ties", *, models: dict[str, str] = MODELS, **changes: Any) -> Recipe:
    parameters = changes.pop("parameters", {})
    group = TensorGroup(method=method, sources=("a", "b"), parameters=parameters)
    return Recipe(models=models, base="base", groups=changes.pop("groups", (group,)), **changes)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        method = methods.get(draw(st.sampled_from(methods.names())))
        count = method.max_sources or draw(st.integers(method.min_sources, 3))
        sources = draw(st.lists(st.sampled_from(list(MODELS)), min_size=count, max_size=count))
        parameters: dict[str, Any] = {}
        for p in method.parameters.values():
            one: st.SearchStrategy[Any] = st.floats(max(p.low, -9), min(p.high, 9))
            if p.kind != "real":
                one = st.booleans() if p.kind == "flag" else st.integers(int(p.low), 9)
            parameters[p.name] = tuple(draw(one) for _ in sources) if p.per_source else draw(one)
        layers = draw(st.none() | st.lists(st.integers(0, 40), unique=True).map(sorted).map(tuple))
        match = tuple(draw(st.lists(st.sampled_from(["mlp", "self_attn", "norm"]), unique=True)))
        shift = draw(st.just(()) | st.tuples(*[st.integers(-9, 9)] * count))
        groups.append(
            TensorGroup(
                method=method.name,
                sources=tuple(sources),
                parameters=parameters,
                layers=layers,
                match=match,
                shift=shift,
                base=draw(st.sampled_from([None, *MODELS])),
                base_shift=draw(st.integers(-2, 2)),
            )
        )
    return recipe(
        groups=tuple(groups),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**40)),
        fisher={name: f"m/{name}.safetensors" for name in MODELS},
        gram={name: f"m/{name}.gram.safetensors" for name in MODELS},
        num_layers=draw(st.none() | st.integers(1, 9)),
    )


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_yaml_and_pickle_are_exact(original: Recipe) -> None:
    for again in (Recipe.from_yaml(original.to_yaml()), pickle.loads(pickle.dumps(original))):
        assert again == original
        assert again.hash == original.hash


def test_the_hash_is_what_changes_the_bits() -> None:
    plain = recipe()
    assert len(plain.hash) == 64
    assert plain.hash == recipe(parameters={"weight": 1.0, "density": (1.0, 1.0)}).hash  # defaults count
    assert plain.hash == recipe(models=MODELS | {"a": "elsewhere/a"}).hash  # places do not
    assert plain.hash == recipe(seed=4).hash  # ties draws nothing
    assert recipe("dare_ties").hash != recipe("dare_ties", seed=4).hash
    different = [plain, recipe(dtype="float16"), recipe(parameters={"density": 0.5}), recipe("dare_ties")]
    assert len({each.hash for each in different}) == 4
    (group,) = plain.groups
    stacks = [{"shift": (0, 1)}, {"base": "a"}, {"base_shift": 1}]
    moved = [recipe(groups=(dataclasses.replace(group, **changes),)) for changes in stacks]
    assert len({each.hash for each in (plain, recipe(num_layers=3), *moved)}) == 5


def test_hashes_of_recipes_that_stack_nothing_stay_what_they_were() -> None:
    assert recipe().hash == "6f9b82f31ae5f6bf9373bbc21c4ff77a2db46492caa9a44ff0ed12649dccab5c"
    same = dataclasses.replace(recipe().groups[0], shift=(0, 0), base=None, base_shift=0)
    assert recipe(groups=(same,)).hash == recipe().hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype: null", "unknown dtype None"),
        ("tokenizer: 5", "expected: the name of a model"),
        ("models: {base: null, a: m/a, b: m/b}", "models: 'base'"),
        ("fisher: {a: null}", "fisher: 'a'"),
        ("seed: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_odd_values_are_refused(change: str, message: str) -> None:
    data = recipe().to_data()
    data.pop(change.partition(": ")[0], None)
    with pytest.raises(ConfigError, match=message):
        Recipe.from_yaml(f"{yaml.safe_dump(data)}{change}\n")


def test_numbers_in_short_scientific_form_are_numbers() -> None:
    text = recipe().to_yaml().replace("lambda: 1.0", "lambda: 1e-1")
    assert Recipe.from_yaml(text).groups[0].parameters["lambda"] == 0.1


def test_a_fisher_file_is_part_of_the_hash_where_it_is_read() -> None:
    files = {"a": "a.fisher", "b": "b.fisher"}
    assert recipe(fisher=files).hash == recipe().hash  # ties reads none
    assert recipe("fisher", fisher=files).hash != recipe("fisher", fisher=files | {"b": "c.fisher"}).hash


def test_a_fisher_method_needs_a_file_for_every_source() -> None:
    with pytest.raises(
        ConfigError, match=r"Fisher information of its sources\n.*\n  got: none for b\n  do: evomerge fisher"
    ):
        recipe("fisher", fisher={"a": "a.fisher"})
    with pytest.raises(ConfigError, match="fisher names an unknown model 'c'"):
        recipe(fisher={"c": "c.fisher"})


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("tie", {}, "unknown merge method 'tie'\n  do: did you mean 'ties'"),
        ("ties", {"densty": 0.5}, "has no parameter 'densty'\n  do: did you mean 'density'"),
        ("ties", {"density": 1.5}, "density is out of range\n  expected: 0 <= density <= 1\n  got: 1.5"),
        ("ties", {"density": (0.5,)}, "density needs one value per source\n  expected: 2 (a, b)\n  got: 1"),
        ("ties", {"weight": float("nan")}, "weight is not a number"),
        ("ties", {"normalize": 1}, "normalize is a flag"),
        ("slerp", {"t": -0.1}, "t is out of range"),
    ],
)
def test_bad_groups_are_refused(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(method, parameters=parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "bse"}, "base names an unknown model 'bse'\n  do: did you mean 'base'"),
        ({"base": None}, "ties works on task vectors and needs a base model"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"tokenizer": "c"}, "tokenizer names an unknown model 'c'"),
        ({"groups": ()}, "no groups"),
        ({"models": {}}, "no models"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    group = TensorGroup(method="ties", sources=("a", "b"))
    settings: dict[str, Any] = {"models": MODELS, "base": "base", "groups": (group,)} | changes
    with pytest.raises(ConfigError) as caught:
        Recipe(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: x}\ngroops: []", "unknown key 'groops'\n  do: did you mean 'groups'"),
        ("models: {a: x}", "missing key 'groups'"),
        ("models: {a: x}\ngroups: [{method: linear}]", "groups[0]: missing key 'sources'"),
        ("models: {a: x}\nseed: -1\ngroups: []", "seed\n  expected: a whole number >= 0"),
        ("models: {a: x}\nformat: 9\ngroups: []", "format\n  expected: 1\n  got: 9"),
        ("{", "not valid YAML"),
        ("- 1", "recipe\n  expected: a mapping"),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_yaml(text)
    assert message in str(caught.value)


def test_the_first_matching_group_makes_a_tensor() -> None:
    groups = (
        TensorGroup(method="linear", sources=("a",), layers=OUTSIDE),
        TensorGroup(method="linear", sources=("b",), layers=(1,), match=("mlp", "norm")),
        TensorGroup(method="linear", sources=("a", "b")),
    )
    made = recipe(groups=groups)
    names = (
        "model.norm.weight",
        "model.layers.1.mlp.up.weight",
        "model.layers.1.attn.q",
        "model.layers.0.mlp.w",
    )
    assert [groups.index(made.group_for(name)) for name in names] == [0, 1, 2, 2]
    assert [group.label() for group in groups] == ["outside", "layer 1 mlp|norm", "all"]
    assert made.used_models() == ("a", "b")
    assert recipe().used_models() == ("base", "a", "b")
    with pytest.raises(ConfigError, match="no group matches tensor 'x'"):
        recipe(groups=groups[1:2]).group_for("x")
    assert layer_of("transformer.h.3.mlp.experts.7.w") == 3


def test_a_recipe_file_may_be_in_either_format(tmp_path: Path) -> None:
    for name in MODELS.values():
        (tmp_path / name.partition("+")[0]).mkdir(parents=True, exist_ok=True)
    original = recipe(dtype="float32")
    (tmp_path / "recipe.yaml").write_text(original.to_yaml())
    (tmp_path / "mergekit.yaml").write_text(mergekit.write(original))
    ours, theirs = (read_recipe(tmp_path / name) for name in ("recipe.yaml", "mergekit.yaml"))
    assert ours.hash == original.hash
    assert ours.models == {
        "base": f"{tmp_path}/m/base",
        "a": f"{tmp_path}/m/a",
        "b": f"{tmp_path}/m/b+lora",
    }
    assert list(theirs.models.values()) == list(ours.models.values())
    (tmp_path / "bad.yaml").write_text("models: {a: x}")
    with pytest.raises(ConfigError, match=r"bad.yaml: recipe: missing key 'groups'"):
        read_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("module", ["evomerge.merging.recipe", "evomerge.merging.methods", "evomerge.search"])
def test_plain_data_needs_no_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_other_groups_keep_the_rest_of_a_recipe() -> None:
    files = {"a": "a.fisher", "b": "b.fisher"}
    original = recipe(fisher=files, dtype="float16", tokenizer="union", seed=3, num_layers=4)
    ties, average = original.groups, [TensorGroup(method="fisher", sources=("a", "b"))]
    again = original.with_groups(average, num_layers=4)
    assert dataclasses.replace(again, groups=ties) == original
    assert original.with_groups(ties) == dataclasses.replace(original, num_layers=None, fisher={})
    with pytest.raises(ConfigError, match="unknown model 'c'"):
        original.with_groups([TensorGroup(method="linear", sources=("c",))])


# Copies --------------------------------------------------------------------------------------------


def group(method: str, *sources: str, **changes: Any) -> TensorGroup:
    placed = {name: changes.pop(name) for name in ("shift", "base", "layers") if name in changes}
    return TensorGroup(method=method, sources=sources, parameters=changes, **placed)


COPIES = [
    group("passthrough", "a"),
    group("passthrough", "a", shift=(2,)),
    group("passthrough", "a", base="b"),
    group("passthrough", "base"),
    group("linear", "a"),
    group("linear", "a", weight=2.0),
    group("linear", "a", weight=-1e-4),
    group("linear", "a", weight=1.0, normalize=False),
    group("linear", "a", shift=(1,)),
    group("linear", "base"),
]
NO_COPIES = [
    group("passthrough", "a", scale=0.5),
    group("passthrough", "a", scale=-1.0),
    group("linear", "a", weight=2.0, normalize=False),
    group("linear", "a", weight=0.0, normalize=False),
    group("linear", "a", "b", weight=(1.0, 0.0)),  # -0.0 + 0.0 is 0.0
    group("linear", "a", "b"),
    group("slerp", "a", "b", t=0.0),
    group("task_arithmetic", "a"),  # base + (a - base) is rounded twice
    group("task_arithmetic", "a", weight=0.0),
    group("task_arithmetic", "base"),
    group("ties", "a"),
    group("dare_ties", "a"),
    group("sce", "a"),
    group("nearswap", "a", t=1e4),
    group("arcee_fusion", "a"),
]


class Arrays:
    """Inputs of a merge from arrays by model, the same for every tensor."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def operand(self, source: str, tensor: str, base: object) -> Operand:
        return Operand(self.arrays[source], base is not None)

    def copied(self, recipe: Recipe, tensor: str) -> None:
        return None

    def gram(self, places: object, compute: Any) -> Any:
        return compute()

    def boundary(self, place: object, rank: int, magnitudes: Any) -> Any:
        return boundary(magnitudes(), rank)

    def measured(self, kind: str, file: str, tensor: str) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module")
def weights() -> Arrays:
    """Weights of all sizes, with zeros of both signs at other places in every model."""
    rng = np.random.default_rng(0)
    arrays = {}
    for shift, name in enumerate(MODELS):
        values = rng.standard_normal(2048) * 10.0 ** rng.integers(-6, 6, 2048)
        values[shift::7], values[shift + 3 :: 7] = -0.0, 0.0
        arrays[name] = values.astype(np.float32)
    return Arrays(arrays)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("made", [*COPIES, *NO_COPIES], ids=repr)
def test_a_copy_has_its_sources_exact_bits(made: TensorGroup, dtype: str, weights: Arrays) -> None:
    bits = {
        name: merge_array(recipe(groups=(group("passthrough", name),), dtype=dtype), "w", weights).tobytes()
        for name in MODELS
    }
    merged = merge_array(recipe(groups=(made,), dtype=dtype), "w", weights).tobytes()
    if made in COPIES:
        assert made.copied_source == made.sources[0]
        assert merged == bits[made.sources[0]]
    else:
        assert made.copied_source is None
        assert merged not in bits.values()


def test_weights_that_cancel_make_no_copy() -> None:
    assert group("linear", "a", weight=0.0).copied_source is None  # merging it is refused


@pytest.mark.parametrize("made", [*COPIES, *NO_COPIES], ids=repr)
def test_spaces_and_mergekit_mean_the_same_copies(made: TensorGroup) -> None:
    """A layer path takes copies, a switched-off cell is a copy of the base, a file of ties holds copies."""
    copied = made.copied_source
    tensors = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))]
    whole = recipe(groups=(dataclasses.replace(made, shift=()),))

    path = LayerPathSpec.model_validate({"kind": "layer_path", "name": "p", "about": "-", "base": True})
    paths = LayerPathSpace(path, template=whole, sources=("a", "b"), tensors=dict.fromkeys(MODELS, tensors))
    assert (paths.encode(whole) is not None) == (copied is not None)

    subset = {"name": "s", "about": "-", "method": "ties", "subset": {"per": []}}
    switched = SearchSpace(
        SpaceSpec.model_validate(subset), template=whole, sources=("a", "b"), tensors=tensors
    )
    off = switched.encode(whole)
    assert (off is not None and bool((off < 0.5).all())) == (copied == "base")

    if copied == "base":
        ties = group("ties", "a", "b", layers=(0,))
        rest = group("ties", "a", "b", layers=OUTSIDE)
        text = mergekit.write(recipe(groups=(ties, rest, *whole.groups)), tensors)
        again = mergekit.read(text, tensors=tensors).group_for(tensors[-1])
        assert again.copied_source == "base"


def test_groups_are_found_by_layer_in_order() -> None:
    groups = [
        TensorGroup(method="linear", sources=("a",), layers=(0, 2), match=("mlp",)),
        TensorGroup(method="linear", sources=("a",), match=("attn",)),
        TensorGroup(method="linear", sources=("b",), layers=()),
        TensorGroup(method="linear", sources=("b",), layers=(2,)),
        TensorGroup(method="linear", sources=("a", "b")),
    ]
    recipe = Recipe(models={"a": "a", "b": "b"}, groups=tuple(groups))
    names = [f"h.{layer}.{part}.w" for layer in range(4) for part in ("mlp", "attn", "norm")] + [
        "attn",
        "head",
    ]
    for name in names:
        assert recipe.group_for(name) is next(group for group in groups if group.matches(name))


def test_gram_files_are_treated_as_fisher_files_are() -> None:
    files = {"a": "a.gram", "b": "b.gram"}
    assert recipe(gram=files).hash == recipe().hash
    assert recipe("regmean", gram=files).hash != recipe("regmean", gram=files | {"b": "c.gram"}).hash
    assert recipe("regmean", gram=files).with_groups([group("ties", "a", "b")]).gram == {}
    with pytest.raises(ConfigError, match=r"Gram matrices of its sources\n.*\n.*none for b\n.*evomerge gram"):
        recipe("regmean", gram={"a": "a.gram"})
    with pytest.raises(ConfigError, match="gram names an unknown model 'c'"):
        recipe(gram={"c": "c.gram"})
