"""Own tasks: a suite's data file as an lm-eval task, made in memory without a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from lm_eval.api.task import ConfigurableTask

from evomerge.errors import ConfigError
from evomerge.evaluation import own_data
from evomerge.evaluation.live_lm import quiet
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.scorers import AnswerScorer
from evomerge.evaluation.scores import SPLITS
from evomerge.evaluation.suite import Suite, SuiteTask

if TYPE_CHECKING:
    from evomerge.evaluation.judge import Judge

_ALL = "all"
"""The one dataset split, where the suite gives numbers of items."""
_LONGEST = 256
"""Tokens of a generated answer, unless `gen_kwargs` says otherwise."""


def own_task(suite: Suite, spec: SuiteTask, permissions: Permissions) -> Any:
    """Return the lm-eval task of an entry with `data`; raise ConfigError as in `own_data.read`."""
    assert spec.data is not None
    path = suite.data_files[spec.data]
    metric = "exact" if spec.role == "retention" else spec.metric.partition("_")[0]
    data = own_data.read(path, spec.columns, metric)
    by_split: dict[str, list[own_data.OwnItem]] = {_ALL: list(data.items)}
    if not spec.splits.drawn:
        by_split = {split: [item for item in data.items if item.split == split] for split in SPLITS}
        empty = [split for split in SPLITS if spec.splits[split] is not None and not by_split[split]]
        if empty:
            raise ConfigError(
                f"task {spec.task!r}: {path} has too few items for three splits",
                expected="items whose prompts' hashes give some to each split",
                got=f"{len(data.items)} items, none in {empty[0]}",
                fix="give more items, or numbers of items: splits: {search: N, select: N, test: N}",
            )
    tables = {
        split: datasets.Dataset.from_list([_document(item) for item in items])
        for split, items in by_split.items()
        if items
    }
    scorer = None
    if spec.scorer is not None:
        scorer = AnswerScorer(spec.task, suite.scorer_place(spec.scorer), permissions)
    judge = None
    if spec.judge is not None:
        from evomerge.evaluation.judge import Judge  # and its HTTP client, which few suites need

        judge = Judge(spec.task, spec.judge, permissions)
    with quiet():
        task = ConfigurableTask(config=_config(spec, datasets.DatasetDict(tables), data, scorer or judge))
    task.judge = judge
    return task


def judged_ahead(task: Any, answers: Sequence[tuple[Mapping[str, Any], str]]) -> None:
    """Let a task's judge, if it has one, score many answers at the same time; raise JudgeError.

    answers: document and answer of each.
    """
    judge = getattr(task, "judge", None)
    if judge is not None:
        judge.ahead([_asked(document, answer) for document, answer in answers])


def _asked(document: Mapping[str, Any], answer: str) -> tuple[str, str, str, dict[str, Any]]:
    """Return prompt, answer, right answer and row, as a judge is asked."""
    return document["prompt"], answer, document["answer"], json.loads(document["row"])


def _document(item: own_data.OwnItem) -> dict[str, Any]:
    row = json.dumps(item.row)
    document: dict[str, Any] = {"prompt": item.prompt, "answer": item.answer, "row": row}
    if item.choices:
        document |= {"choices": list(item.choices), "right": item.choices.index(item.answer)}
    return document


def _config(
    spec: SuiteTask, dataset: Any, data: own_data.OwnData, scorer: AnswerScorer | Judge | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "task": spec.task,
        "custom_dataset": lambda **_: dataset,
        "test_split": _ALL if spec.splits.drawn else "test",
        "doc_to_text": "prompt",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": spec.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if spec.role == "retention":
        return config | {  # a choice of one, because lm-eval puts choices behind prompts of any kind
            "output_type": "multiple_choice",
            "doc_to_target": 0,
            "doc_to_choice": lambda document: [document["answer"]],
            "process_results": lambda document, results: {spec.metric: results[0][0]},
        }
    if spec.choices is not None:
        return config | {
            "output_type": "multiple_choice",
            "doc_to_target": "right",
            "doc_to_choice": "choices",
            "process_results": _choice,
        }
    one_line = spec.metric == "exact" and not any("\n" in item.answer.strip() for item in data.items)
    return config | {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["\n"] if one_line else [],
            "do_sample": False,
            "max_gen_toks": _LONGEST,
        },
        "process_results": _generated(spec, scorer),
    }


def _generated(
    spec: SuiteTask, scorer: AnswerScorer | Judge | None
) -> Callable[[Any, Any], dict[str, float]]:
    """Return what scores a generated answer."""
    if spec.judge is not None:
        judge: Any = scorer
        return lambda document, answers: {spec.metric.partition(",")[0]: judge(*_asked(document, answers[0]))}
    if isinstance(scorer, AnswerScorer):
        return lambda document, answers: scorer(answers[0], json.loads(document["row"]))
    compare = own_data.scorer(spec.metric.partition("_")[0])
    return lambda document, answers: compare(answers[0], document["answer"])


def _choice(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Score the likeliest choice."""
    likelihoods = [likelihood for likelihood, _ in results]
    return {"choice": float(int(np.argmax(likelihoods)) == document["right"])}
