"""The composition root: wires store, executors and search together, to start a run or to resume one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge import files, heap
from evomerge.config import RunConfig
from evomerge.errors import ModelError
from evomerge.evaluation.asking import DISTRIBUTION
from evomerge.evaluation.distributions import packed, unpacked
from evomerge.evaluation.sharing import Sharing
from evomerge.merging.recipe import Recipe
from evomerge.prepare import (
    Prepared,
    check_folder,
    check_time,
    full_hashes,
    optimizer_of,
    prepare,
    run_facts,
    with_judges,
)
from evomerge.running import earlier_scores, executors, forward, looks, own_answers
from evomerge.running.batches import Batches, begun_again
from evomerge.running.breaker import tried_again
from evomerge.running.budget import Budget
from evomerge.running.clock import Clock
from evomerge.running.earlier_scores import EarlierScores
from evomerge.running.forecast import Forecast, Watch
from evomerge.running.log import RunLog
from evomerge.running.observers import Observer, Observers
from evomerge.running.schedule import Foresight, Scheduler
from evomerge.running.scorer import Scorer
from evomerge.running.slopes import Slopes, parts_of
from evomerge.running.store import BASE, ID, RunStore, StoreReader, facts
from evomerge.running.worker import WorkerSpec, item_notes
from evomerge.search import baselines
from evomerge.search.loop import Search
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.spaces.movement import movements
from evomerge.stored import StoredRun, config_to_resume

Hashes = Mapping[str, Mapping[str, str]]
"""Model -> file -> hash of all its bytes."""


def start(config: RunConfig, observer: Observer, *, full_hash: bool = False) -> Outcome:
    """Run a config; where its folder already holds this very run, continue it.

    full_hash: hash every byte of the models first, and refuse any that changed since the run stored hashes.
    """
    started = time.time()
    prepared = with_judges(prepare(config))
    check_folder(prepared)
    check_time(prepared)
    hashes = full_hashes(prepared.config) if full_hash else None
    return execute(prepared, observer, started=started, hashes=hashes)


def resume(
    folder: Path, observer: Observer, *, models: Mapping[str, str] | None = None, **budget: Any
) -> Outcome:
    """Continue the run in a folder.

    models: name -> new place of models that were moved. budget: single limits that replace the stored ones,
    as in `running.budget.replaced`.
    """
    return start(config_to_resume(folder, models=models, **budget), observer)


def execute(
    prepared: Prepared, observer: Observer, *, started: float | None = None, hashes: Hashes | None = None
) -> Outcome:
    """Run a prepared config to its end, from the stored scores where its folder has some.

    started: when this session began, in epoch seconds (default: now). hashes: of the models, to compare with
    the stored ones.
    """
    started = time.time() if started is None else started
    workers = executors.worker_count(prepared.executor)
    guard = prepared.worker.guard()
    assert guard is not None
    worker = replace(prepared.worker, answers=_answers(prepared), distributions=_expected(prepared))
    executor = executors.build(prepared.executor, worker)
    try:
        measured = measure(prepared)
        with _open_store(prepared, executor.sharing) as store, RunLog(prepared.folder) as log:
            shown = Observers(log, observer)
            store.report_to(shown)
            log.session(forward.versions(), workers=workers)
            if hashes is not None:
                StoredRun(store).check_hashes(hashes)
            spec = prepared.config.budget
            clock = Clock(started=started, earlier=store.hours())
            store.begin_session(forward.versions(), started=started)
            if hashes is not None and facts.FULL_HASHES.get(store) is None:
                facts.FULL_HASHES.set(store, {name: dict(by_file) for name, by_file in hashes.items()})
            _note_items(prepared.worker, store, log)
            _keep(measured, worker, store, shown)
            earlier = _earlier(prepared, store, shown)
            forecast = Forecast(
                store,
                clock,
                spec,
                workers=executors.at_once(prepared.executor),
                finalists=prepared.config.finalists,
                several=bool(prepared.config.objective.several),
                earlier=earlier,
            )
            everyone = Observers(Watch(forecast, store, spec, shown), shown)
            budget = Budget.of_run(store, spec, clock, forecast.reserve)
            scheduler = Scheduler(executor)
            if facts.STOPPED.get(store) is not None:
                facts.STOPPED.set(store, None)  # a larger budget: the old winner no longer counts
            with tried_again(store):
                outcome = begun_again(
                    store,
                    prepared.worker.batch_size,
                    lambda batches: _search(
                        prepared, store, scheduler, everyone, budget, batches, guard.compare, earlier
                    ).run(),
                )
            facts.STOPPED.set(store, outcome.stopped)
            looks.note(prepared.suite.test_digest(), prepared.folder)
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
    guard: Callable[[], None],
    earlier: EarlierScores | None,
) -> Search:
    return Search(
        SearchPlan(
            suite=prepared.suite,
            space=prepared.space,
            template=prepared.template,
            norms=facts.NORMS.require(store),
            movements=facts.MOVEMENTS.get(store),
            stacks=prepared.stacks,
            optimizer=prepared.config.optimizer,
            objective=prepared.config.objective,
            racing=prepared.config.racing,
            surrogate=None if prepared.config.surrogate == "off" else prepared.config.surrogate,
            finalists=prepared.config.finalists,
            seed=prepared.config.seed,
            layers=prepared.layers,
            population=optimizer_of(prepared.config, prepared.space).population,
            baselines=prepared.baselines,
            warm=prepared.warm,
            weighting=prepared.weighting,
            weak=prepared.weighting is None or prepared.config.weak_specialists == "allow",
        ),
        scorer=Scorer(
            *(store, scheduler, observer, batches), failures=prepared.config.budget.failures, earlier=earlier
        ),
        journal=store,
        budget=budget,
        observer=observer,
        slopes=Slopes(
            store, scheduler, observer, batches, parts=parts_of(prepared.worker, prepared.parameters)
        ),
        ahead=Foresight(store, scheduler, batches, earlier),
        guard=guard,
        workers=scheduler.workers,
    )


def _earlier(prepared: Prepared, store: RunStore, observer: Observer) -> EarlierScores | None:
    """Read the run whose scores this one copies, if there is one, and say so."""
    place = prepared.config.scores_from
    if place is None:
        return None
    earlier, said = earlier_scores.read_for(Path(place), store, forward.versions())
    observer.noted(f"note: {said}")
    return earlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the task vectors' lengths say: norms of the whole ones, and how far each gene moves the model.

    movements: None where genes count alike, as in runs begun before they were measured.
    """

    norms: dict[str, float]
    movements: tuple[float, ...] | None


def measure(prepared: Prepared) -> Measured:
    """Return the lengths of the task vectors, from the store or measured; ModelError where one is 0.

    Measuring reads every weight, so damaged files show before anything is stored.
    """
    from evomerge.merging.analysis.norms import tensor_norms, whole

    if StoreReader.exists(prepared.folder):
        with StoreReader.read(prepared.folder) as store:
            if (stored := facts.NORMS.get(store)) is not None:
                return Measured(norms=dict(stored), movements=None)
    config = prepared.config
    by_tensor = tensor_norms(
        config.locations, BASE, tokenizer=config.tokenizer, experts=config.models.experts
    )
    norms = {name: whole(parts) for name, parts in by_tensor.items()}
    for name, norm in norms.items():
        if norm == 0:
            raise ModelError(
                f"source {name!r} is identical to the base",
                got=prepared.config.models.sources[name],
                fix="leave it out: it adds nothing to a merge",
            )
    heap.trim()  # a run's own process needs no such memory again
    return Measured(norms=norms, movements=movements(prepared.space, by_tensor))


def _answers(prepared: Prepared) -> own_answers.Answers:
    """Return the answers that companions follow, from the store or generated; {} where none are wanted."""
    if not own_answers.followed(prepared.suite):
        return {}
    if StoreReader.exists(prepared.folder):
        with StoreReader.read(prepared.folder) as store:
            if (stored := facts.ANSWERS.get(store)) is not None:
                return stored
    return own_answers.generate(prepared.worker, prepared.executor, _sources(prepared))


def _expected(prepared: Prepared) -> own_answers.Expected:
    """Return the distributions that gradients follow, from the store or computed; {} where none are."""
    if prepared.warm.gradients is None or not own_answers.followed(prepared.suite, DISTRIBUTION):
        return {}
    if StoreReader.exists(prepared.folder):
        with StoreReader.read(prepared.folder) as store:
            if (stored := facts.DISTRIBUTIONS.get(store)) is not None:
                return {task: unpacked(data) for task, data in stored.items()}
    return own_answers.expect(prepared.worker, prepared.executor, _sources(prepared))


def _sources(prepared: Prepared) -> dict[str, Recipe]:
    """Return name -> recipe of each source as it is."""
    _, *sources = baselines.parents(prepared.template, prepared.space.sources)
    return {named.name: named.recipe for named in sources}


def _note_items(worker: WorkerSpec, store: RunStore, log: RunLog) -> None:
    """Store and log which items were left out, unless an earlier session did."""
    if facts.ITEM_NOTES.get(store) is None:
        facts.ITEM_NOTES.set(store, item_notes(worker))
        for note in facts.ITEM_NOTES.require(store):
            log.event("note", level="warning", text=note)


def _keep(measured: Measured, worker: WorkerSpec, store: RunStore, observer: Observer) -> None:
    """Store what was measured before the first evaluation, unless an earlier session did."""
    if facts.NORMS.get(store) is None:
        if measured.movements is not None:
            facts.MOVEMENTS.set(store, list(measured.movements))
        facts.NORMS.set(store, measured.norms)  # last: a store with it has all that was measured
    said: list[str] = []
    if worker.answers and facts.ANSWERS.get(store) is None:
        facts.ANSWERS.set(store, {task: list(row) for task, row in worker.answers.items()})
        said += own_answers.sentences(worker.suite, worker.answers)
    if worker.distributions and facts.DISTRIBUTIONS.get(store) is None:
        data = {task: packed(rows) for task, rows in worker.distributions.items()}
        facts.DISTRIBUTIONS.set(store, data)
        said += own_answers.distribution_sentences(worker.suite, data)
    for sentence in said:
        observer.noted(f"note: {sentence}")


def _open_store(prepared: Prepared, sharing: Sharing | None) -> RunStore:
    if not StoreReader.exists(prepared.folder):
        decided = {} if sharing is None else {facts.SHARING: sharing.as_data()}
        return RunStore.create(prepared.folder, run_facts(prepared) | decided)
    store = RunStore.open(prepared.folder)
    try:
        files.remove_abandoned(prepared.folder)
        begun = run_facts(prepared)
        StoredRun(store).check_same(begun, prepared.suite)  # again, now that no other process can write
        if facts.CONFIG.get(store) != begun[facts.CONFIG]:
            facts.CONFIG.set(store, begun[facts.CONFIG])
    except BaseException:
        store.close()
        raise
    return store
