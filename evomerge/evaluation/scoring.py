"""Scoring: make a task's scores of what a model answered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evomerge.errors import ConfigError
from evomerge.evaluation.coherence import coherence, drift, thoughts_open
from evomerge.evaluation.generation import Generated, GoldAnswer
from evomerge.evaluation.items import BatchLayout, TaskItems
from evomerge.evaluation.likelihood import Likelihoods
from evomerge.evaluation.live_lm import LiveLM
from evomerge.evaluation.scores import Array, TaskScores

PROMPT_END = 64
"""Last characters of a prompt where a chat template may begin or end the thoughts."""
_SURE = 1e3
"""Margins, in nats, are limited to this size."""


def score(
    task: TaskItems,
    layout: BatchLayout,
    likelihoods: Likelihoods | None,
    written: Mapping[str, Sequence[Generated]],
    lm: LiveLM,
    *,
    twin: TaskItems | None,
    stored_text: int,
) -> TaskScores:
    """Score a task's items.

    likelihoods: of the block's pairs. written: task -> its generated answers. twin: a task that was scored
    just before from the same requests, if there is one. stored_text: as in Harness.
    """
    generated = None
    if task.generates:
        answers = written[(twin or task).name]
        generated = _generated(task, answers, lm, stored_text)
        if task.name in layout.beside:
            read = [answer.companion for answer in answers if answer.companion is not None]
            return _with_companion(task, generated, *_read(read))
    if task.name not in layout.bounds:
        return generated or _requested(task, lm, twin)
    assert likelihoods is not None
    start, stop = layout.bounds[task.name]
    ll, greedy = likelihoods.ll[start:stop], likelihoods.greedy[start:stop]
    margin = likelihoods.margin[start:stop]
    if generated is not None:
        return _with_companion(task, generated, ll, margin)
    if task.texts:
        sums = np.add.reduceat(ll, layout.windows[task.name])
        return TaskScores(task=task.name, metric=sums / [len(text) for text in task.texts])
    if task.builder.spec.role == "retention":
        lengths = [len(task.pairs[number][1]) for number in task.right]
        return TaskScores(task=task.name, metric=ll[task.right] / lengths)
    return _answered(task, ll, greedy, margin)


def _read(companions: Sequence[GoldAnswer]) -> tuple[Array, Array]:
    return np.array([each.ll for each in companions]), np.array([each.lead for each in companions])


def _with_companion(task: TaskItems, generated: TaskScores, ll: Array, margin: Array) -> TaskScores:
    """Add to the scores of generated answers what the model says of the right ones."""
    smooth = _probability(task, ll) if generated.smooth is None else generated.smooth
    return replace(generated, smooth=smooth, margin=margin)


def _answered(
    task: TaskItems, ll: Array, greedy: np.ndarray[Any, np.dtype[np.bool_]], margin: Array
) -> TaskScores:
    """Score a loglikelihood or multiple-choice task from the results of its requests."""
    answers = iter(zip(ll.tolist(), greedy.tolist(), strict=True))
    for group in task.groups:
        for instance in group:
            instance.resps = [next(answers)]
    if task.gold:
        smooth, margin = _choices(task, ll)
    else:
        smooth = _probability(task, ll)
    return TaskScores(task=task.name, metric=_metric(task), smooth=smooth, margin=margin)


def _probability(task: TaskItems, ll: Array) -> Array:
    """Return (n,) the geometric mean probability of the answers' tokens."""
    means: Array = np.exp(ll / [len(continuation) for _, continuation in task.pairs])
    return means


def _choices(task: TaskItems, ll: Array) -> tuple[Array, Array]:
    """Return (n,) the right choices' share of all choices' probability, and their lead in nats."""
    choices = [len(task.task.doc_to_choice(group[0].doc)) for group in task.groups]
    table = np.full((len(choices), max(choices)), -np.inf)
    right = np.zeros_like(table)
    start = 0
    for row, (group, count) in enumerate(zip(task.groups, choices, strict=True)):
        # Requests past the choices are the unconditional ones of acc_mutual_info.
        table[row, :count] = ll[start : start + count]
        start += len(group)
        right[row, [index for index in task.gold[row] if 0 <= index < count]] = 1.0
    probability = np.exp(table - table.max(axis=1, keepdims=True))
    share: Array = (probability * right).sum(axis=1) / probability.sum(axis=1)
    best = np.where(right > 0, table, -np.inf).max(axis=1)
    wrong = np.where(right > 0, -np.inf, table).max(axis=1)
    return share, np.clip(best - wrong, -_SURE, _SURE)  # an item may have no wrong choice


def _requested(task: TaskItems, lm: LiveLM, twin: TaskItems | None) -> TaskScores:
    """Score a task whose requests lm-eval sends one by one. twin: as in `Harness._score`."""
    repeated = repeated_requests(task)
    if twin is not None:
        answered = [instance for group in twin.groups for instance in group]
        answers = [answer for instance in answered for answer in instance.resps]
    else:
        answers = getattr(lm, repeated[0].request_type)(repeated, disable_tqdm=True)
    _give(repeated, answers)
    return TaskScores(task=task.name, metric=_metric(task))


def _give(repeated: Sequence[Any], answers: Sequence[Any]) -> None:
    for instance in repeated:
        instance.resps = []
    for instance, answer in zip(repeated, answers, strict=True):
        instance.resps.append(answer)


def _generated(task: TaskItems, answers: Sequence[Generated], lm: LiveLM, stored_text: int) -> TaskScores:
    """Score a task whose answers the model wrote. stored_text: as in Harness."""
    repeated = repeated_requests(task)
    if task.builder.spec.role == "coherence":
        by_item: dict[int, list[float]] = {}
        for request, answer in zip(repeated, answers, strict=True):
            by_item.setdefault(request.doc_id, []).append(_coherence(task, request, answer, lm))
        metric = np.array([np.mean(values) for values in by_item.values()])
        smooth = None
    else:
        _give(repeated, [answer.text for answer in answers])
        metric = _metric(task)
        smooth = None if (partial := task.builder.spec.smooth) is None else _smooth(task, partial)
    left = iter(answers)
    counts = [sum(instance.repeats or 1 for instance in group) for group in task.groups]
    by_group = [list(itertools.islice(left, count)) for count in counts]
    return TaskScores(
        task=task.name,
        metric=metric,
        smooth=smooth,
        tokens=np.array([np.mean([answer.tokens for answer in group]) for group in by_group]),
        texts=tuple(tuple(answer.text[:stored_text] for answer in group) for group in by_group)
        if stored_text
        else None,
    )


def _smooth(task: TaskItems, name: str) -> Array:
    """Return (n,) the partial credit of each item. name: of the metric."""
    values = _metric(task, name)
    if wrong := [value for value in values.tolist() if not 0 <= value <= 1]:
        raise ConfigError(
            f"task {task.name!r}: smooth metric {name!r}", expected="numbers from 0 to 1", got=str(wrong[0])
        )
    return values


def _coherence(task: TaskItems, request: Any, answer: Generated, lm: LiveLM) -> float:
    """Return the coherence of one answer."""
    end = task.builder.asked.think_end_token
    if isinstance(end, int):
        end = lm.tok_decode([end], skip_special_tokens=False)
    written = request.args[0][-PROMPT_END:] + lm.tok_decode(list(answer.ids), skip_special_tokens=False)
    return coherence(
        lm.tok_encode(answer.text, add_special_tokens=False),
        ended=answer.ended,
        drifted=drift(answer.text, task.question(request.doc)),
        thinking=thoughts_open(written, end),
    )


def _metric(task: TaskItems, other: str | None = None) -> Array:
    """Return (n,) the metric of each item. other: the name of another metric of the task."""
    return np.fromiter(task.metrics(other), dtype=np.float64, count=len(task.groups))


def repeated_requests(task: TaskItems) -> list[Any]:
    """Return a task's requests, each as often as the task repeats it."""
    flat = (instance for group in task.groups for instance in group)
    return [instance for instance in flat for _ in range(instance.repeats or 1)]
