"""The contract of merge methods, one row per method, and what is special about each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.application import apply, generators
from evomerge.merging.methods.averaging import linear, model_stock, passthrough
from evomerge.merging.methods.reduction import BLOCK, cosines, gram, norm
from evomerge.merging.methods.task_vectors import (
    dare_linear,
    dare_ties,
    keep_largest,
    task_arithmetic,
    ties,
)
from evomerge.merging.recipe import TensorGroup

ALL = methods.names()
SYMMETRIC = [name for name in ALL if name != "slerp"]
"""Methods that treat their sources alike."""
WEIGHTED = [name for name in ALL if "weight" in methods.get(name).parameters]
NAMES = ("a", "b", "c")
quick = settings(max_examples=100, deadline=None)

coarse = st.integers(-8, 8).map(lambda n: n / 8)
"""Eighths: many exact ties and zeros, as between bfloat16 checkpoints."""


def sources_of(method: str) -> tuple[str, ...]:
    return NAMES[: methods.get(method).max_sources or len(NAMES)]


def run(
    method: str, base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], seed: int = 0
) -> Tensor:
    """Merge whole models with a method, whatever it wants as input."""
    group = TensorGroup(method=method, sources=NAMES[: len(models)], parameters=parameters)
    inputs = list(models)
    if methods.get(method).inputs == "task_vectors":
        inputs = [model - base for model in models]
    return apply(group, base, inputs, seed=seed, tensor="w")


@st.composite
def cases(draw: st.DrawFn, count: int | None = None) -> tuple[str, Tensor, list[Tensor], dict[str, Any]]:
    """A method, a base, models, and any legal parameters."""
    method = draw(st.sampled_from(ALL))
    number = methods.get(method).max_sources or draw(st.integers(2, 3))
    size = draw(st.integers(1, 12))
    values = st.lists(coarse, min_size=size, max_size=size).map(torch.tensor)
    parameters: dict[str, Any] = {}
    for p in methods.get(method).parameters.values():
        low, high = max(p.low, -1e4), min(p.high, 1e4)
        one = st.booleans() if p.kind == "flag" else st.floats(low, high)
        parameters[p.name] = tuple(draw(one) for _ in range(number)) if p.per_source else draw(one)
    return method, draw(values), [draw(values) for _ in range(number)], parameters


@quick
@given(cases())
def test_any_legal_parameters_give_finite_results_and_leave_the_inputs_alone(case: Any) -> None:
    method, base, models, parameters = case
    before = [tensor.clone() for tensor in (base, *models)]
    weight = parameters.get("weight", (1.0,))
    if abs(sum(weight)) <= 0.01 * sum(map(abs, weight)) and method == "linear":
        parameters["normalize"] = False  # refused, see below
    merged = run(method, base, models, parameters)
    assert merged.isfinite().all()
    assert merged.shape == base.shape
    assert merged.dtype == torch.float32
    assert all(torch.equal(now, then) for now, then in zip((base, *models), before, strict=True))
    assert merged.data_ptr() not in {tensor.data_ptr() for tensor in (base, *models)}


@pytest.mark.parametrize("method", ALL)
def test_sources_equal_to_the_base_give_the_base(method: str) -> None:
    base = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    merged = run(method, base, [base.clone() for _ in sources_of(method)], {})
    torch.testing.assert_close(merged, base, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("normalize", [False, True])
def test_one_hot_weights_give_that_model(method: str, normalize: bool) -> None:
    base, *models = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    merged = run(method, base, models, {"weight": (0.0, 1.0, 0.0), "normalize": normalize})
    torch.testing.assert_close(merged, models[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_sources_does_not_matter(method: str) -> None:
    base, *models = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    parameters: dict[str, Any] = {"weight": (0.2, 0.5, 0.9), "density": (0.3, 0.6, 1.0)}
    parameters = {k: v for k, v in parameters.items() if k in methods.get(method).parameters}
    vectors = methods.get(method).inputs == "task_vectors"
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        group = TensorGroup(
            method=method,
            sources=tuple(NAMES[i] for i in order),
            parameters={k: tuple(v[i] for i in order) for k, v in parameters.items()},
        )
        inputs = [models[i] - base if vectors else models[i] for i in order]
        results.append(apply(group, base, inputs, seed=3, tensor="w"))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_empty_and_scalar_tensors_pass(method: str) -> None:
    for shape in ((0,), ()):
        base = torch.ones(shape)
        assert run(method, base, [base + 1 for _ in sources_of(method)], {}).shape == shape


@pytest.mark.parametrize("method", ALL)
def test_the_number_of_threads_changes_no_bit(method: str) -> None:
    base, *models = torch.randn(4, 1_000_003, generator=torch.Generator().manual_seed(3))
    models = [(0.1 * m + base) for m in models][: len(sources_of(method))]
    parameters = {"density": 0.37} if "density" in methods.get(method).parameters else {}
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(method, base, models, parameters))
    assert torch.equal(*results)


# The methods, element by element -------------------------------------------------------------------


def naive_trim(vector: list[float], density: float) -> list[float]:
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    kept = set(order[: int(density * len(vector))])
    return [value if i in kept else 0.0 for i, value in enumerate(vector)]


def naive_ties(
    base: list[float], vectors: list[list[float]], weight: list[float], density: list[float], scale: float
) -> list[float]:
    vectors = [naive_trim(v, p) for v, p in zip(vectors, density, strict=True)]
    merged = []
    for i, start in enumerate(base):
        parts = [w * v[i] for w, v in zip(weight, vectors, strict=True)]
        sign = 1.0 if sum(parts) >= 0 else -1.0
        agree = [k for k, part in enumerate(parts) if part * sign > 0]
        divisor = sum(weight[k] for k in agree)
        if abs(divisor) <= 0.01 * sum(abs(weight[k]) for k in agree):
            divisor = 1.0
        merged.append(start + scale * sum(parts[k] for k in agree) / divisor)
    return merged


@quick
@given(st.data())
def test_ties_is_its_definition(data: st.DataObject) -> None:
    size, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    row = st.lists(coarse, min_size=size, max_size=size)
    base, vectors = data.draw(row), [data.draw(row) for _ in range(count)]
    weight = [data.draw(st.sampled_from([-0.75, 0.0, 0.25, 0.5, 1.0])) for _ in range(count)]
    density = [data.draw(st.floats(0, 1)) for _ in range(count)]
    scale = data.draw(coarse)
    merged = ties(
        torch.tensor(base),
        [torch.tensor(v) for v in vectors],
        weight=tuple(weight),
        density=tuple(density),
        lambda_=scale,
    )
    expected = torch.tensor(naive_ties(base, vectors, weight, density, scale))
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


@quick
@given(st.lists(coarse, min_size=1, max_size=40), st.floats(0, 1))
def test_trimming_keeps_exactly_k_and_breaks_ties_by_lowest_index(
    values: list[float], density: float
) -> None:
    vector = torch.tensor(values)
    assert keep_largest(vector, density).tolist() == naive_trim(values, density)


def test_trimming_selects_alike_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch selection, used off the CPU, agrees with the numpy one used on it."""
    from evomerge.merging.methods import task_vectors

    class Elsewhere:
        type = "elsewhere"

    class Away(Tensor):
        device = Elsewhere()  # type: ignore[assignment]

    magnitudes = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float().abs()
    for kept in (1, 100, 250, 499):
        here = task_vectors._select(magnitudes, kept)
        away = task_vectors._select(magnitudes.as_subclass(Away), kept)
        assert here[0] == away[0]
        assert here[1].tolist() == away[1].tolist()


def test_a_density_too_small_for_one_element_keeps_nothing() -> None:
    base = torch.ones(3)
    assert torch.equal(ties(base, [base, base], weight=(1.0, 1.0), density=(0.3, 0.0)), base)


@pytest.mark.parametrize("second", [-0.5, -0.4999, -0.49])
def test_nearly_cancelling_weights_do_not_blow_ties_up(second: float) -> None:
    vectors = list(torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)))
    base = torch.zeros(1000)
    merged = ties(base, vectors, weight=(0.5, second), density=(1.0, 1.0))
    assert merged.abs().max() <= 110 * max(v.abs().max() for v in vectors)


def test_linear_refuses_to_normalise_weights_that_cancel() -> None:
    with pytest.raises(ConfigError, match=r"weights cancel.*\n.*\n.*sum 0\n.*normalize: false"):
        linear(None, [torch.ones(1)] * 2, weight=(1.0, -1.0))
    with pytest.raises(ConfigError, match="weights cancel"):
        linear(None, [torch.ones(1)] * 2, weight=(0.0, 0.0))
    assert linear(None, [torch.ones(1)] * 2, weight=(1.0, -1.0), normalize=False).item() == 0.0


def test_task_arithmetic_subtracts_with_negative_weights() -> None:
    vectors = [torch.tensor([2.0]), torch.tensor([3.0])]
    assert task_arithmetic(torch.ones(1), vectors, weight=(1.0, -1.0), lambda_=0.5).item() == 0.5
    normalised = task_arithmetic(torch.ones(1), vectors, weight=(1.0, 3.0), normalize=True)
    assert normalised.item() == pytest.approx(1 + 11 / 4)


def test_slerp_ends_are_the_models_and_the_middle_is_on_the_arc() -> None:
    first, second = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(None, [first, second], t=0.0), first)
    assert torch.equal(slerp(None, [first, second], t=1.0), second)
    a, b = (x / norm(x) for x in (first, second))
    middle = slerp(None, [a, b], t=0.25)
    angle = math.acos(cosines([a, b])[0][1])
    assert norm(middle) == pytest.approx(1.0, abs=1e-6)
    assert math.acos(cosines([a, middle])[0][1]) == pytest.approx(angle / 4, abs=1e-6)


def test_slerp_of_parallel_opposite_and_zero_tensors() -> None:
    x = torch.tensor([3.0, 4.0])
    assert torch.equal(slerp(None, [x, 2 * x], t=0.5), 1.5 * x)
    assert torch.equal(slerp(None, [x, -x], t=0.5), 0 * x)
    torch.testing.assert_close(slerp(None, [0 * x, x], t=0.5), x * math.sin(math.pi / 4))


def test_model_stock_follows_its_formula_and_survives_its_pole() -> None:
    base, *vectors = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).double()
    vectors = [v + base for v in vectors]
    pairs = [torch.cosine_similarity(vectors[i], vectors[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    c = sum(pairs) / 3
    expected = base + 3 * c / (1 + 2 * c) * sum(vectors) / 3
    merged = model_stock(base.float(), [v.float() for v in vectors])
    torch.testing.assert_close(merged, expected.float(), rtol=1e-5, atol=1e-6)
    opposite = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1e-4])]
    assert model_stock(torch.zeros(2), opposite).abs().max() <= 2


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_dare_keeps_the_share_it_says_and_the_mean(density: float) -> None:
    vector, count = torch.ones(20_000), 20_000
    merged = dare_linear(
        torch.zeros(count), [vector], weight=(1.0,), density=(density,), generators=generators(7, "w", ("a",))
    )
    error = 4 * math.sqrt(density * (1 - density) / count)
    assert abs((merged != 0).float().mean().item() - density) < error
    assert abs(merged.mean().item() - 1.0) < error / density
    assert merged.unique().tolist() == [0.0, pytest.approx(1 / density)]


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_of_density_one_drops_nothing_and_of_zero_everything(method: Any) -> None:
    base, vector = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    draws = generators(0, "w", ("a",))
    assert torch.equal(method(base, [vector], weight=(1.0,), density=(1.0,), generators=draws), base + vector)
    assert torch.equal(method(base, [vector], weight=(1.0,), density=(0.0,), generators=draws), base)
    plain = method(base, [vector], weight=(1.0,), density=(0.5,), generators=draws, rescale=False)
    assert set((plain == base + vector).tolist()) == {True, False}


def test_draws_belong_to_seed_tensor_and_source_alone() -> None:
    def first(seed: int, tensor: str, sources: tuple[str, ...]) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in generators(seed, tensor, sources)]

    a, b = first(0, "w", ("a", "b"))
    assert first(0, "w", ("b", "c", "a"))[::2] == [b, a]
    twice = first(0, "w", ("a", "a"))
    others = [first(1, "w", ("a",))[0], first(0, "v", ("a",))[0], *twice[1:]]
    assert twice[0] == a
    assert len({a, b, *others}) == 5


def test_whole_tensor_sums_are_exact_over_blocks() -> None:
    values = torch.randn(3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    exact = math.fsum((values.double() ** 2).tolist())
    assert gram([values])[0][0] == pytest.approx(exact, rel=1e-14)
    assert norm(torch.zeros(0)) == 0.0
    assert cosines([torch.zeros(2), torch.ones(2)]) == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]
    assert np.isfinite(norm(torch.full((2,), 3e38)))
