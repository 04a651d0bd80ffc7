"""Answers of the specialists on `search`: what companions and gradients follow where a suite asks for that.

Companions follow right answers (`companion: specialist`); gradients follow what a specialist expects at each
token of its answers, right or wrong (`companion: distribution`). Both are made once, before anything is
scored, and kept with the run, so that every session and every worker has the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evomerge.errors import UserError
from evomerge.evaluation.asking import DISTRIBUTION, SPECIALIST
from evomerge.evaluation.distributions import Distributions
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.running.executors import ExecutorSpec, build
from evomerge.running.worker import DistributionsJob, Job, WorkerSpec, WrittenAnswers
from evomerge.schema import LARGEST_COUNT

Answers = Mapping[str, Sequence[str | None]]
"""Task -> for each item of `search` the specialist's answer, None where it is not right."""
Expected = Mapping[str, Sequence[Distributions]]
"""Task -> for each item of `search` the specialist's answer and what it expected at each token."""


def followed(suite: Suite, companion: str = SPECIALIST) -> dict[str, str]:
    """Return task -> specialist whose own answers are followed, for tasks with that kind of companion.

    Gradients have no use for distributions of tasks that don't count.
    """
    return {
        spec.task: spec.specialist
        for spec in suite.of("search")
        if spec.specialist is not None
        and suite.asking(spec.task).companion == companion
        and (companion != DISTRIBUTION or (spec.role == "skill" and spec.counted))
    }


def sentences(suite: Suite, answers: Answers) -> list[str]:
    """Return how many answers each companion follows, one sentence per task."""
    specialist_of = followed(suite)
    return [
        f"{task}: {len(row) - list(row).count(None)} of the {len(row)} answers of the specialist "
        f"({specialist_of[task]}) on `search` are right; the companion follows these, else the gold answer"
        for task, row in answers.items()
    ]


def distribution_sentences(suite: Suite, stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return whose distributions gradients follow, one sentence per task.

    stored: task -> its distributions, as in `facts.DISTRIBUTIONS`.
    """
    specialist_of = followed(suite, DISTRIBUTION)
    return [
        f"{task}: gradients follow what the specialist ({specialist_of[task]}) expects at each token of its "
        f"{len(data['answers'])} answers on `search`; the search has the exact metric alone"
        for task, data in stored.items()
    ]


def generate(spec: WorkerSpec, executor: ExecutorSpec, sources: Mapping[str, Recipe]) -> Answers:
    """Let the specialists answer all `search` items; return their right answers.

    sources: name -> recipe of each source as it is. Raises UserError where one can't be scored.
    """
    specialist_of = followed(spec.suite)
    names = sorted(set(specialist_of.values()))
    whole = replace(spec, blocks=1, stored_text=LARGEST_COUNT)
    found: dict[str, Scores] = {}
    with contextlib.closing(build(executor, whole)) as workers:
        for result in workers.run([Job(recipe=sources[name], split="search") for name in names]):
            assert isinstance(result.job, Job)
            name = next(name for name in names if sources[name] == result.job.recipe)
            if isinstance(result.outcome, Failure):
                raise UserError(
                    f"{name} could not answer the items of search: {result.outcome.reason}",
                    fix="remove the cause, or set `companion: auto` in the suite",
                )
            assert isinstance(result.outcome, Scores)
            found[name] = result.outcome
    rows = {task: found[name][task] for task, name in specialist_of.items()}
    return {task: _right(row) for task, row in rows.items() if row.texts is not None}


def expect(spec: WorkerSpec, executor: ExecutorSpec, sources: Mapping[str, Recipe]) -> Expected:
    """Let the specialists answer all `search` items; return what they expect at each token.

    sources: as in `generate`, and so are errors.
    """
    tasks_of: dict[str, list[str]] = {}
    for task, name in sorted(followed(spec.suite, DISTRIBUTION).items()):
        tasks_of.setdefault(name, []).append(task)
    jobs = [DistributionsJob(recipe=sources[name], tasks=tuple(tasks)) for name, tasks in tasks_of.items()]
    found: dict[str, Sequence[Distributions]] = {}
    with contextlib.closing(build(executor, replace(spec, blocks=1))) as workers:
        for result in workers.run(jobs):
            if isinstance(result.outcome, Failure):
                name = next(name for name in tasks_of if sources[name] == result.job.recipe)
                raise UserError(
                    f"{name} could not answer the items of search: {result.outcome.reason}",
                    fix="remove the cause, or set `companion: off` in the suite",
                )
            assert isinstance(result.outcome, WrittenAnswers)
            found |= result.outcome.rows
    return {task: found[task] for task in sorted(found)}


def _right(row: TaskScores) -> list[str | None]:
    assert row.texts is not None
    return [
        answers[0] if metric >= 1.0 and len(answers) == 1 else None
        for answers, metric in zip(row.texts, row.metric.tolist(), strict=True)
    ]
