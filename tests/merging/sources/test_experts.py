"""Experts in another order: matched by their weights, with the router, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.experts import Matched, experts_of, match
from evomerge.merging.sources.source import Source
from tests.merging import families

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "granitemoe")


def shuffled(folder: Path, out: Path, seed: int = 1, routers: bool = True) -> dict[str, list[int]]:
    """Write a model with the experts of every layer in another order; return the orders."""
    generator = np.random.default_rng(seed)
    tensors, source = load_file(folder / "model.safetensors"), Checkpoint.open(str(folder))
    moved, orders = dict(tensors), {}
    for start, experts in experts_of(source.headers).items():
        order = orders[start] = generator.permutation(experts.count).tolist()
        for place, own in zip(sorted(experts.tensors), order, strict=False):
            for ending, name in experts.tensors[place].items():
                moved[name] = tensors[experts.tensors[own][ending]].clone()
        for name in (*experts.joined, *(experts.routers if routers else ())):
            moved[name] = tensors[name][order].clone()
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    return orders


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
