"""One model on one suite: what `evomerge evaluate` shows."""

from __future__ import annotations

from typing import Any, get_args

from rich.table import Table

from evomerge.errors import ConfigError, UserError, nearest
from evomerge.evaluation import statistics
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import DTYPES, Recipe
from evomerge.merging.sources.opening import open_source
from evomerge.running import executors
from evomerge.running.worker import Job, Worker, WorkerSpec


def evaluate(location: str, suite_name: str, split_name: str, *, batch_size: int) -> dict[str, Any]:
    """Score a model as it is stored, and return its scores with 95 % intervals as plain data."""
    if split_name not in SPLITS:
        raise ConfigError(f"unknown split {split_name!r}", fix=nearest(split_name, SPLITS))
    split: Split = next(s for s in get_args(Split) if s == split_name)
    suite = Suite.load(suite_name)
    stored = open_source(location).config.get("dtype", "float32")
    recipe = Recipe.copy_of(location, dtype=stored if stored in DTYPES else "float32")
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
        )
    )
    outcome = worker.run(Job(recipe=recipe, split=split)).outcome
    if isinstance(outcome, Failure):
        raise UserError(f"{location}: could not be scored: {outcome.reason}")
    assert isinstance(outcome, Scores)
    tasks = []
    for scores in outcome:
        binary = set(scores.metric.tolist()) <= {0.0, 1.0}
        interval = (
            statistics.proportion_interval(int(scores.metric.sum()), len(scores.metric))
            if binary
            else statistics.interval([scores.metric], [1.0], seed=0)
        )
        tasks.append(
            {
                "task": scores.task,
                "metric": suite[scores.task].metric,
                "score": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "items": len(scores.metric),
            }
        )
    return {"model": location, "suite": suite.name, "split": split, "tasks": tasks}


def table(data: dict[str, Any]) -> Table:
    """Return the scores as a table for the terminal."""
    shown = Table(title=f"{data['model']} on {data['suite']}, {data['split']}", title_justify="left")
    for name in ("task", "metric"):
        shown.add_column(name)
    for name in ("score", "95 % interval", "items"):
        shown.add_column(name, justify="right")
    for row in data["tasks"]:
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        shown.add_row(row["task"], row["metric"], f"{row['score']:.3f}", interval, str(row["items"]))
    return shown
