"""Examples: one item of each task as the model sees it, with the tokens of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from evomerge.evaluation.companion import gold_text
from evomerge.evaluation.items import TaskItems
from evomerge.evaluation.live_lm import LiveLM


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedItem:
    """A rendered item.

    task: its name in the suite. prompt: all tokens before the answer as one text, special tokens included.
    prompt_tokens: their number. answer: the tokens of the right answer, which are scored; of a task that
    generates, those of the reference. until, limit: what ends a generated answer; None where nothing is
    generated.
    """

    task: str
    prompt: str
    prompt_tokens: int
    answer: tuple[str, ...]
    until: tuple[str, ...] | None = None
    limit: int | None = None


def example(task: TaskItems, lm: LiveLM) -> RenderedItem:
    """Return the first item of a task. For multiple choice the answer is the first right choice."""
    group = task.groups[0]
    if task.texts:
        return _example(task, lm, [lm.prefix_token_id], task.texts[0])
    if task.pairs and not task.generates:
        right = next((index for index in task.gold[0] if 0 <= index < len(group)), 0) if task.gold else 0
        context, continuation = task.pairs[right]
        return _example(task, lm, context, continuation)
    prompt, options = group[0].args[:2]
    limits = normalize_gen_kwargs(options, lm.max_gen_toks)
    asked = lm.tok_encode(prompt)
    whole = [token for part in task.pairs[:1] for tokens in part for token in tokens]
    if whole[: len(asked)] == asked:  # the right answer that its companion follows
        reference = whole[len(asked) :]
    else:
        reference = lm.tok_encode(gold_text(task, group[0].doc) or "", add_special_tokens=False)
    return _example(
        task,
        lm,
        asked,
        reference,
        until=tuple(limits["until"]),
        limit=limits["max_gen_toks"],
    )


def _example(task: TaskItems, lm: LiveLM, prompt: Any, answer: Any, **generation: Any) -> RenderedItem:
    return RenderedItem(
        task=task.name,
        prompt=lm.tok_decode(prompt, skip_special_tokens=False),
        prompt_tokens=len(prompt),
        answer=tuple(_shown(lm.tokenizer, token) for token in answer),
        **generation,
    )


def _shown(tokenizer: Any, token: int) -> str:
    """Return one token's text; the token's own name where it is only a part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        return name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text
