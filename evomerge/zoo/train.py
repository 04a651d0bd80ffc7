"""Train one model of the zoo: the base, a full fine-tune of it, or a LoRA adapter on it.

Each function trains, saves a Hugging Face folder at the given path, and returns the model's scores. They
change the process's global torch state (threads, determinism, seed), so `build.py` runs them in separate
processes. The same seed gives the same bytes on the same machine with one thread, and other bits on others.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from evomerge.zoo.rules import Level
from evomerge.zoo.score import answer_row, pad, skill_accuracy, text_perplexity
from evomerge.zoo.settings import ARCHITECTURES, SpecialistSettings, ZooSettings
from evomerge.zoo.skills import (
    CONTEXT,
    END,
    PAD,
    draw_item,
    draw_text,
    encode,
    make_tokenizer,
    vocabulary,
)

TokenRow = tuple[list[int], list[int]]
BASE_NAME = "base"
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepare_process() -> None:
    """Make this process deterministic, single-threaded and quiet; call it first in a worker process."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # peft uses a deprecated name of transformers; users who build a zoo can't change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# --------------------------------------------------------------------------------------------------- data


def _text_row(rng: np.random.Generator, vocab: dict[str, int]) -> TokenRow:
    ids = encode(f"{END} {draw_text(rng, 'train')} {END}", vocab)
    return ids, ids


def _base_rows(settings: ZooSettings, rng: np.random.Generator) -> list[TokenRow]:
    vocab = vocabulary()
    rows = [_text_row(rng, vocab) for _ in range(settings.text_items)]
    for skill in settings.skills:
        counts: dict[Level, int] = {"easy": settings.easy_items, "hard": settings.hard_items[skill]}
        for level, count in counts.items():
            rows += [answer_row(draw_item(rng, skill, level, "train"), vocab) for _ in range(count)]
    return rows


def _specialist_rows(
    settings: ZooSettings, specialist: SpecialistSettings, rng: np.random.Generator
) -> list[TokenRow]:
    """Return steps x batch rows: the hard skill, and `replay` of text and of the other skills, half each."""
    vocab = vocabulary()
    others: list[str] = [skill for skill in settings.skills if skill != specialist.skill]
    rows: list[TokenRow] = []
    for draw in rng.random(specialist.steps * specialist.batch):
        if draw >= specialist.replay:
            rows.append(answer_row(draw_item(rng, specialist.skill, "hard", "train"), vocab))
        elif draw < specialist.replay / 2:
            rows.append(_text_row(rng, vocab))
        else:
            level: Level = "hard" if rng.random() < specialist.hard_share else "easy"
            other = others[int(rng.integers(len(others)))]
            rows.append(answer_row(draw_item(rng, other, level, "train"), vocab))
    return rows


def _batches(rows: list[TokenRow], batch: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Yield (ids, labels) without end, int64 (batch, longest row) each: shuffled epochs."""
    fill = vocabulary()[PAD]
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += rng.permutation(len(rows)).tolist()
        chosen, order = order[:batch], order[batch:]
        yield pad([rows[i][0] for i in chosen], fill), pad([rows[i][1] for i in chosen], -100)


# ----------------------------------------------------------------------------------------------- training


def _learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _fit(model: Any, batches: Iterator[tuple[Any, Any]], *, steps: int, peak: float, warmup: int) -> None:
    """Train with AdamW, gradient norm clipped at 1, linear warm-up then cosine to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        ids, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, peak, warmup)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def new_model(settings: ZooSettings) -> Any:
    """Return the untrained base of a zoo."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    vocab = vocabulary(settings.skills)
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=len(vocab),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab[END],
        pad_token_id=vocab[PAD],
        **dict.fromkeys(ARCHITECTURES[settings.architecture], settings.hidden // settings.heads),
    )
    # Eager attention is the fastest at this size on a CPU.
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager"
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=vocab[END], pad_token_id=vocab[PAD]
    )
    return model


def _load(folder: Path) -> Any:
    """Load a model, stored in 16 bits, for training and scoring in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _save_full(model: Any, settings: ZooSettings, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(settings.skills).save_pretrained(folder)


def _save_adapter(model: Any, folder: Path) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    # A relative path, so that the adapter finds its base beside it after the zoo is copied.
    model.peft_config["default"].base_model_name_or_path = f"../{BASE_NAME}"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model-card template
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # peft writes a set, whose order changes from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def score(model: Any, settings: ZooSettings) -> dict[str, float]:
    """Return the test accuracy of every skill of a zoo, and ``text_perplexity``."""
    scores: dict[str, float] = {skill: skill_accuracy(model, skill) for skill in settings.skills}
    return {**scores, "text_perplexity": text_perplexity(model)}


def _random_sources(seed: np.random.SeedSequence) -> np.random.Generator:
    """Seed torch's generator from one child of `seed` and return a numpy one from another."""
    for_torch, for_data = seed.spawn(2)
    torch.manual_seed(int(for_torch.generate_state(1, np.uint64)[0] >> 1))
    return np.random.default_rng(for_data)


def train_base(settings: ZooSettings, seed: np.random.SeedSequence, folder: Path) -> dict[str, float]:
    """Pretrain the base on text and easy items, save it at `folder`, return its scores as saved."""
    rng = _random_sources(seed)
    model = new_model(settings)
    batches = _batches(_base_rows(settings, rng), settings.base_batch, rng)
    _fit(model, batches, steps=settings.base_steps, peak=settings.base_learning_rate, warmup=30)
    _save_full(model, settings, folder)
    return score(_load(folder), settings)


def train_specialist(
    settings: ZooSettings,
    specialist: SpecialistSettings,
    seed: np.random.SeedSequence,
    base: Path,
    folder: Path,
) -> dict[str, float]:
    """Fine-tune the model at `base` on one skill, save it at `folder`, return its scores as saved."""
    rng = _random_sources(seed)
    model = _load(base)
    if specialist.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=specialist.lora_rank,
            lora_alpha=specialist.lora_alpha,
            target_modules=list(_LINEAR),
        )
        model = get_peft_model(model, config)
    batches = _batches(_specialist_rows(settings, specialist, rng), specialist.batch, rng)
    _fit(model, batches, steps=specialist.steps, peak=specialist.learning_rate, warmup=10)
    if not specialist.lora_rank:
        _save_full(model, settings, folder)
        return score(_load(folder), settings)
    from peft import PeftModel

    _save_adapter(model, folder)
    return score(PeftModel.from_pretrained(_load(base), folder), settings)
