"""Companions of generated answers: the likelihood of a right answer, without generating a token.

The right answer is the gold target, written as in a few-shot example, or an answer that the specialist gave.
It counts only if the task's own filters and metric find it right, for every item of a split; otherwise the
task has no companion there. A companion moves with the weights where the exact metric stands still, and costs
one forward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from lm_eval.api.utils import maybe_delimit
from lm_eval.utils import apply_template

from evomerge.evaluation.asking import DISTRIBUTION, OFF
from evomerge.evaluation.items import TaskItems
from evomerge.evaluation.live_lm import LiveLM, Pair, compiled_templates

_log = logging.getLogger(__name__)


def with_companion(task: TaskItems, lm: LiveLM, answers: Sequence[str | None] = ()) -> TaskItems:
    """Return a task's items with the pairs of their right answers; as they are where there are none.

    Only tasks that count in the mean have a companion, and only where models answer without reasoning.

    answers: for each item the answer to follow, None for the gold target; () for gold targets alone, which
        also serve where one of the answers is not right when it is written again.
    """
    if not _wanted(task):
        return task
    with compiled_templates():
        gold = [gold_text(task, group[0].doc) for group in task.groups]
        whole = [_rendered(task, group[0].doc) for group in task.groups]
    own = [answer or target for answer, target in zip(answers, gold, strict=True)] if answers else gold
    tried: list[object] = []
    for targets, delimited in itertools.product((own, whole, gold), (True, False)):
        if not all(targets) or (repeated := [*targets, delimited]) in tried:
            continue
        tried.append(repeated)
        requests = [
            SimpleNamespace(args=(group[0].args[0], _written(task, group[0], str(target), delimited)))
            for group, target in zip(task.groups, targets, strict=True)
        ]
        pairs = lm.pairs(requests)
        if all(continuation for _, continuation in pairs) and _right(task, pairs, lm):
            return replace(task, pairs=tuple(pairs))
    _log.info("task %r has no companion: a right answer is not right by its metric", task.name)
    return task


def _wanted(task: TaskItems) -> bool:
    spec, asked = task.builder.spec, task.builder.asked
    thinks = asked.enable_thinking is not False and asked.think_end_token is not None
    return (
        task.generates
        and spec.role == "skill"
        and spec.counted
        and asked.companion not in (OFF, DISTRIBUTION)
        and not thinks
        and all(len(group) == 1 for group in task.groups)
    )


def gold_text(task: TaskItems, document: Any) -> str | None:
    """Return the text of a document's first gold answer, None without one."""
    with contextlib.suppress(Exception):  # a task that checks the answer alone may have no target
        target = task.task.doc_to_target(document)
        if isinstance(target, list):
            target = target[0]
            if not isinstance(target, str | int) and (text := _rendered(task, document)):
                return text  # a JSON list, which lm-eval took for a list of answers
        if isinstance(target, int) and task.task.config.doc_to_choice is not None:
            target = task.task.doc_to_choice(document)[target]
        return str(target)
    return None


def _rendered(task: TaskItems, document: Any) -> str | None:
    """Return the text of a document's target as its template gives it, None without one.

    lm-eval reads a text in square brackets as a list of right answers; it can be one, a JSON list of calls.
    """
    template = task.task.config.doc_to_target
    if isinstance(template, str) and template not in task.task.features:
        with contextlib.suppress(Exception):  # as above
            return str(apply_template(template, document))
    return None


def _written(task: TaskItems, request: Any, target: str, delimited: bool) -> str:
    """Return a target as it would follow the prompt in a few-shot example.

    A chat template separates prompt and answer itself; after `gen_prefix` lm-eval puts one space.
    """
    if not delimited or task.builder.templated:
        return target
    if prefix := getattr(task.task, "doc_to_prefix", lambda _: None)(request.doc):
        return str(maybe_delimit(prefix, target))[len(prefix) :]
    return str(getattr(task.task.config, "target_delimiter", "") or "") + target


def _right(task: TaskItems, pairs: Sequence[Pair], lm: LiveLM) -> bool:
    """Say whether the task finds all answers right, as if the model had generated their tokens."""
    for (request,), (_, continuation) in zip(task.groups, pairs, strict=True):
        text = lm.as_generated(request, continuation)
        request.resps = [text] * (request.repeats or 1)
    try:
        best = None
        for value in task.metrics():
            best = value if best is None else best
            if value < 1.0 or value != best:
                return False
        return True
    except Exception:
        return False
    finally:
        for (request,) in task.groups:
            request.resps, request.filtered_resps = [], {}
