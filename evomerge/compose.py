"""The composition root: checks a run config, wires the rooms together, and runs or resumes.

Everything that can be known from headers and YAML is checked in `prepare`, before a weight is read or a
file is written; what needs the models (tasks, metrics) shows when the executor builds its first worker,
still before the run folder exists.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evomerge import __version__, files, identity
from evomerge.config import RunConfig
from evomerge.errors import ConfigError, ModelError, StoreError, UserError
from evomerge.evaluation.normalise import check_specialists
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split
from evomerge.evaluation.smooth_loss import PASSES
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup, layer_of
from evomerge.merging.tensors import kernels
from evomerge.running import executors, forward, warm_start
from evomerge.running.batches import Batches, begun_again
from evomerge.running.breaker import tried_again
from evomerge.running.budget import Budget, BudgetSpec, Stop, replaced
from evomerge.running.clock import Clock, moment, shown
from evomerge.running.forecast import EXTRA, REPORT, SAFETY, Forecast, Watch, Work
from evomerge.running.log import Logged, RunLog
from evomerge.running.schedule import Foresight, Scheduler
from evomerge.running.scorer import Observer, Scorer
from evomerge.running.slopes import Slopes
from evomerge.running.store import BASE, ID, RunStore
from evomerge.running.worker import Job, WorkerSpec
from evomerge.schema import parse
from evomerge.search import baselines, optimizers
from evomerge.search.loop import Outcome, Search, SearchPlan
from evomerge.search.spaces import kinds
from evomerge.search.spaces.layer_path import LayerPathSpec
from evomerge.search.spaces.space import Space
from evomerge.search.warm_start import WarmStart

_LIBRARIES = (
    *("torch", "transformers", "safetensors", "lm_eval", "datasets", "numpy", "scipy"),
    *("cma", "cmaes", "pymoo", "optuna"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run config found sound, with everything it names opened (headers only).

    fingerprints: model name -> hash of its config, headers, sizes and sampled weights. files: model name ->
    what is known of each of its files. parameters: number of the base model's weights. layers: the base
    model's. optimizer: its name and why it was picked. notes: what is worth knowing about the models, though
    nothing is wrong.
    """

    config: RunConfig
    suite: Suite
    space: kinds.AnySpace
    template: Recipe
    worker: WorkerSpec
    fingerprints: dict[str, str]
    files: dict[str, dict[str, dict[str, int | str]]]
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
    from evomerge.merging.sources import model_files
    from evomerge.merging.sources.opening import open_sources

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
    space = kinds.apply(
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
    _check_engine(config)
    device, dtype, threads = executors.resolve(config.executor)
    if config.executor.threads is None:  # a run keeps the number it was begun with
        threads = forward.kept_threads(Path(config.out)) or threads
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
            generation=config.executor.generation,
        ),
        fingerprints={name: source.fingerprint for name, source in sources.items()},
        files={name: model_files.facts(source) for name, source in sources.items()},
        parameters=sum(header.count for header in headers.values()),
        optimizer=optimizers.choose(config.optimizer, space.coordinates, config.objective.count)[1],
        layers=len({layer_of(name) for name in headers} - {None}),
        notes=notes,
        warm=warm,
    )


def _check_gradients(warm: WarmStart, space: Space) -> None:
    """Refuse gradients where no method of the space can be differentiated."""
    from evomerge.merging.tensors.derivatives import supports

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


def _check_engine(config: RunConfig) -> None:
    """Refuse a generation engine that is not there, or would be given other models than the base's kind."""
    if config.executor.generation == "transformers":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "executor.generation: vllm is not installed",
            fix="pip install 'evomerge[vllm]', or set executor.generation: transformers",
        )
    if isinstance(config.space, LayerPathSpec) or config.tokenizer not in ("", BASE):
        raise ConfigError(
            "executor.generation: vllm holds one model of the base's layers and vocabulary",
            got="a search space of layer paths" if not config.tokenizer else f"tokenizer: {config.tokenizer}",
            fix="set executor.generation: transformers",
        )


def start(config: RunConfig, observer: Observer, *, full_hash: bool = False) -> Outcome:
    """Run a config; where its folder already holds this very run, continue it.

    full_hash: read every byte of the models first; refuse any that is not what it was when this was last
    asked for.
    """
    started = time.time()
    prepared = prepare(config)
    check_folder(prepared)
    _check_time(prepared)
    hashes = identity.full_hashes(prepared.config) if full_hash else None
    return _execute(prepared, observer, started, hashes)


def stored_config(
    folder: Path, *, models: Mapping[str, str] | None = None, suite: str | None = None, **budget: Any
) -> RunConfig:
    """Return the config a run was started with; `out` is where the run lies now.

    models: name -> where models lie now that were moved. suite: where its file lies now. budget: single
    limits that replace the stored ones, as in `running.budget.replaced`.
    """
    with RunStore.read(folder) as store:
        data = store.fact("config")
    data["out"] = str(folder.absolute())
    identity.relocate(data, models or {}, suite)
    data["budget"] = replaced(data["budget"], budget, time.time())
    return parse(RunConfig, data, f"{folder}: stored config")


def stored_suite(store: RunStore) -> Suite:
    """Return the suite a run was started with, from the store alone."""
    return parse(Suite, store.fact("suite"), f"{store.folder}: stored suite")


def versions() -> dict[str, str]:
    """Return the versions of everything that can change the bits of a run."""
    found = {"evomerge": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["vllm"] = importlib.metadata.version("vllm")
    return found | {"processor": forward.processor(), "blas": forward.blas(), "simd": forward.simd()}


def environment_note(folder: Path) -> str | None:
    """Say what of libraries, processor and kernels changed since a run was begun, None if nothing."""
    if not RunStore.exists(folder):
        return None
    with RunStore.read(folder) as store:
        what = forward.changes(store.versions(), versions())
    return None if what is None else forward.warning(what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What two trial candidates told: items and seconds (their mean) per split, and what the run will take.

    seconds_before: until the first generation has ended, which always runs. seconds_after: what follows the
    search. estimate: seconds of the whole run, None where nothing says when it ends. ends: when, in epoch
    seconds, if it began now. cost: None without a price. late: whether a limit of the clock comes too early
    for a single generation.
    """

    items: dict[str, int]
    seconds: dict[str, float]
    workers: int
    seconds_before: float
    seconds_after: float
    estimate: float | None
    ends: float | None
    cost: float | None
    late: bool


def probe(prepared: Prepared) -> Probe:
    """Load the models, build all tasks, and score two candidates of the space on every split.

    A third one goes before them, because the first of a process is slower than the rest.
    """
    _check_time(prepared)
    items: dict[str, int] = {}
    seconds: dict[Split, float] = {}
    with executors.trial(prepared.config.executor, prepared.worker) as executor:
        for split in SPLITS:
            places = (0.5, 0.3, 0.7) if split == "search" else (0.3, 0.7)
            jobs = [_trial(prepared, place, split) for place in places]
            found = list(executor.run(jobs))[-2:]
            scored = [result for result in found if isinstance(result.outcome, Scores)]
            if not scored:
                (failure,) = {r.outcome.reason for r in found[:1] if isinstance(r.outcome, Failure)}
                raise UserError(
                    f"no candidate could be scored on {split}: {failure}",
                    expected="one of two points of the search space to work",
                    fix="narrow the space to what can be scored",
                )
            for result in scored:
                assert isinstance(result.outcome, Scores)
                items[split] = result.outcome.items
            seconds[split] = sum(r.timing.total for r in scored if r.timing is not None) / len(scored)
    return _estimated(prepared, items, seconds)


def _trial(prepared: Prepared, place: float, split: Split) -> Job:
    recipe = prepared.space.decode(np.full(prepared.space.dimension, place))
    return Job(recipe=recipe, split=split, blocks=prepared.worker.blocks_of(split))


def _estimated(prepared: Prepared, items: dict[str, int], seconds: dict[Split, float]) -> Probe:
    config, workers, now = prepared.config, executors.worker_count(prepared.config.executor), time.time()
    sources = tuple(config.models.sources)
    parents = len(sources) + 1
    hand_made = len(baselines.hand_made(prepared.template, sources, dict.fromkeys(sources, 1.0)))
    given = len(prepared.warm.recipes)
    beforehand = math.ceil((parents + hand_made + given) / workers) + len(sources)  # the soup, one by one
    slopes = _slopes(prepared)
    beforehand += math.ceil(slopes)
    first = math.ceil(_optimizer(config, prepared.space).population / workers)
    before = (beforehand + first) * seconds["search"]
    after = REPORT + Work(
        soups=config.finalists,
        select=config.finalists + EXTRA + parents + (hand_made if config.objective.several else 0),
        test=1 + parents + hand_made + 1 + given,
    ).seconds(seconds, workers)
    searched = _searched(prepared, items["search"])
    whole = None
    if searched is not None:
        whole = max(before, (beforehand + max(0.0, searched - slopes) / workers) * seconds["search"]) + after
    limit = config.budget.clock_limit(Clock(started=now))
    if limit is not None:
        whole = min(whole or math.inf, max(limit.at - now - (SAFETY - 1) * after, before + after))
    cost = config.budget.cost
    return Probe(
        items=items,
        seconds={str(split): mean for split, mean in seconds.items()},
        workers=workers,
        seconds_before=before,
        seconds_after=after,
        estimate=whole,
        ends=None if whole is None else now + whole,
        cost=None if cost is None or whole is None else cost.per_hour * whole / 3600,
        late=limit is not None and limit.at < now + before + after,
    )


def _slopes(prepared: Prepared) -> float:
    """Return what following gradients costs, in full evaluations."""
    spec = prepared.warm.gradients
    return 0.0 if spec is None else PASSES * spec.steps * spec.share


def _check_time(prepared: Prepared) -> None:
    """Refuse to begin a run whose time is over."""
    until, now = prepared.config.budget.until, time.time()
    if until is not None and not RunStore.exists(prepared.folder) and moment(until, now) <= now:
        raise ConfigError(
            f"budget.until: {shown(moment(until, now))} is over",
            fix='give a later moment, or a time of day ("08:00")',
        )


def _searched(prepared: Prepared, full: int) -> float | None:
    """Return how many full evaluations the budget allows, None where only time limits it.

    full: items of one. A limit in generations counts as if no candidate stopped early.
    """
    budget = prepared.config.budget
    optimizer = _optimizer(prepared.config, prepared.space)
    limits = [
        budget.evaluations,
        budget.items and budget.items / full,
        budget.generations and budget.generations * optimizer.population + _slopes(prepared),
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


def _execute(
    prepared: Prepared,
    observer: Observer,
    started: float,
    hashes: Mapping[str, Mapping[str, str]] | None,
) -> Outcome:
    executor = executors.build(prepared.config.executor, prepared.worker)
    try:
        norms = _norms(prepared)
        with _open_store(prepared) as store, RunLog(prepared.folder) as log:
            store.report_to(log.event)
            log.session(versions(), workers=executors.worker_count(prepared.config.executor))
            if hashes is not None:
                identity.check_hashes(store, hashes)
            spec = prepared.config.budget
            clock = Clock(started=started, earlier=store.hours())
            forecast = Forecast(
                store,
                clock,
                spec,
                workers=executors.worker_count(prepared.config.executor),
                finalists=prepared.config.finalists,
                several=bool(prepared.config.objective.several),
            )
            observer = Watch(Logged(observer, log), forecast, store, spec)
            store.begin_session(versions(), started=started)
            if hashes is not None and store.fact(identity.HASHES) is None:
                store.set_fact(identity.HASHES, hashes)
            budget = _budget(store, spec, clock, forecast)
            if store.fact("norms") is None:
                store.set_fact("norms", norms)
            scheduler = Scheduler(executor)
            if store.fact("stopped") is not None:
                store.set_fact("stopped", None)  # a larger budget: the old winner no longer counts
            with tried_again(store):
                outcome = begun_again(
                    store,
                    prepared.worker.batch_size,
                    lambda batches: _search(prepared, store, scheduler, observer, budget, batches).run(),
                )
            store.set_fact("stopped", outcome.stopped)
            winner = outcome.winner
            log.event("finished", reason=outcome.stopped, name=winner.name, id=winner.recipe.hash[:ID])
            return outcome
    finally:
        executor.close()


def _search(
    prepared: Prepared,
    store: RunStore,
    scheduler: Scheduler,
    observer: Observer,
    budget: Budget,
    batches: Batches,
) -> Search:
    return Search(
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
        scorer=Scorer(store, scheduler, observer, batches, failures=prepared.config.budget.failures),
        journal=store,
        budget=budget,
        observer=observer,
        slopes=Slopes(store, scheduler, observer, batches),
        ahead=Foresight(store, scheduler, batches),
    )


def _budget(store: RunStore, spec: BudgetSpec, clock: Clock, forecast: Forecast) -> Budget:
    """Return the budget of a session; what the clock ended before stays so until that limit is raised."""
    stop = None if (found := store.fact("stop")) is None else Stop(**found)
    if stop is not None and not stop.holds(spec, clock.now()):
        store.set_fact("stop", None)
        stop = None
    limit = spec.clock_limit(clock)
    store.set_fact("clock", {"limit": None if limit is None else limit.at})
    return Budget(
        spec,
        clock,
        reserve=forecast.reserve,
        stop=stop,
        record=lambda stop: store.set_fact("stop", stop.as_data()),
    )


def _norms(prepared: Prepared) -> dict[str, float]:
    """Return the norms of the task vectors: a check of every weight, before anything is stored."""
    from evomerge.merging.analysis.norms import task_vector_norms

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
        identity.FILES: prepared.files,
        "suite": prepared.suite.model_dump(mode="json", exclude={"tasks_dir"}),
        "suite_digest": prepared.suite.digest(),
        "optimizer": prepared.optimizer,
        "layers": prepared.layers,
        forward.FACT: forward.as_data(forward.find(prepared.worker)),
        "arithmetic": f"{prepared.worker.device.split(':')[0]} {prepared.worker.dtype}",
    }


def _open_store(prepared: Prepared) -> RunStore:
    if not RunStore.exists(prepared.folder):
        return RunStore.create(prepared.folder, _facts(prepared))
    store = RunStore.open(prepared.folder)
    try:
        files.remove_abandoned(prepared.folder)
        facts = _facts(prepared)
        identity.check_same(store, facts)  # again, now that nobody else can write
        if store.fact("config") != facts["config"]:
            store.set_fact("config", facts["config"])
    except BaseException:
        store.close()
        raise
    return store


def check_folder(prepared: Prepared) -> None:
    """Refuse a run folder that can't be made, holds something else, or this run on changed inputs."""
    folder = prepared.folder
    RunStore.refuse_held(folder)
    if RunStore.exists(folder):
        with RunStore.read(folder) as store:
            identity.check_same(store, _facts(prepared))
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
