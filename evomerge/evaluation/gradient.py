"""Differentiate a smooth loss: forward and backward over some items, with gradients in the weights.

Memory: gradients as large as the live weights, and the activations of one batch, which has few rows where
they are large (`activations`). The pairs of one item are always in the same batch, because its loss compares
them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from evomerge import heap
from evomerge.evaluation.activations import Room
from evomerge.evaluation.agreement import agreements
from evomerge.evaluation.items import Items, TaskItems
from evomerge.evaluation.likelihood import Batch, Plan, forward, plan, trims
from evomerge.evaluation.live_lm import Pair
from evomerge.evaluation.normalise import kept_share
from evomerge.evaluation.scores import NonFiniteScores
from evomerge.evaluation.smooth_loss import SmoothLoss, SmoothTask

TOKENS = 32
"""Tokens that a row of a batch has on average at most, padding included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One item of a skill task: its pairs, the indices of the right ones, and its weight in the loss."""

    task: str
    pairs: tuple[Pair, ...]
    right: tuple[int, ...]
    weight: float

    @property
    def length(self) -> int:
        return max(len(context) + len(continuation) for context, continuation in self.pairs)

    @property
    def answers(self) -> int:
        return sum(len(continuation) for _, continuation in self.pairs)


@contextlib.contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """Let a live model's weights collect gradients inside the context; they are freed at its end."""
    parameters = list(model.parameters())
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def backward(
    model: Any,
    items: Items,
    loss: SmoothLoss,
    *,
    batch_size: int,
    max_length: int,
    prefix: int,
    room: Room,
    share: int = 0,
) -> tuple[float, dict[str, float]]:
    """Return a loss on some items, and the skill tasks' soft accuracies there.

    The gradient of the loss is added to the `.grad` of the model's parameters.

    Args:
        model: a causal LM, inside `differentiable`.
        items: the items of the split, all blocks as one.
        loss: the loss and the numbers of its items.
        batch_size: pairs per forward pass.
        max_length: longest input in tokens.
        prefix: the token in front of a text's first token.
        room: memory for a batch's activations.
        share: as in `likelihood.plan`.

    Raises:
        NonFiniteScores: the loss is NaN or infinite.
    """
    by_name = {task.name: task for task in items.tasks}
    taught = [(by_name[part.task], part) for part in loss.tasks if by_name[part.task].taught]
    skills = [
        item
        for part in loss.tasks
        if part.base is None and not by_name[part.task].taught
        for item in _items(by_name[part.task], part)
    ]
    total, right = 0.0, {part.task: 0.0 for part in loss.tasks if part.base is None}
    for chunk in _chunks(skills, batch_size, room):
        total -= _skills(model, chunk, loss.softness, max_length, share, room, right)
        heap.give_back(model)
    for task, part in taught:
        total -= _taught(model, task, part, batch_size, max_length, room, right)
    texts = [(by_name[part.task], part) for part in loss.tasks if part.base is not None]
    if texts and (loss.price or loss.limit):
        total += _retention(model, texts, loss, batch_size, max_length, prefix, room)
    if not math.isfinite(total):
        raise NonFiniteScores("the model's logits are not finite", got=f"a loss of {total}")
    counts = {part.task: len(part.items) for part in loss.tasks}
    return total, {task: value / counts[task] for task, value in right.items()}


def _items(task: TaskItems, part: SmoothTask) -> list[_Item]:
    """Return the items of a task that take part."""
    bounds, start = [], 0
    for number, group in enumerate(task.groups):
        # Requests past the choices are the unconditional ones of acc_mutual_info.
        choices = len(task.task.doc_to_choice(group[0].doc)) if task.gold else 1
        bounds.append((start, start + choices, task.gold[number] if task.gold else (0,)))
        start += len(group)
    weight = part.gain / len(part.items)
    taking_part = []
    for number in part.items:
        first, stop, right = bounds[number]
        taking_part.append(_Item(task=task.name, pairs=task.pairs[first:stop], right=right, weight=weight))
    return taking_part


def _chunks(items: Sequence[_Item], batch_size: int, room: Room) -> Iterator[list[_Item]]:
    """Cut items, longest first, into chunks of at most `batch_size` pairs, fewer where they are long, and at
    least one item."""
    chunk: list[_Item] = []
    held = answers = 0
    for item in sorted(items, key=lambda item: -item.length):
        held, answers = held + len(item.pairs), answers + item.answers
        length = (chunk or [item])[0].length
        enough = room.holds(room.bytes(held, length, answers)) and held * length <= batch_size * TOKENS
        if chunk and (held > batch_size or not enough):
            yield chunk
            chunk, held, answers = [], len(item.pairs), item.answers
        chunk.append(item)
    if chunk:
        yield chunk


def _skills(
    model: Any,
    chunk: Sequence[_Item],
    softness: float,
    max_length: int,
    share: int,
    room: Room,
    right_by_task: dict[str, float],
) -> float:
    """Return the weighted sum of the items' soft accuracies; the gradient of its negative is added.

    right_by_task: task -> sum of its items' soft accuracies, to which those of the chunk are added.
    """
    pairs = [pair for item in chunk for pair in item.pairs]
    names = [item.task for item in chunk for _ in item.pairs]
    laid = plan(pairs, batch_size=len(pairs), max_length=max_length, names=names, share=share)
    ll, lead = _answers(model, laid, room)
    margins, start = [], 0
    for item in chunk:
        stop = start + len(item.pairs)
        if len(item.pairs) == 1:
            margins.append(lead[start])
        else:
            right = torch.zeros(stop - start, dtype=torch.bool)
            right[[index for index in item.right if 0 <= index < stop - start]] = True
            choices = ll[start:stop]
            wrong = choices.masked_fill(right.to(choices.device), -torch.inf).amax()
            margins.append(choices.masked_fill(~right.to(choices.device), -torch.inf).amax() - wrong)
        start = stop
    weights = torch.tensor([item.weight for item in chunk], device=ll.device)
    soft = torch.sigmoid(torch.stack(margins) / softness)
    value = (soft * weights).sum()
    for item, part in zip(chunk, soft.tolist(), strict=True):
        right_by_task[item.task] += part
    (-value).backward()  # type: ignore[no-untyped-call]
    return float(value.detach())


def _taught(
    model: Any,
    task: TaskItems,
    part: SmoothTask,
    batch_size: int,
    max_length: int,
    room: Room,
    agreement_by_task: dict[str, float],
) -> float:
    """Return the weighted sum of the items' agreements; the gradient of its negative is added."""
    chosen = sorted((task.taught[number] for number in part.items), key=lambda item: -sum(map(len, item[0])))
    total = 0.0
    while chosen:
        length = sum(map(len, chosen[0][0]))
        rows_of_it = max(1, min(batch_size, _most(batch_size, room, length) // length))
        (pairs, rows), chosen = zip(*chosen[:rows_of_it], strict=True), chosen[rows_of_it:]
        found = agreements(model, pairs, rows, max_length=max_length, name=task.name, room=room)
        value = found.sum() * (part.gain / len(part.items))
        (-value).backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
        agreement_by_task[task.name] += float(found.detach().sum())
        del found, value
        heap.give_back(model)
    return total


def _most(batch_size: int, room: Room, length: int) -> int:
    """Return how many tokens a batch of rows of some length may have of which all may be read."""
    return min(batch_size * TOKENS, room.tokens(length))


def _answers(model: Any, laid: Plan, room: Room) -> tuple[Tensor, Tensor]:
    """Return (pairs,) differentiable log-likelihoods and smallest leads in nats, in the pairs' order.

    What all batches keep is held at the same time.
    """
    kept = sum(room.bytes(*batch.ids.shape) for batch in laid.batches)
    read = [_tokens(model, batch, trims(model), room, kept) for batch in laid.batches]
    likelihood, lead = (torch.cat(parts) for parts in zip(*read, strict=True))
    count = len(laid.order)
    pair = torch.zeros(len(likelihood), dtype=torch.long)
    pair[torch.from_numpy(laid.starts[1:])] = 1
    pair = torch.from_numpy(laid.order)[pair.cumsum(0)].to(likelihood.device)
    ll = torch.zeros(count, device=likelihood.device).index_add(0, pair, likelihood)
    least = torch.full((count,), torch.inf, device=lead.device).scatter_reduce(0, pair, lead, "amin")
    return ll, least


def _tokens(model: Any, batch: Batch, trimmed: bool, room: Room, kept: int) -> tuple[Tensor, Tensor]:
    """Return (tokens,) differentiable log-likelihoods and leads over the best other token, in nats.

    kept: bytes that it and what is gone back through with it would keep.
    """
    with room.keeping(model, kept):
        logits = forward(model, batch, trimmed)
    gold = batch.gold.to(logits.device)[:, None]
    scored = logits[batch.row.to(logits.device), batch.column.to(logits.device)].float()
    gold_logits = scored.gather(1, gold)[:, 0]
    others = scored.scatter(1, gold, -torch.inf).amax(1)
    return gold_logits - scored.logsumexp(1), gold_logits - others


def _retention(
    model: Any,
    texts: Sequence[tuple[TaskItems, SmoothTask]],
    loss: SmoothLoss,
    batch_size: int,
    max_length: int,
    prefix: int,
    room: Room,
) -> float:
    """Return the price of lost retention; its gradient is added if any is lost.

    A pass without gradients first computes the retention, because the gradient is 0 if nothing is lost.
    """
    laid = [_windows(task, part, batch_size, max_length, prefix, room) for task, part in texts]
    parts = [part for _, part in texts]
    means = [float(windows.score(model).ll @ weights) for windows, weights in laid]
    gained = [mean - (part.base or 0.0) for part, mean in zip(parts, means, strict=True)]
    ratios = [part.gain * kept_share(gain) for part, gain in zip(parts, gained, strict=True)]
    kept = math.fsum(ratios)
    least, short = loss.limit or (0.0, 0.0)
    price = loss.price * (kept < 1.0) + short * (kept < least)
    if not price:
        return 0.0
    trimmed = trims(model)
    for (windows, weights), gain, slope in zip(laid, gained, ratios, strict=True):
        if gain >= 0.0:
            continue
        start = 0
        by_token = torch.from_numpy(weights[windows.order]).repeat_interleave(_lengths(windows))
        for batch in windows.batches:
            likelihood, _ = _tokens(model, batch, trimmed, room, room.bytes(*batch.ids.shape))
            token_weights = by_token[start : start + len(likelihood)].to(likelihood)
            (-price * slope * (token_weights * likelihood).sum()).backward()  # type: ignore[no-untyped-call]
            start += len(likelihood)
            heap.give_back(model)
    return loss.price * max(0.0, 1.0 - kept) + short * max(0.0, least - kept)


def _windows(
    task: TaskItems, part: SmoothTask, batch_size: int, max_length: int, prefix: int, room: Room
) -> tuple[Plan, Any]:
    """Return the batches of a task's text windows or right answers, and (pairs,) their weights in the mean
    per token."""
    pairs: list[Pair] = []
    weights: list[float] = []
    right = task.right
    for number in part.items if not task.texts else ():
        pairs.append(task.pairs[right[number]])
        weights.append(1.0 / (len(pairs[-1][1]) * len(part.items)))
    for number in part.items if task.texts else ():
        text = task.texts[number]
        rolled = get_rolling_token_windows(list(text), prefix, max_length, 1)
        windows = [make_disjoint_window(window) for window in rolled]
        pairs += windows
        weights += [1.0 / (len(text) * len(part.items))] * len(windows)
    longest = min(max_length, max(len(context) + len(answer) for context, answer in pairs))
    options: Any = {"batch_size": batch_size, "most_tokens": _most(batch_size, room, longest)}
    laid = plan(pairs, max_length=max_length, names=[task.name] * len(pairs), **options)
    return laid, torch.tensor(weights, dtype=torch.float64).numpy()


def _lengths(laid: Plan) -> Tensor:
    """Return the number of tokens of each pair, in the order in which they are scored."""
    tokens = sum(len(batch.gold) for batch in laid.batches)
    ends = torch.tensor([*laid.starts[1:].tolist(), tokens])
    return ends - torch.from_numpy(laid.starts)
