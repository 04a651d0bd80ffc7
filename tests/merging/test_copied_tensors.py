"""Whole numbers and truth values in model files: copied from one model in their stored type, never merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError
from evomerge.merging.analysis.interference import measure
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.compatibility import check_models
from evomerge.merging.export.adapter import write_adapter
from evomerge.merging.export.writer import write
from evomerge.merging.importing.folder import import_model
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.tensors.digest import folder_digest
from tests.merging import families
from tests.merging.conftest import WORDS, llama, perturb, save

KINDS = {
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "bool": torch.bool,
}
BOTH = TensorGroup(method="linear", sources=("a", "b"))


def add(folder: Path, seed: int) -> Path:
    """Add tensors of whole numbers to a model's file, other ones for each seed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, kind in KINDS.items():
        tensors[f"model.layers.1.self_attn.{name}_table"] = torch.tensor([1, 0, 7 * seed]).to(kind)
    tensors["model.top"] = torch.tensor([40_000 + seed, 65_535]).to(torch.uint16)
    tensors["model.batches"] = torch.tensor(3 + seed)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("numbered")
    made = {"base": str(add(save(llama(), folder / "base"), 0))}
    for seed, name in enumerate("ab", start=1):
        made[name] = str(add(save(perturb(llama(), seed), folder / name), seed))
    return made


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in load_file(Path(folder) / "model.safetensors").items()
        if not tensor.is_floating_point()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tolist() == other[name].tolist() for name in one
    )


@pytest.mark.parametrize("family", ["granite_speech", "deepseek_v4"])
def test_families_with_whole_numbers_merge(family: str, tmp_path: Path) -> None:
    result = families.tried(family, tmp_path)
    assert (result.outcome, result.note) == ("merged", "")


def test_they_are_copied_from_the_model_that_gives_the_config(
    numbered: dict[str, str], tmp_path: Path
) -> None:
    for tokenizer in ("base", "a"):
        recipe = Recipe(models=numbered, base="base", groups=(BOTH,), tokenizer=tokenizer)
        bench = Workbench(numbered, "base", tokenizer=tokenizer)
        bench.load(recipe)
        out = write(recipe, tmp_path / tokenizer)
        assert same(tensors_of(out), tensors_of(numbered[tokenizer]))
        assert bench.digest(recipe) == folder_digest(out, "bfloat16")


def test_a_copy_of_a_model_has_its_numbers(numbered: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe(models=numbered, base="base", groups=(TensorGroup(method="passthrough", sources=("b",)),))
    bench = Workbench(numbered, "base")
    bench.load(recipe)
    out = write(recipe, tmp_path / "out")
    assert same(tensors_of(out), tensors_of(numbered["b"]))
    assert bench.digest(recipe) == folder_digest(out, "bfloat16")


def test_stacked_layers_take_those_of_their_first_source(numbered: dict[str, str], tmp_path: Path) -> None:
    groups = (
        TensorGroup(method="passthrough", sources=("a",), layers=(0, 1)),
        TensorGroup(method="linear", sources=("b", "a"), layers=(2,), shift=(-1, -1)),
        TensorGroup(method="passthrough", sources=("b",)),
    )
    recipe = Recipe(models=numbered, base="base", groups=groups, num_layers=3)
    bench = Workbench(numbered, "base")
    bench.load(recipe)
    out = write(recipe, tmp_path / "out")
    assert bench.digest(recipe) == folder_digest(out, "bfloat16")
    made, a, b = tensors_of(out), tensors_of(numbered["a"]), tensors_of(numbered["b"])
    name = "model.layers.{}.self_attn.int64_table"
    assert made[name.format(1)].tolist() == a[name.format(1)].tolist()
    assert made[name.format(2)].tolist() == b[name.format(1)].tolist()
    assert made["model.batches"] == b["model.batches"]


def test_a_note_names_numbers_that_differ(numbered: dict[str, str]) -> None:
    notes = check_models(open_sources(numbered, "base"))
    assert any(
        "whole numbers differ between a and base" in note and "model.batches" in note for note in notes
    )
    twice = check_models(open_sources({"base": numbered["base"], "again": numbered["base"]}, "base"))
    assert not any("whole numbers" in note for note in twice)


def test_measures_leave_them_out(numbered: dict[str, str]) -> None:
    assert all(norm > 0 for norm in task_vector_norms(numbered, "base").values())
    assert not any("table" in name for name in measure(numbered, "base").tensors)


def test_numbers_per_token_follow_their_tokens(tmp_path: Path) -> None:
    words = [*WORDS[:4], *WORDS[:3:-1]]
    models = {}
    for name, order in (("base", WORDS), ("other", words)):
        folder = save(llama(), tmp_path / name, order)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.tid2eid"] = torch.tensor([[WORDS.index(word), 1] for word in order])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        models[name] = str(folder)
    recipe = Recipe(
        models=models,
        base="base",
        groups=(TensorGroup(method="passthrough", sources=("other",)),),
        tokenizer="base",
    )
    made = tensors_of(write(recipe, tmp_path / "out"))["model.tid2eid"]
    assert made[:, 0].tolist() == list(range(len(WORDS)))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(2, 2, dtype=torch.int32)),
        ("model.layers.0.mlp.packed", torch.zeros(2, 2, dtype=torch.uint8)),
        ("model.layers.0.mlp.eight", torch.zeros(2, 2).to(torch.float8_e4m3fn)),
    ],
)
def test_packed_weights_are_refused(
    name: str, tensor: torch.Tensor, models: dict[str, str], tmp_path: Path
) -> None:
    save(llama(), tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors") | {name: tensor}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="type that can't be merged") as raised:
        check_models(open_sources({"packed": str(tmp_path / "packed")}, None))
    assert "evomerge import" in str(raised.value)


def test_an_import_keeps_them(numbered: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    save(llama(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        tensors | {"model.batches": torch.tensor(5), "h.0.attn.bias": torch.ones(1, 1, 2, 2).bool()},
        folder / "pytorch_model.bin",
    )
    import_model(str(folder), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert {name: tensor.item() for name, tensor in made.items()} == {"model.batches": 5}


def test_an_adapter_names_them_as_lost(numbered: dict[str, str], tmp_path: Path) -> None:
    for source, lost in (("a", True), ("base", False)):
        recipe = Recipe(models=numbered, base="base", groups=(BOTH,), tokenizer=source, dtype="float32")
        report = write_adapter(recipe, tmp_path / source, rank=4, keep_rest=True)
        assert ("model.batches" in report.lost) is lost


def test_an_import_of_8_bit_weights_keeps_them(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors") | {"model.tid2eid": torch.tensor([[3, 1], [2, 70_000]])}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert import_model(str(folder), tmp_path / "out").streamed
    made = tensors_of(tmp_path / "out")
    assert {name: tensor.tolist() for name, tensor in made.items()} == {
        "model.tid2eid": [[3, 1], [2, 70_000]]
    }
