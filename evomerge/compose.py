"""The composition root: checks a run config, wires the rooms together, and runs or resumes.

Everything that can be known from headers and YAML is checked in `prepare`, before a weight is read or a
file is written; what needs the models (tasks, metrics) shows when the executor builds its first worker,
still before the run folder exists.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evomerge import __version__
from evomerge.config import RunConfig
from evomerge.errors import ConfigError, ModelError, StoreError, UserError
from evomerge.evaluation.normalise import check_specialists
from evomerge.evaluation.scores import SPLITS, Failure, Scores
from evomerge.evaluation.suite import Suite
from evomerge.merging import kernels
from evomerge.merging.recipe import Recipe, TensorGroup, layer_of
from evomerge.running import executors, warm_start
from evomerge.running.budget import Budget
from evomerge.running.schedule import Foresight, Scheduler
from evomerge.running.scorer import Observer, Scorer
from evomerge.running.slopes import Slopes
from evomerge.running.store import BASE, RunStore
from evomerge.running.worker import Job, WorkerSpec
from evomerge.schema import parse
from evomerge.search import baselines, optimizers, spaces
from evomerge.search.genes import Space
from evomerge.search.loop import Outcome, Search, SearchPlan
from evomerge.search.warm_start import WarmStart

_LIBRARIES = (
    *("torch", "transformers", "safetensors", "lm_eval", "datasets", "numpy", "scipy"),
    *("cma", "cmaes", "pymoo", "optuna"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run config found sound, with everything it names opened (headers only).

    fingerprints: model name -> hash of its config, headers, sizes and sampled weights. parameters:
    number of the base model's weights. layers: the base model's. optimizer: its name and why it was picked.
    notes: what is worth knowing about the models, though nothing is wrong.
    """

    config: RunConfig
    suite: Suite
    space: spaces.AnySpace
    template: Recipe
    worker: WorkerSpec
    fingerprints: dict[str, str]
    parameters: int
    layers: int
    optimizer: str
    notes: tuple[str, ...]
    warm: WarmStart = field(default_factory=WarmStart)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)


def prepare(config: RunConfig) -> Prepared:
    """Check a config against the models' headers; raise UserError at the first thing that can't work."""
    from evomerge.merging.compatibility import check
    from evomerge.merging.source import open_sources

    suite = Suite.load(config.suite).weighted(config.objective.weights)
    config.objective.check(suite)
    sources = open_sources(config.locations, BASE, tokenizer=config.tokenizer)
    template = Recipe(
        models=config.locations,
        groups=(TensorGroup(method="linear", sources=tuple(config.models.sources)),),
        base=BASE,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        seed=config.seed,
    )
    notes = (*check(template, sources), *kernels.notes())
    check_specialists(suite, config.models.sources)
    headers = sources[BASE].headers
    assert not isinstance(config.space, str)
    space = spaces.apply(
        config.space,
        template=template,
        sources=tuple(config.models.sources),
        tensors={name: tuple(source.headers) for name, source in sources.items()},
    )
    _optimizer(config, space)
    warm = warm_start.resolve(config.warm_start, space=space, template=template, folder=Path(config.out))
    for start in warm.recipes:
        check(start.recipe, sources)
    _check_gradients(warm, space)
    device, dtype, threads = executors.resolve(config.executor)
    return Prepared(
        config=config,
        suite=suite,
        space=space,
        template=template,
        worker=WorkerSpec(
            models=config.locations,
            base=BASE,
            tokenizer=config.tokenizer,
            suite=suite,
            batch_size=config.executor.batch_size,
            dtype=dtype,
            device=device,
            threads=threads,
            max_length=config.executor.max_length,
            attention=config.executor.attention,
            low_memory=config.executor.low_memory,
            blocks=config.racing.blocks,
            block_seed=config.seed,
        ),
        fingerprints={name: source.fingerprint for name, source in sources.items()},
        parameters=sum(header.count for header in headers.values()),
        optimizer=optimizers.choose(config.optimizer, space.coordinates, config.objective.count)[1],
        layers=len({layer_of(name) for name in headers} - {None}),
        notes=notes,
        warm=warm,
    )


def _check_gradients(warm: WarmStart, space: Space) -> None:
    """Refuse gradients where no method of the space can be differentiated."""
    from evomerge.merging.derivatives import supports

    if warm.gradients is None:
        return
    if all(coordinate.levels is not None for coordinate in space.coordinates):
        raise ConfigError(
            "warm_start.gradients: the search space has no continuous gene to follow a slope in",
            fix="set warm_start.gradients: off",
        )
    used = {group.method for group in space.decode(np.full(space.dimension, 0.5)).groups}
    if not any(map(supports, used)):
        raise ConfigError(
            f"warm_start.gradients: {', '.join(sorted(used))} can't be differentiated",
            expected="a space over a method such as linear, task_arithmetic, ties or slerp",
            fix="set warm_start.gradients: off",
        )


def start(config: RunConfig, observer: Observer) -> Outcome:
    """Run a config; where its folder already holds this very run, continue it."""
    prepared = prepare(config)
    check_folder(prepared)
    return _execute(prepared, observer)


def stored_config(folder: Path, **budget: Any) -> RunConfig:
    """Return the config a run was started with; `out` is where the run lies now.

    budget: single limits (evaluations, items, generations, hours) that replace the stored ones.
    """
    with RunStore.read(folder) as store:
        data = store.fact("config")
    data["out"] = str(folder.absolute())
    data["budget"] |= {name: value for name, value in budget.items() if value is not None}
    return parse(RunConfig, data, f"{folder}: stored config")


def stored_suite(store: RunStore) -> Suite:
    """Return the suite a run was started with, from the store alone."""
    return parse(Suite, store.fact("suite"), f"{store.folder}: stored suite")


def versions() -> dict[str, str]:
    """Return the versions of everything that can change the bits of a run."""
    found = {"evomerge": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _LIBRARIES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one trial candidate told: items and seconds per split, seconds of the whole run."""

    items: dict[str, int]
    seconds: dict[str, float]
    workers: int
    estimate: float | None


def probe(prepared: Prepared) -> Probe:
    """Load the models, build all tasks and score the uniform average once per split.

    estimate: seconds the whole run would take, None where only time limits it.
    """
    items: dict[str, int] = {}
    seconds: dict[str, float] = {}
    with executors.trial(prepared.config.executor, prepared.worker) as executor:
        for split in SPLITS:
            job = Job(recipe=prepared.template, split=split, blocks=prepared.worker.blocks_of(split))
            _, result = executor.run([job, job])  # the first time warms caches
            if isinstance(result.outcome, Failure):
                raise UserError(
                    f"the uniform average could not be scored on {split}: {result.outcome.reason}"
                )
            assert isinstance(result.outcome, Scores)
            assert result.timing is not None
            items[split], seconds[split] = result.outcome.items, result.timing.total
    config, workers = prepared.config, executors.worker_count(prepared.config.executor)
    searched = _searched(prepared, items["search"])
    estimate = None
    if searched is not None:
        sources = tuple(config.models.sources)
        parents = len(sources) + 1
        hand_made = len(baselines.hand_made(prepared.template, sources, dict.fromkeys(sources, 1.0)))
        work = (searched + parents + hand_made + len(sources)) * seconds["search"]
        again = hand_made if config.objective.several else 0
        work += config.finalists * seconds["search"]  # their soup, and the optimizer's favourite
        work += (config.finalists + 2 + parents + again) * seconds["select"]
        work += (parents + hand_made + 2) * seconds["test"]
        estimate = work / workers
    return Probe(items=items, seconds=seconds, workers=workers, estimate=estimate)


def _searched(prepared: Prepared, full: int) -> float | None:
    """Return how many full evaluations the budget allows, None where only time limits it.

    full: items of one. A limit in generations counts as if no candidate stopped early.
    """
    budget = prepared.config.budget
    optimizer = _optimizer(prepared.config, prepared.space)
    limits = [
        budget.evaluations,
        budget.items and budget.items / full,
        budget.generations and budget.generations * optimizer.population,
    ]
    return min((limit for limit in limits if limit), default=None)


def _optimizer(config: RunConfig, space: Space) -> optimizers.Optimizer:
    """Return the run's optimizer as it would begin in the middle of the space; ConfigError if it can't."""
    return optimizers.create(
        config.optimizer,
        coordinates=space.coordinates,
        objectives=config.objective.count,
        starts=[np.full(space.dimension, 0.5)],
        seed=np.random.SeedSequence(0),
    )


def _execute(prepared: Prepared, observer: Observer) -> Outcome:
    executor = executors.build(prepared.config.executor, prepared.worker)
    try:
        norms = _norms(prepared)
        with _open_store(prepared) as store:
            store.begin_session(versions())
            if store.fact("norms") is None:
                store.set_fact("norms", norms)
            scheduler = Scheduler(executor)
            if store.fact("stopped") is not None:
                store.set_fact("stopped", None)  # a larger budget: the old winner no longer counts
            search = Search(
                SearchPlan(
                    suite=prepared.suite,
                    space=prepared.space,
                    template=prepared.template,
                    norms=store.fact("norms"),
                    optimizer=prepared.config.optimizer,
                    objective=prepared.config.objective,
                    racing=prepared.config.racing,
                    surrogate=None if prepared.config.surrogate == "off" else prepared.config.surrogate,
                    finalists=prepared.config.finalists,
                    seed=prepared.config.seed,
                    layers=prepared.layers,
                    warm=prepared.warm,
                ),
                scorer=Scorer(store, scheduler, observer),
                journal=store,
                budget=Budget(prepared.config.budget, store.hours),
                observer=observer,
                slopes=Slopes(store, scheduler, observer),
                ahead=Foresight(store, scheduler),
            )
            outcome = search.run()
            store.set_fact("stopped", outcome.stopped)
            return outcome
    finally:
        executor.close()


def _norms(prepared: Prepared) -> dict[str, float]:
    """Return the norms of the task vectors: a check of every weight, before anything is stored."""
    from evomerge.merging.analysis import task_vector_norms

    if RunStore.exists(prepared.folder):
        with RunStore.read(prepared.folder) as store:
            if (stored := store.fact("norms")) is not None:
                return dict(stored)
    norms = task_vector_norms(prepared.config.locations, BASE, tokenizer=prepared.config.tokenizer)
    for name, norm in norms.items():
        if norm == 0:
            raise ModelError(
                f"source {name!r} is identical to the base",
                got=prepared.config.models.sources[name],
                fix="leave it out: it adds nothing to a merge",
            )
    return norms


def _facts(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    started = {warm_start.FACT: warm_start.to_data(prepared.warm)} if prepared.warm.recipes else {}
    return started | {
        "config": config.model_dump(mode="json", exclude={"out"}),  # a run folder may be moved
        "identity": config.identity(),
        "blocks": prepared.worker.blocks,
        "fingerprints": prepared.fingerprints,
        "suite": prepared.suite.model_dump(mode="json", exclude={"tasks_dir"}),
        "suite_digest": prepared.suite.digest(),
        "optimizer": prepared.optimizer,
        "layers": prepared.layers,
        "arithmetic": f"{prepared.worker.device.split(':')[0]} {prepared.worker.dtype}",
    }


def _open_store(prepared: Prepared) -> RunStore:
    if not RunStore.exists(prepared.folder):
        return RunStore.create(prepared.folder, _facts(prepared))
    store = RunStore.open(prepared.folder)
    try:
        facts = _facts(prepared)
        _check_same(store, facts)  # again, now that nobody else can write
        if store.fact("config") != facts["config"]:
            store.set_fact("config", facts["config"])
    except BaseException:
        store.close()
        raise
    return store


def check_folder(prepared: Prepared) -> None:
    """Refuse a run folder that can't be made, holds something else, or this run on changed inputs."""
    folder = prepared.folder
    if RunStore.exists(folder):
        with RunStore.read(folder) as store:
            _check_same(store, _facts(prepared))
        return
    if folder.is_dir():
        others = [p for p in folder.iterdir() if p.name != ".lock" and not p.name.startswith(".run.sqlite")]
        if others:
            raise StoreError(
                f"{folder}: exists and is not a run folder", fix="choose another `out`, or empty the folder"
            )
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(
            f"{folder}: the run folder can't be made",
            got=f"{above} is not a writable folder",
            fix="choose another `out`",
        )


def _check_same(store: RunStore, facts: dict[str, Any]) -> None:
    """Refuse to go on with a stored run whose config, models, tasks or device are not these."""
    folder = store.folder
    if store.fact("identity") != facts["identity"]:
        raise StoreError(
            f"{folder}: holds a run of another config",
            got=", ".join(_differences(store.fact("config"), facts["config"])) or "other settings",
            fix="choose another `out`, or go on with the stored run: evomerge resume "
            + shlex.quote(str(folder)),
        )
    stored = store.fact("fingerprints")
    changed = [name for name, print_ in facts["fingerprints"].items() if stored.get(name) != print_]
    if changed:
        raise StoreError(
            f"{folder}: model files changed since the run began: {', '.join(changed)}",
            fix="put the old files back, or start a new run in another folder",
        )
    for key, what in (("suite_digest", "the suite or its task files"), ("arithmetic", "device or dtype")):
        if store.fact(key) != facts[key]:
            raise StoreError(
                f"{folder}: {what} changed since the run began, so scores would not be comparable",
                expected=str(store.fact(key)),
                got=str(facts[key]),
                fix="restore what was there, or start a new run in another folder",
            )


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Name the settings in which two stored configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            if not place and key in ("budget", "out"):
                continue
            found += _differences(old.get(key), new.get(key), f"{place}{key}.")
        return found
    return [] if old == new else [f"{place.rstrip('.')} {old!r} there, {new!r} here"]
