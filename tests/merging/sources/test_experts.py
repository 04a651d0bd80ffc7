"""Experts in another order: matched by their weights, with the router, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.analysis.interference import measure
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.compatibility import check
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.mergekit import write as mergekit_yaml
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.experts import Matched, match
from evomerge.merging.sources.opening import open_sources, open_used
from evomerge.merging.sources.source import Source
from evomerge.merging.tensors.digest import folder_digest
from tests.merging import families
from tests.merging.experts_shuffled import FAMILIES, errors, shuffled


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_experts_are_put_back(family: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        families.build(family, seed).save_pretrained(tmp_path / name)
    orders = shuffled(tmp_path / "tuned", tmp_path / "shuffled")
    assert orders
    base, tuned, other = (Checkpoint.open(str(tmp_path / n)) for n in ("base", "tuned", "shuffled"))
    sources: dict[str, Source] = {"base": base, "tuned": tuned, "other": other}
    found = match(sources, "base")
    assert found["base"] is base
    assert found["tuned"] is tuned
    again = found["other"]
    assert isinstance(again, Matched)
    assert "move" in again.note
    assert again.fingerprint != other.fingerprint
    for name in tuned.headers:
        assert torch.equal(again.tensor(name), tuned.tensor(name)), name
        assert np.array_equal(again.array(name), tuned.array(name)), name


def test_groups_of_experts_stay_together(tmp_path: Path) -> None:
    model: Any = families.build("deepseek_v3", 0)
    model.config.n_group = 2
    model.save_pretrained(tmp_path / "base")
    shuffled(tmp_path / "base", tmp_path / "other", seed=3)
    other = match({n: Checkpoint.open(str(tmp_path / n)) for n in ("base", "other")}, "base")["other"]
    if isinstance(other, Matched):
        for order in other._rows.values():
            assert all(own // 2 == place // 2 for place, own in enumerate(order.tolist()))


def test_experts_without_a_router_are_refused(tmp_path: Path) -> None:
    families.build("mixtral", 0).save_pretrained(tmp_path / "base")
    shuffled(tmp_path / "base", tmp_path / "other")
    for name in ("base", "other"):
        path = tmp_path / name / "model.safetensors"
        tensors = {k.replace("gate.weight", "choice.weight"): t for k, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    sources: dict[str, Source] = {n: Checkpoint.open(str(tmp_path / n)) for n in ("base", "other")}
    with pytest.raises(ModelError, match="no router follows them"):
        match(sources, "base")


def test_dense_models_are_left_alone(tmp_path: Path) -> None:
    families.build("llama", 0).save_pretrained(tmp_path / "base")
    source = Checkpoint.open(str(tmp_path / "base"))
    assert match({"a": source, "b": source}, None) == {"a": source, "b": source}


@pytest.mark.parametrize("family", FAMILIES)
def test_matched_merges_are_those_of_models_in_one_order(family: str, tmp_path: Path) -> None:
    stored, matched = errors(family, tmp_path)
    assert matched == 0.0
    assert stored > 1e-4


@pytest.fixture
def mixtures(tmp_path: Path) -> dict[str, str]:
    """A base, a fine-tune, and the fine-tune with its experts in another order."""
    for seed, name in enumerate(("base", "tuned")):
        families.build("mixtral", seed).save_pretrained(tmp_path / name)
    shuffled(tmp_path / "tuned", tmp_path / "shuffled")
    return {name: str(tmp_path / name) for name in ("base", "tuned", "shuffled")}


def recipe_of(models: dict[str, str], source: str, **changes: Any) -> Recipe:
    group = TensorGroup(method="task_arithmetic", sources=("m",), parameters={"weight": 0.5})
    places = {"base": models["base"], "m": models[source]}
    return Recipe(models=places, base="base", groups=(group,), dtype="float32", **changes)


def test_what_is_scored_is_what_is_written(mixtures: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(mixtures, "shuffled", experts="matched")
    bench = Workbench(recipe.models, "base", experts="matched")
    bench.load(recipe)
    out = write(recipe, tmp_path / "out")
    other = write(recipe_of(mixtures, "tuned"), tmp_path / "other")
    digests = {bench.digest(recipe), folder_digest(out, "float32"), folder_digest(other, "float32")}
    assert len(digests) == 1
    assert any("experts matched" in note for note in check(recipe, open_used(recipe)))
    again = open_sources(recipe.models, "base", experts="matched")["m"]
    assert again.fingerprint == open_used(recipe)["m"].fingerprint
    with pytest.raises(ConfigError, match="order of the experts"):
        bench.load(recipe_of(mixtures, "shuffled"))


def test_a_recipe_carries_the_order(mixtures: dict[str, str]) -> None:
    plain, recipe = recipe_of(mixtures, "tuned"), recipe_of(mixtures, "tuned", experts="matched")
    assert "experts" not in plain.to_data()
    assert recipe.hash != plain.hash
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.with_groups(recipe.groups) == recipe
    with pytest.raises(ConfigError, match="did you mean 'matched'"):
        recipe_of(mixtures, "tuned", experts="matchd")
    with pytest.raises(ConfigError, match="experts"):
        mergekit_yaml(recipe)


def test_the_reference_need_not_be_read(mixtures: dict[str, str]) -> None:
    group = TensorGroup(method="linear", sources=("m",))
    places = {"base": mixtures["base"], "m": mixtures["shuffled"]}
    recipe = Recipe(models=places, base="base", groups=(group,), tokenizer="m", experts="matched")
    assert list(open_used(recipe)) == ["m"]
    assert isinstance(open_used(recipe)["m"], Matched)


def test_norms_are_those_of_matched_models(mixtures: dict[str, str]) -> None:
    norms = task_vector_norms(mixtures, "base", experts="matched")
    assert norms["tuned"] == norms["shuffled"] < task_vector_norms(mixtures, "base")["shuffled"]


def test_analysis_names_routers(mixtures: dict[str, str]) -> None:
    kinds = measure(mixtures, "base").by_kind()
    assert [kind for kind in kinds if "(router)" in kind] == ["block_sparse_moe.gate (router)"]


def test_experts_that_a_table_chooses_stay(tmp_path: Path) -> None:
    families.build("deepseek_v4", 0).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(str(tmp_path / "base"))
    assert any("tid2eid" in name for name in base.copied)
    assert match({"base": base, "again": Checkpoint.open(str(tmp_path / "base"))}, "base")["again"].copied
