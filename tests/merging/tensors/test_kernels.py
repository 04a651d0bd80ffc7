"""Compiled kernels give the bits of the methods as torch runs them, whatever is merged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.live.workbench import Workbench
from evomerge.merging.methods.blend import Blend, Draws, Ranks, run
from evomerge.merging.methods.draws import CHUNK
from evomerge.merging.methods.reduction import BLOCK, gram
from evomerge.merging.methods.selection import Boundary, boundary
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.arrays import of_tensor, to_tensor
from evomerge.merging.tensors import kernels
from evomerge.merging.tensors.kernels import Operand
from tests.examples import examples

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler")
compiled = settings(max_examples=examples(40), deadline=None)

SIZES = (1, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 13)


def tensors(count: int, size: int, dtypes: Sequence[torch.dtype], *, coarse: bool, seed: int) -> list[Tensor]:
    """Return random tensors; coarse ones have few magnitudes, so that many tie, and many zeros."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        values = torch.randn(size, generator=random)
        values = (values * 2).round() / 4 if coarse else values
        made.append(values.to(dtypes[index % len(dtypes)]))
    return made


def same_bits(one: Tensor, two: Tensor) -> bool:
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == two.dtype and torch.equal(one.view(whole), two.view(whole))


def as_torch(base: Tensor | None, operands: Sequence[Operand]) -> list[Tensor]:
    return [
        to_tensor(each.data).float() - (base.float() if each.minus_base and base is not None else 0.0)
        for each in operands
    ]


def boundaries(vectors: Sequence[Tensor]) -> Any:
    def at(index: int, rank: int) -> Boundary:
        return boundary(vectors[index].abs().numpy(), rank)

    return at


@st.composite
def blends(draw: st.DrawFn, count: int, size: int) -> Blend:
    weights = tuple(
        draw(st.sampled_from([-1.5, -0.3, 0.0, 0.3, 0.7, 1.0, 2.0**-149, 1e-40, -(2.0**-126), 1.1e-35]))
        for _ in range(count)
    )
    kept: list[Ranks | Draws] = []
    rule = draw(st.sampled_from(["all", "top", "middle", "drawn"]))
    for _ in range(count if rule != "all" else 0):
        if rule == "drawn":
            share = draw(st.integers(0, 65536))
            kept.append(Draws(key=draw(st.integers(0, 2**64 - 1)), share=share, factor=draw(st.floats(1, 9))))
        else:
            last = draw(st.integers(0, size))
            kept.append(Ranks(first=draw(st.integers(0, last)) if rule == "middle" else 0, last=last))
    return Blend(
        weights=weights,
        masks=tuple(kept),
        elect=draw(st.booleans()),
        mean=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.7, -2.0])),
    )


@compiled
@given(st.data())
def test_a_kernel_gives_the_bits_of_torch(data: st.DataObject) -> None:
    count, size = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(SIZES))
    dtypes = data.draw(
        st.sampled_from([[torch.bfloat16], [torch.float32], [torch.bfloat16, torch.float32, torch.float32]])
    )
    base, *models = tensors(
        count + 1, size, dtypes, coarse=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99))
    )
    vectors = data.draw(st.booleans())
    operands = [Operand(of_tensor(model), vectors and model.dtype == dtypes[0]) for model in models]
    plan = data.draw(blends(count, size))
    inputs = as_torch(base, operands)
    expected = run(plan, base.float() if vectors else None, inputs)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(size, dtype=dtype)
        finite = kernels.blend(
            plan, Operand(of_tensor(base)), operands, boundaries(inputs), of_tensor(out), add_base=vectors
        )
        assert finite == bool(expected.to(dtype).isfinite().all())
        assert same_bits(out, expected.to(dtype))
    live = torch.empty(size)
    kernels.blend(
        plan,
        Operand(of_tensor(base)),
        operands,
        boundaries(inputs),
        of_tensor(live),
        add_base=vectors,
        rounded=True,
    )
    assert same_bits(live, expected.to(torch.bfloat16).float())


@compiled
@given(
    st.integers(1, 4), st.sampled_from([1, 15, 16, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 5]), st.integers(0, 99)
)
def test_inner_products_have_the_bits_of_numpy(count: int, size: int, seed: int) -> None:
    base, *models = tensors(count + 1, size, [torch.bfloat16, torch.float32], coarse=False, seed=seed)
    operands = [Operand(of_tensor(model), True) for model in models]
    assert kernels.gram(Operand(of_tensor(base)), operands) == gram(as_torch(base, operands))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.3e38])
def test_what_is_not_finite_is_said(value: float) -> None:
    base, model = torch.zeros(5000), torch.zeros(5000)
    model[4321] = value
    out = of_tensor(torch.empty(5000, dtype=torch.bfloat16))
    zeros, operand = Operand(of_tensor(base)), Operand(of_tensor(model), True)
    for plan in (
        Blend(weights=(1.5,)),
        Blend(weights=(1.5,), masks=(Ranks(last=2500),), elect=True, mean=True),
    ):
        assert not kernels.blend(plan, zeros, [operand], boundaries([model]), out, add_base=True)
    nothing = Blend(weights=(0.0,))
    assert kernels.blend(nothing, zeros, [Operand(zeros.data, True)], boundaries([]), out, add_base=True)


def test_without_a_compiler_the_weights_are_the_same(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = (
        TensorGroup(method="dare_ties", sources=("a", "b", "c"), layers=(0,), parameters={"density": 0.6}),
        TensorGroup(method="ties", sources=("a", "b"), layers=(1,), parameters={"density": 0.3}),
        TensorGroup(method="model_stock", sources=("a", "b", "c"), layers=(2,)),
        TensorGroup(method="slerp", sources=("a", "b")),
    )
    recipe = Recipe(models=models, base="base", groups=groups)
    states = []
    for path in ("", "/no/such/folder"):
        if path:
            kernels._compiler.cache_clear()
            monkeypatch.setenv("PATH", path)
            monkeypatch.delenv("CC", raising=False)
            assert not kernels.available()
            assert kernels.notes() == (kernels.MISSING,)
        bench = Workbench(models, "base")
        bench.load(recipe)
        states.append(torch.cat([p.flatten() for p in bench.model.parameters()]))
    monkeypatch.undo()
    kernels._compiler.cache_clear()
    assert torch.equal(*states)


def test_a_compiler_that_fails_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels._folder.cache_clear()
    kernels._compiler.cache_clear()
    assert not kernels.available()
    monkeypatch.undo()
    kernels._folder.cache_clear()
    kernels._compiler.cache_clear()
    assert kernels.available()


def test_kernels_are_kept_and_several_processes_may_build_them(tmp_path: Path) -> None:
    script = (
        "import numpy\n"
        "from evomerge.merging.tensors import kernels\nfrom evomerge.merging.methods.blend import Blend\n"
        "x = numpy.ones(9, dtype='float32'); out = numpy.empty(9, dtype='float32')\n"
        "kernels.blend(Blend(weights=(2.0,)), None, [kernels.Operand(x, False)], None, out, add_base=False)\n"
        "assert out.tolist() == [2.0] * 9"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    folder = tmp_path / "evomerge" / "kernels"
    before = {kept: kept.stat().st_mtime_ns for kept in folder.iterdir()}
    assert all(kept.suffix == ".so" for kept in before)
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert {kept: kept.stat().st_mtime_ns for kept in folder.iterdir()} == before


def test_a_nan_that_rounding_would_lose_is_said() -> None:
    base = of_tensor(torch.zeros(5000))
    model = base.copy()
    out = of_tensor(torch.empty(5000, dtype=torch.bfloat16))
    for payload in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8001):
        model.view("uint32")[4321] = payload
        for plan in (Blend(weights=(1.0,)), Blend(weights=(1.0,), elect=True, mean=True)):
            operands = [Operand(model, True)]
            assert not kernels.blend(plan, Operand(base), operands, boundaries([]), out, add_base=True)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_kernel_is_made_again(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels._folder.cache_clear()
    compiler = kernels._compiler()
    assert compiler is not None
    shape = ("SOURCES(S)=S(0,f32,0)", "K=1", "OUT=f32")
    path = kernels._built(compiler, "blend", shape)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4] if content is None else content)
    again = kernels._built(compiler, "blend", shape)
    assert again.stem.endswith(kernels._digest(again.read_bytes()))
    monkeypatch.undo()
    kernels._folder.cache_clear()


def test_a_compile_that_fails_later_leaves_it_to_torch(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = TensorGroup(method="slerp", sources=("a", "b"))
    recipe = Recipe(models=models, base="base", groups=(group,))
    bench = Workbench(models, "base")
    bench.load(recipe)
    expected = torch.cat([p.flatten() for p in bench.model.parameters()])

    def broken(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    kernels._kernel.cache_clear()
    monkeypatch.setattr(kernels, "_built", broken)
    bench = Workbench(models, "base")
    bench.load(recipe)
    assert torch.equal(torch.cat([p.flatten() for p in bench.model.parameters()]), expected)
    assert all("can't compile a merge kernel" in record.message for record in caplog.records)
    assert 1 <= len(caplog.records) <= 2  # once for each kernel, not for each tensor
    kernels._kernel.cache_clear()
