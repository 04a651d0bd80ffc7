"""The items of a split, built once: requests rendered, tokenised, cut into blocks and laid out in batches."""

from __future__ import annotations

import copy
import hashlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evomerge.errors import ConfigError
from evomerge.evaluation.likelihood import Plan, plan
from evomerge.evaluation.live_lm import LiveLM, Pair, compiled_templates
from evomerge.evaluation.scores import Split
from evomerge.evaluation.tasks import TaskBuilder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskItems:
    """One task's items on one split.

    task: the lm-eval task that owns the requests. groups: the requests of each item, in item order.
    pairs: for each request its tokens (likelihood tasks). texts: for each item its tokens (rolling tasks).
    gold: for each item its right choices (multiple choice).
    """

    builder: TaskBuilder
    task: Any
    groups: tuple[tuple[Any, ...], ...]
    pairs: tuple[Pair, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    gold: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> str:
        return self.builder.spec.task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """The prebuilt items of one block of a split. Get them from `Harness.items`."""

    split: Split
    tasks: tuple[TaskItems, ...]
    block: int = 0
    plans: dict[tuple[int, int], BatchLayout] = field(default_factory=dict)

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of items of each task."""
        return types.MappingProxyType({task.name: len(task.groups) for task in self.tasks})

    @property
    def total(self) -> int:
        """Number of items, all tasks together."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchLayout:
    """How a split's likelihood pairs are batched for one context length and batch size.

    bounds: for each task (start, stop) of its pairs. windows: for each rolling task, the offsets of its
    items' first windows, counted from the task's first pair.
    """

    plan: Plan | None
    bounds: Mapping[str, tuple[int, int]]
    windows: Mapping[str, np.ndarray[Any, np.dtype[np.intp]]]


def merged(blocks: Sequence[Items]) -> Items:
    """Return the items of all blocks of a split as one block."""
    tasks = tuple(
        replace(
            rows[0],
            groups=tuple(group for row in rows for group in row.groups),
            pairs=tuple(pair for row in rows for pair in row.pairs),
            texts=tuple(text for row in rows for text in row.texts),
            gold=tuple(gold for row in rows for gold in row.gold),
        )
        for rows in zip(*(block.tasks for block in blocks), strict=True)
    )
    return Items(split=blocks[0].split, tasks=tasks)


def refuse_glued(builder: TaskBuilder, lm: LiveLM) -> None:
    """Refuse a task whose answers run into their prompts.

    lm-eval joins prompt and answer as they are, tokenises, and scores what lies past the prompt's own
    number of tokens. Where a word spans the border, the answer's first tokens are silently lost. One such
    item can be the tokenizer's doing; if all of a sample are like that, the template is wrong.
    """
    asked = [
        instance
        for instance in builder.sample
        if instance.request_type == "loglikelihood" and instance.args[0]
    ]
    pairs = lm.pairs(asked)
    glued = [
        instance
        for instance, (context, continuation) in zip(asked, pairs, strict=True)
        if context + continuation != lm.tok_encode(instance.args[0] + instance.args[1])
    ]
    if asked and len(glued) == len(asked):
        raise ConfigError(
            f"task {builder.spec.task!r}: the answers run into the prompts, so they can't be scored apart",
            expected="a space or another token's border between prompt and answer",
            got=repr(glued[0].args[0][-40:] + glued[0].args[1][:40]),
            fix="start doc_to_target with a space",
        )


def build_items(builder: TaskBuilder, split: Split, lm: LiveLM) -> TaskItems:
    task = builder.requests(split)
    instances = task.instances
    by_item: dict[int, list[Any]] = {}
    for instance in instances:
        by_item.setdefault(instance.doc_id, []).append(instance)
    groups = tuple(tuple(sorted(group, key=lambda instance: instance.idx)) for group in by_item.values())
    flat = [instance for group in groups for instance in group]
    if builder.output_type == "loglikelihood_rolling":
        texts = tuple(tuple(lm.tok_encode(instance.args[0])) for instance in flat)
        if () in texts:
            raise ConfigError(f"task {builder.spec.task!r}: item {texts.index(())} of {split} has no text")
        return TaskItems(builder=builder, task=task, groups=groups, texts=texts)
    if builder.output_type == "generate_until":
        return TaskItems(builder=builder, task=task, groups=groups)
    gold: tuple[tuple[int, ...], ...] = ()
    with compiled_templates():
        for group in groups:
            task.doc_to_target(group[0].doc)  # rendered here, so that scoring finds it remembered
        if builder.output_type == "multiple_choice":
            gold = tuple(tuple(builder.gold(group[0].doc)) for group in groups)
    return TaskItems(builder=builder, task=task, groups=groups, pairs=tuple(lm.pairs(flat)), gold=gold)


def refuse_few(builder: TaskBuilder, blocks: int) -> None:
    count = len(builder.documents.get("search", ()))
    if 0 < count < blocks:
        raise ConfigError(
            f"task {builder.spec.task!r} has too few search items for {blocks} item blocks",
            expected=f"{blocks} or more",
            got=str(count),
            fix=f"give the task more items, or set racing.blocks to {count} (1 turns racing off)",
        )


def cut_into_blocks(whole: Sequence[TaskItems], blocks: int, seed: int) -> list[tuple[TaskItems, ...]]:
    """Return the items of every block: of each task a random share, as equal as can be, in item order."""
    if blocks == 1:
        return [tuple(whole)]
    cut: list[list[TaskItems]] = [[] for _ in range(blocks)]
    spare = 0  # the first block to get one item more, so that blocks differ by few items over all tasks
    for task in whole:
        count = len(task.groups)
        name = int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:8], "big")
        order = np.random.default_rng([seed, name]).permutation(count)
        block_of = np.empty(count, dtype=np.intp)
        block_of[order] = (np.arange(count) + spare) % blocks
        spare = (spare + count) % blocks
        for block, parts in enumerate(cut):
            parts.append(_sliced(task, np.flatnonzero(block_of == block).tolist()))
    return [tuple(parts) for parts in cut]


def _sliced(task: TaskItems, chosen: Sequence[int]) -> TaskItems:
    """Return some items of a task, with an lm-eval task of their own, whose filters see only them."""
    groups = tuple(task.groups[item] for item in chosen)
    view = copy.copy(task.task)
    view._instances = [instance for group in groups for instance in group]
    ends = np.cumsum([len(group) for group in task.groups]).tolist()
    pairs = [task.pairs[ends[i] - len(task.groups[i]) : ends[i]] for i in chosen] if task.pairs else ()
    return TaskItems(
        builder=task.builder,
        task=view,
        groups=groups,
        pairs=tuple(pair for part in pairs for pair in part),
        texts=tuple(task.texts[item] for item in chosen) if task.texts else (),
        gold=tuple(task.gold[item] for item in chosen) if task.gold else (),
    )


def lay_out(items: Items, lm: LiveLM, batch_size: int, max_length: int) -> BatchLayout:
    pairs: list[Pair] = []
    names: list[str] = []
    bounds: dict[str, tuple[int, int]] = {}
    windows: dict[str, Any] = {}
    for task in items.tasks:
        start = len(pairs)
        if task.texts:
            firsts = []
            for text in task.texts:
                firsts.append(len(pairs) - start)
                rolled = get_rolling_token_windows(list(text), lm.prefix_token_id, max_length, 1)
                pairs += (make_disjoint_window(window) for window in rolled)
            windows[task.name] = np.array(firsts, dtype=np.intp)
        pairs += task.pairs
        if len(pairs) > start:
            bounds[task.name] = (start, len(pairs))
            names += [task.name] * (len(pairs) - start)
    laid = plan(pairs, batch_size=batch_size, max_length=max_length, names=names) if pairs else None
    return BatchLayout(plan=laid, bounds=bounds, windows=windows)
