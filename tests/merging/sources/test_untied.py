"""Heads that are tied, stored though tied, or tied beside untied ones: what is scored is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.source import task_vector
from evomerge.merging.tensors.digest import folder_digest
from tests.merging.conftest import llama, save

IDS = torch.arange(3, 13)[None]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def gemma(folder: Path, seed: int, head: str = "none", **config: Any) -> str:
    """Save a Gemma 2 without tie_word_embeddings in its config, as published ones are.

    head: "none" in the file, the "same" as the embeddings, or an "other" one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        other = torch.randn(40, 16)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    del data["tie_word_embeddings"]
    path.write_text(json.dumps(data | config))
    if head != "none":
        tensors = load_file(folder / "model.safetensors")
        tensors[HEAD] = tensors[EMBEDDINGS].clone() if head == "same" else other
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def tied_llama(folder: Path, seed: int, tied: bool) -> str:
    return str(save(llama(seed, tie_word_embeddings=tied), folder))


def scored_is_exported(models: dict[str, str], out: Path) -> Any:
    """Assert it for a DARE merge; return the reloaded model."""
    group = TensorGroup(
        method="dare_ties", sources=("a", "b"), parameters={"density": 0.5, "weight": (0.5, 0.5)}
    )
    recipe = Recipe(models=models, base="base", groups=(group,), dtype="float32")
    bench = Workbench(models, "base")
    bench.load(recipe)
    write(recipe, out)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(bench.model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert bench.digest(recipe) == folder_digest(out, "float32")
    return model


@pytest.mark.parametrize("stored", [("same",) * 3, ("none", "same", "none"), ("same", "none", "none")])
def test_a_stored_copy_of_the_embeddings_is_no_head(stored: tuple[str, ...], tmp_path: Path) -> None:
    names = ("base", "a", "b")
    models = {n: gemma(tmp_path / n, i, head) for i, (n, head) in enumerate(zip(names, stored, strict=True))}
    model = scored_is_exported(models, tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_head_of_its_own_is_one_whatever_the_class_says(tmp_path: Path) -> None:
    """transformers doesn't tie what the files hold with different elements."""
    models = {name: gemma(tmp_path / name, i, "other") for i, name in enumerate(("base", "a", "b"))}
    model = scored_is_exported(models, tmp_path / "out")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "kinds", [(True, False, True), (False, True, False), (True, True, False), (False, False, True)]
)
def test_tied_and_untied_models_merge(kinds: tuple[bool, ...], tmp_path: Path) -> None:
    names = ("base", "a", "b")
    models = {
        n: tied_llama(tmp_path / n, i, tied) for i, (n, tied) in enumerate(zip(names, kinds, strict=True))
    }
    model = scored_is_exported(models, tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    sources = open_sources(models, "base")
    for name, tied in zip(names, kinds, strict=True):
        head = Checkpoint.open(models[name]).stored(EMBEDDINGS if tied else HEAD)
        assert torch.equal(sources[name].tensor(HEAD), head.float())
    moved = task_vector(sources["a"], sources["base"], HEAD)
    assert moved is not None
    assert torch.equal(moved, sources["a"].tensor(HEAD) - sources["base"].tensor(HEAD))


def test_a_merge_that_leaves_out_the_untied_model_still_has_a_head(tmp_path: Path) -> None:
    kinds = {"base": True, "a": True, "b": False}
    models = {name: tied_llama(tmp_path / name, i, tied) for i, (name, tied) in enumerate(kinds.items())}
    group = TensorGroup(method="task_arithmetic", sources=("a",))
    recipe = Recipe(models=models, base="base", groups=(group,))
    bench = Workbench(models, "base")
    bench.load(recipe)
    write(recipe, tmp_path / "out")
    assert bench.digest(recipe) == folder_digest(tmp_path / "out", recipe.dtype)
    assert any("head tied to its embeddings" in note for note in bench.notes)


def test_a_tied_model_that_stores_only_its_head_is_refused_by_name(tmp_path: Path) -> None:
    """transformers 5 ties in both directions and loads it; saved again it has embeddings."""
    folder = Path(tied_llama(tmp_path / "a", 0, True))
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDINGS)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="hold only the head") as raised:
        Checkpoint.open(str(folder))
    assert HEAD in str(raised.value)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert EMBEDDINGS in Checkpoint.open(str(tmp_path / "again")).headers


def test_an_untied_model_without_a_head_is_the_one_at_fault(tmp_path: Path) -> None:
    models = {"base": tied_llama(tmp_path / "base", 0, True), "a": tied_llama(tmp_path / "a", 1, False)}
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    del tensors[HEAD]
    save_file(tensors, path, metadata={"format": "pt"})
    for base, other in (("base", "a"), ("a", "base")):
        group = TensorGroup(method="task_arithmetic", sources=(other,))
        with pytest.raises(ModelError, match="model 'a' has no head"):
            write(Recipe(models=models, base=base, groups=(group,)), tmp_path / "out")
