"""Layer paths: genome <-> recipe, bounds, parents, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evomerge.config import load_space, parse_space
from evomerge.errors import ConfigError
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.search.baselines import parents
from evomerge.search.spaces.layer_path import LayerPathSpace, LayerPathSpec, Step, depth

MODULES = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
EXTRA = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def names(layers: int, modules: tuple[str, ...] = MODULES) -> list[str]:
    return [f"model.layers.{i}.{module}" for i in range(layers) for module in modules] + list(EXTRA)


def template(*sources: str) -> Recipe:
    models = {name: name for name in ("base", *sources)}
    return Recipe(models=models, base="base", groups=(TensorGroup(method="linear", sources=sources),), seed=7)


def space(layers: int = 6, sources: tuple[str, ...] = ("a", "b"), **changes: Any) -> LayerPathSpace:
    spec = LayerPathSpec.model_validate({"kind": "layer_path", "name": "p", "about": "-"} | changes)
    tensors = {name: names(layers) for name in ("base", *sources)}
    return LayerPathSpace(spec, template=template(*sources), sources=sources, tensors=tensors)


SCALE = {"low": 0.5, "high": 2.0}
SPACES = {
    "plain": space(),
    "scaled": space(scale=SCALE),
    "one source": space(sources=("a",), reach=2),
    "with the base": space(base=True, reach=3, longest=2.0),
    "in place": space(reach=0, shortest=1.0, longest=1.0),
    "shorter": space(reach=2, shortest=0.3, longest=0.8),
    "blocks": space(layers=7, block=3, shortest=0.5, longest=2.0, scale=SCALE),
    "three": space(layers=3, sources=("a", "b", "c"), longest=1.7, scale={"low": 1, "high": 1.5}),
}
every = pytest.mark.parametrize("name", SPACES)


@st.composite
def genomes(draw: st.DrawFn) -> tuple[LayerPathSpace, np.ndarray]:
    chosen = SPACES[draw(st.sampled_from(sorted(SPACES)))]
    u = draw(hnp.arrays(np.float64, chosen.dimension, elements=st.floats(0, 1)))
    return chosen, u


@given(genomes())
def test_encode_gives_the_canonical_genome(case: tuple[LayerPathSpace, np.ndarray]) -> None:
    chosen, u = case
    recipe = chosen.decode(u)
    canonical = chosen.encode(recipe)
    assert canonical is not None
    assert chosen.decode(canonical) == recipe
    assert np.array_equal(chosen.encode(chosen.decode(canonical)), canonical)  # type: ignore[arg-type]
    for coordinate, value in zip(chosen.coordinates, canonical, strict=True):
        if coordinate.levels is not None and value != 0.5:
            assert value == coordinate.middle(coordinate.level(value))


@given(genomes())
def test_all_points_of_a_bin_mean_the_same(case: tuple[LayerPathSpace, np.ndarray]) -> None:
    chosen, u = case
    middles = [
        c.middle(c.level(float(value))) if c.levels is not None else value
        for c, value in zip(chosen.coordinates, u, strict=True)
    ]
    assert chosen.decode(np.array(middles)).hash == chosen.decode(u).hash


@given(genomes())
def test_a_path_keeps_its_bounds(case: tuple[LayerPathSpace, np.ndarray]) -> None:
    chosen, u = case
    recipe, spec = chosen.decode(u), chosen.spec
    assert recipe.stacked
    assert recipe.num_layers is not None
    if spec.block == 1:
        assert spec.shortest <= depth(recipe, chosen.num_layers) <= spec.longest
    taken = [layer for group in recipe.groups if not group.match for layer in group.layers or ()]
    assert taken == list(range(recipe.num_layers))
    for group in recipe.groups:
        assert all(0 <= layer + group.shifts[0] < chosen.num_layers for layer in group.layers or ())
        if group.match:
            assert spec.scale is not None
            assert spec.scale.low <= group.per_source("scale")[0] <= spec.scale.high


@every
def test_every_parent_is_a_genome(name: str) -> None:
    chosen = SPACES[name]
    for parent in parents(template(*chosen.sources), chosen.models):
        genome = chosen.encode(parent.recipe)
        if parent.name not in chosen.models or name == "shorter":
            assert genome is None
            continue
        assert genome is not None
        recipe = chosen.decode(genome)
        assert recipe.num_layers == chosen.num_layers
        assert {group.sources for group in recipe.groups} == {(parent.name,)}
        assert not any(group.shift or group.match for group in recipe.groups)


def test_a_path_is_written_as_runs_of_layers() -> None:
    steps = [Step(model="a", block=0), Step(model="a", block=1, attn=0.5), Step(model="b", block=1)]
    recipe = SPACES["scaled"].recipe([*steps, Step(model="b", block=2), Step(model="b", block=2)], "b")
    shown = [(g.sources[0], g.layers, g.match, g.shift, g.per_source("scale")[0]) for g in recipe.groups]
    assert shown == [
        ("a", (0,), (), (), 1.0),
        ("a", (1,), ("o_proj",), (), 0.5),
        ("a", (1,), (), (), 1.0),
        ("b", (2, 3), (), (-1,), 1.0),
        ("b", (4,), (), (-2,), 1.0),
        ("b", OUTSIDE, (), (), 1.0),
    ]
    assert (recipe.num_layers, recipe.seed, recipe.base) == (5, 7, "base")
    genome = SPACES["scaled"].encode(recipe)
    assert genome is not None
    assert SPACES["scaled"].decode(genome) == recipe


def stacked(*groups: tuple[str, tuple[int, ...] | None, dict[str, Any]], layers: int | None = 6) -> Recipe:
    made = tuple(
        TensorGroup(sources=(name,), layers=at, **({"method": "passthrough"} | more))
        for name, at, more in groups
    )
    kept = template("a", "b", "c")
    return Recipe(models=kept.models, base="base", groups=made, num_layers=layers)


@pytest.mark.parametrize(
    "recipe",
    [
        template("a", "b"),
        stacked(("c", None, {})),
        stacked(("base", None, {})),
        stacked(("a", None, {}), layers=3),
        stacked(("a", (0, 1, 2, 3, 4), {}), ("a", (5,), {"shift": (-5,)}), ("a", OUTSIDE, {})),
        stacked(("a", None, {"parameters": {"scale": 0.9}})),
        stacked(("a", None, {"match": ("up_proj",), "parameters": {"scale": 0.9}}), ("a", None, {})),
        stacked(("a", None, {"match": ("mlp",)}), ("b", None, {})),
        stacked(("a", None, {"match": ("lm_head",)}), ("b", None, {})),
        stacked(("a", None, {"match": ("o_proj.bias",), "parameters": {"scale": 0.9}}), ("a", None, {})),
        stacked(("a", None, {"match": ("o_proj",), "parameters": {"scale": 2.5}}), ("a", None, {})),
        stacked(("a", (0, 1, 2), {}), ("a", OUTSIDE, {})),
        stacked(("a", None, {"shift": (1,)})),
        stacked(("a", None, {"method": "linear", "parameters": {"weight": 0.5, "normalize": False}})),
    ],
    ids=str,
)
def test_what_is_no_path_of_the_space_has_no_genome(recipe: Recipe) -> None:
    assert SPACES["scaled"].encode(recipe) is None


def test_fewer_genes_where_there_is_nothing_to_choose() -> None:
    assert SPACES["in place"].dimension == 6 * 2 + 1
    assert space(sources=("a",), reach=0, longest=1.0).dimension == 6
    assert SPACES["plain"].dimension == 7 * 3 + 1
    assert SPACES["scaled"].dimension == 7 * 5 + 1
    assert len(SPACES["scaled"].labels) == SPACES["scaled"].dimension
    assert SPACES["plain"].describe() == "p: 22 genes, paths of 5 to 7 layers through 2 models of 6"


def test_genomes_are_checked() -> None:
    for wrong in (np.zeros(3), np.full(22, 1.5), np.full(22, np.nan)):
        with pytest.raises(ValueError, match=r"shape \(22,\) and values in \[0, 1\]"):
            SPACES["plain"].decode(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reach": -1}, "reach: Input should be greater than or equal to 0"),
        ({"block": 0}, "block: Input should be greater"),
        ({"shortest": 2.0}, "shortest is above longest, got 2 and 1.25"),
        ({"scale": {"low": 1.2, "high": 2}}, "scale: a scale's range needs low <= 1 <= high, got 1.2 to 2"),
        ({"scale": {"low": 1, "high": 1}}, "a scale's range needs"),
        ({"slots": 3}, "unknown key 'slots'"),
        ({"kind": "layer_paths"}, "unknown kind 'layer_paths'\n  do: did you mean 'layer_path'"),
    ],
)
def test_mistakes_in_a_preset_are_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_space({"kind": "layer_path", "name": "p", "about": "-"} | changes, "file")
    assert message in str(caught.value)


def test_models_that_do_not_fit_are_one_message() -> None:
    spec = LayerPathSpec.model_validate({"kind": "layer_path", "name": "p", "about": "-", "scale": SCALE})

    def build(spec: LayerPathSpec, **tensors: list[str]) -> None:
        LayerPathSpace(
            spec, template=template(*tensors), sources=tuple(tensors), tensors=tensors | {"base": names(6)}
        )

    with pytest.raises(ConfigError, match="b has another number of layers than the base"):
        build(spec, a=names(6), b=names(4))
    with pytest.raises(ConfigError, match="layer 0 of a has no mlp"):
        build(spec, a=names(6, MODULES[:-1]))
    with pytest.raises(ConfigError, match="a norm behind it"):
        build(spec, a=names(6, (*MODULES, "post_feedforward_layernorm.weight")))
    with pytest.raises(ConfigError, match="no number of blocks lies between"):
        build(spec.model_copy(update={"shortest": 1.1, "longest": 1.12}), a=names(6))


@pytest.mark.parametrize("preset", ["layer_path", "hybrid_path"])
@pytest.mark.parametrize("layers", [2, 4, 32])
def test_presets_fit_models_of_any_depth_and_start_from_a_parent(preset: str, layers: int) -> None:
    spec = load_space(preset)
    assert isinstance(spec, LayerPathSpec)
    tensors = {name: names(layers) for name in ("base", "a", "b")}
    chosen = LayerPathSpace(spec, template=template("a", "b"), sources=("a", "b"), tensors=tensors)
    for parent in parents(template("a", "b"), ("a", "b"))[1:]:
        assert chosen.encode(parent.recipe) is not None


def test_hand_made_stacks_put_one_model_under_another_best_pairs_first() -> None:
    chosen = space(layers=8, sources=("a", "b", "c"))
    found = chosen.stacks(("c", "a", "b"), most=100)
    assert len(found) == len({recipe.hash for _, recipe in found}) == 6 * 3
    assert found[0][0] == "c up to layer 3, then a"
    expected = [Step(model="c" if block < 4 else "a", block=block) for block in range(8)]
    assert found[0][1] == chosen.recipe(expected, "a")
    assert [name for name, _ in found[:4]] == [
        "c up to layer 3, then a",
        "c up to layer 5, then a",
        "c up to layer 1, then a",
        "a up to layer 3, then c",
    ]
    assert [recipe.hash for _, recipe in found[:5]] == [r.hash for _, r in chosen.stacks(("c", "a", "b"), 5)]
    assert all(chosen.encode(recipe) is not None for _, recipe in found)


def test_stacks_that_are_no_paths_of_the_space_are_left_out() -> None:
    assert space(longest=0.9, shortest=0.5).stacks(("a", "b"), most=10) == []
    assert space(sources=("a",)).stacks(("a",), most=10) == []
    assert len(space(layers=7, block=3).stacks(("a", "b"), most=10)) == 2 * 2  # three blocks have two cuts
