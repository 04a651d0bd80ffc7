"""Interference: counted by hand, by a naive reference, by invariants; from files as from memory."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.analysis import interference
from evomerge.merging.analysis.interference import Tally, kind_of, measure, tally
from evomerge.merging.export.writer import write
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import Recipe
from tests.examples import examples
from tests.merging.conftest import llama, save

quick = settings(max_examples=examples(60), deadline=None)
coarse = st.integers(-8, 8).map(lambda n: n / 8)


def same_tally(first: Tally, second: Tally, order: list[int] | None = None) -> None:
    """Expect equal numbers, the second's models reordered."""
    assert (first.count, pytest.approx(first.base, rel=1e-9)) == (second.count, second.base)
    for name in ("products", "same", "opposite", "top"):
        other = getattr(second, name)
        other = other if order is None else other[np.ix_(order, order)]
        np.testing.assert_allclose(getattr(first, name), other, rtol=1e-9, atol=1e-12, err_msg=name)
    assert first.shares.tolist() == second.shares.tolist()


def test_a_case_counted_by_hand() -> None:
    base = torch.tensor([3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    a = torch.tensor([4.0, 3.0, 0.0, -2.0, 0.1, 0.0, 0.0, 0.0])
    b = torch.tensor([1.0, -2.0, 0.0, -2.0, 0.0, 1.0, 0.1, 0.0])
    found = tally(base, [a, b], threshold=0.5, top=0.25)
    # Changed: a above 0.5 * 9.1 / 8 = 0.57: 0, 1, 3; b above 0.5 * 6.1 / 8 = 0.38: 0, 1, 3, 5.
    assert found.same.tolist() == [[3, 2], [2, 4]]
    assert found.opposite.tolist() == [[0, 1], [1, 0]]
    assert found.shares.tolist() == [4, 1, 2, 1]
    assert found.conflict[0, 1] == pytest.approx(1 / 3)
    # Tops of two: a 0 and 1; b 1 and 3.
    assert found.top.tolist() == [[2, 1], [1, 2]]
    assert found.overlap[0, 1] == pytest.approx(1 / 3)
    np.testing.assert_allclose(found.norms, [math.sqrt(29.01), math.sqrt(10.01)], rtol=1e-6)
    np.testing.assert_allclose(found.relative, found.norms / 5)
    assert found.cosine[0, 1] == pytest.approx((4 - 6 + 4) / math.sqrt(29.01 * 10.01), rel=1e-6)


def naive(vectors: list[list[float]], threshold: float, top: float) -> dict[str, Any]:
    count = len(vectors[0])
    changed, tops = [], []
    for vector in vectors:
        size = [abs(x) for x in vector]
        bound = threshold * sum(size) / count
        changed.append(
            [0 if s <= bound else int(math.copysign(1, x)) for s, x in zip(size, vector, strict=True)]
        )
        kept = sorted(size, reverse=True)[: int(top * count)]
        tops.append({i for i, s in enumerate(size) if kept and s >= kept[-1] and s > 0})
    shares = [0, 0, 0, 0]
    for column in zip(*changed, strict=True):
        signs = [s for s in column if s]
        shares[len(signs) if len(signs) < 2 else 2 + (len(set(signs)) > 1)] += 1
    pairs = {}
    for i, j in combinations(range(len(vectors)), 2):
        products = [x * y for x, y in zip(changed[i], changed[j], strict=True)]
        pairs[i, j] = products.count(1), products.count(-1), len(tops[i] & tops[j]), len(tops[i] | tops[j])
    return {"shares": shares, "pairs": pairs}


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    size = draw(st.integers(1, 40))
    row = st.lists(coarse, min_size=size, max_size=size).map(torch.tensor)
    return draw(row), [draw(row) for _ in range(draw(st.integers(2, 4)))]


@quick
@given(tensors(), st.sampled_from([0.0, 0.5, 1.0, 1.7]), st.floats(0.01, 1.0))
def test_counts_are_those_of_the_definition(
    case: tuple[Tensor, list[Tensor]], threshold: float, top: float
) -> None:
    base, vectors = case
    found = tally(base, vectors, threshold=threshold, top=top)
    expected = naive([v.tolist() for v in vectors], threshold, top)
    assert found.shares.tolist() == expected["shares"]
    for (i, j), (same, opposite, both, either) in expected["pairs"].items():
        assert (found.same[i, j], found.opposite[i, j], found.top[i, j]) == (same, opposite, both)
        if either:
            assert found.overlap[i, j] == pytest.approx(both / either)
        else:
            assert math.isnan(found.overlap[i, j])


@quick
@given(tensors())
def test_invariants(case: tuple[Tensor, list[Tensor]]) -> None:
    base, vectors = case
    before = [v.clone() for v in (base, *vectors)]
    found = tally(base, vectors)
    assert all(torch.equal(x, y) for x, y in zip((base, *vectors), before, strict=True))
    assert found.shares.sum() == found.count == base.numel()
    assert found.chance_shares.sum() == pytest.approx(1.0)
    for matrix in (found.products, found.same, found.opposite, found.top, found.cosine):
        np.testing.assert_array_equal(matrix, matrix.T)
    order = list(range(len(vectors)))[::-1]
    same_tally(found, tally(base, [vectors[i] for i in order]), order)
    louder = tally(base, [4.0 * vectors[0], *vectors[1:]])  # a factor that keeps the bits
    for name in ("same", "opposite", "top", "shares"):
        np.testing.assert_array_equal(getattr(louder, name), getattr(found, name))
    np.testing.assert_allclose(louder.cosine, found.cosine, atol=1e-12)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *vectors = torch.randn(4, 5, 41, generator=torch.Generator().manual_seed(0))
    whole = tally(base, vectors)
    monkeypatch.setattr(interference, "BLOCK", 7)
    same_tally(whole, tally(base, vectors))


def test_unrelated_task_vectors_are_at_chance() -> None:
    base, *vectors = torch.randn(4, 400, 1000, generator=torch.Generator().manual_seed(0))
    found = tally(base, vectors)
    off = np.triu_indices(3, 1)
    np.testing.assert_allclose(found.conflict[off], 0.5, atol=0.005)
    np.testing.assert_allclose(found.overlap[off], 0.2 / 1.8, atol=0.005)
    np.testing.assert_allclose(found.cosine[off], 0.0, atol=0.005)
    np.testing.assert_allclose(found.changed, 0.425, atol=0.005)  # P(|z| > E|z|) of a normal z
    np.testing.assert_allclose(found.shares / found.count, found.chance_shares, atol=0.005)


def test_nothing_changed_and_nothing_there() -> None:
    for shape in ((3, 4), (0,), ()):
        found = tally(torch.zeros(shape), [torch.zeros(shape)] * 2)
        assert found.cosine.tolist() == [[0, 0], [0, 0]]
        assert found.relative.tolist() == [0, 0]
        assert math.isnan(found.mean_conflict)
        assert math.isnan(found.mean_overlap)
        assert found.shares.tolist() == [torch.zeros(shape).numel(), 0, 0, 0]


def test_kinds_of_a_mixture_of_experts_are_one() -> None:
    names = [f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight" for i in (0, 11) for j in (0, 7)]
    assert {kind_of(name) for name in names} == {"block_sparse_moe.experts.*.w1"}
    assert kind_of("model.layers.0.self_attn.q_proj.bias") == "self_attn.q_proj.bias"
    assert kind_of("lm_head.weight") == "lm_head"


# From files ----------------------------------------------------------------------------------------


def weights(location: str) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    return dict(model.named_parameters())  # a tied head counts once


def test_files_are_measured_as_memory_is(models: dict[str, str]) -> None:
    steps: list[tuple[int, int]] = []
    found = measure(models, "base", progress=lambda done, whole: steps.append((done, whole)))
    assert steps == sorted(steps)
    assert len(steps) == len(found.tensors)
    assert steps[-1] == (found.total.count, found.total.count)
    loaded = {name: weights(location) for name, location in models.items()}
    assert found.models == ("a", "b", "c")
    assert set(found.tensors) == set(loaded["base"])
    for name, base in loaded["base"].items():
        vectors = [(loaded[model][name] - base).detach() for model in found.models]
        same_tally(found.tensors[name], tally(base.detach(), vectors))
    flat = [
        torch.cat([(loaded[m][n] - b).flatten() for n, b in loaded["base"].items()]).double().detach()
        for m in found.models
    ]
    for i, j in found.pairs:
        expected = torch.cosine_similarity(flat[i], flat[j], dim=0).item()
        assert found.total.cosine[i, j] == pytest.approx(expected, abs=1e-9)


def test_sums_over_layers_kinds_and_cells_are_the_whole(models: dict[str, str]) -> None:
    found = measure(models, "base")
    for groups in (found.by_layer(), found.by_kind(), found.cells()):
        same_tally(Tally.total(groups.values()), found.total)
    assert set(found.by_layer()) == {None, 0, 1, 2}
    layer = [one for name, one in found.tensors.items() if layer_of(name) == 1]
    same_tally(found.by_layer()[1], Tally.total(layer))


def test_the_order_of_models_does_not_matter(models: dict[str, str]) -> None:
    turned = {name: models[name] for name in ("c", "base", "a", "b")}
    first, second = measure(models, "base"), measure(turned, "base")
    same_tally(first.total, second.total, [second.models.index(name) for name in first.models])


def test_an_adapter_is_measured_as_its_merged_folder(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    location = f"{models['base']}+{adapters['plain']}"
    folder = str(write(Recipe.copy_of(location, dtype="float32"), tmp_path / "merged"))
    named = {"base": models["base"], "a": models["a"]}
    adapter = measure(named | {"lora": adapters["plain"]}, "base")
    merged = measure(named | {"lora": folder}, "base")
    for tensor, one in adapter.tensors.items():
        same_tally(one, merged.tensors[tensor])
    changed = {t for t, one in adapter.tensors.items() if one.same[1, 1]}
    assert {kind_of(t) for t in changed} == {"self_attn.q_proj", "mlp.down_proj"}


def test_what_cannot_be_measured_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown base model 'bas'"):
        measure(models, "bas")
    with pytest.raises(ConfigError, match=r"at least two other models\n.*'base' and 'a'"):
        measure({name: models[name] for name in ("base", "a")}, "base")
    with pytest.raises(ConfigError, match="top"):
        measure(models, "base", top=0.0)
    with pytest.raises(ConfigError, match="threshold"):
        measure(models, "base", threshold=math.nan)
    wide = str(save(llama(intermediate_size=32), tmp_path / "wide"))
    with pytest.raises(ModelError, match="another shape"):
        measure(models | {"wide": wide}, "base")
    sick = llama()
    sick.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    place = str(save(sick, tmp_path / "sick"))
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' has[^\n]*\n  got: in sick"):
        measure(models | {"sick": place}, "base")
    with pytest.raises(ModelError, match="in sick"):
        measure({"sick": place, "a": models["a"], "b": models["b"]}, "sick")
