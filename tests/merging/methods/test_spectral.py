"""tsv, iso_c and iso_cts against their definitions in float64, and what they make of unusual matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from evomerge.merging.methods.reduction import one_blas_thread
from evomerge.merging.methods.spectral import factors, iso_c, iso_cts, top, tsv

SHAPES = [(12, 9), (9, 12), (10, 10), (1, 6), (6, 1)]
Array = NDArray[np.float64]


def drawn(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    base, *vectors = torch.randn(count + 1, *shape, generator=torch.Generator().manual_seed(seed))
    return base, [0.1 * vector for vector in vectors]


def polar(columns: Array) -> Array:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left @ right)


def naive_tsv(vectors: Sequence[Array]) -> Array:
    rank = max(1, min(vectors[0].shape) // len(vectors))
    found = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in found], axis=1))
    right = polar(np.concatenate([v[:rank] for _, _, v in found]).T)
    return np.asarray(left @ np.diag(np.concatenate([s[:rank] for _, s, _ in found])) @ right.T)


def naive_iso_c(vectors: Sequence[Array]) -> Array:
    left, values, right = np.linalg.svd(sum(vectors), full_matrices=False)
    return np.asarray(values.mean() * left @ right)


def naive_iso_cts(vectors: Sequence[Array], common: float) -> Array:
    size = min(vectors[0].shape)
    own = min(round((1 - common) * size / len(vectors)), size // len(vectors))
    kept = size - own * len(vectors)
    left, values, right = np.linalg.svd(sum(vectors), full_matrices=False)
    lefts, all_values, rights = [left[:, :kept]], [values[:kept]], [right[:kept].T]
    for vector in vectors:
        u, s, v = np.linalg.svd(vector - lefts[0] @ lefts[0].T @ vector, full_matrices=False)
        lefts.append(u[:, :own])
        all_values.append(s[:own])
        rights.append(v[:own].T)
    directions = polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights, axis=1)).T
    return np.asarray(np.concatenate(all_values).mean() * directions)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0), (0.3, -0.5, 1.2), (0.7, 0.0, 0.4)])
def test_they_are_their_definitions(shape: tuple[int, int], weight: tuple[float, ...]) -> None:
    base, vectors = drawn(shape)
    taken = [w * v.double().numpy() for w, v in zip(weight, vectors, strict=True) if w]
    for merged, expected in (
        (tsv(base, vectors, weight=weight, lambda_=0.8, inside=True), naive_tsv(taken)),
        (iso_c(base, vectors, weight=weight, lambda_=0.8, inside=True), naive_iso_c(taken)),
        (iso_cts(base, vectors, weight=weight, lambda_=0.8, inside=True), naive_iso_cts(taken, 0.8)),
        (
            iso_cts(base, vectors, weight=weight, common=0.4, lambda_=0.8, inside=True),
            naive_iso_cts(taken, 0.4),
        ),
    ):
        torch.testing.assert_close(merged, base + 0.8 * torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


METHODS = [tsv, iso_c, iso_cts]


@pytest.mark.parametrize("method", METHODS)
def test_everything_but_matrices_of_layers_is_task_arithmetic(method: Any) -> None:
    for shape, inside in (((12, 9), False), ((12,), True), ((3, 4, 5), True), ((), True), ((0, 3), True)):
        base, vectors = drawn(shape)
        merged = method(base, vectors, weight=(0.5, -1.0, 0.2), lambda_=0.9, inside=inside)
        expected = base + 0.9 * (0.5 * vectors[0] - vectors[1] + 0.2 * vectors[2])
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_sources_that_cancel_repeat_or_are_zero_give_finite_weights(
    method: Any, shape: tuple[int, int]
) -> None:
    base, (a, b, _) = drawn(shape)
    for vectors in ([a, -a], [a, a], [a, 0 * a], [0 * a, 0 * a], [a, b, a], [1e-25 * a, 1e15 * b]):
        merged = method(base, vectors, weight=(1.0,) * len(vectors), inside=True)
        assert merged.isfinite().all()
    assert torch.equal(method(base, [0 * a, 0 * a], weight=(1.0, 1.0), inside=True), base)
    assert method(base, [a, a * torch.inf], weight=(1.0, 1.0), inside=True).isfinite().all().logical_not()


def test_equal_sources_are_not_filled_with_directions_of_chance() -> None:
    """Their directions coincide, so the nearest orthonormal ones are not unique."""
    base, (a, *_) = drawn((12, 9))
    left, values, right = factors(a)
    expected = (left[:, :4] * values[:4]) @ right[:4]
    merged = tsv(base, [a, a], weight=(1.0, 1.0), inside=True)
    torch.testing.assert_close(merged - base, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_sources_stay_of_low_rank(method: Any) -> None:
    """As those of LoRA adapters: rounding errors are no directions."""
    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.randn(60, 2, generator=generator) @ torch.randn(2, 40, generator=generator) for _ in range(2)
    ]
    merged = method(torch.zeros(60, 40), vectors, weight=(1.0, 1.0), inside=True)
    assert torch.linalg.matrix_rank(merged, rtol=1e-4).item() == 4
    largest = torch.linalg.matrix_norm(sum(vectors), 2)  # type: ignore[arg-type]
    assert torch.linalg.matrix_norm(merged, 2) <= 1.01 * largest


def test_few_directions_of_a_large_matrix_are_found_by_projection() -> None:
    """On a spectrum that falls slowly, as those of fine-tunes do, less than 1 % of the length is lost."""
    size, count = 512, 64
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q.float()
        for _ in range(2)
    )
    values = torch.arange(1.0, size + 1) ** -0.5
    matrix = (left * values) @ right.T
    u, s, v = top(matrix, count)
    assert s.norm() >= 0.99 * values[:count].norm()
    assert torch.linalg.matrix_norm(u.T @ u - torch.eye(count)) < 1e-4
    assert ((u * s) @ v - matrix).norm() <= 1.01 * values[count:].norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_changes_no_bit_of_large_matrices(method: Any) -> None:
    base, vectors = drawn((640, 520), count=5)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(method(base, vectors, weight=(1.0,) * 5, inside=True))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (60, 60)])
def test_factors_are_exact_down_to_weak_directions(shape: tuple[int, int]) -> None:
    size = min(shape)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(length, size, generator=generator, dtype=torch.float64)).Q
        for length in shape
    )
    values = torch.logspace(0, -4, size, dtype=torch.float64)
    matrix = ((left * values) @ right.T).float()
    u, s, v = factors(matrix)
    torch.testing.assert_close(s.double(), values, rtol=1e-2, atol=0.0)  # the matrix itself is rounded
    torch.testing.assert_close((u * s) @ v, matrix, rtol=0.0, atol=2e-6)
    for directions in (u.T @ u, v @ v.T):
        torch.testing.assert_close(directions, torch.eye(size), rtol=0.0, atol=1e-5)
    weak = torch.outer(left[:, 0], right[:, 0]) + 1e-6 * torch.outer(left[:, 1], right[:, 1])
    assert len(factors(weak.float())[1]) == 1


def test_one_blas_thread_holds_until_the_last_leaves_and_restores_what_was() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        before = threads()
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as of another thread
        assert set(threads()) == {1}
        second.__exit__(None, None, None)
        assert threads() == before
