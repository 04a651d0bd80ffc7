"""Mixed spaces: genomes and recipes are inverse whatever is written; what exists follows from the methods."""

from __future__ import annotations

import doctest
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.schema import parse, parse_yaml
from evomerge.search.spaces import curve, domain
from evomerge.search.spaces import space as space_module
from evomerge.search.spaces.merge_space import SearchSpace, SpaceSpec

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
LAYERS = 6
TENSORS = tuple(
    ["model.embed_tokens.weight", "model.norm.weight"]
    + [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in PARTS]
)
MODULES = {"attn": ["attn"], "mlp": []}
RANGE = {"low": 0.0, "high": 1.0}


def space(
    sources: tuple[str, ...] = ("a", "b"),
    *,
    fisher: tuple[str, ...] = (),
    base: str | None = "base",
    **spec: Any,
) -> SearchSpace:
    """Build a space over six layers; `spec` is as in YAML."""
    template = Recipe(
        models={name: name for name in ("base", *sources)},
        groups=(TensorGroup(method="linear", sources=sources),),
        base=base,
        fisher={name: f"{name}.fisher" for name in fisher},
        gram={name: f"{name}.gram" for name in fisher},
    )
    data: dict[str, Any] = {"name": "s", "about": "", **spec}
    return SearchSpace(parse(SpaceSpec, data, "s.yaml"), template=template, sources=sources, tensors=TENSORS)


def recipe(*groups: TensorGroup, sources: tuple[str, ...] = ("a", "b")) -> Recipe:
    return Recipe(models={n: n for n in ("base", *sources)}, base="base", groups=groups)


def at(s: SearchSpace, **values: Any) -> Any:
    """Return the genome with the given values by gene name (`_` for a space), the middle elsewhere."""
    u = np.full(s.dimension, 0.5)
    names = [gene.name for gene in s.genes]
    for name, value in values.items():
        position = names.index(name.replace("_", " "))
        unit = s.genes[position].domain.unit(value)
        assert unit is not None
        u[position] = unit
    return u


@st.composite
def specs(draw: st.DrawFn) -> tuple[SearchSpace, Any]:
    """Draw a space of any methods and genes, and a genome."""
    count = draw(st.integers(1, 3))
    sources = ("a", "b", "c")[:count]
    group_axes = st.sets(st.sampled_from(["layers", "modules"])).map(sorted)
    subset = draw(st.none() | group_axes.map(lambda per: {"per": per}))
    pool = [
        name
        for name in methods.names()
        if (m := methods.get(name)).min_sources <= (count if subset is None else 1)
        and (m.max_sources or count) >= count
    ]
    chosen = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))
    known = {p.name: p for name in chosen for p in methods.get(name).parameters.values()}
    genes: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []:
        parameter = known[name]
        axes = ["layers", "modules"] + ["source"] * parameter.per_source
        gene: dict[str, Any] = {}
        if draw(st.booleans()):
            gene["per"] = sorted(draw(st.sets(st.sampled_from(axes))))
        if parameter.kind == "flag":
            gene["choices"] = [False, True]
        elif parameter.kind == "integer":
            gene |= {"low": 1, "high": draw(st.integers(2, 9))}
        elif draw(st.integers(0, 3)) == 0:
            gene["choices"] = draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=2, unique=True))
        else:
            low, high = draw(st.sampled_from([(0.1, 0.9), (1e-3, 1.0), (1 / 3, 2 / 3), (0.123456789, 0.3)]))
            gene |= {"low": low, "high": high, "scale": draw(st.sampled_from(["linear", "log"]))}
            if "layers" in gene.get("per", ["layers"]) and draw(st.booleans()):
                kind = draw(st.sampled_from(["linear", "smooth"]))
                gene["curve"] = {"points": draw(st.integers(2, 6)), "kind": kind}
        owners = [m for m in chosen if name in methods.get(m).parameters]
        genes[draw(st.sampled_from([name, *(f"{m}.{name}" for m in owners)]))] = gene
    assume(genes or len(chosen) > 1 or subset is not None)
    spec = {
        "method": {"choices": chosen, "per": draw(group_axes)},
        "layers": draw(st.sampled_from([1, 2, 4, "all", [[0, 0], [1, 5]], [[3, 5], [0, 2]]])),
        "modules": draw(st.sampled_from([MODULES, {"all": []}])),
        "genes": genes,
    } | ({} if subset is None else {"subset": subset})
    try:
        built = space(sources, fisher=sources, **spec)
    except ConfigError as error:
        assume("would have gaps" not in str(error) and "is not the same thing" not in str(error))
        raise
    return built, draw(arrays(np.float64, built.dimension, elements=st.floats(0, 1)))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=specs(), data=st.data())
def test_any_space_has_one_canonical_genome_per_recipe(drawn: tuple[SearchSpace, Any], data: Any) -> None:
    s, u = drawn
    found = s.decode(u)
    canonical = s.encode(found)
    assert canonical is not None
    assert s.decode(canonical) == found
    again = s.encode(s.decode(canonical))
    assert again is not None
    assert again.tobytes() == canonical.tobytes()
    for x, coordinate in zip(canonical, s.coordinates, strict=True):
        if coordinate.levels is not None:
            assert x in {0.5, *(coordinate.middle(level) for level in range(coordinate.levels))}
    v = u.copy()
    changed = data.draw(st.integers(0, s.dimension - 1))
    v[changed] = data.draw(st.floats(0, 1))
    other = s.decode(v)
    other_canonical = s.encode(other)
    assert other_canonical is not None
    assert (other.hash == found.hash) == (other_canonical.tobytes() == canonical.tobytes())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=specs())
def test_a_written_recipe_is_found_again(drawn: tuple[SearchSpace, Any]) -> None:
    s, u = drawn
    found = s.decode(u)
    read = s.encode(Recipe.from_yaml(found.to_yaml()))
    assert read is not None
    assert s.decode(read) == found


# Methods.


def test_a_gene_exists_only_where_a_method_has_its_parameter() -> None:
    s = space(
        method={"choices": ["task_arithmetic", "ties"], "per": ["layers"]},
        layers=3,
        genes={"weight": {**RANGE, "per": ["source"]}, "density": {"low": 0.1, "high": 1}},
    )
    assert [g.name for g in s.genes if g.parameter == "method"] == [
        "method layers 0-2",
        "method layers 3-5",
        "method outside",
    ]
    density = next(g for g in s.genes if g.name == "density b layers 3-5")
    assert s.condition(density) == "method is ties"
    assert s.condition(next(g for g in s.genes if g.parameter == "weight")) == ""
    u = np.full(s.dimension, 0.9)
    names = [g.name for g in s.genes]
    u[names.index("method layers 0-2")] = 0.1
    canonical = s.encode(s.decode(u))
    assert canonical is not None
    assert canonical[names.index("density a layers 0-2")] == 0.5
    assert canonical[names.index("density a layers 3-5")] == pytest.approx(0.9, abs=1e-5)
    u[names.index("density a layers 0-2")] = 0.2
    assert s.decode(u).hash == s.decode(canonical).hash
    assert [g.method for g in s.decode(u).groups] == ["task_arithmetic", "ties", "ties"]


def test_one_method_for_the_whole_model() -> None:
    s = space(method={"choices": ["linear", "ties"], "per": []}, layers=1, genes={"weight": RANGE})
    assert [g.name for g in s.genes].count("method") == 1
    for method in ("linear", "ties"):
        assert {g.method for g in s.decode(at(s, method=method)).groups} == {method}
    mixed = (
        TensorGroup(method="linear", sources=("a", "b"), layers=(0,)),
        TensorGroup(method="ties", sources=("a", "b")),
    )
    assert s.encode(recipe(*mixed)) is None


def test_methods_share_a_gene_or_have_their_own() -> None:
    s = space(
        method={"choices": ["ties", "dare_ties", "della"], "per": []},
        genes={"density": {**RANGE, "per": []}, "ties.density": {"low": 0.1, "high": 0.4, "per": []}},
        fixed={"normalize": False, "della.normalize": True},
    )
    assert [(g.name, g.methods) for g in s.genes] == [
        ("method", ()),
        ("density", ("dare_ties", "della")),
        ("ties.density", ("ties",)),
    ]
    for method, density, normalize in (
        ("ties", 0.25, False),
        ("dare_ties", 0.5, False),
        ("della", 0.5, True),
    ):
        group = s.decode(at(s, method=method)).groups[0]
        assert group.per_source("density") == (density, density)
        assert group.parameters["normalize"] is normalize


def test_whole_numbers_flags_and_listed_numbers() -> None:
    s = space(
        method={"choices": ["karcher", "ties"], "per": []},
        genes={
            "max_iter": {"low": 1, "high": 4},
            "normalize": {"choices": [False, True], "per": []},
            "weight": {"choices": [0.5, 1.0, 0.25], "per": []},
            "density": {"choices": [0.1, 0.2, 0.5], "per": []},
        },
    )
    by_name = {
        g.name: (g.domain.kind, c.levels, c.ordered) for g, c in zip(s.genes, s.coordinates, strict=True)
    }
    assert by_name["method"] == ("choice", 2, False)
    assert by_name["max_iter outside"] == ("integer", 4, True)
    assert by_name["normalize"] == ("flag", 2, False)
    assert by_name["weight"] == ("choice", 3, False)
    assert by_name["density"] == ("choice", 3, True)
    u = at(s, method="karcher")
    u[[g.parameter == "max_iter" for g in s.genes]] = 1.0
    assert s.decode(u).groups[0].parameters["max_iter"] == 4
    assert (
        s.encode(recipe(TensorGroup(method="ties", sources=("a", "b"), parameters={"density": 0.3}))) is None
    )


def test_the_fisher_method_is_offered_where_there_are_fisher_files() -> None:
    spec = {"method": {"choices": ["linear", "fisher"], "per": []}, "genes": {"weight": {**RANGE, "per": []}}}
    s = space(fisher=("a", "b"), **spec)
    found = s.decode(at(s, method="fisher"))
    assert found.fisher == {"a": "a.fisher", "b": "b.fisher"}
    assert s.encode(found) is not None
    with pytest.raises(ConfigError, match=r"Fisher information\n.*\n.*none for b\n.*leave fisher out"):
        space(fisher=("a",), **spec)


def test_an_order_that_matters_is_kept() -> None:
    s = space(method="slerp", genes={"t": RANGE})
    for sources, there in ((("a", "b"), True), (("b", "a"), False)):
        group = TensorGroup(method="slerp", sources=sources, parameters={"t": 0.25})
        assert (s.encode(recipe(group)) is not None) == there


# Switches.


def test_a_source_that_is_off_is_left_out_and_all_off_is_the_base() -> None:
    s = space(
        ("a", "b", "c"),
        method={"choices": ["linear", "ties"], "per": []},
        subset={"per": []},
        genes={"weight": {**RANGE, "per": ["source"]}},
    )
    u = at(s, on_a=True, on_b=False, on_c=True, weight_a=0.25, weight_c=0.75, method="ties")
    groups = s.decode(u).groups
    assert {g.sources for g in groups} == {("a", "c")}
    assert groups[0].per_source("weight") == (0.25, 0.75)
    canonical = s.encode(s.decode(u))
    assert canonical is not None
    assert canonical[[g.name for g in s.genes].index("weight b")] == 0.5
    assert s.condition(next(g for g in s.genes if g.name == "weight b")) == "b is on"
    off = at(s, on_a=False, on_b=False, on_c=False)
    assert {(g.method, g.sources) for g in s.decode(off).groups} == {("linear", ("base",))}
    for group in (
        TensorGroup(method="linear", sources=("base",)),
        TensorGroup(method="passthrough", sources=("base",)),
    ):
        found = s.encode(recipe(group, sources=("a", "b", "c")))
        assert found is not None
        on = [x for x, gene in zip(found, s.genes, strict=True) if gene.parameter == "on"]
        assert on == [0.25] * 3
        assert [x for x, gene in zip(found, s.genes, strict=True) if gene.parameter != "on"] == [0.5] * 4


def test_switches_may_differ_between_groups() -> None:
    s = space(method="karcher", layers=3, modules=MODULES, subset={"per": ["layers"]})
    assert [g.name for g in s.genes] == [
        f"on {source} {run}" for run in ("layers 0-2", "layers 3-5", "outside") for source in ("a", "b")
    ]
    u = np.array([0.9, 0.1, 0.1, 0.9, 0.9, 0.9])
    assert [g.sources for g in s.decode(u).groups] == [("a",), ("a",), ("b",), ("b",), ("a", "b")]


def test_the_soups_lie_in_the_soup_space() -> None:
    s = space(("a", "b", "c"), method="linear", subset={"per": []}, genes={"weight": {"low": 0.1, "high": 1}})
    for sources in (("a", "b", "c"), ("a", "c"), ("b",)):
        found = recipe(TensorGroup(method="linear", sources=sources), sources=("a", "b", "c"))
        u = s.encode(found)
        assert u is not None
        assert s.decode(u).groups[0].sources == sources


# Groups and curves.


def test_listed_ranges_of_layers() -> None:
    s = space(
        method="task_arithmetic",
        layers=[[0, 0], [1, 4], [5, 5]],
        genes={"weight": {**RANGE, "per": ["layers"]}},
    )
    assert [g.group for g in s.genes] == ["layer 0", "layers 1-4", "layer 5", "outside"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[0, 2], [2, 5]], "layer 2 is in two ranges"),
        ([[0, 2], [4, 5]], "layer 3 is in no range"),
        ([[0, 6]], "layer 6 is no layer of the model\n  expected: .* layers 0 to 5"),
        ([[3, 1]], r"\[first, last\], both included"),
        ([3], r"\[first, last\], both included"),
        ([], "at least 1, 'all', or a list"),
        ("most", "at least 1, 'all', or a list"),
        (True, "at least 1, 'all', or a list"),
    ],
)
def test_ranges_that_do_not_fit(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        space(method="task_arithmetic", layers=layers, genes={"weight": RANGE})
    assert "problems" not in str(error.value)


def test_a_curve_has_few_points_and_values_between_them() -> None:
    curve = {"points": 3, "kind": "linear"}
    gene = {"low": 0, "high": 1, "per": ["layers"], "curve": curve}
    s = space(method="task_arithmetic", layers=1, genes={"weight": gene})
    assert [g.name for g in s.genes] == [*(f"weight layers point {i}" for i in (1, 2, 3)), "weight outside"]
    found = s.decode(np.array([0.0, 0.5, 1.0, 0.3]))
    values = [group.per_source("weight")[0] for group in found.groups]
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.3])
    straight = tuple(
        TensorGroup(method="task_arithmetic", sources=("a", "b"), layers=(i,), parameters={"weight": 0.2 * i})
        for i in range(LAYERS)
    )
    assert s.encode(found) is not None
    bent = recipe(
        *straight[:5], TensorGroup(method="task_arithmetic", sources=("a", "b"), parameters={"weight": 0.1})
    )
    assert s.encode(bent) is None
    constant = TensorGroup(method="task_arithmetic", sources=("a", "b"), parameters={"weight": 0.7})
    assert s.encode(recipe(constant)) == pytest.approx([0.7] * 4)


def test_a_curve_has_no_more_points_than_there_are_runs() -> None:
    gene = {**RANGE, "per": ["layers"], "curve": {"points": 20}}
    assert space(method="ties", layers=3, genes={"weight": gene}).dimension == 2 + 1


def test_curves_per_source_and_module() -> None:
    s = space(method="ties", layers=1, modules=MODULES, genes={"weight": {**RANGE, "curve": {"points": 4}}})
    assert s.dimension == 2 * 2 * 4 + 2
    assert len({g.name for g in s.genes}) == s.dimension


def test_five_hundred_genes_decode_in_a_few_milliseconds() -> None:
    names = tuple("abcdefghi")
    s = space(
        names,
        method={"choices": ["task_arithmetic", "ties", "della"]},
        layers=1,
        modules={part: [part] for part in PARTS[:-1]} | {"rest": []},
        subset={"per": ["layers"]},
        genes={"weight": RANGE, "density": RANGE},
    )
    assert s.dimension >= 500
    genomes = np.random.default_rng(0).random((20, s.dimension))
    seconds = []
    for u in genomes:
        started = time.process_time()
        s.decode(u)
        seconds.append(time.process_time() - started)
    assert sorted(seconds)[10] < 0.012  # 5,000 of them in a minute


def test_the_example_of_the_docs_is_a_space() -> None:
    page = (Path(__file__).parents[3] / "docs" / "search_spaces.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    s = space(**parse_yaml(example))
    kinds = {g.parameter: g.domain.kind for g in s.genes}
    assert kinds == {"method": "choice", "on": "flag", "weight": "real", "density": "log", "lambda": "choice"}
    assert parse(SpaceSpec, s.spec.model_dump(mode="json"), "stored") == s.spec  # as a run keeps it


@pytest.mark.parametrize("module", [curve, domain, space_module])
def test_the_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


# What can't be.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": {"choices": ["ties", "tise"]}}, "unknown merge method 'tise'"),
        ({"method": {"choices": ["ties", "ties"]}}, "the same method stands twice"),
        ({"method": {"choices": []}}, "at least 1 item"),
        ({"method": {"choises": ["ties"]}}, r"unknown key 'method.choises' \(did you mean 'choices'"),
        ({"genes": {"t": RANGE}}, "no parameter 't'"),
        ({"method": {"choices": ["ties", "linear"]}, "genes": {"t": RANGE}}, "no method has a parameter 't'"),
        ({"genes": {"della.density": RANGE}}, "for a method that is not in the space"),
        ({"genes": {"ties.wieght": RANGE}}, "no parameter 'wieght'.*\n.*did you mean 'weight'"),
        ({"genes": {"density": RANGE, "ties.density": RANGE}}, "density has no effect"),
        ({"genes": {"weight": {"low": 0}}}, "missing `low` and `high`, or `choices`"),
        ({"genes": {"weight": {"choices": [1]}}}, "two or more different values"),
        ({"genes": {"weight": {"choices": [1, 1.0]}}}, "two or more different values"),
        ({"genes": {"weight": {"choices": ["a", "b"]}}}, "a list of numbers or flags"),
        ({"genes": {"weight": {"choices": [1, 2], "low": 0}}}, "either `choices` or a range"),
        ({"genes": {"weight": {"choices": [1, 1e6]}}}, "genes.weight.choices: weight is out of range"),
        ({"genes": {"normalize": {"choices": [0, 1]}}}, "normalize is a flag"),
        ({"genes": {"weight": {"choices": [False, True]}}}, "weight is not a number"),
        ({"genes": {"weight": {**RANGE, "curve": {"points": 1}}}}, "greater than or equal to 2"),
        ({"genes": {"weight": {**RANGE, "per": ["source"], "curve": {"points": 3}}}}, "`per` must name them"),
        ({"genes": {"weight": {"low": 1, "high": 1.0001, "curve": {"points": 3}}}}, "too narrow for a curve"),
        ({"method": "karcher", "genes": {"max_iter": {"low": 1, "high": 2.5}}}, "is a whole number"),
        (
            {"method": "karcher", "genes": {"max_iter": {"low": 1, "high": 9, "scale": "log"}}},
            "leave `scale` and `curve` out",
        ),
        (
            {"method": {"choices": ["ties", "multislerp"]}, "genes": {"weight": {"low": -1, "high": 1}}},
            "genes.weight.low, of multislerp: weight is out of range",
        ),
        (
            {"method": {"choices": ["ties", "nearswap"]}, "genes": {"weight": RANGE}},
            "wrong number of sources for",
        ),
        ({"method": "model_stock", "subset": {}}, "at least 2 sources, but `subset` may leave fewer"),
        (
            {
                "method": {"choices": ["ties", "linear"]},
                "genes": {"density": {**RANGE, "curve": {"points": 3}}},
            },
            "the curve of density would have gaps\n.*`method` that does not differ by layers",
        ),
        (
            {"subset": {"per": ["layers"]}, "genes": {"weight": {**RANGE, "curve": {"points": 3}}}},
            "the curve of weight would have gaps\n.*`subset` that does not differ by layers",
        ),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(**{"method": "ties", "layers": 1, **spec})


def test_methods_that_need_a_base_and_subsets_of_nothing() -> None:
    with pytest.raises(ConfigError, match="ties works on task vectors and needs a base model"):
        space(base=None, method={"choices": ["linear", "ties"]})
    with pytest.raises(ConfigError, match="`subset` needs a base model"):
        space(base=None, method="linear", subset={})


# Different recipes that are one model.


WEIGHTED = [name for name in methods.names() if "weight" in methods.get(name).parameters]


@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        (name, normalize)
        for name in WEIGHTED
        for normalize in ((False, True) if "normalize" in methods.get(name).parameters else (None,))
    ],
)
def test_the_notes_on_weights_are_true(name: str, normalize: bool | None) -> None:
    """Half of all weights is the same model exactly where the space says so."""
    import torch

    declared = methods.get(name)
    fixed = {} if normalize is None else {"normalize": normalize}
    s = space(fisher=("a", "b"), method=name, genes={"weight": RANGE}, fixed=fixed)
    generator = torch.Generator().manual_seed(0)
    base, *tensors = (torch.randn(8, 8, generator=generator) for _ in range(3))
    results = []
    for factor in (1.0, 0.5):
        settings_: dict[str, Any] = {
            parameter.name.replace("lambda", "lambda_"): (parameter.default,) * 2
            if parameter.per_source
            else parameter.default
            for parameter in declared.parameters.values()
        }
        settings_ |= fixed | {"weight": (0.3 * factor, 0.6 * factor)}
        if declared.random:
            settings_["keys"] = [1, 2]
        if declared.file:
            settings_[f"{declared.file}s"] = [t.square() + 9 * torch.eye(8) for t in tensors]
        if declared.matrices:
            settings_["inside"] = True
        results.append(declared.function(base, tensors, **settings_))
    same = torch.allclose(*results, atol=1e-5)
    assert same == any("in proportion" in note for note in s.notes)


def test_notes_on_lambda_flags_and_zero_weights() -> None:
    genes = {"weight": RANGE, "lambda": RANGE}
    assert space(method="task_arithmetic", genes=genes).notes == (
        "task_arithmetic: only the product of weight and lambda counts",
    )
    assert space(method="task_arithmetic", genes={"weight": RANGE}).notes == ()
    flag = {"weight": RANGE, "normalize": {"choices": [False, True]}}
    assert "where normalize is true" in space(method="ties", genes=flag).notes[0]
    assert "weight of exactly 0" in space(method="ties", subset={}, genes={"weight": RANGE}).notes[-1]
