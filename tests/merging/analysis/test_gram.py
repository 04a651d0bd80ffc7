"""Files of Gram matrices: what is measured, what a recipe makes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from evomerge.errors import ConfigError, DiskError, ModelError
from evomerge.merging.analysis.gram import measure
from evomerge.merging.export.writer import write
from evomerge.merging.methods.regression import regmean
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources import measured_files

LINES = ["w1 w2 w3 w4", "", "w9 w8", "w5", "  w7 w7 w20 w1 w2 w3 "]
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


def test_the_gram_matrix_is_the_mean_product_of_a_layers_inputs(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    done = measure(models["a"], text, tmp_path / "a.st", progress=lambda i, n: steps.append((i, n)))
    found = load_file(tmp_path / "a.st")
    assert (done.sequences, done.tokens, done.matrices) == (3, 12, len(found))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(found) == 3 * 7  # the tied head is stored as embeddings, which have no inputs
    model = AutoModelForCausalLM.from_pretrained(models["a"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models["a"])
    seen: list[torch.Tensor] = []
    module = model.model.layers[1].mlp.down_proj
    module.register_forward_hook(lambda _, given, __: seen.append(given[0][0].detach()))
    for line in (LINES[0], LINES[2], LINES[4].strip()):
        model(**tokenizer(line, return_tensors="pt"))
    stacked = torch.cat(seen)
    torch.testing.assert_close(found[NAME], stacked.T @ stacked / 12, rtol=1e-4, atol=1e-7)


def test_a_recipe_with_gram_matrices_is_written_as_defined(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    files = {name: str(measure(models[name], text, tmp_path / f"{name}.st").file) for name in "ab"}
    group = TensorGroup(method="regmean", sources=("a", "b"), parameters={"weight": (1.0, 2.0)})
    write(
        Recipe(models={n: models[n] for n in "ab"}, groups=(group,), gram=files, dtype="float32"),
        tmp_path / "out",
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    stored = [load_file(Path(models[n]) / "model.safetensors") for n in "ab"]
    grams = [load_file(file) for file in files.values()]
    weights = [part[NAME].float() for part in stored]
    expected = regmean(None, weights, weight=(1.0, 2.0), grams=[gram[NAME] for gram in grams])
    assert torch.equal(merged[NAME], expected)
    embeddings = [part["model.embed_tokens.weight"].float() for part in stored]
    torch.testing.assert_close(merged["model.embed_tokens.weight"], embeddings[0] / 3 + 2 * embeddings[1] / 3)


def test_files_that_do_not_belong_are_refused(models: dict[str, str], text: Path, tmp_path: Path) -> None:
    good = measure(models["a"], text, tmp_path / "a.st").file
    group = TensorGroup(method="regmean", sources=("a", "b"))

    def refused(b: str, message: str) -> None:
        recipe = Recipe(models={n: models[n] for n in "ab"}, groups=(group,), gram={"a": str(good), "b": b})
        with pytest.raises(ModelError, match=message):
            write(recipe, tmp_path / "out")

    refused(str(good), "Gram matrices of another model than 'b'")
    refused(str(tmp_path / "absent"), "no such Gram file")
    refused(f"{models['b']}.fisher.safetensors", "not a Gram file")
    bad = tmp_path / "bad.st"
    save_file({NAME: torch.eye(3)}, bad, {"kind": measured_files.KINDS["gram"]})
    refused(str(bad), "not the Gram matrices of model 'b'")
    with pytest.raises(DiskError, match="already exists"):
        measure(models["a"], text, good)


def test_models_whose_layers_are_not_linear_modules_are_refused(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(models["a"]).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="no Linear modules"):
        measure(str(tmp_path / "gpt2"), text, tmp_path / "out.st")
    assert not (tmp_path / "out.st").exists()
