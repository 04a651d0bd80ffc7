"""One model on one suite (`evomerge evaluate`)."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from evomerge.config import load_suite
from evomerge.delivery import gate, style
from evomerge.delivery.gate import GateRules, RuleResult
from evomerge.delivery.summary import Summary, raw_interval
from evomerge.errors import ConfigError, UserError
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import Failure, Scores, TaskScores, named_split
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import DTYPES, Recipe
from evomerge.merging.sources.opening import open_source
from evomerge.running import executors, forward, looks
from evomerge.running.batches import sizes_in_force
from evomerge.running.store import facts
from evomerge.running.worker import Job, Worker, WorkerSpec
from evomerge.schema import parse
from evomerge.stored import StoredRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is scored; None takes the run's setting, or the default.

    batch_size: requests per forward pass. dtype: of the forward pass. max_length: longest input in tokens.
    """

    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    max_length: int | None = None

    def over(self, spec: executors.ExecutorSpec) -> executors.ExecutorSpec:
        """Return the executor settings of one process in this one, with these replaced."""
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        one: dict[str, Any] = {"name": "inline", "workers": None, "address": "auto", "resources": {}}
        return parse(executors.ExecutorSpec, spec.model_dump() | one | chosen, "options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model's scores as plain data, and the results of a gate's rules; None without a gate."""

    data: dict[str, Any]
    gate: list[RuleResult] | None


def evaluate(
    location: str,
    suite_name: str | None,
    split_name: str,
    *,
    settings: Settings = Settings(),
    run: Path | None = None,
    permissions: Permissions = NOTHING,
    rules: GateRules | None = None,
) -> Evaluation:
    """Score a model as it is stored.

    Args:
        location: a folder, a hub id, or `path+adapter`.
        suite_name: a preset's name, or a YAML file; None takes the run's.
        split_name: search, select or test.
        settings: how to score it.
        run: a run folder whose suite, settings and batches are used, so that an exported winner gets the
            stored scores.
        permissions: which code of the suite's tasks may run.
        rules: of a gate, which the model must keep in place of the run's winner.

    Returns:
        Per task the mean raw score in the metric's unit, its 95 % interval and the item count.

    Raises:
        ConfigError: no such suite or split, the run's task files changed, or the gate has no reference.
        UserError: the model can't be scored.
    """
    split = named_split(split_name)
    if suite_name is None and run is None:
        fix = "give --suite SUITE, or --run RUN to score as a run does"
        raise ConfigError("no suite to score on", fix=fix)
    _refuse_gate(rules, run, suite_name, split)
    stored = None if run is None else StoredRun.read(run)
    with contextlib.nullcontext() if stored is None else stored:
        config = None if stored is None else stored.config()
        spec = _as_run(settings, stored)
        name = suite_name or (config.suite if config is not None else "")
        suite = load_suite(name)
        if stored is not None and suite_name is None:
            suite = suite.as_stored(facts.SUITE.require(stored.store))
            stored.refuse_other_tasks(suite)
        recipe = Recipe.copy_of(location, dtype=_stored_dtype(location))
        worker = _worker(recipe, suite, spec, permissions)
        if stored is not None and config is not None:
            blocks = facts.BLOCKS.get(stored.store) or 1
            sharing = Sharing.of_run(facts.SHARING.get(stored.store))
            worker = replace(worker, blocks=blocks, block_seed=config.seed, sharing=sharing, judgements=run)
            recipe_blocks = worker.blocks_of(split)
            sizes = sizes_in_force(stored.store, spec.batch_size, split, recipe_blocks)
        else:
            recipe_blocks, sizes = worker.blocks_of(split), {}
    job = Job(recipe=recipe, split=split, blocks=recipe_blocks, batch_sizes=sizes)
    scores = _scored(location, worker, job)
    if split == "test":
        looks.note(suite.test_digest(), f"evaluate {location}" if run is None else run)
    return _gated(_as_data(location, suite, scores), rules, run, scores)


def _as_run(settings: Settings, stored: StoredRun | None) -> executors.ExecutorSpec:
    """Return how to score: as a run did, what this machine would choose included; else by default."""
    spec = settings.over(executors.ExecutorSpec() if stored is None else stored.config().executor)
    passes = None if stored is None else forward.stored(stored.store)
    if passes is None:
        return spec
    same: dict[str, Any] = {"dtype": passes.dtype} if spec.dtype == "auto" else {}
    same |= {"threads": passes.threads} if spec.threads is None else {}
    return spec.model_copy(update=same)


def _scored(location: str, worker: WorkerSpec, job: Job) -> Scores:
    outcome = Worker(worker).run(job).outcome
    if isinstance(outcome, Failure):
        raise UserError(f"{location}: could not be scored: {outcome.reason}")
    assert isinstance(outcome, Scores)
    return outcome


def _as_data(location: str, suite: Suite, scores: Scores) -> dict[str, Any]:
    tasks = [_row(task, suite[task.task].metric) for task in scores]
    return {"model": location, "suite": suite.name, "split": scores.split, "tasks": tasks}


def _gated(data: dict[str, Any], rules: GateRules | None, run: Path | None, scores: Scores) -> Evaluation:
    """Check a model's scores on `test` against the rules for a run's winner, if there are any."""
    if rules is None or run is None:
        return Evaluation(data=data, gate=None)
    with StoredRun.read(run) as finished:
        results = gate.check(rules, Summary(finished), model=scores)
    return Evaluation(data=data | {"gate": gate.as_data(results)}, gate=results)


def _refuse_gate(rules: GateRules | None, run: Path | None, suite_name: str | None, split: str) -> None:
    """Raise ConfigError where a gate can't be checked, before the model is scored."""
    if rules is None:
        return
    if run is None or suite_name is not None or split != "test":
        raise ConfigError(
            "evaluate --gate: a gate compares a model with those of a finished run, on its `test` items",
            expected="evomerge evaluate MODEL --run RUN --gate FILE",
            got="no --run" if run is None else "--suite" if suite_name is not None else f"--split {split}",
        )
    with StoredRun.read(run) as stored:
        gate.refuse_unknown(rules, Summary(stored))


def _worker(
    recipe: Recipe, suite: Suite, spec: executors.ExecutorSpec, permissions: Permissions
) -> WorkerSpec:
    source = open_source(recipe.models["model"])
    parameters = sum(header.count for header in source.headers.values())
    models = executors.ModelSizes(parameters=parameters, dtype=recipe.dtype, files=0)
    device, dtype, threads = executors.resolve(spec, models)
    return WorkerSpec(
        models=recipe.models,
        base="model",
        suite=suite,
        batch_size=spec.batch_size,
        dtype=dtype,
        device=device,
        threads=threads,
        max_length=spec.max_length,
        attention=spec.attention,
        permissions=permissions,
    )


def _stored_dtype(location: str) -> str:
    stored = str(open_source(location).config.get("dtype", "float32"))
    return stored if stored in DTYPES else "float32"


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
