"""Runs compared on their shared `test` items: seeds of one config, and configs with each other.

Within a config the question is what its search gains over the best baseline, whatever its seed. Between two
configs it is which one's winners are better, per task and in the mean. All on the scale of the first run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.style import bounds, difference, p_value, short_task
from evomerge.delivery.summary import SEED, Summary
from evomerge.errors import StoreError
from evomerge.evaluation import statistics
from evomerge.evaluation.scores import Array, Scores
from evomerge.evaluation.statistics import PairedTest
from evomerge.evaluation.suite import comparable
from evomerge.running.store import facts
from evomerge.stored import StoredRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One run with a tested winner: scores of winner, best baseline and base on `test`."""

    folder: Path
    seed: int
    winner: Scores
    baseline: Scores
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The runs of one config, which differ in their seed only, and their mean gain over best baselines."""

    name: str
    runs: tuple[Finished, ...]
    gain: PairedTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """The winners of one config less those of the first. task: None for the mean. adjusted: p after Holm."""

    config: str
    task: str | None
    test: PairedTest
    adjusted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs by config, in the order given, and every later config against the first."""

    suite: str
    configs: tuple[Config, ...]
    versus: tuple[Versus, ...]

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data, differences in points: normalised for the mean, raw for tasks."""
        return {
            "configs": [
                {
                    "name": config.name,
                    "runs": [
                        {"run": str(run.folder), "seed": run.seed, "points": 100 * run.gain}
                        for run in config.runs
                    ],
                    "gain": _points(config.gain),
                }
                for config in self.configs
            ],
            "versus": [
                {
                    "config": v.config,
                    "against": self.configs[0].name,
                    "task": v.task,
                    **_points(v.test),
                    "p_holm": v.adjusted,
                }
                for v in self.versus
            ],
        }


def _points(test: PairedTest) -> dict[str, float]:
    return {"points": 100 * test.estimate, "low": 100 * test.low, "high": 100 * test.high, "p": test.p}


@contextmanager
def opened(folders: Sequence[Path]) -> Iterator[list[Summary]]:
    """Open runs, check that their winners were scored on the same `test` items, and close them again.

    Raises:
        StoreError: a run is not finished, appears twice, or has other items.
    """
    with ExitStack() as stack:
        summaries: list[Summary] = []
        for folder in folders:
            if folder.resolve() in {summary.store.folder.resolve() for summary in summaries}:
                raise StoreError(f"{folder}: named twice", fix="name every run once")
            summary = Summary(stack.enter_context(StoredRun.read(folder)))
            if summary.verdict(summary.rows()) is None:
                raise StoreError(
                    f"{folder}: no winner scored on `test` yet", fix=f"finish it: evomerge resume {folder}"
                )
            summaries.append(summary)
        for summary in summaries[1:]:
            _refuse_other_items(summaries[0], summary)
        yield summaries


def _refuse_other_items(first: Summary, second: Summary) -> None:
    digests = [str(facts.SUITE_DIGEST.get(summary.store)) for summary in (first, second)]
    shapes = [
        {task.task: len(task.metric) for task in scores} if scores else None
        for summary in (first, second)
        for scores in (summary.scores(summary.parents[0].recipe.hash, "test"),)
    ]
    same = digests[0] == digests[1]
    if not comparable(*digests):  # one run is older
        same = _tested(first) == _tested(second) is not None
    if not same or shapes[0] != shapes[1]:
        raise StoreError(
            f"{second.store.folder}: scored on other `test` items than {first.store.folder}",
            expected=f"suite {first.suite.name} ({digests[0][:12]})",
            got=f"suite {second.suite.name} ({digests[1][:12]})",
            fix="compare runs with the same suite and task files",
        )


def _tested(summary: Summary) -> object | None:
    """Return what the `test` items ask and how answers are measured; None where a run does not store it."""
    questions = summary.store.questions("test", 0)
    metrics = [(task.task, task.metric, task.weight) for task in summary.suite.of("test")]
    return (questions, metrics) if questions else None


def compare(summaries: Sequence[Summary]) -> Comparison:
    """Compare finished runs on their shared `test` items.

    Args:
        summaries: from `opened`.
    """
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(_config_key(summary), []).append(summary)
    finished = [[_finished(s, summaries[0]) for s in group] for group in groups.values()]
    configs = tuple(
        Config(name=_name(runs), runs=tuple(runs), gain=_gain(summaries[0], runs)) for runs in finished
    )
    versus: list[tuple[str, str | None, PairedTest]] = []
    for config in configs[1:]:
        versus += [(config.name, task, test) for task, test in _differences(summaries[0], configs[0], config)]
    adjusted = statistics.holm([test.p for *_, test in versus])
    return Comparison(
        suite=summaries[0].suite.name,
        configs=configs,
        versus=tuple(
            Versus(config=name, task=task, test=test, adjusted=p)
            for (name, task, test), p in zip(versus, adjusted, strict=True)
        ),
    )


def _config_key(summary: Summary) -> str:
    """Return what two runs share that differ in their seed only."""
    config = summary.run.config()
    data = [
        config.model_copy(update={"seed": 0}).identity(),
        facts.FINGERPRINTS.get(summary.store),
        config.budget.model_dump(mode="json"),
    ]
    return json.dumps(data, sort_keys=True)


def _finished(summary: Summary, first: Summary) -> Finished:
    best = summary.best_baseline(summary.rows())
    assert best is not None
    assert summary.winner is not None
    winner, baseline = (
        summary.scores(recipe, "test") for recipe in (summary.winner.recipe.hash, best.recipe)
    )
    scale = first.normaliser("test")
    assert winner is not None
    assert baseline is not None
    assert scale is not None
    return Finished(
        folder=summary.store.folder,
        seed=int(facts.CONFIG.require(summary.store)["seed"]),
        winner=winner,
        baseline=baseline,
        gain=scale.mean(winner) - scale.mean(baseline),
    )


def _name(runs: Sequence[Finished]) -> str:
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].folder.name}{more}"


def _averaged(by_run: Sequence[Sequence[Array]]) -> list[Array]:
    """Return for each task (n,) the items' mean over the runs."""
    return [np.mean(task, axis=0) for task in zip(*by_run, strict=True)]


def _gain(first: Summary, runs: Sequence[Finished]) -> PairedTest:
    scale = first.normaliser("test")
    assert scale is not None
    if len(runs) == 1:
        return scale.compare(runs[0].winner, runs[0].baseline, seed=SEED)
    winners = _averaged([scale.items(run.winner) for run in runs])
    baselines = _averaged([scale.items(run.baseline) for run in runs])
    return statistics.across_runs(
        [a - b for a, b in zip(winners, baselines, strict=True)],
        [np.array([run.gain for run in runs])],
        scale.weights,
        seed=SEED,
        spans=[(low - high, high - low) for low, high in scale.spans],
    )


def _differences(first: Summary, a: Config, b: Config) -> list[tuple[str | None, PairedTest]]:
    """Return config b's winners less config a's: the mean, then every task."""
    scale = first.normaliser("test")
    assert scale is not None
    single = len(a.runs) == len(b.runs) == 1
    if single:
        mean = scale.compare(b.runs[0].winner, a.runs[0].winner, seed=SEED)
    else:
        items = [_averaged([scale.items(run.winner) for run in config.runs]) for config in (a, b)]
        mean = statistics.across_runs(
            [y - x for x, y in zip(*items, strict=True)],
            [np.array([scale.mean(run.winner) for run in config.runs]) for config in (a, b)],
            scale.weights,
            seed=SEED,
            spans=[(low - high, high - low) for low, high in scale.spans],
        )
    tests: list[tuple[str | None, PairedTest]] = [(None, mean)]
    for task in first.shown_tasks:
        metrics = [[run.winner[task.task].metric for run in config.runs] for config in (a, b)]
        if single:
            tests.append((task.task, statistics.paired_items(metrics[1][0], metrics[0][0], seed=SEED)))
            continue
        low, high = statistics.span(*metrics[0], *metrics[1])
        test = statistics.across_runs(
            [np.mean(metrics[1], axis=0) - np.mean(metrics[0], axis=0)],
            [np.array([metric.mean() for metric in config]) for config in metrics],
            [1.0],
            seed=SEED,
            spans=[(low - high, high - low)],
        )
        tests.append((task.task, test))
    return tests


def terminal(comparison: Comparison) -> RenderableType:
    """Return the comparison as tables for the terminal."""
    gains = style.table(
        style.words("config"),
        *(style.numbers(name, wrap=True) for name in ("runs", "gain", "95 % interval", "p")),
        title="winner less best baseline on `test`, in points, over items and seeds",
        caption="a single run: its interval says nothing about other seeds"
        if any(len(config.runs) == 1 for config in comparison.configs)
        else None,
    )
    for config in comparison.configs:
        test = config.gain
        gains.add_row(
            config.name, str(len(config.runs)), difference(test.estimate), bounds(test.low, test.high),
            p_value(test.p),
        )  # fmt: skip
    parts: list[RenderableType] = [gains]
    if comparison.versus:
        table = style.table(
            style.words("config"),
            style.words("score"),
            *(style.numbers(name, wrap=True) for name in ("difference", "95 % interval", "p (Holm)")),
            title=f"winners less those of {comparison.configs[0].name}, in points (tasks: raw score)",
        )
        for v in comparison.versus:
            table.add_row(
                v.config,
                "mean" if v.task is None else short_task(v.task, comparison.suite),
                difference(v.test.estimate),
                bounds(v.test.low, v.test.high),
                p_value(v.adjusted),
                style="" if v.adjusted > 0.05 else "green" if v.test.estimate > 0 else "red",
            )
        parts.append(table)
    else:
        parts.append(Text("all runs have the same config, so no winners are compared with each other"))
    return Group(*parts)
