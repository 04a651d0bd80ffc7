"""ram and ramplus_tl against their definitions, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.methods import reinforced
from evomerge.merging.methods.reinforced import ram, ramplus_tl
from tests.examples import examples

coarse = st.integers(-8, 8).map(lambda n: n / 8)


def naive(
    vectors: list[list[float]], weight: list[float], epsilon: float, r: float, alpha: float
) -> list[float]:
    """The definition, one element after the other."""
    places, sources = range(len(vectors[0])), range(len(vectors))
    changed = [[k for k in sources if abs(vectors[k][i]) > epsilon and weight[k]] for i in places]
    factor = []
    for k in sources:
        unique = sum(found == [k] for found in changed)
        shared = sum(k in found and len(found) > 1 for found in changed)
        factor.append(1 + r * min(shared / unique, alpha) if unique else 1.0)
    merged = []
    for i, found in zip(places, changed, strict=True):
        if len(found) == 1:
            merged.append(weight[found[0]] * vectors[found[0]][i] * factor[found[0]])
            continue
        size = sum(abs(weight[k]) for k in found)
        merged.append(sum(abs(weight[k]) * weight[k] * vectors[k][i] for k in found) / (size or 1.0))
    return merged


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_they_are_their_definition(data: st.DataObject) -> None:
    size, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    row = st.lists(coarse, min_size=size, max_size=size)
    base, vectors = data.draw(row), [data.draw(row) for _ in range(count)]
    weight = [data.draw(st.sampled_from([-0.75, 0.0, 0.25, 0.5, 1.0])) for _ in range(count)]
    epsilon, scale = data.draw(st.sampled_from([1e-5, 0.3])), data.draw(coarse)
    r, alpha = data.draw(st.sampled_from([0.0, 0.1, 2.0])), data.draw(st.sampled_from([0.0, 0.2, 5.0]))
    given = (torch.tensor(base), [torch.tensor(v) for v in vectors])
    shared = {"weight": tuple(weight), "epsilon": epsilon, "lambda_": scale}
    for merged, amplified in (
        (ram(*given, **shared), 0.0),  # type: ignore[arg-type]
        (ramplus_tl(*given, **shared, r=r, alpha=alpha), r),  # type: ignore[arg-type]
    ):
        expected = torch.tensor(naive(vectors, weight, epsilon, amplified, alpha))
        torch.testing.assert_close(merged, torch.tensor(base) + scale * expected, rtol=1e-5, atol=1e-6)


def test_a_large_tensor_is_merged_by_the_counts_of_all_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *vectors = torch.randn(4, 7, 30, generator=torch.Generator().manual_seed(0))
    vectors = [vector * (vector.abs() > 0.8) for vector in vectors]
    whole = ramplus_tl(base, vectors, weight=(1.0, 0.5, 0.8), r=0.5, alpha=2.0)
    monkeypatch.setattr(reinforced, "PIECE", 11)
    assert torch.equal(ramplus_tl(base, vectors, weight=(1.0, 0.5, 0.8), r=0.5, alpha=2.0), whole)


def test_weights_of_one_are_the_papers_mean() -> None:
    vectors = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0]), torch.tensor([5.0, 0.0, 1e-6])]
    assert ram(torch.zeros(3), vectors, weight=(1.0,) * 3).tolist() == [3.0, 2.0, 0.0]
    assert ram(torch.zeros(3), vectors, weight=(0.0, 0.5, 0.0)).tolist() == [1.5, 0.0, 0.0]
