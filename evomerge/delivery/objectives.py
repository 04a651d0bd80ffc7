"""Several objectives and constraints of a run: the Pareto front, picks from it, constraints met or not.

Computed from the store alone. Fronts are shown on `select`, which the optimizer does not use; `test` is used
for the winner only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evomerge.delivery.style import percent, short_task
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError, nearest
from evomerge.evaluation.scores import Scores, Split
from evomerge.running.store import StoredFront, facts
from evomerge.search import pareto
from evomerge.search.objective import Objective
from evomerge.search.ports import Named

PICKS = ("knee", "best:TASK", "weights:TASK=0.7,OTHER=0.3")

Role = Literal["base", "parent", "baseline", "candidate", "winner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recipe in the space of the objectives, on `select`.

    values: one per objective, higher is better: 1 is a specialist (tasks, mean) or the base (retention,
    coherence, depth). on_front: whether it is a candidate and no other candidate dominates it.
    """

    role: Role
    name: str
    recipe: str
    values: tuple[float, ...]
    on_front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The Pareto front of a run with several objectives.

    axes: labels of the objectives' values times 100. generations: the front on `search` after each
    generation. points: on `select`, candidates first, by the first objective; empty until they are scored
    there.
    """

    objectives: tuple[str, ...]
    axes: tuple[str, ...]
    generations: tuple[StoredFront, ...]
    points: tuple[Point, ...]

    @property
    def searched(self) -> list[Point]:
        """The finalists of the front, the winner among them."""
        return [point for point in self.points if point.role in ("candidate", "winner")]

    @property
    def sentence(self) -> str:
        """Size and hypervolume of the front in one line."""
        if not self.generations:
            return "no front yet"
        first, last = self.generations[0], self.generations[-1]
        return (
            f"Pareto front of size {len(last.recipes)}, hypervolume {last.hypervolume:.4g} on search "
            f"({first.hypervolume:.4g} after the first generation)"
        )

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data, for `report --json` and `status --json`."""
        return {
            "objectives": list(self.objectives),
            "reference": list(self.generations[-1].reference) if self.generations else None,
            "hypervolume": [generation.hypervolume for generation in self.generations],
            "recipes": list(self.generations[-1].recipes) if self.generations else [],
            "split": "select",
            "points": [
                {
                    "role": point.role,
                    "name": point.name,
                    "recipe": point.recipe,
                    "values": list(point.values),
                    "on_front": point.on_front,
                }
                for point in self.points
            ],
        }


def _axis(objective: str, summary: Summary) -> str:
    """Return the label of an objective's values times 100: its name and unit."""
    unit = {
        "retention": "% of the base",
        "coherence": "% of the base",
        "depth": "% of the base's layers",
        "tokens": lengths(summary),
    }
    return f"{objective}, {unit.get(objective, 'points')}"


def lengths(summary: Summary) -> str:
    """Return the unit of generated tokens in a run."""
    model = summary.objective.tokens_of
    return f"% of {'the base' if model == 'base' else model}'s tokens"


def front(summary: Summary) -> Front | None:
    """Return the Pareto front of a run, or None where it has one objective."""
    store = summary.store
    spec = summary.objective
    if not spec.several:
        return None
    objective, points = _objective(summary, "select"), []
    if objective is not None:
        finalists = _scored(summary, store.entries("finalist"), "select")
        losses = objective.losses([s for _, s in finalists], [named.recipe for named, _ in finalists])
        members = set(pareto.front(losses)) if finalists else set()
        for index in sorted(range(len(finalists)), key=lambda i: losses[i, 0]):
            named, scores = finalists[index]
            winner = summary.winner is not None and named.recipe.hash == summary.winner.recipe.hash
            role: Role = "winner" if winner else "candidate"
            points.append(_point(role, named, objective, scores, index in members))
        others: list[tuple[Role, Named]] = [("base", named) for named in summary.parents[:1]]
        others += [("parent", named) for named in summary.parents[1:]]
        others += [("baseline", named) for named in summary.baselines]
        for role, named in others:
            for _, scores in _scored(summary, [named], "select"):
                points.append(_point(role, named, objective, scores, False))
    return Front(
        objectives=spec.names,
        axes=tuple(_axis(name, summary) for name in spec.names),
        generations=tuple(store.fronts()),
        points=tuple(points),
    )


def notes(summary: Summary) -> list[str]:
    """Return what a reader must know about the objective, one sentence each."""
    sentences = []
    if summary.objective.several:
        sentences.append(
            "several objectives: the winner is the knee of the front on select; the verdict is about its "
            "mean score only; the front's numbers are from select"
        )
    sentences += [
        each for each in (floors(summary), constraints(summary), price(summary)) if each is not None
    ]
    return sentences


def floors(summary: Summary) -> str | None:
    """Return which merge sets the floors, as a sentence; None where the objective has none."""
    if summary.standard is None:
        return None
    return (
        f"floors: the search lets no skill fall below what {summary.standard.name} has on search, less "
        "sampling error (objective: {kind: floors})"
    )


def price(summary: Summary) -> str | None:
    """Return what floors, constraints or balance cost: the best candidate by the mean alone, and the winner.

    None where the winner is that candidate, or one of them is not scored on `test`.
    """
    normaliser = summary.normaliser("test")
    if summary.unlimited is None or summary.winner is None or normaliser is None:
        return None
    found = []
    for named in (summary.unlimited, summary.winner):
        scores = summary.scores(named.recipe.hash, "test")
        if scores is None:
            return None
        tasks = {task: value for task, value in normaliser.task(scores).items() if task in normaliser.counted}
        weakest = min(tasks, key=lambda task: tasks[task])
        found.append(
            f"{percent(normaliser.mean(scores))} on test (weakest: {short_task(weakest, summary.suite.name)} "
            f"{percent(tasks[weakest])})"
        )
    return (
        f"what limits cost: the best candidate by the mean alone has {found[0]}, the winner {found[1]}; "
        "objective: {kind: mean} searches for the mean"
    )


def constraints(summary: Summary) -> str | None:
    """Return whether the winner meets the constraints, as a sentence; None without constraints or winner."""
    store = summary.store
    on_select, on_test = _objective(summary, "select"), _objective(summary, "test")
    if not summary.objective.constraints or summary.winner is None or on_select is None:
        return None
    selected = summary.scores(summary.winner.recipe.hash, "select")
    if selected is None:
        return None
    shortfalls = on_select.shortfalls(selected)
    if shortfalls:
        finalists = _scored(summary, store.entries("finalist"), "select")
        none = all(on_select.violation(scores) > 0 for _, scores in finalists)
        text = (
            "no finalist meets the constraints on select; the winner violates them least: "
            if none
            else "the winner does not meet the constraints on select: "
        ) + _listed(shortfalls, summary)
    else:
        text = "the winner meets the constraints on select"
    tested = summary.scores(summary.winner.recipe.hash, "test")
    if on_test is None or tested is None:
        return text
    missed = on_test.shortfalls(tested)
    if missed:
        return f"{text}; it does not meet them on test: {_listed(missed, summary)}"
    return f"{text}; it meets them on test" if shortfalls else f"{text} and on test"


def picked(summary: Summary, pick: str) -> Named:
    """Return the finalist that "knee", "best:TASK" or "weights:TASK=0.7,OTHER=0.3" names.

    Finalists are compared by their scores on `select`: the knee by the run's objectives, the others by
    normalised task scores (0 is the base, 1 the specialist), `retention` and `coherence`. If some finalists
    meet the run's constraints, the others are left out.

    Raises:
        StoreError: nothing is scored on `select` yet.
        ConfigError: the pick can't be read, or the run has one objective and hence no knee.
    """
    store = summary.store
    objective = _objective(summary, "select")
    finalists = _scored(summary, store.entries("finalist"), "select") if objective is not None else []
    if objective is None or not finalists:
        raise StoreError(
            f"{store.folder}: no finalists to pick from yet",
            fix=f"finish the run: evomerge resume {store.folder}",
        )
    finalists = [(n, s) for n, s in finalists if objective.violation(s) == 0] or finalists
    scores_by_task = [_named_values(summary, scores) for _, scores in finalists]
    if pick == "knee":
        if objective.count == 1:
            raise ConfigError(
                f"{store.folder}: a run with one objective has no knee",
                fix="pick the winner, or run with several objectives (`objective: {several: [...]}`)",
            )
        index = pareto.knee(objective.losses([s for _, s in finalists], [n.recipe for n, _ in finalists]))
    else:
        index = pareto.heaviest(scores_by_task, weights(pick, scores_by_task[0]))
    named, _ = finalists[index]
    return Named(name=f"{pick} ({named.name})", recipe=named.recipe)


def weights(pick: str, valid: Mapping[str, float]) -> dict[str, float]:
    """Parse "best:TASK" or "weights:TASK=0.7,OTHER=0.3".

    >>> weights("best:add", {"add": 0.0}), weights("weights:add=0.7,sort=0.3", {"add": 0.0, "sort": 0.0})
    ({'add': 1.0}, {'add': 0.7, 'sort': 0.3})
    """
    kind, _, rest = pick.partition(":")
    by_task: dict[str, float] = {}
    for part in rest.split(","):
        name, _, number = part.partition("=") if kind == "weights" else (part, "=", "1")
        if name.strip() not in valid:
            raise ConfigError(f"--pick {pick}: no task {name.strip()!r}", fix=nearest(name.strip(), valid))
        try:
            by_task[name.strip()] = float(number)
        except ValueError:
            by_task = {}
            break
    if not all(np.isfinite(w) and w >= 0 for w in by_task.values()) or not sum(by_task.values()):
        raise ConfigError(f"--pick {pick}: can't be read", expected=" or ".join(PICKS[1:]), got=pick)
    return by_task


def _objective(summary: Summary, split: Split) -> Objective | None:
    store = summary.store
    normaliser = summary.normaliser(split)
    return (
        None
        if normaliser is None
        else Objective(summary.objective, normaliser, layers=facts.LAYERS.get(store))
    )


def _scored(summary: Summary, recipes: list[Named], split: Split) -> list[tuple[Named, Scores]]:
    results = [(named, summary.scores(named.recipe.hash, split)) for named in recipes]
    return [(named, scores) for named, scores in results if scores is not None]


def _point(role: Role, named: Named, objective: Objective, scores: Scores, on_front: bool) -> Point:
    losses = objective.point(scores, named.recipe)
    values = [_value(name, float(loss)) for name, loss in zip(objective.names, losses, strict=True)]
    return Point(
        role=role, name=named.name, recipe=named.recipe.hash, values=tuple(values), on_front=on_front
    )


def _value(objective: str, loss: float) -> float:
    if objective in ("retention", "coherence"):
        return 1 - loss
    return 1 + loss if objective in ("depth", "tokens") else 0.0 - loss


def _named_values(summary: Summary, scores: Scores) -> dict[str, float]:
    normaliser = summary.normaliser(scores.split)
    assert normaliser is not None
    others = {"retention": normaliser.retention(scores), "coherence": normaliser.coherence(scores)}
    return {**normaliser.task(scores), **{name: v for name, v in others.items() if v is not None}}


def _listed(shortfalls: Mapping[str, tuple[float, float]], summary: Summary) -> str:
    texts = []
    for name, (value, limit) in shortfalls.items():
        of, unit = ("of at most", f" {lengths(summary)}") if name == "tokens" else ("of", "")
        texts.append(f"{name} {percent(value)} {of} {100 * limit:g}{unit}")
    return ", ".join(texts)
