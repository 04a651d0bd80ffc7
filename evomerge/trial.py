"""Trial: candidates scored on every split before a run, and an estimate of the run from their seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.errors import UserError
from evomerge.evaluation import gains
from evomerge.evaluation.gains import Gain
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split
from evomerge.prepare import Prepared, check_time, optimizer_of
from evomerge.running import executors
from evomerge.running.clock import Clock
from evomerge.running.forecast import EXTRA, REPORT, SAFETY, Work
from evomerge.running.store import StoreReader
from evomerge.running.worker import Job
from evomerge.search import baselines
from evomerge.search.surrogate.guide import generation_price
from evomerge.search.warm_start import ENDS, GradientSpec, automatic

COSTLY = 5.0
"""Seconds of one model on `search` from which a trial is one candidate, on the splits that nothing was scored
on. Shorter times vary too much for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Items and mean seconds of the trial candidates per split, and what the whole run will take.

    test_items: per task. seconds_before: until the end of the first generation, which always runs.
    seconds_after: after the search. estimate: seconds of the whole run, None where only `patience` ends it.
    ends: its end in epoch seconds, if it started now. cost: None without a price. late: whether a limit of
    the clock comes too early for a single generation. gains: what specialists gain over the base on `search`.
    task_items: per split and task. gradients: how the run follows gradients, at most; None where it does not.
    sated: whether they take the whole budget, so that there is no generation.
    """

    items: Mapping[str, int]
    test_items: dict[str, int]
    seconds: dict[str, float]
    workers: int
    seconds_before: float
    seconds_after: float
    estimate: float | None
    ends: float | None
    cost: float | None
    late: bool
    gains: tuple[Gain, ...] = ()
    task_items: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    gradients: GradientSpec | None = None
    sated: bool = False


def probe(prepared: Prepared) -> Probe:
    """Load the models, build all tasks, and score two candidates of the space on every split.

    Base and sources are scored on `search` before them, which shows whether the run can measure anything; and
    the first candidates of a process are slower than the rest. Where these take long, they stand for the
    candidates on `search`, and one candidate is scored on the other splits.
    """
    check_time(prepared)
    items: dict[str, int] = {}
    task_items: dict[str, dict[str, int]] = {}
    seconds: dict[Split, float] = {}
    parameters = prepared.models.parameters
    with executors.trial(prepared.executor, prepared.worker, parameters=parameters) as executor:
        references = _references(prepared, executor)
        found = _gains(prepared, references)
        costly = _seconds(references) >= COSTLY
        for split in SPLITS:
            places = (0.3,) if costly else (0.3, 0.7)
            results = (
                references
                if costly and split == "search"
                else list(executor.run([_trial(prepared, place, split) for place in places]))
            )
            scored = [result for result in results if isinstance(result.outcome, Scores)]
            if not scored:
                (failure,) = {r.outcome.reason for r in results[:1] if isinstance(r.outcome, Failure)}
                raise UserError(
                    f"no candidate could be scored on {split}: {failure}",
                    expected=f"{'a point' if costly else 'one of two points'} of the search space to work",
                    fix="narrow the space to what can be scored",
                )
            for result in scored:
                assert isinstance(result.outcome, Scores)
                items[split] = result.outcome.items
                task_items[split] = {task.task: len(task.metric) for task in result.outcome}
            seconds[split] = _seconds(scored)
    estimated = _estimated(prepared, items, seconds, task_items)
    return replace(estimated, test_items=task_items["test"], gains=found)


def again(prepared: Prepared, found: Probe) -> Probe:
    """Return the estimate of another budget for the same candidates, from the seconds of an earlier probe."""
    seconds: dict[Split, float] = {split: found.seconds[split] for split in SPLITS}
    estimated = _estimated(prepared, found.items, seconds, found.task_items)
    return replace(estimated, test_items=found.test_items, gains=found.gains)


def refuse_nothing(prepared: Prepared, probe: Probe) -> None:
    """Raise ConfigError where a new run would measure hardly anything, unless its config allows it."""
    if prepared.config.weak_specialists == "refuse" and not StoreReader.exists(prepared.folder):
        gains.refuse_nothing(probe.gains)


def references(prepared: Prepared, executor: executors.Executor) -> tuple[Scores, dict[str, Scores]]:
    """Return the scores of base and sources on `search`; raise UserError where one can't be scored."""
    return _outcomes(prepared, _references(prepared, executor))


def _references(prepared: Prepared, executor: executors.Executor) -> list[executors.Result]:
    """Return the results of base and sources on `search`."""
    named = baselines.parents(prepared.template, prepared.space.sources)
    blocks = prepared.worker.blocks_of("search")
    return list(executor.run([Job(recipe=each.recipe, split="search", blocks=blocks) for each in named]))


def _outcomes(prepared: Prepared, results: Sequence[executors.Result]) -> tuple[Scores, dict[str, Scores]]:
    """Return the scores of base and sources; raise UserError where one can't be scored."""
    named = baselines.parents(prepared.template, prepared.space.sources)
    by_recipe = {result.job.recipe.hash: result.outcome for result in results}
    scores = []
    for each in named:
        outcome = by_recipe[each.recipe.hash]
        if not isinstance(outcome, Scores):
            reason = outcome.reason if isinstance(outcome, Failure) else "not begun"
            raise UserError(f"{each.name} can't be scored on `search`: {reason}")
        scores.append(outcome)
    return scores[0], {each.name: one for each, one in zip(named[1:], scores[1:], strict=True)}


def _gains(prepared: Prepared, results: Sequence[executors.Result]) -> tuple[Gain, ...]:
    """Return what specialists gain over the base on `search`, () where one can't be scored."""
    try:
        base, parents = _outcomes(prepared, results)
    except UserError:
        return ()
    return gains.find_gains(prepared.suite, base=base, parents=parents)


def _seconds(results: Sequence[executors.Result]) -> float:
    """Return the mean seconds of results that have a time, 0 without any."""
    times = [result.timing.total for result in results if result.timing is not None]
    return sum(times) / max(1, len(times))


def _trial(prepared: Prepared, place: float, split: Split) -> Job:
    recipe = prepared.space.decode(np.full(prepared.space.dimension, place))
    return Job(recipe=recipe, split=split, blocks=prepared.worker.blocks_of(split))


def _estimated(
    prepared: Prepared,
    items: Mapping[str, int],
    seconds: dict[Split, float],
    task_items: Mapping[str, Mapping[str, int]],
) -> Probe:
    config, workers, now = prepared.config, executors.at_once(prepared.executor), time.time()
    sources = tuple(config.models.sources)
    parents = len(sources) + 1
    rows = baselines.hand_made(prepared.template, sources, dict.fromkeys(sources, 1.0))
    hand_made = sum(row.name in prepared.baselines for row in rows)
    starts = len(prepared.warm.recipes)
    beforehand = math.ceil((parents + hand_made + starts) / workers) + len(sources)  # the soup, one by one
    gradients, sated = _descent(prepared, items["search"], task_items)
    slopes = 0.0 if gradients is None else gradients.cost
    beforehand += math.ceil(slopes)
    first = 0 if sated else math.ceil(optimizer_of(config, prepared.space).population / workers)
    before = (beforehand + first) * seconds["search"]
    after = REPORT + Work(
        soups=config.finalists,
        select=config.finalists + EXTRA + parents + (hand_made if config.objective.several else 0),
        test=1
        + parents
        + (min(hand_made, baselines.TESTED) if prepared.baselines.short else hand_made + 1)
        + starts,
    ).seconds(seconds, workers)
    searched = slopes + ENDS if sated else _searched(prepared, items["search"], gradients)
    whole = None
    if searched is not None:
        whole = max(before, (beforehand + max(0.0, searched - slopes) / workers) * seconds["search"]) + after
    limit = config.budget.clock_limit(Clock(started=now))
    if limit is not None:
        whole = min(whole or math.inf, max(limit.at - now - (SAFETY - 1) * after, before + after))
    cost = config.budget.cost
    return Probe(
        items=items,
        test_items={},
        task_items=task_items,
        gradients=gradients,
        sated=sated,
        seconds={str(split): mean for split, mean in seconds.items()},
        workers=executors.worker_count(prepared.executor),
        seconds_before=before,
        seconds_after=after,
        estimate=whole,
        ends=None if whole is None else now + whole,
        cost=None if cost is None or whole is None else cost.per_hour * whole / 3600,
        late=limit is not None and limit.at < now + before + after,
    )


def requests(prepared: Prepared, found: Probe) -> dict[str, int | None]:
    """Return, per task with a judge, the most requests that the run sends; None without a limit in work.

    An answer that was judged before is not sent again, so there are fewer in a run.
    """
    if not prepared.judges:
        return {}
    config, sources = prepared.config, tuple(prepared.config.models.sources)
    rows = baselines.hand_made(prepared.template, sources, dict.fromkeys(sources, 1.0))
    known = (
        len(sources) + 1 + sum(row.name in prepared.baselines for row in rows) + len(prepared.warm.recipes)
    )
    searched = _searched(prepared, found.items["search"], found.gradients)
    if searched is None:
        return dict.fromkeys(prepared.judges)
    counts: dict[Split, int] = {
        "search": math.ceil(known + len(sources) + config.finalists + searched),
        "select": config.finalists + EXTRA + known,
        "test": known + 2,
    }
    return {
        name: sum(found.task_items.get(split, {}).get(name, 0) * count for split, count in counts.items())
        for name in prepared.judges
    }


def _descent(
    prepared: Prepared, full: int, task_items: Mapping[str, Mapping[str, int]]
) -> tuple[GradientSpec | None, bool]:
    """Return how the run would follow gradients, None if not, and whether they get the whole budget.

    full: items of an evaluation.
    """
    spec = prepared.warm.gradients
    if spec is None or not prepared.warm.automatic:
        return spec, False
    population = optimizer_of(prepared.config, prepared.space).population
    counted = [task.task for task in prepared.suite.of("search") if task.role == "skill" and task.counted]
    sizes = [count for task, count in task_items["search"].items() if task in counted]
    allowed = prepared.config.budget.allowed(full, population)
    config = prepared.config
    paid = config.budget.allowed(full, sys.maxsize)  # by all limits but that in generations
    price = generation_price(
        prepared.space.coordinates,
        population,
        prepared.worker.blocks,
        None if config.surrogate == "off" else config.surrogate,
        dispensable=paid == allowed and not config.objective.several and not config.optimizer.async_,
    )
    decided = automatic(spec, allowed, min(sizes, default=None), price)
    return decided, decided is not None and not decided.leaves(price, allowed)


def _searched(prepared: Prepared, full: int, gradients: GradientSpec | None) -> float | None:
    """Return how many full evaluations the budget allows, None where only time limits it.

    full: items of one. A limit in generations counts as if no candidate stopped early.
    """
    budget = prepared.config.budget
    optimizer = optimizer_of(prepared.config, prepared.space)
    limits = [
        budget.evaluations,
        budget.items and budget.items / full,
        budget.generations
        and budget.generations * optimizer.population + (0.0 if gradients is None else gradients.cost),
    ]
    return min((limit for limit in limits if limit), default=None)
