"""core_space against its definition, and as whole models: what is merged, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.methods.core_space import LowRankUpdate, core_space
from evomerge.merging.methods.task_vectors import ties
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.merging.tensors.inputs import FileInputs


def drawn(count: int = 3) -> tuple[Tensor, list[LowRankUpdate]]:
    """A base and updates of ranks 1, 2, ..."""
    generator = torch.Generator().manual_seed(0)
    updates = [
        (torch.randn(12, rank, generator=generator), torch.randn(rank, 9, generator=generator))
        for rank in range(1, count + 1)
    ]
    return torch.randn(12, 9, generator=generator), updates


def test_it_is_ties_on_the_cores() -> None:
    base, updates = drawn()
    left = torch.linalg.svd(torch.cat([b for b, _ in updates], 1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([a for _, a in updates]), full_matrices=False).Vh.T
    cores = [left.T @ b @ a @ right for b, a in updates]
    settings = {"weight": (1.0, 0.6, -0.3), "density": (0.5, 0.7, 1.0)}
    merged = core_space(base, (), updates=updates, lambda_=0.8, **settings)  # type: ignore[arg-type]
    core = ties(torch.zeros_like(cores[0]), cores, lambda_=0.8, **settings)
    torch.testing.assert_close(merged, base + left @ core @ right.T, rtol=1e-4, atol=1e-5)


def test_without_election_and_trimming_it_is_task_arithmetic() -> None:
    base, updates = drawn()
    weight = (0.5, 1.0, -2.0)
    merged = core_space(base, (), weight=weight, density=(1.0,) * 3, elect=False, updates=updates)
    expected = base + sum(w * (b @ a) for w, (b, a) in zip(weight, updates, strict=True))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_one_adapter_is_merged_as_it_is_whatever_the_others_change() -> None:
    base, (one, two, _) = drawn()
    expected = base + one[0] @ one[1]
    for updates in ([one, None], [one, two], [one, (0 * two[0], two[1])]):
        merged = core_space(base, (), weight=(1.0, 0.0), density=(1.0, 1.0), updates=updates)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        core_space(base, (), weight=(1.0, 1.0), density=(1.0, 1.0), updates=[None, None]), base
    )
    zero = (0 * one[0], 0 * one[1])
    assert torch.equal(core_space(base, (), weight=(1.0,), density=(1.0,), updates=[zero]), base)
    broken = (one[0] * torch.nan, one[1])
    assert core_space(base, (), weight=(1.0,), density=(1.0,), updates=[broken]).isnan().all()


def recipe_of(models: dict[str, str], **parameters: Setting) -> Recipe:
    sources = tuple(name for name in models if name != "base")
    group = TensorGroup(method="core_space", sources=sources, parameters=parameters)
    return Recipe(models=models, base="base", groups=(group,), dtype="float32")


@pytest.fixture
def located(models: dict[str, str], adapters: dict[str, str]) -> dict[str, str]:
    """The base, and adapters on it that change different modules."""
    loras = {name: f"{models['base']}+{adapters[name]}" for name in ("plain", "rslora", "patterns")}
    return {"base": models["base"], **loras}


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_scored_is_what_is_exported(threads: int, located: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(located, density=0.6, weight=(1.0, 0.5, 0.7))
    torch.set_num_threads(threads)
    bench = Workbench(located, "base")
    bench.load(recipe)
    torch.set_num_threads(1)
    write(recipe, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, bench.model.state_dict()[name]), name


def test_adapters_are_never_multiplied_out(
    located: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    operand = FileInputs.operand

    def noted(self: FileInputs, source: str, *rest: object) -> object:
        read.append(source)
        return operand(self, source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FileInputs, "operand", noted)
    write(recipe_of(located), tmp_path / "out")
    assert set(read) == {"base"}


def test_a_plain_sum_in_core_space_is_the_task_arithmetic_of_the_adapters(
    located: dict[str, str], tmp_path: Path
) -> None:
    write(recipe_of(located, elect=False, weight=0.5), tmp_path / "core")
    group = TensorGroup(method="task_arithmetic", sources=tuple(located)[1:], parameters={"weight": 0.5})
    write(Recipe(models=located, base="base", groups=(group,), dtype="float32"), tmp_path / "sum")
    plain = load_file(tmp_path / "sum" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "core" / "model.safetensors").items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_sources_that_are_no_adapters_on_the_base_are_refused(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    lora = f"{models['base']}+{adapters['plain']}"
    others = {
        "whole": models["a"],
        "elsewhere": f"{models['a']}+{adapters['plain']}",
        "itself": models["base"],
    }
    for name, place in others.items():
        recipe = recipe_of({"base": models["base"], "lora": lora, name: place})
        with pytest.raises(ConfigError, match=f"merges LoRA adapters on the base, and '{name}' is none"):
            write(recipe, tmp_path / "out")
    shifted = TensorGroup(method="core_space", sources=("lora",), layers=(1,), shift=(-1,))
    rest = TensorGroup(method="linear", sources=("base",))
    recipe = Recipe(models={"base": models["base"], "lora": lora}, base="base", groups=(shifted, rest))
    with pytest.raises(ConfigError, match="layers that they were made for"):
        write(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
