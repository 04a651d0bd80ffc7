"""Tiny random models, made once: a base, three fine-tunes of it, and LoRA adapters."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from evomerge.merging.sources.measured_files import KINDS

logging.disable_progress_bar()

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a random Llama of some 8000 parameters: 3 layers, tied head, bfloat16."""
    settings: dict[str, object] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return model.to(torch.bfloat16)


def save(model: LlamaForCausalLM, folder: Path, words: list[str] | None = None, **options: object) -> Path:
    """Save a model with its tokenizer, and return the folder."""
    model.save_pretrained(folder, **options)
    words = WORDS if words is None else words
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def perturb(model: LlamaForCausalLM, seed: int, size: float = 0.02) -> LlamaForCausalLM:
    """Move every weight a little, as a fine-tune does; a third of the elements stay exactly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * size
        noise *= torch.rand(parameter.shape, generator=generator) > 1 / 3
        parameter.data.add_(noise.to(parameter.dtype))
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of a base and of three fine-tunes `a`, `b`, `c`; `c` is sharded.

    Beside each fine-tune lie a made-up Fisher and made-up Gram matrices of it.
    """
    folder = tmp_path_factory.mktemp("models")
    made = {"base": str(save(llama(), folder / "base"))}
    for seed, name in enumerate("abc", start=1):
        options = {"max_shard_size": "6KB"} if name == "c" else {}
        made[name] = str(save(perturb(llama(), seed), folder / name, **options))
        generator = torch.Generator().manual_seed(seed)
        fishers = {
            key: torch.rand(p.shape, generator=generator).square() for key, p in llama().named_parameters()
        }
        save_file(fishers, f"{made[name]}.fisher.safetensors", {"kind": KINDS["fisher"]})
        grams = {
            key: inputs.T @ inputs
            for key, p in llama().named_parameters()
            if p.dim() == 2 and "layers" in key
            for inputs in (torch.randn(10, p.shape[1], generator=generator),)
        }
        save_file(grams, f"{made[name]}.gram.safetensors", {"kind": KINDS["gram"]})
    return made


@pytest.fixture(scope="session")
def adapters(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of LoRA adapters on `base`: plain, rslora, and patterns of rank and alpha."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, dict[str, object]] = {
        "plain": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6},
        "rslora": {"target_modules": ["v_proj"], "lora_alpha": 3, "use_rslora": True},
        "patterns": {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 9, r".*\.2\.self_attn\.k_proj": 1},
        },
    }
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, chosen) in enumerate(options.items()):
        base = LlamaForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls what transformers deprecates
            adapted = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **chosen))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder / name)
        config = folder / name / "adapter_config.json"
        settings = json.loads(config.read_text())
        settings["base_model_name_or_path"] = os.path.relpath(models["base"], folder / name)
        config.write_text(json.dumps(settings))
        made[name] = str(folder / name)
    return made
