"""Methods on the sphere against their definitions, and where directions are none."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.merging.methods.reduction import norm
from evomerge.merging.methods.spherical import chained_slerp, karcher, multislerp, nuslerp, slerp
from tests.merging.methods.test_methods import ALONE, run


def test_chained_slerp_is_slerp_after_slerp_in_the_order_of_the_sources() -> None:
    x, y, z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for weight in ((1.0, 1.0, 1.0), (0.2, 0.7, 0.4), (0.0, 2.0, 1.0), (1.0, 0.0, 3.0)):
        first = slerp(None, [x, y], t=weight[1] / (weight[0] + weight[1]))
        expected = slerp(None, [first, z], t=weight[2] / sum(weight))
        merged = chained_slerp(None, [x, y, z], weight=weight)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    uniform = chained_slerp(None, [x, y, z], weight=(0.0, 0.0, 0.0))
    assert torch.equal(uniform, chained_slerp(None, [x, y, z], weight=(2.0, 2.0, 2.0)))
    assert not torch.allclose(uniform, chained_slerp(None, [z, y, x], weight=(1.0, 1.0, 1.0)), atol=1e-3)


def test_chained_slerp_of_two_is_slerp() -> None:
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for weight, t in (((1.0, 1.0), 0.5), ((3.0, 1.0), 0.25), ((1.0, 0.0), 0.0), ((0.0, 1.0), 1.0)):
        for pair in ([x, y], [x, 2 * x], [x, -x], [0 * x, y]):
            assert torch.equal(chained_slerp(None, pair, weight=weight), slerp(None, pair, t=t))


def test_nuslerp_is_slerp_by_relative_weights() -> None:
    base, *models = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for weight, t in (((3.0, 1.0), 0.25), ((0.3, 0.6), 2 / 3), ((0.0, 0.0), 0.5)):
        alone = nuslerp(None, models, weight=weight)
        torch.testing.assert_close(alone, slerp(None, models, t=t))
        torch.testing.assert_close(nuslerp(base, models, weight=weight), base + alone)


def test_nuslerp_goes_beyond_an_end_by_negative_weights() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for weight in ((-1.0, 3.0), (1.0, -3.0)):
        torch.testing.assert_close(nuslerp(None, [x, y], weight=weight), slerp_at(x, y, 1.5))
    torch.testing.assert_close(nuslerp(None, [x, y], weight=(-1.0, -3.0)), slerp_at(x, y, 0.75))
    middle = nuslerp(None, [x, y], weight=(1.0, 1.0))
    for weight in ((1.0, -1.0), (0.5, -0.5 + 1e-8)):
        assert torch.equal(nuslerp(None, [x, y], weight=weight), middle)


def slerp_at(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    """Shoemake's equation for two orthogonal tensors, in double precision."""
    angle = math.pi / 2
    mix = math.sin((1 - t) * angle) * x.double() + math.sin(t * angle) * y.double()
    return (mix / math.sin(angle)).float()


@pytest.mark.parametrize("along", [0, -1])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)])
def test_nuslerp_of_vectors_is_nuslerp_of_each(along: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, x, y = (torch.randn(shape, generator=generator) for _ in range(3))
    x.select(along, 0)[...] = 0
    y.transpose(along, -1)[(0,) * (len(shape) - 1)] = x.transpose(along, -1)[(0,) * (len(shape) - 1)] * 2
    kind = {"nuslerp_flatten": False, "nuslerp_row_wise": along == 0}
    for weight in ((1.0, 2.0), (-1.0, 3.0)):
        found = nuslerp(base, [x, y], weight=weight, **kind).transpose(along, -1)
        pairs = [tensor.transpose(along, -1).reshape(-1, shape[along]) for tensor in (base, x, y)]
        expected = [nuslerp(b, [v, w], weight=weight) for b, v, w in zip(*pairs, strict=True)]
        torch.testing.assert_close(found.reshape(-1, shape[along]), torch.stack(expected))
    flat = nuslerp(None, [x[0], y[0]], weight=(1.0, 1.0), nuslerp_row_wise=True)
    assert torch.equal(flat, nuslerp(None, [x[0], y[0]], weight=(1.0, 1.0)))


def test_nuslerp_of_parallel_and_opposite_tensors_is_their_line() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nuslerp(None, [x, 2 * x], weight=(1.0, 1.0)), 1.5 * x)
    nearly = -3 * x + 1e-4 * torch.ones(1000)
    assert norm(nuslerp(None, [x, nearly], weight=(1.0, 1.0))) <= 1.1 * norm(x)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "multislerp" + ALONE])
def test_spherical_means_have_the_mean_length_or_are_the_linear_mean(method: str) -> None:
    base, *models = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    vectors = [m - base if method == "multislerp" else m for m in models]
    merged = run(method, base, models, {})
    moved = merged - base if method == "multislerp" else merged
    assert norm(moved) == pytest.approx(sum(map(norm, vectors)) / 3, rel=1e-5)
    first = run(method, torch.zeros(60), [models[0], -models[0]], {})
    torch.testing.assert_close(first, torch.zeros(60))


def test_multislerp_is_its_definition() -> None:
    models = list(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double())
    weight = torch.tensor([0.2, 0.5, 0.9]).double()
    weight /= weight.sum()
    units = torch.stack([m / m.norm() for m in models])
    mean = (weight[:, None] * units).sum(0)
    mean /= mean.norm()
    tangent = (weight[:, None] * (units - (units @ mean)[:, None] * mean)).sum(0)
    assert tangent.norm() < 1e-12
    expected = mean * (weight * torch.stack([m.norm() for m in models])).sum()
    merged = multislerp(None, [m.float() for m in models], weight=(0.2, 0.5, 0.9))
    torch.testing.assert_close(merged, expected.float())


def test_karcher_is_where_the_logarithms_cancel() -> None:
    models = list(torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    point = karcher(None, models, max_iter=100, tol=1e-10).double()
    point /= point.norm()
    total = torch.zeros(40).double()
    for model in models:
        unit = model.double() / model.double().norm()
        cos = unit @ point
        total += (unit - cos * point) * cos.arccos() / cos.arccos().sin()
    assert total.norm() < 1e-5
    a, b = (m / norm(m) for m in models[:2])
    torch.testing.assert_close(karcher(None, [a, b]), slerp(None, [a, b], t=0.5))


def test_a_tensor_of_zeros_has_no_direction_but_a_length() -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(karcher(None, [x, 0 * x]), x / 2)
    torch.testing.assert_close(multislerp(None, [x, 0 * x], weight=(1.0, 1.0)), x / 2)
