"""Baselines: what they are, and the greedy soup's rule."""

from __future__ import annotations

import pytest

from evomerge.config import load_space
from evomerge.errors import ConfigError
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.schema import load_yaml, preset_folder
from evomerge.search import baselines
from evomerge.search.selection import Candidate, finalists
from evomerge.search.spaces.merge_space import SearchSpace

NAMES = ("a", "b", "c")
TEMPLATE = Recipe(
    models={n: n for n in ("base", *NAMES)},
    groups=(TensorGroup(method="linear", sources=NAMES),),
    base="base",
)


def test_parents_are_exact_copies() -> None:
    rows = baselines.parents(TEMPLATE, NAMES)
    assert [row.name for row in rows] == ["base", *NAMES]
    assert all(row.recipe.groups[0].sources == (row.name,) for row in rows)


def test_equal_norms_gives_every_task_vector_the_same_length() -> None:
    norms = {"a": 1.0, "b": 2.0, "c": 4.0}
    rows = {row.name: row.recipe for row in baselines.hand_made(TEMPLATE, NAMES, norms)}
    weights = rows["task arithmetic 0.5, equal norms"].groups[0].per_source("weight")
    lengths = [w * norms[n] for w, n in zip(weights, NAMES, strict=True)]
    assert lengths == pytest.approx([0.5 * 7 / 3] * 3, rel=1e-5)


def test_slerp_needs_two_sources_and_nothing_is_listed_twice() -> None:
    three = [row.name for row in baselines.hand_made(TEMPLATE, NAMES, dict.fromkeys(NAMES, 1.0))]
    two = [row.name for row in baselines.hand_made(TEMPLATE, NAMES[:2], dict.fromkeys(NAMES, 1.0))]
    assert "SLERP" not in three
    assert "SLERP" in two
    assert len(set(three)) == len(three)


def test_spaces_find_a_start_among_the_baselines() -> None:
    """What no baseline lies in would start in its middle, however good the baselines are."""
    tensors = tuple(
        f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("attn.q_proj", "mlp.up_proj")
    )
    none = []
    for path in sorted(preset_folder("search_spaces").glob("*.yaml")):
        method = load_yaml(path).get("method")
        if method is None or method in ("regmean", "core_space"):  # a stack of layers; files, or adapters
            continue
        names = NAMES[:2] if path.stem.startswith("slerp") else NAMES
        template = Recipe(models=TEMPLATE.models, groups=TEMPLATE.groups, base="base")
        space = SearchSpace(load_space(path.stem), template=template, sources=names, tensors=tensors)
        rows = baselines.hand_made(template, names, dict.fromkeys(names, 1.0))
        if all(space.encode(row.recipe) is None for row in rows):
            none.append(path.stem)
    assert none == ["breadcrumbs_layers", "della_layers"]


def test_a_source_without_any_change_does_not_break_the_grid() -> None:
    rows = baselines.hand_made(TEMPLATE, NAMES, {"a": 1.0, "b": 0.0, "c": 1.0})
    assert rows[8].recipe.groups[0].per_source("weight")[1] == 0.0


def test_greedy_soup_keeps_only_what_helps() -> None:
    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    soups = {("b", "c"): 0.4, ("a", "b"): 0.05}
    soup = baselines.greedy_soup(TEMPLATE, NAMES, losses, lambda recipe: soups[recipe.groups[0].sources])
    assert soup.recipe.groups[0].sources == ("a", "b")


def test_greedy_soup_enters_in_the_order_of_scores_and_keeps_ties() -> None:
    asked = []

    def loss_of(recipe: Recipe) -> float:
        asked.append(recipe.groups[0].sources)
        return 0.1

    losses = {"a": 0.3, "b": 0.1, "c": 0.2}
    soup = baselines.greedy_soup(TEMPLATE, NAMES, losses, loss_of)
    assert asked == [("b", "c"), ("a", "b", "c")]
    assert soup.recipe.groups[0].sources == NAMES
    assert (soup.recipe.groups[0].method, soup.recipe.groups[0].per_source("weight")) == (
        "linear",
        (1.0,) * 3,
    )


def test_finalists_are_distinct_and_best_first() -> None:
    recipes = [row.recipe for row in baselines.parents(TEMPLATE, NAMES)]
    found = [
        Candidate(name=str(i), recipe=recipes[i % 3], loss=loss)
        for i, loss in enumerate((3.0, 1.0, 2.0, 0.5, 1.0))
    ]
    assert [c.name for c in finalists(found, 2)] == ["3", "1"]
    assert [c.name for c in finalists(found, 9)] == ["3", "1", "2"]


def test_which_baselines_are_scored() -> None:
    rows = baselines.hand_made(TEMPLATE, NAMES, dict.fromkeys(NAMES, 1.0))
    available = [*(row.name for row in rows), baselines.SOUP]
    for spec, weights in (("all", 10**12), ("auto", baselines.COSTLY - 1)):
        choice = baselines.choose(spec, available=available, weights=weights)
        assert not choice.short
        assert all(name in choice for name in available)
    short = baselines.choose("auto", available=available, weights=baselines.COSTLY)
    assert short.short
    assert short.names is not None
    assert set(short.names) == set(baselines.SHORT) - {"SLERP"}  # for two sources only
    named = baselines.choose(("TIES", "uniform average"), available=available, weights=1)
    assert named == baselines.Choice(names=("uniform average", "TIES"))
    for choice in (short, named, baselines.Choice()):
        assert baselines.Choice.from_data(choice.as_data()) == choice
    assert baselines.Choice.from_data(None) == baselines.Choice()
    with pytest.raises(ConfigError, match=r"there is no 'TEIS'(.|\n)*TIES"):
        baselines.choose(("TEIS",), available=available, weights=1)
