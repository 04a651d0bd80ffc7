"""Which files beside the weights a merged folder takes over, and what a user is told of the rest."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.merging.export.folder import folder_notes
from evomerge.merging.export.writer import write
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources import beside as module
from evomerge.merging.sources.opening import open_used

KEPT = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/tool_use.jinja",
    "tekken.json",
    "sentencepiece.bpe.model",
    "modules.json",
    "1_Pooling/config.json",
    "modeling_own.py",
    "own/helper.py",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "params.json",
)
GONE = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "model.gguf",
    "onnx/model.onnx",
    "original/params.json",
    "checkpoint-500/config.json",
    "2_Dense/model.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    ".env",
)
UNMENTIONED = (
    ".git/config",
    ".gitattributes",
    ".cache/huggingface/x.lock",
    "README.md",
    "recipe.yaml",
    "mergekit_config.yml",
    "mergekit.yaml",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "__pycache__/x.pyc",
)


@pytest.fixture
def model(models: dict[str, str], tmp_path: Path) -> Path:
    shutil.copytree(models["base"], tmp_path / "model")
    return tmp_path / "model"


def put(folder: Path, *names: str, text: str = "own") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def merged(model: Path) -> tuple[Path, str]:
    """Return the written folder and what is said of it."""
    recipe = Recipe.copy_of(str(model), dtype="float32")
    notes = folder_notes(recipe, open_used(recipe))
    return write(recipe, model.parent / "out"), "\n".join(notes)


def test_everything_but_weights_and_caches_is_taken_over(model: Path) -> None:
    put(model, *KEPT, *GONE, *UNMENTIONED)
    out, said = merged(model)
    assert all((out / name).read_text() == "own" for name in KEPT)
    assert not any((out / name).exists() for name in (*GONE, *UNMENTIONED) if name != "recipe.yaml")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert said.startswith("left out of the folder: ")
    assert "onnx/ (weights, training or cache)" in said
    assert "and 4 more" in said
    assert not any(name.split("/")[0] in said for name in (*KEPT, *UNMENTIONED))


def test_a_plain_folder_needs_no_note(model: Path) -> None:
    put(model, *KEPT, *UNMENTIONED)
    assert merged(model)[1] == ""


def test_code_is_copied_and_never_run(model: Path) -> None:
    put(model, "modeling_own.py", text=f"open({str(model.parent / 'ran')!r}, 'w')")
    out, _ = merged(model)
    assert (out / "modeling_own.py").is_file()
    assert not (model.parent / "ran").exists()


def link_to_file(outside: Path, folder: Path) -> None:
    (folder / "secret.txt").symlink_to(outside / "file")


def link_to_folder(outside: Path, folder: Path) -> None:
    (folder / "secret.txt").symlink_to(outside)


def link_below(outside: Path, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "secret.txt").symlink_to(outside / "file")


def broken_link(outside: Path, folder: Path) -> None:
    (folder / "secret.txt").symlink_to(outside / "nothing")


def fifo(outside: Path, folder: Path) -> None:
    os.mkfifo(folder / "secret.txt")


@pytest.mark.parametrize("make", [link_to_file, link_to_folder, link_below, broken_link, fifo])
def test_no_link_leads_out_of_the_folder(make: Callable[[Path, Path], None], model: Path) -> None:
    outside = model.parent / "outside"
    put(outside, "file")
    make(outside, model)
    out, said = merged(model)
    assert not list(out.rglob("secret.txt"))
    assert re.search(r"secret.txt/? \(", said)


def test_links_inside_the_folder_and_the_hubs_cache_are_followed(model: Path) -> None:
    put(model, "NOTICE")
    (model / "LICENSE").symlink_to("NOTICE")
    cache = model.parent / "models--a--b"
    put(cache / "blobs", "0f")
    (cache / "snapshots").mkdir()
    snapshot = model.rename(cache / "snapshots" / "1")
    (snapshot / "USE_POLICY.md").symlink_to("../../blobs/0f")
    out, said = merged(snapshot)
    assert said == ""
    assert [(out / name).read_text() for name in ("LICENSE", "USE_POLICY.md")] == ["own", "own"]
    assert not (out / "LICENSE").is_symlink()


def test_a_large_file_is_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    put(model, "data.json", "tekken.json", text="x" * 2000)
    out, said = merged(model)
    assert (out / "tekken.json").exists()
    assert not (out / "data.json").exists()
    assert "data.json (larger than" in said
