"""Candidates merged on a device have the processor's bits; Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.methods.draws import CHUNK, STEPS, keys, short
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.arrays import WeightArray, computable, of_tensor
from evomerge.merging.tensors import on_device
from evomerge.merging.tensors.inputs import Difference, TensorKey, WarmInputs
from evomerge.merging.tensors.kernels import Operand
from evomerge.merging.tensors.merge_tensor import NonFiniteWeights, merge_tensor
from evomerge.merging.tensors.on_device import DeviceMerger, available, merges_there

pytestmark = pytest.mark.skipif(not available("cpu"), reason="no Triton")

ON_DEVICE = {
    *("breadcrumbs", "breadcrumbs_ties", "chained_slerp", "dare_linear", "dare_ties", "karcher", "linear"),
    *("model_stock", "multislerp", "nuslerp", "passthrough", "slerp", "task_arithmetic", "ties"),
}
"""Methods that are blends, which docs/devices.md lists."""
NAME = "model.layers.0.mlp.up_proj.weight"
SIZE = CHUNK + 14


class Held(WarmInputs):
    """Tensors in memory, as a search holds those of files. computed: names of sources that are adapters."""

    def __init__(self, tensors: Mapping[str, Tensor], computed: tuple[str, ...] = ()) -> None:
        super().__init__({})
        self._tensors, self._adapters = tensors, computed
        self.reads = 0

    def operand(self, source: str, tensor: str, base: TensorKey | None) -> Operand:
        weights = self.weights(((source, tensor), base))
        if weights is None:
            return Operand(of_tensor(torch.zeros(self._tensors["base"].shape)), False)
        there = self.computed(((source, tensor), base))
        return Operand(computable(weights), base is not None and not there)

    def copied(self, recipe: Recipe, tensor: str) -> WeightArray | None:
        return None

    def computed(self, place: Difference) -> bool:
        return place[1] is not None and place[0][0] in self._adapters

    def weights(self, place: Difference) -> WeightArray | None:
        self.reads += 1
        found = self._tensors[place[0][0]]
        if self.computed(place):
            return of_tensor(found.float()) if found.any() else None
        return of_tensor(found)


def models(*dtypes: torch.dtype, size: int = SIZE, seed: int = 0, coarse: bool = True) -> dict[str, Tensor]:
    """Return a base and sources; coarse ones have few magnitudes, so that many tie, and many zeros."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, dtype in zip(("base", "a", "b", "c", "d", "e"), dtypes, strict=False):
        values = torch.randn(size, generator=random)
        values = (values * 2).round() / 4 if coarse else values
        values[:: max(7, size // 9)] *= 1e-39  # subnormal
        made[name] = values.to(dtype)
    return made


def recipe_of(method: str, sources: str, dtype: str = "bfloat16", **parameters: Any) -> Recipe:
    places = {name: f"/models/{name}" for name in ("base", *sources)}
    group = TensorGroup(method=method, sources=tuple(sources), parameters=parameters)
    return Recipe(models=places, base="base", groups=(group,), dtype=dtype, seed=5)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def assert_same(recipe: Recipe, inputs: Held, live: torch.dtype, **options: Any) -> DeviceMerger:
    """Merge on the device and on the processor, and compare bits."""
    size = len(inputs._tensors["base"])
    expected, place = torch.zeros(size, dtype=live), torch.zeros(size, dtype=live)
    merge_tensor(recipe, NAME, inputs, out=expected)
    merger = DeviceMerger(inputs, "cpu", **options)
    assert merger.merge(recipe, {NAME: place}, {NAME: size}) == []
    assert same_bits(place, expected)
    return merger


TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@pytest.mark.parametrize("method", sorted(ON_DEVICE))
def test_every_blend_has_the_bits_of_the_processor(method: str) -> None:
    declared = methods.get(method)
    sources = "abc"[: declared.max_sources or 3]
    chosen = {"density": 0.37, "gamma": 0.1, "weight": (0.7, 0.45, -0.6)[: len(sources)], "lambda": 0.9}
    if method in ("chained_slerp", "multislerp", "nuslerp"):
        chosen["weight"] = (0.7, 0.45, 0.6)[: len(sources)]
    parameters = {name: value for name, value in chosen.items() if name in declared.parameters}
    turn = sorted(ON_DEVICE).index(method)
    stored = [list(TYPES.values())[(turn + i) % 3] for i in range(4)]
    dtype, live = list(TYPES)[turn % 3], list(TYPES.values())[(turn // 3) % 3]
    assert_same(recipe_of(method, sources, dtype, **parameters), Held(models(*stored)), live)


def test_only_blends_are_merged_on_the_device() -> None:
    blends = {name for name in methods.names() if methods.get(name).blend is not None}
    assert blends == ON_DEVICE
    page = (Path(__file__).parents[3] / "docs" / "devices.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| the GPU |"))
    assert set(re.findall(r"`(\w+)`", row)) == ON_DEVICE
    held = Held(models(*[torch.bfloat16] * 4))
    merger, place = DeviceMerger(held, "cpu"), {NAME: torch.zeros(SIZE)}
    for method in ("della", "sce", "nearswap"):
        recipe = recipe_of(method, "a")
        assert merger.merge(recipe, place, {NAME: SIZE}) == [NAME]
    cancelling = recipe_of("linear", "ab", weight=(1.0, -1.0))  # whose error is the processor's
    assert merger.merge(cancelling, place, {NAME: SIZE}) == [NAME]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_blend_has_the_bits_of_the_processor(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    method = data.draw(st.sampled_from(["breadcrumbs_ties", "dare_ties", "linear", "ties", "breadcrumbs"]))
    several = {
        "weight": st.sampled_from([-1.5, -0.3, 0.0, 0.3, 0.31, 1.0, 1e-40, 1.1e-35]),
        "density": st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9999, 1.0]),
        "gamma": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    }
    declared = methods.get(method).parameters
    parameters: dict[str, Any] = {
        name: tuple(data.draw(values) for _ in range(count))
        for name, values in several.items()
        if name in declared
    }
    if "normalize" in declared:
        parameters["normalize"] = data.draw(st.booleans()) and method != "linear"
    if "lambda" in declared:
        parameters["lambda"] = data.draw(st.sampled_from([1.0, 0.7, -2.0]))
    stored = data.draw(st.lists(st.sampled_from(list(TYPES.values())), min_size=6, max_size=6))
    held = models(
        *stored,
        size=data.draw(st.sampled_from([1, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 13])),
        seed=data.draw(st.integers(0, 99)),
        coarse=data.draw(st.booleans()),
    )
    adapters = ("a", "c") if data.draw(st.booleans()) else ()
    recipe = recipe_of(method, "abcde"[:count], data.draw(st.sampled_from(list(TYPES))), **parameters)
    assert_same(recipe, Held(held, adapters), data.draw(st.sampled_from(list(TYPES.values()))))


@pytest.mark.parametrize("share", [0.25, 0.99999, 1.0])
def test_masks_are_those_of_the_draws(share: float) -> None:
    size = 3 * CHUNK + 5
    held = Held({"base": torch.zeros(size), "a": torch.ones(size)})
    recipe = recipe_of("dare_linear", "a", "float32", density=share, rescale=False)
    place = torch.empty(size)
    DeviceMerger(held, "cpu").merge(recipe, {NAME: place}, {NAME: size})
    (key,) = keys(recipe.seed, NAME, ("a",))
    assert torch.equal(place.bool(), torch.from_numpy(short(key, size) < round(share * STEPS)))


def spares(*answers: bool) -> Callable[[], bool]:
    waiting = iter(answers)
    return lambda: next(waiting, False)


@pytest.mark.parametrize(
    ("answers", "kept"), [((True,) * 9, 3), ((), 0), ((False, True), 1)], ids=["kept", "sent", "mixed"]
)
def test_sources_are_kept_where_they_fit_and_else_sent_again(answers: tuple[bool, ...], kept: int) -> None:
    held = Held(models(*[torch.bfloat16] * 3))
    recipe = recipe_of("ties", "ab", density=0.4)
    merger = assert_same(recipe, held, torch.bfloat16, spare=spares(*answers))
    assert merger.nbytes == kept * SIZE * 2
    before, place = held.reads, torch.zeros(SIZE, dtype=torch.bfloat16)
    merger.merge(recipe, {NAME: place}, {NAME: SIZE})
    assert held.reads - before == 3 - kept
    assert merger.give_way() == (kept > 0)
    again = torch.zeros(SIZE, dtype=torch.bfloat16)
    merger.merge(recipe, {NAME: again}, {NAME: SIZE})
    assert merger.nbytes == 0
    assert same_bits(place, again)


def test_models_and_their_task_vectors_are_kept_once() -> None:
    held = Held(models(*[torch.bfloat16] * 3))
    merger, place = DeviceMerger(held, "cpu"), {NAME: torch.zeros(SIZE)}
    for method in ("linear", "task_arithmetic"):
        assert merger.merge(recipe_of(method, "ab"), place, {NAME: SIZE}) == []
    assert merger.nbytes == 3 * SIZE * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_is_left_to_the_processor(value: float) -> None:
    held = models(*[torch.float32] * 2)
    held["a"][4] = value
    recipe = recipe_of("task_arithmetic", "a", weight=1.0)
    merger, place = DeviceMerger(Held(held), "cpu"), {NAME: torch.zeros(SIZE)}
    assert merger.merge(recipe, place, {NAME: SIZE}) == [NAME]
    with pytest.raises(NonFiniteWeights):
        merge_tensor(recipe, NAME, Held(held))


def test_a_tensor_that_shares_its_place_is_merged_with_the_other_one() -> None:
    held = Held(models(*[torch.bfloat16] * 2))
    groups = (
        TensorGroup(method="linear", sources=("a",), match=("embed",)),
        TensorGroup(method="della", sources=("a",), parameters={"density": 0.5}),
    )
    recipe = dataclasses.replace(recipe_of("linear", "a"), groups=groups)
    place = torch.zeros(SIZE)
    places = {"model.embed_tokens.weight": place, "lm_head.weight": place}
    left = DeviceMerger(held, "cpu").merge(recipe, places, dict.fromkeys(places, SIZE))
    assert left == list(places)


def test_a_place_that_is_no_vector_is_written_too() -> None:
    held = Held(models(*[torch.bfloat16] * 3))
    recipe = recipe_of("linear", "ab", "float16")
    whole = torch.zeros(SIZE // 2, 2, dtype=torch.bfloat16).T
    expected = merge_tensor(recipe, NAME, held).to(torch.bfloat16)
    assert DeviceMerger(held, "cpu").merge(recipe, {NAME: whole}, {NAME: SIZE}) == []
    assert same_bits(whole.flatten(), expected)


@pytest.mark.parametrize("fault", ["bits", "error"])
def test_a_kernel_that_is_wrong_changes_no_weights(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from evomerge.merging.tensors import gpu_kernels

    class Wrong:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                if fault == "error":
                    raise RuntimeError("PTX assembly aborted")
                arguments[5].fill_(1.0)

            return launch

    monkeypatch.setattr(gpu_kernels, "blend", Wrong())
    held = Held(models(*[torch.bfloat16] * 3))
    merger, place = DeviceMerger(held, "cpu"), {NAME: torch.zeros(SIZE)}
    with caplog.at_level(logging.ERROR):
        assert merger.merge(recipe_of("linear", "ab"), place, {NAME: SIZE}) == [NAME]
    assert "the processor merges from now on" in caplog.text
    assert ("PTX assembly" in caplog.text) == (fault == "error")
    monkeypatch.undo()
    assert merger.merge(recipe_of("linear", "ab"), place, {NAME: SIZE}) == [NAME]  # for good
    assert merger.nbytes == 0


def test_sources_leave_a_device_that_lacks_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent, sends = on_device._sent, 0

    def full(*arguments: Any) -> Tensor:
        nonlocal sends
        sends += 1
        if sends == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return sent(*arguments)

    monkeypatch.setattr(on_device, "_sent", full)
    merger, recipe = DeviceMerger(Held(models(*[torch.bfloat16] * 3)), "cpu"), recipe_of("linear", "ab")
    place = {NAME: torch.zeros(SIZE)}
    assert merger.merge(recipe, place, {NAME: SIZE}) == [NAME]
    assert merger.nbytes == 0
    assert merger.merge(recipe, place, {NAME: SIZE}) == []  # without keeping any
    assert merger.nbytes == 0
    assert not caplog.records
    sends = 1
    assert merger.merge(recipe, place, {NAME: SIZE}) == [NAME]
    assert "the processor merges from now on" in caplog.text


def test_where_candidates_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merges_there("device", "cpu")  # the hook of tests
    assert merges_there("auto", "cuda:1")
    assert not merges_there("auto", "cpu")
    assert not merges_there("cpu", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    for device in ("cpu", "mps"):
        with pytest.raises(ConfigError, match=rf"merge_on: .*{device}\n.*\n.*\n.*merge_on: auto"):
            merges_there("device", device)
    monkeypatch.setattr(on_device, "installed", lambda: False)
    assert not merges_there("auto", "cuda")
    with pytest.raises(ConfigError, match=r"Triton is not installed\n.*evomerge\[triton\]"):
        merges_there("device", "cuda")


COMPILE = """
import re
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from evomerge.merging.tensors import gpu_kernels
from evomerge.merging.tensors.on_device import EXACT


class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Absent())
x, reals = torch.zeros(4096, dtype=torch.int16), torch.zeros(4, 5)
whole = torch.zeros(4, 5, dtype=torch.int64)
until, flag = torch.zeros(6, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
form = {"K": 3, "MINUS": (True, False, True), "ADD": True, "ELECT": True, "MEAN": True, "TYPE": tl.int16}
ranked = {**form, "RANKED": True, "TOP": True, "DRAWN": False}
drawn = {**form, "MINUS": (False,) * 3, "ADD": False, "RANKED": False, "TOP": False, "DRAWN": True}
three, rest = (x, x.float(), x), (flag, 2, 4096, 1.5)
kernels = (
    gpu_kernels.blend.warmup(three, x, reals, whole, until, x, *rest, grid=(2,), **ranked, **EXACT),
    gpu_kernels.blend.warmup(
        (x,) * 3, None, reals, whole, None, x.half(), *rest, grid=(2,), **drawn, **EXACT
    ),
    gpu_kernels.count_equal.warmup(
        three, x, reals, until.int(), 2, 4096, K=3, MINUS=(True,) * 3, grid=(2,), **EXACT
    ),
)
for kernel in kernels:
    code = kernel.asm["ptx"]
    wide = len(re.findall(r"ld[.]global[.]v4[.]b32", code))
    print(re.findall(r"fma|ftz|div[.]full|div[.]approx", code), "div.rn.f32" in code, wide)
"""


def test_the_code_for_a_gpu_fuses_nothing_and_reads_whole_words() -> None:
    """Triton compiles for a GPU without one. 16 bytes a read: both rows of the base and of each source."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-c", COMPILE]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] True 10", "[] True 6", "[] False 10"]
