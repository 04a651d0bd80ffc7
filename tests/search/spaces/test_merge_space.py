"""Search spaces: presets fit, genome and recipe are inverse, mistakes are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.config import load_space
from evomerge.errors import ConfigError
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.schema import parse, preset_folder
from evomerge.search.spaces.merge_space import SearchSpace, SpaceSpec

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
TENSORS = tuple(
    ["model.embed_tokens.weight", "model.norm.weight"]
    + [f"model.layers.{i}.{part}.weight" for i in range(4) for part in PARTS]
)
NAMES = sorted(path.stem for path in preset_folder("search_spaces").glob("*.yaml"))
PRESETS = [name for name in NAMES if isinstance(load_space(name), SpaceSpec)]
"""Of the ordinary kind; layer paths have tests of their own."""


def make(spec: SpaceSpec | str, sources: tuple[str, ...] = ("a", "b")) -> SearchSpace:
    spec = load_space(spec)
    template = Recipe(
        models={name: name for name in ("base", *sources)},
        groups=(TensorGroup(method="linear", sources=sources),),
        base="base",
        gram={name: f"{name}.gram" for name in sources},
    )
    return SearchSpace(spec, template=template, sources=sources, tensors=TENSORS)


def inline(**changes: Any) -> SpaceSpec:
    data = {"name": "s", "about": "", "method": "ties", "genes": {"weight": {"low": 0, "high": 1}}, **changes}
    return parse(SpaceSpec, data, "space.yaml")


def test_the_presets_of_the_contract_are_there() -> None:
    assert {
        "global_weights",
        "task_arithmetic_layers",
        "ties_layers",
        "dare_ties_layers",
        "slerp_layers",
        "breadcrumbs_layers",
        "della_layers",
        "method_global",
        "smooth_layers",
        "subset_soup",
    } <= set(PRESETS)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("global_weights", 2),
        ("task_arithmetic_layers", 2 * (4 * 2 + 2)),
        ("ties_layers", 2 * (4 * 2 + 2) + 2),
        ("dare_ties_layers", 2 * (4 * 2 + 2) + 2),
        ("slerp_layers", 4 * 2 + 2),
        ("breadcrumbs_layers", 2 * (4 * 2 + 2) + 4),
        ("della_layers", 2 * (4 * 2 + 2) + 4),
        ("method_global", 1 + 2 + 2 + 1 + 1),
        ("smooth_layers", 2 * (4 * 2 + 2)),
        ("subset_soup", 2 + 2),
    ],
)
def test_dimension(name: str, dimension: int) -> None:
    assert make(name).dimension == dimension


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("global_weights", "1be8f6dab2154aca"),
        ("task_arithmetic_layers", "91971c296cb1882a"),
        ("ties_layers", "4ebca86829c6bf90"),
        ("dare_ties_layers", "c0fa62f53dd78423"),
        ("slerp_layers", "ded49b958877cf60"),
    ],
)
def test_a_stored_genome_means_the_same_recipe_for_ever(name: str, start: str) -> None:
    space = make(name)
    assert space.decode(np.linspace(0.03, 0.97, space.dimension)).hash.startswith(start)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_encode_is_the_inverse_of_decode(name: str, data: st.DataObject) -> None:
    space = make(name)
    u = data.draw(arrays(np.float64, space.dimension, elements=st.floats(0, 1)))
    recipe = space.decode(u)
    back = space.encode(recipe)
    assert back is not None
    for x, gene, given_ in zip(back, space.genes, u, strict=True):
        if not space.condition(gene) and gene.domain.coordinate.levels is None:
            assert x == pytest.approx(given_, abs=1e-5)
    assert space.decode(back) == recipe
    assert space.decode(back).hash == recipe.hash


@pytest.mark.parametrize("name", PRESETS)
def test_every_gene_changes_the_recipe(name: str) -> None:
    """From a canonical genome in which every gene has an effect, if there is one."""
    space = make(name)
    middle = np.full(space.dimension, 0.45)
    for position, gene in enumerate(space.genes):
        if gene.parameter == "method":
            middle[position] = 0.99
        if gene.domain.kind == "flag":
            middle[position] = 0.75
    canonical = space.encode(space.decode(middle))
    assert canonical is not None
    hashes = {space.decode(canonical).hash}
    for position in range(space.dimension):
        u = canonical.copy()
        u[position] = 0.1
        hashes.add(space.decode(u).hash)
    assert len(hashes) == space.dimension + 1
    assert len({gene.name for gene in space.genes}) == space.dimension


def test_a_global_recipe_is_expressed_in_a_space_of_layers() -> None:
    space = make("task_arithmetic_layers")
    recipe = Recipe(
        models={"base": "base", "a": "a", "b": "b"},
        base="base",
        groups=(
            TensorGroup(method="task_arithmetic", sources=("b", "a"), parameters={"weight": (0.25, 0.75)}),
        ),
    )
    u = space.encode(recipe)
    assert u is not None
    assert space.decode(u).group_for(TENSORS[3]).per_source("weight") == (0.75, 0.25)


@pytest.mark.parametrize(
    ("method", "parameters", "sources"),
    [
        ("linear", {}, ("a", "b")),
        ("task_arithmetic", {"weight": 7.0}, ("a", "b")),
        ("ties", {"weight": 0.5}, ("a", "b")),
    ],
)
def test_what_a_space_cannot_express(method: str, parameters: Any, sources: tuple[str, ...]) -> None:
    group = TensorGroup(method=method, sources=sources, parameters=parameters)
    recipe = Recipe(models={"base": "base", "a": "a", "b": "b"}, base="base", groups=(group,))
    assert make("task_arithmetic_layers").encode(recipe) is None


@pytest.mark.parametrize("changes", [{"shift": (0, 1)}, {"base_shift": 1}, {"base": "a"}, {"num_layers": 3}])
def test_a_space_of_plain_recipes_cannot_express_stacks_and_other_bases(changes: dict[str, Any]) -> None:
    of_recipe = {key: value for key, value in changes.items() if key == "num_layers"}
    of_group = {key: value for key, value in changes.items() if key not in of_recipe}
    group = TensorGroup(method="task_arithmetic", sources=("a", "b"), parameters={"weight": 0.5}, **of_group)
    models = {"base": "base", "a": "a", "b": "b"}
    recipe = Recipe(models=models, base="base", groups=(group,), **of_recipe)
    assert make("task_arithmetic_layers").encode(recipe) is None


def test_a_source_left_out_counts_as_weight_zero() -> None:
    space = make("global_weights")
    group = TensorGroup(method="task_arithmetic", sources=("b",), parameters={"weight": 0.5})
    u = space.encode(Recipe(models={"base": "base", "b": "b"}, base="base", groups=(group,)))
    assert u is not None
    assert space.decode(u).groups[0].per_source("weight") == (0.0, 0.5)


def test_per_shares_genes_between_groups() -> None:
    genes = {
        "weight": {"low": 0, "high": 1, "per": ["layers"]},
        "density": {"low": 0.1, "high": 1, "scale": "log", "per": []},
    }
    space = make(inline(layers=2, genes=genes))
    assert [gene.name for gene in space.genes] == [
        "weight layers 0-1",
        "density",
        "weight layers 2-3",
        "weight outside",
    ]
    recipe = space.decode(np.array([0.0, 0.5, 1.0, 0.5]))
    assert recipe.group_for(TENSORS[2]).per_source("weight") == (0.0, 0.0)
    assert recipe.group_for(TENSORS[2]).per_source("density") == pytest.approx((0.316228,) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "tie"}, "unknown merge method 'tie'"),
        ({"genes": {"wieght": {"low": 0, "high": 1}}}, "no parameter 'wieght'"),
        ({"genes": {"density": {"low": 0, "high": 1.5}}}, "density is out of range"),
        ({"genes": {"weight": {"low": 1, "high": 1}}}, "low must be below high"),
        ({"genes": {"weight": {"low": 0, "high": 1, "scale": "log"}}}, "needs low > 0"),
        ({"genes": {"normalize": {"low": 0, "high": 1}}}, "is a flag, not a real number"),
        ({"genes": {"lambda": {"low": 0, "high": 1, "per": ["source"]}}}, "one value for all sources"),
        ({"fixed": {"weight": 1}}, "both a gene and fixed"),
        ({"genes": {}}, "nothing to search"),
        ({"modules": {"rest": [], "mlp": ["mlp"]}}, "only the last filter may be empty"),
        ({"modules": {"mlp": ["mlp"]}}, "no group holds"),
        ({"layers": 0}, "at least 1"),
        ({"mehtod": "ties"}, "unknown key 'mehtod' (did you mean 'method'?"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(inline(**changes))
    assert message in str(error.value)


def test_slerp_wants_two_sources() -> None:
    with pytest.raises(ConfigError, match="wrong number of sources"):
        make("slerp_layers", ("a", "b", "c"))


def test_a_genome_outside_the_cube_is_refused() -> None:
    with pytest.raises(ValueError, match="values in"):
        make("global_weights").decode(np.array([0.5, 1.5]))
