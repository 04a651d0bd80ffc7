"""fisher against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.merging.methods.averaging import linear
from evomerge.merging.methods.fisher import fisher
from tests.merging.methods.test_methods import coarse, quick


@quick
@given(st.data())
def test_fisher_is_its_definition(data: st.DataObject) -> None:
    size, count = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    row = st.lists(coarse, min_size=size, max_size=size)
    models = [data.draw(row) for _ in range(count)]
    fishers = [[abs(f) for f in data.draw(row)] for _ in range(count)]
    weight = [data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for _ in range(count)]
    floor = data.draw(st.sampled_from([1e-6, 0.01, 0.5]))
    merged = fisher(
        None,
        [torch.tensor(m) for m in models],
        weight=tuple(weight),
        floor=floor,
        fishers=[torch.tensor(f) for f in fishers],
    )
    top = max(max(f) for f in fishers)
    shares = weight if sum(weight) else [1.0] * count
    for i in range(size):
        sure_of = [w * max(f[i], floor * top) if top else w for w, f in zip(shares, fishers, strict=True)]
        expected = sum(s * m[i] for s, m in zip(sure_of, models, strict=True)) / sum(sure_of)
        assert merged[i].item() == pytest.approx(expected, abs=1e-6)


def test_fisher_of_equal_fishers_is_linear_whatever_their_scale() -> None:
    models = list(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)))
    weight = (0.2, 0.5, 0.9)
    expected = linear(None, models, weight=weight)
    for scale in (1e-30, 1.0, 1e30):
        fishers = [torch.full((50,), scale)] * 3
        merged = fisher(None, models, weight=weight, fishers=fishers)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        fisher(None, models, weight=weight, fishers=[torch.zeros(50)] * 3), expected, rtol=1e-5, atol=1e-6
    )


def test_fisher_follows_the_source_that_is_sure() -> None:
    models = [torch.zeros(2), torch.ones(2)]
    fishers = [torch.tensor([1e6, 0.0]), torch.tensor([0.0, 1e6])]
    merged = fisher(None, models, weight=(1.0, 1.0), fishers=fishers)
    torch.testing.assert_close(merged, torch.tensor([0.0, 1.0]), rtol=0, atol=2e-6)
