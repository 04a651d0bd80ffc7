"""One model on one suite (`evomerge evaluate`)."""

from __future__ import annotations

from typing import Any, get_args

from rich.table import Table

from evomerge.delivery import style
from evomerge.delivery.summary import raw_interval
from evomerge.errors import ConfigError, UserError, nearest
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import DTYPES, Recipe
from evomerge.merging.sources.opening import open_source
from evomerge.running import executors
from evomerge.running.worker import Job, Worker, WorkerSpec


def evaluate(
    location: str,
    suite_name: str,
    split_name: str,
    *,
    batch_size: int,
    permissions: Permissions = NOTHING,
) -> dict[str, Any]:
    """Score a model as it is stored.

    Args:
        location: a folder, a hub id, or `path+adapter`.
        suite_name: a preset's name, or a YAML file.
        split_name: search, select or test.
        batch_size: requests per forward pass.
        permissions: which code of the suite's tasks may run.

    Returns:
        Plain data: per task the mean raw score in the metric's unit, its 95 % interval and the item count.

    Raises:
        ConfigError: there is no such suite or split.
        UserError: the model can't be scored.
    """
    if split_name not in SPLITS:
        raise ConfigError(f"unknown split {split_name!r}", fix=nearest(split_name, SPLITS))
    split: Split = next(s for s in get_args(Split) if s == split_name)
    suite = Suite.load(suite_name)
    stored_dtype = open_source(location).config.get("dtype", "float32")
    recipe = Recipe.copy_of(location, dtype=stored_dtype if stored_dtype in DTYPES else "float32")
    spec = executors.ExecutorSpec(name="inline", batch_size=batch_size)
    device, dtype, threads = executors.resolve(spec)
    worker = Worker(
        WorkerSpec(
            models=recipe.models,
            base="model",
            suite=suite,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            threads=threads,
            permissions=permissions,
        )
    )
    outcome = worker.run(Job(recipe=recipe, split=split)).outcome
    if isinstance(outcome, Failure):
        raise UserError(f"{location}: could not be scored: {outcome.reason}")
    assert isinstance(outcome, Scores)
    tasks = [_row(scores, suite[scores.task].metric) for scores in outcome]
    return {"model": location, "suite": suite.name, "split": split, "tasks": tasks}


def _row(scores: TaskScores, metric: str) -> dict[str, Any]:
    interval = raw_interval(scores.metric)
    return {
        "task": scores.task,
        "metric": metric,
        "score": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "items": len(scores.metric),
    }


def table(data: dict[str, Any]) -> Table:
    """Return the scores of `evaluate` as a table for the terminal."""
    scores = style.table(
        style.words("task"),
        style.words("metric"),
        *(style.numbers(name) for name in ("score", "95 % interval", "items")),
        title=f"{data['model']} on {data['suite']}, {data['split']}",
    )
    for row in data["tasks"]:
        interval = f"[{style.decimal(row['low'])}, {style.decimal(row['high'])}]"
        scores.add_row(row["task"], row["metric"], style.decimal(row["score"]), interval, str(row["items"]))
    return scores
