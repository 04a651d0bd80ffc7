"""What a run's objective says of its candidates: the Pareto front, picks from it, constraints kept or not.

Computed from the store alone. Fronts are shown as they are on `select`, which the optimizer never saw;
`test` belongs to the winner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError, nearest
from evomerge.evaluation.scores import Scores, Split
from evomerge.running.store import StoredFront, StoreReader, facts
from evomerge.schema import parse
from evomerge.search import pareto
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.ports import Named

PICKS = ("knee", "best:TASK", "weights:TASK=0.7,OTHER=0.3")

Role = Literal["base", "parent", "baseline", "candidate", "winner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recipe in the space of the objectives, on `select`.

    values: one per objective as people read it: 1 is a specialist (tasks, mean) or the base (retention,
    coherence, depth). on_front: whether it was searched for and no other searched point dominates it.
    """

    role: Role
    name: str
    recipe: str
    values: tuple[float, ...]
    on_front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The front of a run with several objectives.

    generations: the front on `search` after each. points: on `select`, searched ones first by the first
    objective; empty until they are scored there.
    """

    objectives: tuple[str, ...]
    generations: tuple[StoredFront, ...]
    points: tuple[Point, ...]

    @property
    def searched(self) -> list[Point]:
        """The candidates that stand for the front, and the winner among them."""
        return [point for point in self.points if point.role in ("candidate", "winner")]

    @property
    def sentence(self) -> str:
        """Size and hypervolume of the front in one line."""
        if not self.generations:
            return "no front yet"
        first, last = self.generations[0], self.generations[-1]
        return (
            f"{len(last.recipes)} candidates on the front, hypervolume {last.hypervolume:.4g} on search "
            f"({first.hypervolume:.4g} after the first generation)"
        )

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data, for `report --json` and `status --json`."""
        return {
            "objectives": list(self.objectives),
            "reference": list(self.generations[-1].reference) if self.generations else None,
            "hypervolume": [g.hypervolume for g in self.generations],
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


def axis(objective: str) -> str:
    """Return what an objective's values, times 100, are."""
    unit = {"retention": "% of the base", "coherence": "% of the base", "depth": "% of the base's layers"}
    return f"{objective}, {unit.get(objective, 'points')}"


def front(summary: Summary) -> Front | None:
    """Return the front of a run, or None where it has one objective."""
    store = summary.store
    spec = _spec(store)
    if not spec.several:
        return None
    objective, points = _objective(summary, "select"), []
    if objective is not None:
        found = _scored(store, store.entries("finalist"), "select")
        losses = objective.losses([s for _, s in found], [n.recipe for n, _ in found])
        kept = set(pareto.front(losses)) if found else set()
        for row in sorted(range(len(found)), key=lambda i: losses[i, 0]):
            named, scores = found[row]
            winner = summary.winner is not None and named.recipe.hash == summary.winner.recipe.hash
            role: Role = "winner" if winner else "candidate"
            points.append(_point(role, named, objective, scores, row in kept))
        rest: list[tuple[Role, Named]] = [("base", n) for n in summary.parents[:1]]
        rest += [("parent", n) for n in summary.parents[1:]]
        rest += [("baseline", n) for n in summary.baselines]
        for role, named in rest:
            for _, scores in _scored(store, [named], "select"):
                points.append(_point(role, named, objective, scores, False))
    return Front(objectives=spec.names, generations=tuple(store.fronts()), points=tuple(points))


def notes(summary: Summary) -> list[str]:
    """Return what a reader must know of the objective, one sentence each."""
    store = summary.store
    found = []
    if _spec(store).several:
        found.append(
            "several objectives: the winner is the knee of the front on select, and the verdict is about "
            "its mean alone; numbers of the front are from select"
        )
    if (sentence := constraints(summary)) is not None:
        found.append(sentence)
    return found


def constraints(summary: Summary) -> str | None:
    """Say whether the winner meets the constraints; None without constraints or winner."""
    store = summary.store
    on_select, on_test = _objective(summary, "select"), _objective(summary, "test")
    if not _spec(store).constraints or summary.winner is None or on_select is None:
        return None
    mine = _scored(store, [summary.winner], "select")
    if not mine:
        return None
    short = on_select.shortfalls(mine[0][1])
    if short:
        finalists = _scored(store, store.entries("finalist"), "select")
        none = all(on_select.violation(scores) > 0 for _, scores in finalists)
        head = "no finalist meets the constraints on select" if none else "constraints are not met on select"
        text = (
            f"{head}; the winner falls short least: {_listed(short)}" if none else f"{head}: {_listed(short)}"
        )
    else:
        text = "the winner meets the constraints on select"
    tested = _scored(store, [summary.winner], "test")
    if on_test is not None and tested:
        missing = on_test.shortfalls(tested[0][1])
        on = "; on test it falls short: " + _listed(missing) if missing else "; on test it meets them"
        text += " and on test" if not (short or missing) else on
    return text


def picked(summary: Summary, pick: str) -> Named:
    """Return the finalist that "knee", "best:TASK" or "weights:TASK=0.7,OTHER=0.3" means.

    Finalists are compared by their scores on `select`: the knee by the run's objectives, the others by
    normalised task scores (0 is the base, 1 the specialist), `retention` and `coherence`. Where some meet
    the run's constraints, those that don't are left out.

    Raises:
        StoreError: nothing is scored on `select` yet.
        ConfigError: the pick can't be read, or the run has one objective and hence no knee.
    """
    store = summary.store
    objective = _objective(summary, "select")
    found = _scored(store, store.entries("finalist"), "select") if objective is not None else []
    if objective is None or not found:
        raise StoreError(
            f"{store.folder}: no finalists to pick from yet", fix=f"finish it: evomerge resume {store.folder}"
        )
    found = [(n, s) for n, s in found if objective.violation(s) == 0] or found
    values = [_named_values(summary, scores) for _, scores in found]
    if pick == "knee":
        if objective.count == 1:
            raise ConfigError(
                f"{store.folder}: a run with one objective has no knee",
                fix="pick the winner, or run with several objectives (`objective: {several: [...]}`)",
            )
        row = pareto.knee(objective.losses([s for _, s in found], [n.recipe for n, _ in found]))
    else:
        row = pareto.heaviest(values, weights(pick, values[0]))
    return Named(name=f"{pick} ({found[row][0].name})", recipe=found[row][0].recipe)


def weights(pick: str, valid: Mapping[str, float]) -> dict[str, float]:
    """Read "best:TASK" or "weights:TASK=0.7,OTHER=0.3".

    >>> weights("best:add", {"add": 0.0}), weights("weights:add=0.7,sort=0.3", {"add": 0.0, "sort": 0.0})
    ({'add': 1.0}, {'add': 0.7, 'sort': 0.3})
    """
    kind, _, rest = pick.partition(":")
    found: dict[str, float] = {}
    for part in rest.split(","):
        name, _, number = part.partition("=") if kind == "weights" else (part, "=", "1")
        if name.strip() not in valid:
            raise ConfigError(f"--pick {pick}: no task {name.strip()!r}", fix=nearest(name.strip(), valid))
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found = {}
            break
    if not found or not all(np.isfinite(w) and w >= 0 for w in found.values()) or not sum(found.values()):
        raise ConfigError(f"--pick {pick}: can't be read", expected=" or ".join(PICKS[1:]), got=pick)
    return found


def _spec(store: StoreReader) -> ObjectiveSpec:
    return parse(ObjectiveSpec, facts.CONFIG.require(store)["objective"], f"{store.folder}: stored objective")


def _objective(summary: Summary, split: Split) -> Objective | None:
    store = summary.store
    normaliser = summary.normaliser(split)
    return None if normaliser is None else Objective(_spec(store), normaliser, layers=facts.LAYERS.get(store))


def _scored(store: StoreReader, named: list[Named], split: Split) -> list[tuple[Named, Scores]]:
    results = [(n, store.result(n.recipe.hash, split)) for n in named]
    return [(n, result) for n, result in results if isinstance(result, Scores)]


def _point(role: Role, named: Named, objective: Objective, scores: Scores, on_front: bool) -> Point:
    losses = objective.point(scores, named.recipe)
    values = [_value(name, float(loss)) for name, loss in zip(objective.names, losses, strict=True)]
    return Point(
        role=role, name=named.name, recipe=named.recipe.hash, values=tuple(values), on_front=on_front
    )


def _value(objective: str, loss: float) -> float:
    if objective in ("retention", "coherence"):
        return 1 - loss
    return 1 + loss if objective == "depth" else 0.0 - loss


def _named_values(summary: Summary, scores: Scores) -> dict[str, float]:
    normaliser = summary.normaliser(scores.split)
    assert normaliser is not None
    others = {"retention": normaliser.retention(scores), "coherence": normaliser.coherence(scores)}
    return {**normaliser.task(scores), **{name: v for name, v in others.items() if v is not None}}


def _listed(short: Mapping[str, tuple[float, float]]) -> str:
    parts = (f"{name} {100 * value:.1f} of {100 * limit:g}" for name, (value, limit) in short.items())
    return ", ".join(parts)
