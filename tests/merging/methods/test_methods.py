"""The contract of merge methods, one row per method, and what is special about each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.methods.averaging import linear, model_stock
from evomerge.merging.methods.blend import Ranks, keep_ranks
from evomerge.merging.methods.declaration import Method, Parameter
from evomerge.merging.methods.draws import keys, short, uniform
from evomerge.merging.methods.reduction import BLOCK, cosines, gram, norm
from evomerge.merging.methods.selection import Spectrum, boundary
from evomerge.merging.methods.sparse import breadcrumbs, della, della_linear, keep_by_rank, middle_ranks
from evomerge.merging.methods.spherical import slerp
from evomerge.merging.methods.task_vectors import (
    dare_linear,
    dare_ties,
    task_arithmetic,
    ties,
)
from evomerge.merging.recipe import TensorGroup
from evomerge.merging.tensors.application import apply
from tests.examples import examples

ALONE = " without a base"
ALL = (
    *methods.names(),
    *(name + ALONE for name in methods.names() if methods.get(name).inputs == "either"),
)
"""One row per method, two for those that work with and without a base."""


def declared(row: str) -> Method:
    return methods.get(row.removesuffix(ALONE))


CHAINS = ("slerp", "chained_slerp")
SYMMETRIC = [row for row in ALL if row not in CHAINS and declared(row).max_sources != 1]
"""Methods that treat their sources alike."""
WEIGHTED = [row for row in ALL if "weight" in declared(row).parameters]
ISOTROPIC = ("iso_c", "iso_cts")
"""Methods that change a matrix even if there is only one source."""
NAMES = ("a", "b", "c")
TENSOR = "layers.0.w"
"""A tensor of a layer, because some methods treat the matrices of layers in a way of their own."""
quick = settings(max_examples=examples(100), deadline=None)

coarse = st.integers(-8, 8).map(lambda n: n / 8)
"""Eighths: many exact ties and zeros, as between bfloat16 checkpoints."""


def sources_of(method: str) -> tuple[str, ...]:
    return NAMES[: declared(method).max_sources or len(NAMES)]


def run(
    method: str, base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], seed: int = 0
) -> Tensor:
    """Merge whole models with a method, whatever it wants as input."""
    name = declared(method).name
    group = TensorGroup(method=name, sources=NAMES[: len(models)], parameters=parameters)
    given = None if method.endswith(ALONE) else "base"
    inputs = list(models)
    if declared(method).uses_task_vectors(given):
        inputs = [model - base for model in models]
    files = measured(method, models)
    return apply(group, base if given else None, inputs, seed=seed, tensor=TENSOR, files=files)


def measured(method: str, models: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return what a method takes of its sources beside their weights."""
    if declared(method).file != "gram":
        return sure(models)
    if models[0].dim() != 2 or models[0].shape[1] > 2000:
        return [None] * len(models)
    return [model.T @ model for model in models]


def sure(models: Sequence[Tensor]) -> list[Tensor]:
    """Return a Fisher for each model that belongs to it whatever the order, zeros among them."""
    return [(model.abs() - 0.3).clamp(min=0.0) for model in models]


@st.composite
def cases(draw: st.DrawFn, count: int | None = None) -> tuple[str, Tensor, list[Tensor], dict[str, Any]]:
    """A method, a base, models, and any legal parameters."""
    method = draw(st.sampled_from(ALL))
    number = declared(method).max_sources or draw(st.integers(2, 3))
    size = draw(st.integers(1, 12))
    values = st.lists(coarse, min_size=size, max_size=size).map(torch.tensor)
    parameters: dict[str, Any] = {}
    for p in declared(method).parameters.values():
        low, high = max(p.low, -1e4), min(p.high, 1e4)
        one: st.SearchStrategy[Any] = st.booleans() if p.kind == "flag" else st.floats(low, high)
        if p.kind == "integer":
            one = st.integers(int(low), int(high))
        parameters[p.name] = tuple(draw(one) for _ in range(number)) if p.per_source else draw(one)
    return method, draw(values), [draw(values) for _ in range(number)], parameters


TINY = (5e-324, 1e-310, 2.0**-149, 1e-40, 2.0**-126, 2.0**-120, 1e-30, 1e-16)
"""Subnormal in float64 and in float32, at the border, and others whose squares or reciprocals may be lost."""
extreme = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-3, *TINY, *(-w for w in TINY)])
scattered = st.one_of(coarse, st.sampled_from([1e-45, -1e-45, 1e-38, 1e-25, -1e-19, 1e-8, 1e15, -1e15]))


@st.composite
def extremes(draw: st.DrawFn, method: str) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """A base and models of any scale, and numbers of any scale as parameters of a method."""
    number = declared(method).max_sources or draw(st.integers(2, 3))
    size = draw(st.integers(1, 6))
    values = st.lists(scattered, min_size=size, max_size=size).map(torch.tensor)
    parameters: dict[str, Any] = {}
    for p in declared(method).parameters.values():
        one: st.SearchStrategy[Any] = st.booleans() if p.kind == "flag" else extreme.map(within(p))
        if p.kind == "integer":
            one = st.integers(int(p.low), int(p.high))
        parameters[p.name] = tuple(draw(one) for _ in range(number)) if p.per_source else draw(one)
    return draw(values), [draw(values) for _ in range(number)], parameters


def within(parameter: Parameter) -> Any:
    return lambda value: min(max(value, parameter.low), parameter.high)


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_numbers_of_any_scale_give_finite_weights(method: str, data: st.DataObject) -> None:
    base, models, parameters = data.draw(extremes(method))
    weight = parameters.get("weight", (1.0,))
    if method == "linear" and abs(math.fsum(weight)) <= 1e-3 * math.fsum(map(abs, weight)):
        with pytest.raises(ConfigError, match="the weights cancel"):
            run(method, base, models, {**parameters, "normalize": True})
        parameters["normalize"] = False
    assert run(method, base, models, parameters).isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name in methods.names() if "weight" in methods.get(name).parameters]
)
@pytest.mark.parametrize("weight", [1.1e4, -3.4e38, 1e300, math.inf, math.nan])
def test_weights_that_can_only_be_a_slip_are_refused(name: str, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight is (out of range|not a number)"):
        TensorGroup(method=name, sources=NAMES[:2], parameters={"weight": (1.0, weight)})


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
@pytest.mark.parametrize("weight", [2.0**-149, 1e-40, 2.0**-126, 2.0**-119, -(2.0**-119), 1e-30])
def test_a_mean_by_tiny_weights_is_that_of_one_source_or_nothing(method: str, weight: float) -> None:
    models = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])]
    merged = run(method, torch.zeros(2), models, {"weight": (weight, 0.0), "normalize": True})
    expected = models[0] if abs(weight) >= 2.0**-119 else torch.zeros(2)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_direction_far_too_short_to_count_is_none(method: str) -> None:
    models = [torch.tensor([1e10, 0.0]), torch.tensor([0.0, 2e-30])]
    merged = run(method + ALONE if method == "multislerp" else method, torch.zeros(2), models, {})
    torch.testing.assert_close(merged, torch.tensor([5e9, 0.0]))


@quick
@given(cases())
@example(
    (
        "dare_ties",
        torch.zeros(1),
        [torch.ones(1), torch.zeros(1), torch.zeros(1)],
        {"weight": (1.4e-45, 0.0, 0.0), "density": (1.0, 1.0, 1.0), "normalize": True},
    )
)
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


@pytest.mark.parametrize("method", [row for row in WEIGHTED if row not in ISOTROPIC])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_hot_weights_give_that_model(method: str, normalize: bool) -> None:
    base, *models = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    models = models[: len(sources_of(method))]
    parameters: dict[str, Any] = {"weight": (0.0, 1.0, 0.0)[: len(models)]}
    if "normalize" in declared(method).parameters:
        parameters["normalize"] = normalize
    merged = run(method, base, models, parameters)
    torch.testing.assert_close(merged, models[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_sources_does_not_matter(method: str) -> None:
    base, *models = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(2))
    models = models[: len(sources_of(method))]
    parameters: dict[str, Any] = {"weight": (0.2, 0.5, 0.9), "density": (0.3, 0.6, 1.0)}
    parameters |= {"gamma": (0.1, 0.0, 0.2), "epsilon": (0.1, 0.2, 0.0)}
    per_source = {p.name for p in declared(method).parameters.values() if p.per_source}
    parameters = {k: v for k, v in parameters.items() if k in per_source}
    given = None if method.endswith(ALONE) else "base"
    results = []
    for order in ((0, 1, 2), (2, 0, 1)) if len(models) == 3 else ((0, 1), (1, 0)):
        group = TensorGroup(
            method=declared(method).name,
            sources=tuple(NAMES[i] for i in order),
            parameters={k: tuple(v[i] for i in order) for k, v in parameters.items()},
        )
        vectors = declared(method).uses_task_vectors(given)
        inputs = [models[i] - base if vectors else models[i] for i in order]
        files = measured(method, [models[i] for i in order])
        results.append(apply(group, base if given else None, inputs, seed=3, tensor=TENSOR, files=files))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_empty_and_scalar_tensors_pass(method: str) -> None:
    flags = {"filter_wise": True} if "filter_wise" in declared(method).parameters else {}
    for shape in ((0,), (), (2, 0), (0, 3)):
        base = torch.ones(shape)
        for parameters in ({}, flags):
            assert run(method, base, [base + 1 for _ in sources_of(method)], parameters).shape == shape


@pytest.mark.parametrize(
    "shape",
    [(301, 999), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(300_007,), (7, 40_001)])],
)
@pytest.mark.parametrize("method", ALL)
def test_the_number_of_threads_changes_no_bit(method: str, shape: tuple[int, ...]) -> None:
    base, *models = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    models = [(0.1 * m + base) for m in models][: len(sources_of(method))]
    uneven = {"density": 0.37, "select_topk": 0.4, "filter_wise": True, "t": 0.03}
    parameters = {k: v for k, v in uneven.items() if k in declared(method).parameters}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(method, base, models, parameters))
    assert torch.equal(*results[:2])
    assert torch.equal(*results[1:])


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
    assert keep_ranks(vector, Ranks(last=int(density * len(values)))).tolist() == naive_trim(values, density)


@quick
@given(st.lists(st.one_of(coarse, st.floats(-4, 4, width=32)), min_size=1, max_size=200), st.integers(0, 200))
def test_a_spectrum_knows_every_boundary(values: list[float], kept: int) -> None:
    magnitudes = np.abs(np.array(values, dtype=np.float32))
    expected = boundary(magnitudes, kept)
    assert Spectrum(magnitudes.copy()).boundary(kept) == expected
    repeated = np.tile(magnitudes, 4)  # few distinct ones, so kept in the shorter form
    assert Spectrum(repeated).boundary(4 * kept).magnitude == expected.magnitude


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
    angle = math.acos(cosines(gram([a, b]))[0][1])
    assert norm(middle) == pytest.approx(1.0, abs=1e-6)
    assert math.acos(cosines(gram([a, middle]))[0][1]) == pytest.approx(angle / 4, abs=1e-6)


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
        torch.zeros(count), [vector], weight=(1.0,), density=(density,), keys=keys(7, "w", ("a",))
    )
    error = 4 * math.sqrt(density * (1 - density) / count)
    assert abs((merged != 0).float().mean().item() - density) < error
    assert abs(merged.mean().item() - 1.0) < error / density
    assert merged.unique().tolist() == [0.0, pytest.approx(1 / density, rel=1e-3)]


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_of_density_one_drops_nothing_and_of_zero_everything(method: Any) -> None:
    base, vector = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    draws = keys(0, "w", ("a",))
    assert torch.equal(method(base, [vector], weight=(1.0,), density=(1.0,), keys=draws), base + vector)
    assert torch.equal(method(base, [vector], weight=(1.0,), density=(0.0,), keys=draws), base)
    plain = method(base, [vector], weight=(1.0,), density=(0.5,), keys=draws, rescale=False)
    assert set((plain == base + vector).tolist()) == {True, False}


def test_draws_belong_to_seed_tensor_and_source_alone() -> None:
    def first(seed: int, tensor: str, sources: tuple[str, ...]) -> list[float]:
        return [uniform(key, 1).item() for key in keys(seed, tensor, sources)]

    a, b = first(0, "w", ("a", "b"))
    assert first(0, "w", ("b", "c", "a"))[::2] == [b, a]
    twice = first(0, "w", ("a", "a"))
    others = [first(1, "w", ("a",))[0], first(0, "v", ("a",))[0], *twice[1:]]
    assert twice[0] == a
    assert len({a, b, *others}) == 5


@pytest.mark.parametrize("draw", [lambda key, n: short(key, n) / 65536, uniform])
def test_draws_are_uniform_and_independent_of_their_neighbours_and_of_other_keys(draw: Any) -> None:
    """Chi-squared over 64 bins and correlations, at 5 standard errors."""
    count = 1_000_000
    one, two = (draw(key, count) for key in keys(3, "w", ("a", "b")))
    expected = count / 64
    for values in (one, two):
        chi2 = ((np.histogram(values, 64, (0, 1))[0] - expected) ** 2 / expected).sum()
        assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    pairs = [(one, two), *((one[lag:], one[:-lag]) for lag in (1, 2, 768, 1024, 2048))]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(count)
    joint = np.histogram2d(one, two, 8, [(0, 1), (0, 1)])[0]
    assert abs(((joint - count / 64) ** 2 / (count / 64)).sum() - 63) < 5 * math.sqrt(2 * 63)
    assert draw(7, 5000)[:10].tolist() == draw(7, 10).tolist()


def test_whole_tensor_sums_are_exact_over_blocks() -> None:
    values = torch.randn(3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    exact = math.fsum((values.double() ** 2).tolist())
    assert gram([values])[0][0] == pytest.approx(exact, rel=1e-14)
    assert norm(torch.zeros(0)) == 0.0
    assert cosines(gram([torch.zeros(2), torch.ones(2)])) == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]
    assert np.isfinite(norm(torch.full((2,), 3e38)))


# Thinning by rank ----------------------------------------------------------------------------------


def naive_middle(vector: list[float], density: float, gamma: float) -> list[float]:
    count = len(vector)
    top = int(gamma * count)
    bottom = count - int(density * count) - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    order = sorted(range(count), key=lambda i: (abs(vector[i]), -i))
    kept = set(order[bottom : count - top])
    return [value if i in kept else 0.0 for i, value in enumerate(vector)]


@quick
@given(st.lists(coarse, min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_breadcrumbs_keep_exactly_the_middle(values: list[float], density: float, gamma: float) -> None:
    ranks = middle_ranks(len(values), density, gamma)
    assert keep_ranks(torch.tensor(values), ranks).tolist() == naive_middle(values, density, gamma)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_of_a_tensor_too_small_for_an_outlier_keep_its_largest(method: str) -> None:
    """mergekit zeroes every tensor with gamma * n < 1."""
    base, model = torch.zeros(8), torch.arange(8.0)
    merged = run(method, base, [model], {"density": 0.5, "gamma": 0.1})
    assert merged.tolist() == [0, 0, 0, 0, 4, 5, 6, 7]


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "ties"])
def test_a_density_that_leaves_no_element_gives_the_base(method: str) -> None:
    base = torch.ones(3)
    assert torch.equal(run(method, base, [base + 1] * 2, {"density": 0.0}), base)


def test_breadcrumbs_are_task_arithmetic_of_the_middle() -> None:
    base, *vectors = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    merged = breadcrumbs(base, vectors, weight=(0.5, -2.0), density=(0.4, 0.9), gamma=(0.2, 0.05))
    middle = [
        torch.tensor(naive_middle(v.tolist(), p, g))
        for v, p, g in zip(vectors, (0.4, 0.9), (0.2, 0.05), strict=True)
    ]
    torch.testing.assert_close(merged, base + 0.5 * middle[0] - 2.0 * middle[1])


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.2), (0.9, 0.15), (0.1, 0.15), (0.5, 1.0), (0.7, 0.0)]
)
def test_della_keeps_by_rank_and_keeps_the_mean(density: float, epsilon: float) -> None:
    """Density 0.9 with the default epsilon stops mergekit."""
    columns, rows = 5, 40_000
    vector = torch.tensor([3.0, -1.0, 2.0, -5.0, 4.0]).repeat(rows, 1)
    (key,) = keys(7, "w", ("a",))
    merged = keep_by_rank(vector, density, epsilon, key, True)
    width = min(epsilon, density, 1 - density)
    chance = density - width + 2 * width * torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0]) / (columns - 1)
    error = 4 * (chance * (1 - chance) / rows).sqrt() + 1e-6
    assert ((merged != 0).float().mean(0) - chance).abs().le(error).all()
    assert (merged != 0).float().mean().item() == pytest.approx(density, abs=0.01)
    possible = chance > 1e-6
    mean = merged.mean(0) / vector[0]
    assert (mean - 1).abs()[possible].le((error / chance)[possible] + 1e-6).all()
    assert not merged[:, ~possible].any()


def test_della_ranks_equal_magnitudes_by_lowest_index() -> None:
    vector = torch.tensor([[1.0, -1.0, 1.0, 1.0]]).repeat(20_000, 1)
    (key,) = keys(1, "w", ("a",))
    share = (keep_by_rank(vector, 0.5, 0.5, key, False) != 0).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("method", [della, della_linear])
def test_della_masks_belong_to_the_keys(method: Any) -> None:
    base, vector = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))

    def merged(seed: int) -> Tensor:
        draws = keys(seed, "w", ("a",))
        found: Tensor = method(
            base, [vector], weight=(1.0,), density=(0.5,), epsilon=(0.1,), keys=draws, rescale=False
        )
        return found

    before = torch.random.get_rng_state()
    assert torch.equal(merged(1), merged(1))
    assert not torch.equal(merged(1), merged(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set((merged(1) == base).flatten().tolist()) == {True, False}
    kept = merged(1) != base
    assert torch.equal(merged(1)[kept], (base + vector)[kept])


# Under other names ---------------------------------------------------------------------------------


def test_a_uniform_soup_is_linear_by_default() -> None:
    base, *models = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run("linear", base, models, {}), sum(models) / 3)


def test_task_vectors_are_added_negated_and_scaled() -> None:
    base, a, b = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    close = torch.testing.assert_close
    close(run("task_arithmetic", base, [a, b], {}), base + (a - base) + (b - base))
    close(run("task_arithmetic", base, [a], {"weight": -1.0}), base - (a - base))
    close(run("task_arithmetic", base, [a, b], {"weight": (1.0, -0.5)}), base + (a - base) - 0.5 * (b - base))
    close(run("task_arithmetic", base, [a], {"weight": 0.3}), base + 0.3 * (a - base))
    close(run("task_arithmetic", base, [a, b], {"lambda": 0.3}), base + 0.3 * (a + b - 2 * base))
