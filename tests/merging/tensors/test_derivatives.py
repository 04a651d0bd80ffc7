"""Derivatives of merged tensors by their parameters, against finite differences of the merge itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging import methods
from evomerge.merging.live.live_weights import Spread, gradient_at
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.tensors.derivatives import added, inner, parameters, supports, tensor_derivatives
from evomerge.merging.tensors.inputs import FileInputs
from evomerge.merging.tensors.merge_tensor import merge_tensor
from tests.examples import examples

TENSORS = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight")
HELD = {"density", "gamma", "tol"}
"""Parameters that only select, or only say when to stop."""

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Setting]]] = {
    "linear": ("linear", ("a", "b", "c"), {"weight": (1.0, 0.25, -0.5)}),
    "linear, not normalised": ("linear", ("a", "b"), {"weight": (0.7, 0.1), "normalize": False}),
    "task arithmetic": ("task_arithmetic", ("a", "b", "c"), {"weight": (0.4, 0.0, -0.7), "lambda": 1.3}),
    "task arithmetic, normalised": (
        "task_arithmetic",
        ("a", "b"),
        {"weight": (0.4, 0.9), "normalize": True, "lambda": 0.7},
    ),
    "ties": ("ties", ("a", "b", "c"), {"weight": (1.0, 0.6, 0.8), "density": (0.5, 0.3, 1.0), "lambda": 0.8}),
    "ties, a sum": ("ties", ("a", "b"), {"weight": (0.5, 0.4), "density": 0.6, "normalize": False}),
    "ties, mixed signs": ("ties", ("a", "b", "c"), {"weight": (1.0, -0.4, 0.8), "density": 0.7}),
    "slerp": ("slerp", ("a", "b"), {"t": 0.3}),
    "dare_linear": ("dare_linear", ("a", "b"), {"weight": (0.5, 0.8), "density": 0.5}),
    "breadcrumbs_ties": ("breadcrumbs_ties", ("a", "b", "c"), {"weight": (0.5, 0.8, 1.0), "density": 0.6}),
    "nuslerp": ("nuslerp", ("a", "b"), {"weight": (0.5, 0.8)}),
    "multislerp": ("multislerp", ("a", "b", "c"), {"weight": (0.5, 0.8, 0.2)}),
}


def recipe_of(
    models: Mapping[str, str], method: str, sources: tuple[str, ...], given: Mapping[str, Setting]
) -> Recipe:
    group = TensorGroup(method=method, sources=sources, parameters=given)
    return Recipe(models=models, base="base", groups=(group,), dtype="float32", seed=3)


def moved(recipe: Recipe, name: str, index: int, by: float) -> Recipe:
    (group,) = recipe.groups
    value: Any = group.parameters[name]
    if isinstance(value, tuple):
        value = (*value[:index], value[index] + by, *value[index + 1 :])
    else:
        value += by
    group = dataclasses.replace(group, parameters={**group.parameters, name: value})
    return dataclasses.replace(recipe, groups=(group,))


def differences(
    recipe: Recipe, name: str, tensor: str, gradient: torch.Tensor, inputs: FileInputs
) -> list[float]:
    """Return <gradient, dW/dp> by central differences of the merged tensor, for one parameter."""
    elects = "ties" in recipe.groups[0].method and gradient.numel() > 100
    step = 1e-4 if elects else 1e-3  # small where one of many elected signs may turn
    found = []
    for index in range(np.size(recipe.groups[0].parameters[name])):
        low, high = (
            merge_tensor(moved(recipe, name, index, by), tensor, inputs).double() for by in (-step, step)
        )
        found.append(float((gradient * (high - low)).sum()) / (2 * step))
    return found


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_merge(case: str, tensor: str, models: dict[str, str]) -> None:
    recipe = recipe_of(models, *CASES[case])
    inputs = FileInputs(open_sources(models, "base"))
    shape = merge_tensor(recipe, tensor, inputs).shape
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = tensor_derivatives(recipe, tensor, gradient.numpy(), inputs)
    assert found is not None
    assert all(value == 0.0 for name in HELD & set(found) for value in found[name])
    free = [name for name in parameters(recipe.groups[0]) if name not in HELD]
    wanted = {name: differences(recipe, name, tensor, gradient, inputs) for name in free}
    size = max(abs(value) for values in wanted.values() for value in values)
    assert size > 1e-3
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, abs=0.02 * size), name


@settings(max_examples=examples(30), deadline=None)
@given(
    weight=st.tuples(*[st.floats(-2, 2)] * 3),
    scale=st.floats(-2, 2),
    values=st.lists(st.floats(-1, 1, width=32), min_size=12, max_size=12),
)
def test_task_arithmetic_is_linear_in_its_weights(
    weight: tuple[float, ...], scale: float, values: list[float], models: dict[str, str]
) -> None:
    """So that its derivative is the inner product with each task vector, whatever the weights."""
    inputs = FileInputs(open_sources(models, "base"))
    tensor = TENSORS[1]
    gradient = np.resize(np.array(values, dtype=np.float32), 16)
    recipe = recipe_of(models, "task_arithmetic", ("a", "b", "c"), {"weight": weight, "lambda": scale})
    found = tensor_derivatives(recipe, tensor, gradient, inputs)
    base = merge_tensor(recipe_of(models, "linear", ("base",), {}), tensor, inputs)
    each = [
        inner(gradient, (merge_tensor(recipe_of(models, "linear", (s,), {}), tensor, inputs) - base).numpy())
        for s in "abc"
    ]
    assert found is not None
    assert found["weight"] == pytest.approx([scale * one for one in each], abs=1e-6)
    assert found["lambda"] == pytest.approx(
        [sum(w * one for w, one in zip(weight, each, strict=True))], abs=1e-6
    )


def test_methods_that_are_no_blends_have_none(models: dict[str, str]) -> None:
    assert [name for name in methods.names() if not supports(name)] == [
        "arcee_fusion", "core_space", "della", "della_linear", "fisher", "iso_c", "iso_cts",
        "nearswap", "ram", "ramplus_tl", "regmean", "sce", "tsv", "wudi",
    ]  # fmt: skip
    recipe = recipe_of(models, "sce", ("a", "b"), {})
    inputs = FileInputs(open_sources(models, "base"))
    assert tensor_derivatives(recipe, TENSORS[1], np.ones(16, dtype=np.float32), inputs) is None
    filtered = recipe_of(models, "model_stock", ("a", "b"), {"filter_wise": True})
    assert tensor_derivatives(filtered, TENSORS[1], np.ones(16, dtype=np.float32), inputs) is None


def test_sums_do_not_depend_on_where_they_start() -> None:
    values = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    assert inner(values, values) == pytest.approx(float((values.astype(np.float64) ** 2).sum()), rel=1e-12)
    assert added([]) == {}


def test_a_backward_pass_through_the_live_model(models: dict[str, str], adapters: dict[str, str]) -> None:
    """The whole way: loss -> live weights (tied ones too) -> tensors -> parameters of each group."""
    named = {"base": models["base"], "a": models["a"], "lora": f"{models['base']}+{adapters['plain']}"}
    bench = Workbench(named, "base")
    ids = torch.arange(4, 20).reshape(2, 8)

    def recipe(attn: tuple[float, float], rest: tuple[float, float]) -> Recipe:
        shared = {"method": "task_arithmetic", "sources": ("a", "lora")}
        groups = (
            TensorGroup(**shared, layers=(1,), match=("attn",), parameters={"weight": attn}),  # type: ignore[arg-type]
            TensorGroup(**shared, parameters={"weight": rest}),  # type: ignore[arg-type]
        )
        return Recipe(models=named, base="base", groups=groups, dtype="float32")

    def loss(attn: tuple[float, float], rest: tuple[float, float]) -> torch.Tensor:
        bench.load(recipe(attn, rest))
        return bench.model(input_ids=ids).logits.square().sum()

    at = ((0.5, 0.3), (0.2, 0.8))
    bench.model.requires_grad_(True)
    loss(*at).backward()
    first, second = bench.derivatives(recipe(*at))
    bench.model.requires_grad_(False)
    step = 1e-2
    for place, found in ((0, first), (1, second)):
        for index in (0, 1):
            ends = []
            for by in (step, -step):
                point = [list(each) for each in at]
                point[place][index] += by
                ends.append(float(loss(tuple(point[0]), tuple(point[1])).double()))  # type: ignore[arg-type]
            wanted = (ends[0] - ends[1]) / (2 * step)
            assert found["weight"][index] == pytest.approx(wanted, rel=0.02, abs=2e-3)


def test_the_gradient_of_a_tensor_whose_elements_lie_apart() -> None:
    live = torch.nn.Parameter(torch.zeros(6))
    live.grad = torch.arange(6.0)
    parts = (
        (live.data, torch.tensor([4, 1]), torch.tensor([0, 2])),
        (live.data, torch.tensor([5]), torch.tensor([1])),
    )
    by_storage = {live.untyped_storage().data_ptr(): live}
    assert gradient_at(Spread(parts=parts), by_storage).tolist() == [4.0, 5.0, 1.0]
    assert gradient_at(live.data[2:4], by_storage).tolist() == [2.0, 3.0]
    live.grad = None
    assert gradient_at(live.data[2:4], by_storage).tolist() == [0.0, 0.0]
