"""Methods that solve a least-squares problem, against the problem itself."""

from __future__ import annotations

import pytest
import torch

from evomerge.errors import ModelError
from evomerge.merging.methods.regression import regmean, wudi


def interference(delta: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
    """What wudi minimises."""
    return sum(((delta - v) @ v.T).square().sum() / v.square().sum() for v in vectors)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10), (3, 12), (1, 6), (6, 1)])
@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0), (0.3, -0.5, 1.2), (0.7, 0.0, 0.4)])
def test_wudi_has_the_least_interference(shape: tuple[int, int], weight: tuple[float, ...]) -> None:
    base, *vectors = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    taken = [w * v.double() for w, v in zip(weight, vectors, strict=True) if w]
    merged = wudi(torch.zeros_like(base), vectors, weight=weight, inside=True).double()
    free = merged.clone().requires_grad_()
    interference(free, taken).backward()
    size = sum(float((v.T @ v).norm() * v.norm()) for v in taken)
    assert free.grad is not None
    assert free.grad.norm() < 1e-5 * size
    products = [v.T @ v / v.square().sum() for v in taken]
    expected = sum(v @ p for v, p in zip(taken, products, strict=True)) @ torch.linalg.pinv(
        sum(products),
        rtol=1e-9,  # type: ignore[call-overload]
    )
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    moved = wudi(base, vectors, weight=weight, lambda_=-0.5, inside=True)
    torch.testing.assert_close(moved, base - 0.5 * merged.float())


def test_everything_but_matrices_of_layers_is_task_arithmetic() -> None:
    for shape, inside in (((12, 9), False), ((12,), True), ((3, 4, 5), True), ((), True), ((0, 3), True)):
        base, *vectors = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        merged = wudi(base, vectors, weight=(0.5, -1.0), lambda_=0.9, inside=inside)
        torch.testing.assert_close(merged, base + 0.9 * (0.5 * vectors[0] - vectors[1]))


def test_sources_that_cancel_repeat_or_are_zero() -> None:
    base, a, b = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(0))
    merged = wudi(base, [a, a, 0 * b], weight=(1.0, 1.0, 1.0), inside=True)
    torch.testing.assert_close(merged, base + a, rtol=1e-3, atol=1e-3)
    for vectors in ([a, -a], [0 * a, 0 * a], [1e-25 * a, 1e15 * b], [a, b, a]):
        assert wudi(base, vectors, weight=(1.0,) * len(vectors), inside=True).isfinite().all()


def test_the_number_of_threads_changes_no_bit_of_large_matrices() -> None:
    base, *vectors = torch.randn(4, 640, 520, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(wudi(base, vectors, weight=(1.0, 1.0, 1.0), inside=True))
    torch.set_num_threads(1)
    assert torch.equal(*results)


# Regression means ----------------------------------------------------------------------------------


def inputs(count: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(30, width, generator=generator) @ torch.randn(width, width) for _ in range(count)]


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_regmean_is_its_closed_form(alpha: float) -> None:
    models = list(torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(0)))
    grams = [x.T @ x / len(x) for x in inputs(3, 9)]
    weight = (0.5, 0.0, 2.0)
    scaled = [g.double() * alpha + (1 - alpha) * torch.diag(g.double().diagonal()) for g in grams]
    wanted = sum(w * m.double() @ g for w, m, g in zip(weight, models, scaled, strict=True))
    normal = sum(w * g for w, g in zip(weight, scaled, strict=True))
    expected = wanted @ torch.linalg.inv(normal)  # type: ignore[operator]
    merged = regmean(None, models, weight=weight, alpha=alpha, grams=grams)
    torch.testing.assert_close(merged, expected.float(), rtol=1e-3, atol=1e-3)


def test_regmean_of_alpha_one_has_the_least_squared_error_of_outputs() -> None:
    models = list(torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0)))
    texts = inputs(2, 9)
    merged = regmean(None, models, weight=(1.0, 1.0), alpha=1.0, grams=[x.T @ x for x in texts])

    def error(weights: torch.Tensor) -> float:
        return sum(float(((weights - m) @ x.T).square().sum()) for m, x in zip(models, texts, strict=True))

    for seed in range(5):
        away = 0.05 * torch.randn(7, 9, generator=torch.Generator().manual_seed(seed))
        assert error(merged) < error(merged + away)


def test_regmean_is_the_weighted_mean_where_nothing_was_measured() -> None:
    a, b = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    gram, nothing = torch.eye(9), torch.zeros(9, 9)
    for grams in ([gram, None], [None, None], [nothing, nothing], [gram, gram]):
        merged = regmean(None, [a, b], weight=(1.0, 3.0), grams=grams)
        torch.testing.assert_close(merged, 0.25 * a + 0.75 * b)
    used = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 4))
    merged = regmean(None, [a, b], weight=(0.0, 0.0), grams=[used, used])
    torch.testing.assert_close(merged, (a + b) / 2)
    vectors = [a[0], b[0]]
    merged = regmean(None, vectors, weight=(1.0, 1.0), grams=[gram, gram])
    torch.testing.assert_close(merged, (a[0] + b[0]) / 2)


def test_a_damaged_gram_matrix_is_an_error() -> None:
    a, b = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    damaged = torch.ones(9, 9) * 5 + torch.eye(9) * -3
    with pytest.raises(ModelError, match="not one of inputs"):
        regmean(None, [a, b], weight=(1.0, 1.0), alpha=1.0, grams=[damaged, damaged])
