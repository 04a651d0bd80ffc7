"""Gate: rules that a run's winner must pass, as a YAML file and an exit code for CI.

A rule fails where the data show that it is violated: by a one-sided test at the file's confidence, corrected
for the number of rules that are not clearly kept (Holm). So a gate stops a winner that violates nothing in at
most 5 % of cases, whatever the number of rules; what it lets pass is not proven harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.table import Table

from evomerge.delivery import style
from evomerge.delivery.style import difference, p_value, percent, short_task
from evomerge.delivery.summary import Row, Summary
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation import statistics
from evomerge.evaluation.normalise import kept_share
from evomerge.evaluation.scores import Array, Scores
from evomerge.evaluation.statistics import Span
from evomerge.schema import Strict, load_yaml, parse

Points = Annotated[float, Field(ge=0, le=1000)]

EVERY = "any"
"""The name under `max_loss` that means every task."""


class GateRules(Strict):
    """The rules of a gate file."""

    max_loss: dict[str, Points] = Field(default={})
    """Largest loss in points: of raw score for a task or `any` (every task that is not named), of the
    normalised mean for `mean`."""
    against: Literal["base", "best_baseline", "parents"] = "best_baseline"
    """What a loss is measured against; `parents`: the task's specialist, and the best parent for `mean`.
    `compare` measures against the first run's winner."""
    min_retention: float | None = Field(default=None, gt=0, le=1)
    """Least retention: 1 where nothing of the base is lost."""
    min_points: float | None = Field(default=None, ge=-1000, le=1000)
    """Least mean in points: 0 is the base, 100 the specialists."""
    confidence: float = Field(default=0.95, ge=0.5, le=0.9999)
    """How sure it must be that a rule is violated."""

    @model_validator(mode="after")
    def _not_empty(self) -> GateRules:
        if not self.max_loss and self.min_retention is None and self.min_points is None:
            raise ValueError("no rule; expected max_loss, min_retention or min_points")
        return self

    @classmethod
    def load(cls, path: Path) -> GateRules:
        """Read a gate file."""
        return parse(cls, load_yaml(path), str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleResult:
    """One rule's test. measured, limit: differences or scores; p: adjusted, that the rule is kept."""

    rule: str
    measured: float
    limit: float
    p: float
    passed: bool

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data; points and percent as hundredths."""
        return {
            "rule": self.rule,
            "measured": 100 * self.measured,
            "limit": 100 * self.limit,
            "p_holm": self.p,
            "passed": self.passed,
        }


def passed(results: Iterable[RuleResult]) -> bool:
    """Return whether no rule is violated."""
    return all(result.passed for result in results)


def as_data(results: Iterable[RuleResult]) -> dict[str, Any]:
    """Return the gate as plain data."""
    results = list(results)
    return {"passed": passed(results), "rules": [result.as_data() for result in results]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A mean over tasks that a rule bounds from below: per-item samples, weights, limit and ranges."""

    rule: str
    samples: list[Array]
    weights: Array
    limit: float
    spans: list[Span]

    @property
    def measured(self) -> float:
        means = [sample.mean() for sample in self.samples]
        return float(np.average(means, weights=self.weights))

    @property
    def p(self) -> float:
        return statistics.p_below(self.samples, self.weights, self.limit, spans=self.spans)


def refuse_unknown(rules: GateRules, summary: Summary) -> None:
    """Raise ConfigError where the run has no tested winner, or nothing that a rule names."""
    if summary.winner is None or summary.scores(summary.winner.recipe.hash, "test") is None:
        raise ConfigError(
            f"{summary.store.folder}: no winner scored on `test` to check",
            fix="finish the run, then check it",
        )
    names = [*(task.task for task in summary.shown_tasks), EVERY, "mean"]
    for name in rules.max_loss:
        if name not in names:
            raise ConfigError(f"gate: max_loss: no task {name!r} on `test`", fix=nearest(name, names))
    scale = summary.normaliser("test")
    if rules.min_retention is not None and (scale is None or not scale.retained):
        raise ConfigError(
            f"gate: min_retention: no task of suite {summary.suite.name!r} measures retention on `test`",
            fix="remove the rule, or add a task with `role: retention` to the suite",
        )


def check(
    rules: GateRules, summary: Summary, *, model: Scores | None = None, reference: Summary | None = None
) -> list[RuleResult]:
    """Test a run's winner against the rules, on `test`.

    Args:
        rules: of the gate file.
        summary: of the run.
        model: scores of another model on the run's `test` items, which is tested instead of the winner.
        reference: of the run whose winner is the reference instead of `against`; on the same items.

    Raises:
        ConfigError: as `refuse_unknown`.
    """
    refuse_unknown(rules, summary)
    rows = summary.rows()
    assert summary.winner is not None
    scores = summary.scores(summary.winner.recipe.hash, "test") if model is None else model
    assert scores is not None
    tasks = [task.task for task in summary.shown_tasks]
    tests = [
        _task_loss(task, limit, scores, _rival(task, rules, summary, rows, reference))
        for task in tasks
        if (limit := rules.max_loss.get(task, rules.max_loss.get(EVERY))) is not None
    ]
    tests += _mean_rules(rules, summary, scores, _rival(None, rules, summary, rows, reference))
    tests += _retention(rules, summary, scores)
    return verdicts(tests, rules.confidence)


def verdicts(tests: list[Limit], confidence: float) -> list[RuleResult]:
    """Return the rules' results: p-values corrected for the number of rules that are in doubt."""
    adjusted = statistics.holm_of_doubtful([test.p for test in tests])
    return [
        RuleResult(rule=test.rule, measured=test.measured, limit=test.limit, p=p, passed=p > 1 - confidence)
        for test, p in zip(tests, adjusted, strict=True)
    ]


def _rival(
    task: str | None, rules: GateRules, summary: Summary, rows: list[Row], reference: Summary | None
) -> Scores:
    """Return the scores that a loss on a task (None: on the mean) is measured against."""
    if reference is not None:
        assert reference.winner is not None
        recipe, source = reference.winner.recipe.hash, reference
    else:
        source = summary
        if rules.against == "base":
            row = rows[0]
        elif rules.against == "best_baseline":
            best = summary.best_baseline(rows)
            assert best is not None
            row = best
        else:
            parents = [row for row in rows if row.role == "parent"]
            named = next((t.specialist for t in summary.shown_tasks if t.task == task), None)
            chosen = [parent for parent in parents if parent.name == named] or parents
            row = max(chosen, key=lambda r: r.mean.estimate if task is None else r.tasks[task].estimate)
        recipe = row.recipe
    scores = source.scores(recipe, "test")
    assert scores is not None
    return scores


def _task_loss(task: str, limit: float, winner: Scores, rival: Scores) -> Limit:
    a, b = winner[task].metric, rival[task].metric
    low, high = statistics.span(a, b)
    return Limit(
        rule=f"max_loss {task}",
        samples=[a - b],
        weights=np.ones(1),
        limit=-limit / 100,
        spans=[(low - high, high - low)],
    )


def _mean_rules(rules: GateRules, summary: Summary, winner: Scores, rival: Scores) -> list[Limit]:
    scale = summary.normaliser("test")
    assert scale is not None
    tests = []
    if (limit := rules.max_loss.get("mean")) is not None:
        pairs = zip(scale.items(winner), scale.items(rival), strict=True)
        spans = [(low - high, high - low) for low, high in scale.spans]
        tests.append(
            Limit(
                rule="max_loss mean",
                samples=[a - b for a, b in pairs],
                weights=scale.weights,
                limit=-limit / 100,
                spans=spans,
            )
        )
    if rules.min_points is not None:
        tests.append(
            Limit(
                rule="min_points",
                samples=scale.items(winner),
                weights=scale.weights,
                limit=rules.min_points / 100,
                spans=scale.spans,
            )
        )
    return tests


def _retention(rules: GateRules, summary: Summary, winner: Scores) -> list[Limit]:
    """Return the test of the retention: exp of a mean, so items are linearised around it."""
    scale, base = summary.normaliser("test"), summary.scores(summary.parents[0].recipe.hash, "test")
    if rules.min_retention is None:
        return []
    assert scale is not None
    assert base is not None
    samples = []
    for part in scale.retained:
        lost = winner[part.task].metric - base[part.task].metric
        kept = kept_share(float(lost.mean()))
        samples.append(kept * (1 + lost - lost.mean()))
    return [
        Limit(
            rule="min_retention",
            samples=samples,
            weights=np.array([part.share for part in scale.retained]),
            limit=rules.min_retention,
            spans=[(float(s.min()), float(s.max())) for s in samples],
        )
    ]


def table(results: Iterable[RuleResult], suite: str) -> Table:
    """Return the gate as a table for the terminal."""
    results = list(results)
    shown = style.table(
        style.words("rule"),
        *(style.numbers(name) for name in ("measured", "limit", "p (Holm)")),
        style.words("result"),
        title=f"gate: {'passed' if passed(results) else 'FAILED'}",
        caption="a rule fails where the data show that it is violated",
    )
    for result in results:
        kind, _, task = result.rule.partition(" ")
        write = difference if kind == "max_loss" else percent
        shown.add_row(
            f"{kind} {short_task(task, suite)}".strip(),
            write(result.measured),
            write(result.limit),
            p_value(result.p),
            "passed" if result.passed else "FAILED",
            style="" if result.passed else "red",
        )
    return shown
