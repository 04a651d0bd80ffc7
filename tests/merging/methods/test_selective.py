"""Methods that choose element by element, and those of rows and of one model, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.merging.methods import selective
from evomerge.merging.methods.averaging import model_stock, passthrough
from evomerge.merging.methods.reduction import BLOCK
from evomerge.merging.methods.selective import arcee_fusion, nearswap, sce
from evomerge.merging.recipe import TensorGroup
from tests.merging.methods.test_methods import coarse, quick


def naive_sce(base: list[float], vectors: list[list[float]], share: float) -> list[float]:
    size, count = len(base), len(vectors)
    if share < 1:
        mean = [sum(v[i] for v in vectors) / count for i in range(size)]
        variance = [sum((v[i] - mean[i]) ** 2 for v in vectors) / count for i in range(size)]
        order = sorted(range(size), key=lambda i: (-variance[i], i))
        kept = set(order[: int(share * sum(x > 0 for x in variance))])
        vectors = [[x if i in kept else 0.0 for i, x in enumerate(v)] for v in vectors]
    energy = [sum(x * x for x in v) for v in vectors]
    weight = [e / (sum(energy) or 1.0) for e in energy]
    merged = []
    for i, start in enumerate(base):
        sign = 1.0 if sum(v[i] for v in vectors) >= 0 else -1.0
        agree = [k for k, v in enumerate(vectors) if v[i] * sign > 0]
        divisor = sum(weight[k] for k in agree) or 1.0
        merged.append(start + sum(weight[k] * vectors[k][i] for k in agree) / divisor)
    return merged


@quick
@given(st.data())
def test_sce_is_its_definition(data: st.DataObject) -> None:
    size, count = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 2, 4]))
    row = st.lists(coarse, min_size=size, max_size=size)
    base, vectors = data.draw(row), [data.draw(row) for _ in range(count)]
    share = data.draw(st.floats(0, 1))
    merged = sce(torch.tensor(base), [torch.tensor(v) for v in vectors], select_topk=share)
    torch.testing.assert_close(merged, torch.tensor(naive_sce(base, vectors, share)), rtol=1e-5, atol=1e-6)


def test_nearswap_interpolates_by_nearness() -> None:
    base, model = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 1e-3, 0.3, 100.0):
        share = (t / (base - model).abs().clamp(min=1e-6)).clamp(0, 1)
        expected = share * model + (1 - share) * base
        torch.testing.assert_close(nearswap(base, [model - base], t=t), expected, rtol=1e-5, atol=1e-6)


def test_arcee_fusion_is_its_definition() -> None:
    base, noise = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    model = base + 0.1 * noise
    p, q = (torch.softmax(x.double(), -1) for x in (model, base))
    importance = (model - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[int(share * 1199)] for share in (0.25, 0.5, 0.75))
    expected = torch.where(importance > middle + 1.5 * (high - low), model, base)
    merged = arcee_fusion(base, [model])
    assert torch.equal(merged, expected)
    assert 0 < (merged != base).sum() < 300


def test_arcee_fusion_of_long_rows_is_that_of_their_blocks() -> None:
    base, noise = torch.randn(2, 2, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    model = base + 0.1 * noise
    p, q = (torch.log_softmax(x.double(), -1) for x in (model, base))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(selective._divergence(model, base), expected)


def test_filter_wise_model_stock_is_model_stock_of_each_row() -> None:
    base, *vectors = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(0))
    vectors[0][2] = 0.0
    merged = model_stock(base, vectors, filter_wise=True)
    rows = [model_stock(base[i], [v[i] for v in vectors]) for i in range(6)]
    torch.testing.assert_close(merged, torch.stack(rows))
    row = model_stock(base[0], [v[0] for v in vectors], filter_wise=True)
    torch.testing.assert_close(row, rows[0])


def test_passthrough_scales_one_model() -> None:
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(passthrough(None, [x], scale=(1.0,)), x)
    assert torch.equal(passthrough(None, [x], scale=(-0.5,)), -0.5 * x)
    with pytest.raises(ConfigError, match="wrong number of sources"):
        TensorGroup(method="passthrough", sources=("a", "b"))
