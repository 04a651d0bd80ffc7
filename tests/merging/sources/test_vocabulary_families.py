"""Other tokens in other architectures: heads with bias, other names, a text model inside another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.vocabulary import row_tensors
from tests.merging.conftest import perturb
from tests.merging.export.test_writer import assert_same_bits
from tests.merging.live.test_architectures import COMMON, FAMILIES

TOKENS = ["<unk>", *(f"t{i}" for i in range(1, 40))]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def config(name: str, rows: int) -> Any:
    if name != "gemma3-with-images":
        kind, changes, _ = FAMILIES[name]
        return getattr(transformers, kind)(**(COMMON | changes | {"vocab_size": rows}))
    images = {"image_token_index": 30, "boi_token_index": 31, "eoi_token_index": 32, "mm_tokens_per_image": 1}
    text = COMMON | {"vocab_size": rows}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, **images)


def make(folder: Path, name: str, seed: int, tokens: list[str], added: list[str]) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(name, len(tokens) + len(added)))
    perturb(model.to(torch.float32), seed, 0.1).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("phi", 3),
        ("gpt-neox", 2),
        ("gpt2", 1),
        ("mixtral", 2),
        ("qwen3-moe", 1),
        ("gemma3", 1),
        ("gemma3-with-images", 1),
    ],
)
def test_rows_follow_their_token_in_every_table(name: str, tables: int, tmp_path: Path) -> None:
    turned = [TOKENS[0], *TOKENS[:0:-1]]
    models = {
        "base": make(tmp_path / "base", name, 1, TOKENS, []),
        "chat": make(tmp_path / "chat", name, 2, turned, ["<|im_start|>", "<|im_end|>"]),
    }
    for method, parameters in (("linear", {}), ("ties", {"density": 0.5})):
        group = TensorGroup(method=method, sources=("chat",), parameters=parameters)
        recipe = Recipe(models=models, groups=(group,), base="base", tokenizer="union", dtype="float32")
        bench = Workbench(models, "base", tokenizer="union")
        bench.load(recipe)
        out = write(recipe, tmp_path / method)
        assert_same_bits(bench, out, "float32")
    chat, merged = Checkpoint.open(models["chat"]), Checkpoint.open(str(tmp_path / "linear"))
    assert chat.vocabulary is not None
    assert merged.vocabulary is not None
    assert len(row_tensors(chat)) == len(row_tensors(merged)) == tables
    for tensor in row_tensors(chat):
        for token, row in chat.vocabulary.items():
            assert torch.equal(merged.tensor(tensor)[merged.vocabulary[token]], chat.tensor(tensor)[row])
    written = json.loads((tmp_path / "linear" / "config.json").read_text())
    assert written.get("text_config", written)["vocab_size"] == 42
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "linear")
    assert model(input_ids=torch.tensor([[1, 40, 41]])).logits.shape == (1, 3, 42)
