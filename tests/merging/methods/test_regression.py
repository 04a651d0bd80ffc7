"""Methods that solve a least-squares problem, against the problem itself."""

from __future__ import annotations

import pytest
import torch

from evomerge.merging.methods.regression import wudi


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
