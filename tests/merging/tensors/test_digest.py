"""The digest of weights: equal for a live model and its files, different after any change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.merging.export import writer
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.tensors.digest import exact_dtype, folder_digest, weights_digest


@pytest.mark.parametrize("computed", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_live_weights_equal_the_written_ones_in_every_pair_of_types(
    stored: str, computed: str, models: dict[str, str], tmp_path: Path
) -> None:
    bench = Workbench(models, "base", compute_dtype=computed)
    group = TensorGroup(method="linear", sources=("a", "b"), parameters={"weight": (0.3, 0.7)})
    recipe = Recipe(models=models, base="base", groups=(group,), dtype=stored)
    bench.load(recipe)
    folder = writer.write(recipe, tmp_path / "out", max_shard_bytes=5_000)
    digest = bench.digest(recipe)
    assert folder_digest(folder, exact_dtype(stored, computed)) == digest
    path = sorted(folder.glob("*.safetensors"))[-1]
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 64
    path.write_bytes(bytes(changed))
    assert folder_digest(folder, exact_dtype(stored, computed)) != digest


def test_names_shapes_types_and_bits_count() -> None:
    def of(dtype: str = "float32", **tensors: torch.Tensor) -> str:
        return weights_digest({name: lambda t=t: t for name, t in tensors.items()}, dtype)  # type: ignore[misc]

    zeros = torch.zeros(2, 3)
    assert of(a=zeros, b=zeros) == of(b=zeros.clone(), a=zeros)
    different = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros, b=zeros),
        of(a=zeros.T),
        of(a=-zeros),
        of("bfloat16", a=zeros),
        of(a=torch.zeros(())),
        of(a=torch.zeros(0)),
    ]
    assert len(set(different)) == len(different)
    assert of(a=torch.zeros(3, 2).T) == of(a=zeros)
