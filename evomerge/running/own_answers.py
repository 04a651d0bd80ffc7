"""Right answers of the specialists on `search`: what companions follow where a suite asks for that.

They are generated once, before anything is scored, and kept with the run, so that every session and every
worker has the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

from evomerge.errors import UserError
from evomerge.evaluation.asking import SPECIALIST
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.running.executors import ExecutorSpec, build
from evomerge.running.worker import Job, WorkerSpec
from evomerge.schema import LARGEST_COUNT

Answers = Mapping[str, list[str | None]]
"""Task -> for each item of `search` the specialist's answer, None where it is not right."""


def followed(suite: Suite) -> dict[str, str]:
    """Return task -> specialist whose own answers its companion follows."""
    return {
        spec.task: spec.specialist
        for spec in suite.of("search")
        if spec.specialist is not None and suite.asking(spec.task).companion == SPECIALIST
    }


def sentences(suite: Suite, answers: Answers) -> list[str]:
    """Return how many answers each companion follows, one sentence per task."""
    specialist_of = followed(suite)
    return [
        f"{task}: {len(row) - row.count(None)} of the {len(row)} answers of the specialist "
        f"({specialist_of[task]}) on `search` are right; the companion follows these, else the gold answer"
        for task, row in answers.items()
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


def _right(row: TaskScores) -> list[str | None]:
    assert row.texts is not None
    return [
        answers[0] if metric >= 1.0 and len(answers) == 1 else None
        for answers, metric in zip(row.texts, row.metric.tolist(), strict=True)
    ]
