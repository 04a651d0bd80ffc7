"""Score a zoo model: exact-match accuracy of every skill and the perplexity of its English.

A greedy generation equals the answer if and only if every token of the answer, and the end of text after it,
is the arg-max given the right tokens before it. So one teacher-forced pass per batch gives the accuracy of
greedy generation, and agrees with lm-eval's ``is_greedy`` on the tasks of `tasks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from evomerge.zoo.skills import END, PAD, Item, ZooSplit, encode, vocabulary
from evomerge.zoo.tasks import skill_items, text_items

_BATCH = 125


def pad(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Return an int64 tensor (n, longest row) with rows padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def answer_row(item: Item, vocab: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of an item; labels are -100 on the prompt, else the ids."""
    prompt = encode(item.prompt, vocab)
    answer = encode(f"{item.answer} {END}", vocab)
    return prompt + answer, [-100] * len(prompt) + answer


@torch.inference_mode()
def exact_and_probability(model: Any, items: Sequence[Item]) -> tuple[list[bool], list[float]]:
    """Return per item whether greedy decoding gives the answer, and its mean (geometric) probability."""
    vocab = vocabulary()
    exact: list[bool] = []
    probability: list[float] = []
    for start in range(0, len(items), _BATCH):
        rows = [answer_row(item, vocab) for item in items[start : start + _BATCH]]
        ids = pad([row[0] for row in rows], vocab[PAD])
        labels = pad([row[1] for row in rows], -100)[:, 1:]
        # Padding is on the right, where earlier positions of a causal model don't see it: no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        asked = labels != -100
        right = (logits.argmax(-1) == labels) | ~asked
        gold = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        mean = (gold * asked).sum(1) / asked.sum(1)
        exact += right.all(1).tolist()
        probability += mean.exp().tolist()
    return exact, probability


def skill_accuracy(model: Any, skill: str, split: ZooSplit = "test", limit: int | None = None) -> float:
    """Return the share of a skill's hard items answered exactly, in [0, 1], of the first `limit` items."""
    exact, _ = exact_and_probability(model, skill_items(skill, split)[:limit])
    return sum(exact) / len(exact)


@torch.inference_mode()
def text_perplexity(model: Any, split: ZooSplit = "test", limit: int | None = None) -> float:
    """Return the word perplexity of the texts, each read after an end-of-text token as lm-eval does."""
    vocab = vocabulary()
    total, words = 0.0, 0
    texts = text_items(split)[:limit]
    for start in range(0, len(texts), _BATCH):
        rows = [encode(f"{END} {text}", vocab) for text in texts[start : start + _BATCH]]
        ids = pad(rows, vocab[PAD])
        labels = pad(rows, -100)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        asked = labels != -100
        gold = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total += float((gold * asked).double().sum())
        words += int(asked.sum())
    return math.exp(-total / words)
