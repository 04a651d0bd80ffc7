"""What two specialists are expected to gain by a merge, before it is made (`evomerge analyze --gain`).

At a specialist each item of its skill has a margin, the lead of the right answer, and a slope: how that lead
changes along the task vector of another model. Where margins are large beside slopes, the other model can be
added and answers stay right. With m the margins and x the slopes of both directions of a pair,

    slack = mean over both directions of log(mean(m^2) / mean(x^2)),

and the gain is a straight line of it: what the best of ten merges of the two scores on their two skills above
the better of both, in normalised scores (0 the base, 1 the specialist). The line and its error come from
33 pairs of four small zoos; benchmarks/perf/LOG.md says how.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import UserError
from evomerge.evaluation.gains import find_gains
from evomerge.evaluation.scores import Array, Failure
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss, SmoothTask
from evomerge.merging.recipe import TensorGroup
from evomerge.prepare import Prepared
from evomerge.running import executors
from evomerge.running.executors import Executor
from evomerge.running.worker import GradientJob
from evomerge.trial import references

ITEMS, FEWEST = 64, 16
"""Items of a skill that are differentiated, and the number below which a skill says too little."""
LEAST_GAIN = 0.1
"""What a specialist must gain over the base, on its metric's scale: the gain of a merge is measured in it."""
SLOPE, OFFSET = 0.158, 0.043
"""Of the line through the measured pairs."""
ERROR, CORRELATION, PAIRS, ZOOS = 0.1, 0.75, 33, 4
"""Root mean square error and rank correlation of lines through the other zoos' pairs, and their number."""
LINEAR = 200.0
"""Softness, in nats, at which a sigmoid of a margin is a straight line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGain:
    """The expected gain of a pair of sources over the better of both, in normalised scores."""

    pair: tuple[str, str]
    slack: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGains:
    """Pairs, the highest expected gain first; and sources without a prediction: name -> reason."""

    pairs: tuple[PairGain, ...]
    without: Mapping[str, str]
    items: int


def foresee(prepared: Prepared, progress: Callable[[int, int], None] | None = None) -> PairGains:
    """Load the models, score base and sources on `search`, and differentiate items one by one.

    Args:
        prepared: a run config, prepared.
        progress: receives the number of differentiated items, and of all.

    Raises:
        UserError: a model can't be scored or differentiated, or fewer than two sources have a prediction.
    """
    names = tuple(prepared.space.sources)
    with executors.trial(prepared.config.executor, prepared.worker) as executor:
        tasks, without = _tasks(prepared, executor)
        if len(tasks) < 2:
            raise UserError(
                "no pair's gain can be predicted: " + "; ".join(f"{n}: {why}" for n, why in without.items()),
                expected="two sources with a skill of the suite that they are better at than the base",
                fix="name a `specialist` for the suite's tasks; leave out --gain to look at the files alone",
            )
        total = sum(count for _, count in tasks.values())
        tables: dict[str, Array] = {}
        done = 0
        for name, (task, count) in tasks.items():
            rows = []
            for item in range(count):
                rows.append(_margin_and_slopes(prepared, executor, name, task, item))
                done += 1
                if progress is not None:
                    progress(done, total)
            tables[name] = np.array(rows)
    return PairGains(pairs=ranked(names, tables), without=without, items=total)


def ranked(names: Sequence[str], tables: Mapping[str, Array]) -> tuple[PairGain, ...]:
    """Return the pairs of the sources that have a table, the highest expected gain first.

    names: of all sources. tables: source -> (items, 1 + sources), its margins and their slopes by source.
    """
    found = []
    for a, b in itertools.combinations([name for name in names if name in tables], 2):
        ways = ((tables[a], 1 + names.index(b)), (tables[b], 1 + names.index(a)))
        ratios = [(table[:, 0] ** 2).mean() / max((table[:, at] ** 2).mean(), 1e-12) for table, at in ways]
        slack = float(np.mean(np.log(np.maximum(ratios, 1e-12))))
        found.append(PairGain(pair=(a, b), slack=slack, gain=OFFSET + SLOPE * slack))
    return tuple(sorted(found, key=lambda pair: -pair.gain))


def _tasks(prepared: Prepared, executor: Executor) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """Return source -> (its task, number of items), and source -> why it has none."""
    base, parents = references(prepared, executor)
    tasks: dict[str, tuple[str, int]] = {}
    without = dict.fromkeys(parents, "it is no task's specialist")
    for gain in find_gains(prepared.suite, base=base, parents=parents):
        name, scored = gain.specialist, base[gain.task]
        if name in tasks:
            continue
        if scored.margin is None:
            without[name] = f"{gain.task} has no likelihood of right answers, which a gradient needs"
        elif not gain.shown or gain.score - gain.base < LEAST_GAIN:
            without[name] = f"it is hardly better than the base on {gain.task} ({gain.numbers})"
        elif len(scored.metric) < FEWEST:
            without[name] = f"{gain.task} has {len(scored.metric)} `search` items, fewer than {FEWEST}"
        else:
            tasks[name] = gain.task, min(ITEMS, len(scored.metric))
    return tasks, {name: reason for name, reason in without.items() if name not in tasks}


def _margin_and_slopes(
    prepared: Prepared, executor: Executor, name: str, task: str, item: int
) -> list[float]:
    """Return the margin of a source on an item, and its slope along each source's task vector."""
    sources = tuple(prepared.space.sources)
    weights = tuple(float(other == name) for other in sources)
    group = TensorGroup(method="task_arithmetic", sources=sources, parameters={"weight": weights})
    part = SmoothTask(task=task, gain=-1.0, items=(item,))
    loss = SmoothLoss(tasks=(part,), price=0.0, softness=LINEAR)
    (result,) = executor.run([GradientJob(recipe=prepared.template.with_groups([group]), loss=loss)])
    if isinstance(result.outcome, Failure):
        raise UserError(
            f"{name} can't be differentiated on {task}: {result.outcome.reason}",
            fix="leave out --gain to look at the files alone",
        )
    assert isinstance(result.outcome, Gradient)
    share = result.outcome.values[task]
    scale = LINEAR / (share * (1 - share))
    margin = LINEAR * float(np.log(share / (1 - share)))
    return [margin, *(scale * slope for slope in result.outcome.groups[0]["weight"])]
