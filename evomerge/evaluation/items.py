"""The items of a split, built once: requests are rendered, tokenised, cut into blocks and batched."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evomerge.errors import ConfigError
from evomerge.evaluation.distributions import Distributions
from evomerge.evaluation.likelihood import Plan, check_answer, plan
from evomerge.evaluation.live_lm import LiveLM, Pair, compiled_templates, no_room
from evomerge.evaluation.own_tasks import judged_ahead
from evomerge.evaluation.scores import Question, Split
from evomerge.evaluation.tasks import TaskBuilder, is_number


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskItems:
    """One task's items on one split.

    task: the lm-eval task of the requests. groups: for each item its requests, in item order.
    pairs: for each request its tokens (likelihood tasks), or those of a right answer (tasks that generate and
    have a companion). texts: for each item its tokens (rolling tasks).
    gold: for each item the indices of its right choices (multiple choice).
    taught: for each item what its specialist wrote after the prompt, with its distributions, for gradients.
    """

    builder: TaskBuilder
    task: Any
    groups: tuple[tuple[Any, ...], ...]
    pairs: tuple[Pair, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    gold: tuple[tuple[int, ...], ...] = ()
    taught: tuple[tuple[Pair, Distributions], ...] = ()

    @property
    def name(self) -> str:
        return self.builder.spec.task

    @property
    def right(self) -> list[int]:
        """For each item the number of the pair with its right answer, the first of several."""
        starts = np.cumsum([0, *(len(group) for group in self.groups)]).tolist()
        return [starts[item] + (self.gold[item][0] if self.gold else 0) for item in range(len(self.groups))]

    def twin(self, earlier: Sequence[TaskItems]) -> TaskItems | None:
        """Return an earlier task of the suite with the same requests, whose answers serve this one too."""
        spec, end = self.builder.spec, self.builder.asked.think_end_token
        for other in earlier:
            if (
                other.builder.spec.source == spec.source
                and {spec.role, other.builder.spec.role} != {"skill", "coherence"}
                and other.builder.asked.think_end_token == end
                and other.texts == self.texts
                and (other.pairs == self.pairs or self.generates)
                and _requests(other) == _requests(self)
            ):
                return other
        return None

    @property
    def generates(self) -> bool:
        """Whether the model writes the answers."""
        return str(self.groups[0][0].request_type) == "generate_until"

    def question(self, document: Any) -> str:
        """Return what a document asks, and its right answer where it has one; without examples."""
        texts = []
        for part in (self.task.doc_to_text, self.task.doc_to_target):
            with contextlib.suppress(Exception):  # a task that checks the answer alone may have no target
                texts.append(str(part(document)))
        return "\n".join(texts)

    def metrics(self, other: str | None = None) -> Iterator[float]:
        """Yield the metric of each item, from the requests' answers by lm-eval's filters and metrics.

        other: the name of another metric of the task.

        Raises:
            ConfigError: the metric can't be computed, or is not a finite number.
        """
        for group in self.groups:
            for instance in group:
                instance.filtered_resps = {}
        self.task.apply_filters()
        name, chosen = other or self.builder.metric, self.builder.filter
        judged_ahead(self.task, [(g[0].doc, g[0].filtered_resps[chosen]) for g in self.groups])
        for item, group in enumerate(self.groups):
            results = [instance.filtered_resps[chosen] for instance in group]
            try:
                value = self.task.process_results(group[0].doc, results).get(name)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"task {self.name!r}: metric {name!r} failed on item {item}: {reason}"
                ) from error
            if not is_number(value) or not math.isfinite(value):
                raise ConfigError(
                    f"task {self.name!r}: metric {name!r} of item {item} is not a finite number",
                    got=repr(value),
                )
            yield float(value)


def _requests(task: TaskItems) -> list[tuple[Any, ...]]:
    return [request.args for group in task.groups for request in group]


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
    """The batches of a block's likelihood pairs, for one context length and batch size.

    plan: None if no task has pairs. bounds: task -> (start, stop) of its pairs. windows: rolling task -> the
    offsets of its items' first windows, from the task's first pair. beside: tasks that generate, whose right
    answers are scored while their prompts are read.
    """

    plan: Plan | None
    bounds: Mapping[str, tuple[int, int]]
    windows: Mapping[str, np.ndarray[Any, np.dtype[np.intp]]]
    beside: frozenset[str] = frozenset()


def merged(blocks: Sequence[Items]) -> Items:
    """Return the items of all blocks of a split as one block."""
    tasks = tuple(
        replace(
            rows[0],
            groups=tuple(group for row in rows for group in row.groups),
            pairs=tuple(pair for row in rows for pair in row.pairs),
            texts=tuple(text for row in rows for text in row.texts),
            gold=tuple(gold for row in rows for gold in row.gold),
            taught=tuple(item for row in rows for item in row.taught),
        )
        for rows in zip(*(block.tasks for block in blocks), strict=True)
    )
    return Items(split=blocks[0].split, tasks=tasks)


def refuse_glued(builder: TaskBuilder, lm: LiveLM) -> None:
    """Raise ConfigError for a task whose answers share tokens with their prompts.

    lm-eval tokenises prompt and answer together and scores the tokens after the prompt's number of tokens.
    If a token spans the border, the answer's first tokens are silently lost. A single item may be due to the
    tokenizer; if all items of a sample are like that, the task's template is wrong.
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
            f"task {builder.spec.task!r}: the answers share tokens with the prompts, so they can't be scored",
            expected="a space, or another border between tokens, between prompt and answer",
            got=repr(glued[0].args[0][-40:] + glued[0].args[1][:40]),
            fix="start doc_to_target with a space",
        )


def refuse_long(items: Items, lm: LiveLM) -> None:
    """Raise ConfigError for a prompt that is longer than the model's context, where its task says so.

    lm: with the model's config attached. Texts of rolling tasks are read in windows.
    """
    for task in items.tasks:
        if task.texts or task.builder.asked.long_prompts == "cut":
            continue
        requests = [request for group in task.groups for request in group]
        if task.pairs and not task.generates:
            room = lm.max_length + 1  # the last token is only predicted
            lengths = [len(context) + len(continuation) for context, continuation in task.pairs]
        else:
            limit = max(normalize_gen_kwargs(r.args[1], lm.max_gen_toks)["max_gen_toks"] for r in requests)
            if (room := lm.max_length - limit) <= 0:
                raise no_room(task.name, limit, lm.max_length)
            lengths = [len(lm.tok_encode(request.args[0])) for request in requests]
        for request, length in zip(requests, lengths, strict=True):
            if length > room:
                raise _too_long(task, request, items.split, length, room)


def refuse_long_answers(items: Items, max_length: int) -> None:
    """Raise ConfigError for an answer to be scored that is longer than the context, in tokens."""
    for task in items.tasks:
        for _, continuation in task.pairs:
            check_answer(task.name, continuation, max_length)


def _too_long(task: TaskItems, request: Any, split: Split, length: int, room: int) -> ConfigError:
    given = task.pairs and not task.generates
    prompt, kind = ("prompt with its answer", "answer's last token") if given else ("prompt", "answer")
    return ConfigError(
        f"task {task.name!r}: item {request.doc_id} of {split} is longer than the model's context",
        expected=f"at most {room} tokens, which leaves room for the {kind}",
        got=f"a {prompt} of {length} tokens",
        fix="reduce num_fewshot, or set long_prompts: cut; a long prompt then loses its start, as in lm-eval",
    )


def build_items(builder: TaskBuilder, split: Split, lm: LiveLM) -> TaskItems:
    """Return a task's items on a split, rendered and tokenised. Raises ConfigError."""
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
            task.doc_to_target(group[0].doc)  # renders it now and caches it for scoring
        if builder.output_type == "multiple_choice":
            gold = tuple(tuple(builder.gold(group[0].doc)) for group in groups)
    return TaskItems(builder=builder, task=task, groups=groups, pairs=tuple(lm.pairs(flat)), gold=gold)


def questions(task: TaskItems, characters: int) -> list[Question]:
    """Return what is asked in each item; of long texts the end of a prompt, the start of an answer."""
    with compiled_templates():
        return [_question(task, number, group, characters) for number, group in enumerate(task.groups)]


def _question(task: TaskItems, number: int, group: Sequence[Any], characters: int) -> Question:
    prompt = str(group[0].args[0])[-characters:]
    choices: list[str] = []
    right: list[str] = []
    if task.texts or task.builder.spec.role == "coherence":
        pass
    elif task.gold:
        count = len(task.task.doc_to_choice(group[0].doc))  # later requests are those of acc_mutual_info
        choices = [str(request.args[1]) for request in group[:count]]
        right = [choices[index] for index in task.gold[number] if 0 <= index < count]
    elif task.pairs and not task.generates:
        right = [str(group[0].args[1])]
    else:
        target: Any = ()
        with contextlib.suppress(Exception):  # a task that checks the answer alone may have no target
            target = task.task.doc_to_target(group[0].doc)
        right = [
            str(text) for text in (target if isinstance(target, list) else [target] if target != () else ())
        ]
    return Question(prompt, [c[:characters] for c in choices], [r[:characters] for r in right])


def refuse_few(builder: TaskBuilder, blocks: int) -> None:
    """Raise ConfigError for a task with fewer search items than item blocks."""
    count = len(builder.documents.get("search", ()))
    if 0 < count < blocks:
        raise ConfigError(
            f"task {builder.spec.task!r} has too few search items for {blocks} item blocks",
            expected=f"{blocks} or more",
            got=str(count),
            fix=f"give the task more items, or set racing.blocks to {count} (1 turns racing off)",
        )


def cut_into_blocks(whole: Sequence[TaskItems], blocks: int, seed: int) -> list[tuple[TaskItems, ...]]:
    """Return the items of every block: random parts of each task, as equal as possible, in item order."""
    if blocks == 1:
        return [tuple(whole)]
    cut: list[list[TaskItems]] = [[] for _ in range(blocks)]
    spare = 0  # the first block with an additional item; it moves on, so that block sizes stay similar
    assigned: dict[tuple[str, int], np.ndarray[Any, np.dtype[np.intp]]] = {}
    for task in whole:
        count, source = len(task.groups), task.builder.spec.source
        if (source, count) not in assigned:  # a task that stands twice is cut in the same way
            name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
            order = np.random.default_rng([seed, name]).permutation(count)
            block_of = assigned[source, count] = np.empty(count, dtype=np.intp)
            block_of[order] = (np.arange(count) + spare) % blocks
            spare = (spare + count) % blocks
        block_of = assigned[source, count]
        for block, parts in enumerate(cut):
            parts.append(_sliced(task, np.flatnonzero(block_of == block).tolist()))
    return [tuple(parts) for parts in cut]


def _sliced(task: TaskItems, chosen: Sequence[int]) -> TaskItems:
    """Return some items of a task, with a copy of the lm-eval task whose filters see only these."""
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
        taught=tuple(task.taught[item] for item in chosen) if task.taught else (),
    )


def lay_out(
    items: Items,
    lm: LiveLM,
    batch_size: int,
    max_length: int,
    share: int,
    beside: Collection[str] = (),
) -> BatchLayout:
    """Return the batches of a block's likelihood pairs. Raises ConfigError for answers that are too long.

    share: as in `likelihood.plan`. beside: tasks whose right answers are scored elsewhere.
    """
    beside = set(beside)
    pairs: list[Pair] = []
    names: list[str] = []
    bounds: dict[str, tuple[int, int]] = {}
    windows: dict[str, Any] = {}
    for number, task in enumerate(items.tasks):
        start = len(pairs)
        twin = task.twin(items.tasks[:number]) if task.pairs or task.texts else None
        if twin is not None and twin.pairs == task.pairs and twin.name in beside:
            beside.add(task.name)
        if task.name in beside:
            continue
        if twin is not None and twin.pairs == task.pairs:
            bounds[task.name] = bounds[twin.name]
            windows |= {task.name: windows[twin.name]} if task.texts else {}
            continue
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
    options: Any = {"batch_size": batch_size, "max_length": max_length, "names": names, "share": share}
    laid = plan(pairs, **options) if pairs else None
    return BatchLayout(plan=laid, bounds=bounds, windows=windows, beside=frozenset(beside))
