"""The objective: Scores on one split become the losses of a candidate, lower is better.

One scale everywhere: 0 is the base, -1 a specialist, so a loss is minus what was gained on the way from
one to the other. What can only be lost (retention, coherence) starts at 0; at 1 all of it is gone.

Limits of a single loss act as a price on what is missing, which has a slope; with several objectives a
candidate that violates one ranks behind all that do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation import statistics
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Array, Failure, Scores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.schema import LARGEST_FACTOR, Strict
from evomerge.search.utility import Utility, UtilityKind, levels_of

FAILURE_MARGIN = 1.0
"""How much worse than the worst finite loss a failed candidate is: one whole specialist."""

INFEASIBLE = 1.0
"""The loss at the border of what constraints allow, with several objectives; see `Objective.losses`."""

SHORT = 2.0
"""Price of a unit that a single loss is short of a constraint: more than any gain elsewhere."""

FLOOR = 1.0
"""Price of a unit that a task is below its floor: more than the same gain elsewhere is worth."""

READY_MADE = ("mean", "worst", "retention", "coherence", "depth", "tokens")
"""The objectives that are not a task's name."""

Weight = Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]
Least = Annotated[float, Field(ge=-100, le=100)]


class ConstraintsSpec(Strict):
    """Limits. What a candidate is short of has a price, and no finalist that violates one wins over one that
    does not; with several objectives it ranks behind every candidate that does not."""

    tasks: Least | dict[str, Least] | None = None
    """Least normalised score (0 is the base, 1 the specialist) of every task of the mean; or `{task:
    score}`."""
    retention: float | None = Field(default=None, gt=0, le=1)
    """Least retention: 1 where nothing of the base is lost."""
    coherence: float | None = Field(default=None, gt=0, le=1)
    """Least coherence: 1 where nothing of the base's is lost."""
    tokens: float | None = Field(default=None, gt=0, le=100)
    """Most generated tokens per item, relative to the model of `tokens_of`."""

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.tasks, self.retention, self.coherence, self.tokens))


class ObjectiveSpec(Strict):
    """The `objective` part of a run config."""

    kind: UtilityKind = "floors"
    """What the scores of the tasks are worth together. `floors`: their mean, and no task may fall below what
    it has in the best hand-made merge, less sampling error; `mean`: the mean alone, which may give up a skill
    for others; `balanced`: the mean of their logarithms, in which the weakest skill counts most."""
    smooth: float = Field(default=0.3, ge=0, le=1)
    """Share of the gold answer's probability in a score; the rest is the metric. Accuracies tie often and
    move in steps, probabilities do not."""
    retention: Weight = 0.2
    """Loss per unit of the base's general ability that is lost."""
    coherence: Weight = 0.2
    """Loss per unit of the coherence of the base's free generations that is lost."""
    depth: Weight = 0.0
    """Loss for every additional layer, in units of the base's number of layers; fewer layers are a gain."""
    weights: dict[str, Weight] = Field(default={})
    """Task weights that replace the suite's, in search, selection and verdict."""
    several: tuple[str | dict[str, Weight], ...] = ()
    """Two or more objectives instead of one: `mean`, `worst` (the weakest task of the mean), `retention`,
    `coherence`, `depth`, `tokens`, a task, or a weighted group of tasks `{task: weight, ...}`. The prices
    above do not enter them."""
    tokens_of: str = "base"
    """The model whose answers have length 1 in `tokens`: `base` or a source."""
    constraints: ConstraintsSpec = Field(default_factory=ConstraintsSpec)
    """Limits that candidates must respect."""

    @field_validator("several")
    @classmethod
    def _at_least_two(cls, several: tuple[str | dict[str, float], ...]) -> tuple[str | dict[str, float], ...]:
        names = [label(each) for each in several]
        if len(names) == 1:
            raise ValueError("one objective is not several; for a mean of your own use `weights`")
        if len(set(names)) < len(names):
            raise ValueError("the same objective stands twice")
        if any(isinstance(each, dict) and not sum(each.values()) for each in several):
            raise ValueError("a group of tasks needs a weight above 0")
        return several

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names, in the order of the losses; ("loss",) where there is only one."""
        return tuple(label(each) for each in self.several) or ("loss",)

    @property
    def count(self) -> int:
        """Number of objectives."""
        return len(self.names)

    @property
    def items_decide(self) -> bool:
        """Whether items alone make the loss, so that races can compare candidates on some of them and a model
        of the items can predict it."""
        return not (self.several or self.depth or self.constraints.tokens is not None)

    @property
    def items_decide_front(self) -> bool:
        """Whether items alone, and the depth of recipes, make the losses of several objectives."""
        return bool(self.several) and "tokens" not in self.several and self.constraints.tokens is None

    def check(self, suite: Suite, sources: Collection[str]) -> None:
        """Check that suite and sources have what the objective names.

        Raises:
            ConfigError: a task is unknown or has no search items, no task measures what is wanted, or
                `tokens_of` is neither the base nor a source.
        """
        models = ("base", *sources)
        if self.tokens_of not in models:
            raise ConfigError(
                f"objective: tokens_of: no model is called {self.tokens_of!r}",
                fix=nearest(self.tokens_of, models),
            )
        skills = [task.task for task in suite.of("search") if task.role == "skill"]
        named = [task for each in self.several for task in ([each] if isinstance(each, str) else each)]
        limits = self.constraints
        limited = list(limits.tasks) if isinstance(limits.tasks, Mapping) else []
        for where, tasks in (("several", named), ("constraints.tasks", limited)):
            valid = [*skills, *(READY_MADE if where == "several" else ())]
            for task in tasks:
                if task not in valid:
                    raise ConfigError(
                        f"objective: {where}: {task!r} is no skill task of suite {suite.name!r} "
                        "with search items",
                        fix=nearest(task, valid),
                    )
        groups = [task for each in self.several if isinstance(each, dict) for task in each]
        if wrong := [task for task in groups if task in READY_MADE and task not in skills]:
            raise ConfigError(
                f"objective: several: {wrong[0]!r} can't be part of a group of tasks",
                fix="make it an objective of its own",
            )
        for role in ("retention", "coherence"):
            wanted = role in named or getattr(limits, role) is not None
            if wanted and not any(task.role == role and task.counted for task in suite.tasks):
                raise ConfigError(
                    f"objective: {role} is part of it, but no task of suite {suite.name!r} measures it",
                    expected=f"a task with `role: {role}`, search items and a weight above 0",
                    fix="add one to the suite",
                )


def check_tokens(spec: ObjectiveSpec, *, generates: bool) -> None:
    """Check that something is generated where the objective names `tokens`; raise ConfigError if not.

    generates: whether a task that counts does.
    """
    wanted = "tokens" in spec.several or spec.constraints.tokens is not None or spec.tokens_of != "base"
    if wanted and not generates:
        raise ConfigError(
            "objective: tokens is part of it, but no task generates answers",
            expected="a task with output_type: generate_until, search items and a weight above 0",
            fix="add one to the suite",
        )


def label(objective: str | Mapping[str, float]) -> str:
    """Return an objective's name in tables: a group's tasks with their weights.

    >>> label("mean"), label({"add": 0.7, "sort": 0.3})
    ('mean', '0.7 add + 0.3 sort')
    """
    if isinstance(objective, str):
        return objective
    return " + ".join(f"{weight:g} {task}" for task, weight in objective.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """The merge whose skills a candidate must keep: the best hand-made one.

    scores: on the objective's items. slack: task -> how far below it a candidate may be, normalised: the
    standard error of its score on all items of the split.
    """

    name: str
    scores: Scores
    slack: Mapping[str, float]


class Objective:
    """The losses of candidates: one number each, or a vector for several objectives.

    layers: of the base model, which `depth` is measured in; None where every recipe has as many. standard:
    the merge that sets the floors, in an objective of that kind.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        normaliser: Normaliser,
        *,
        layers: int | None = None,
        standard: Standard | None = None,
    ) -> None:
        self._spec = spec
        self._normaliser = normaliser
        self._layers = layers
        self._standard = standard
        self._utility = self._with_floors()

    @property
    def normaliser(self) -> Normaliser:
        """The scale of its scores."""
        return self._normaliser

    @property
    def utility(self) -> Utility:
        """What the scores of the counted tasks are worth, without floors of a standard."""
        normaliser, limits = self._normaliser, self._limits()
        utility = Utility(shares=normaliser.shares, concave=self._spec.kind == "balanced")
        return utility.above(levels_of(normaliser.counted, limits), SHORT)

    @property
    def standard(self) -> Standard | None:
        """The merge that sets the floors; None where the objective has none."""
        return self._standard

    @property
    def unlimited(self) -> Objective | None:
        """This one objective as the mean alone, without floors and constraints; None where it is that."""
        if self._spec.kind == "mean" and not self._spec.constraints:
            return None
        spec = self._spec.model_copy(update={"kind": "mean", "constraints": ConstraintsSpec()})
        return Objective(spec, self._normaliser, layers=self._layers)

    def above(self, name: str, scores: Scores) -> Objective:
        """Return this objective with the floors that a merge sets, if it is of that kind.

        name, scores: of the merge, on the objective's items.
        """
        if self._spec.kind != "floors" or self._spec.several:
            return self
        shares = self._normaliser.shares.tolist()
        parts = self._normaliser.contributions(scores, smooth=self._spec.smooth, retention=0.0, coherence=0.0)
        slack = {
            task: statistics.standard_error(part) / share
            for task, part, share in zip(self._normaliser.counted, parts, shares, strict=False)
        }
        return self._with(self._normaliser, Standard(name=name, scores=scores, slack=slack))

    def floors_of(self, scores: Scores) -> dict[str, float]:
        """Return the floors that a merge sets by its metrics, less sampling error, whatever the objective."""
        spec = self._spec.model_copy(update={"kind": "floors", "several": (), "smooth": 0.0})
        return Objective(spec, self._normaliser, layers=self._layers).above("", scores).floors()

    def floors(self) -> dict[str, float]:
        """Return the floor of every task that has one, as a normalised score."""
        if self._standard is None:
            return {}
        reached = self._tasks(self._standard.scores)
        return {
            task: reached[task] - self._standard.slack[task]
            for task in self._normaliser.counted
            if task not in self._normaliser.duds
        }

    @property
    def count(self) -> int:
        """Number of objectives."""
        return self._spec.count

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the objectives."""
        return self._spec.names

    def loss(self, scores: Scores, recipe: Recipe | None = None) -> float:
        """Return the one loss of a scored candidate: minus what its skills are worth, plus the price of what
        is lost and of what it is short of a constraint."""
        spec, limits = self._spec, self._spec.constraints
        if self._utility.linear:
            loss = -self._blend(self._normaliser.mean(scores), self._normaliser.smooth_mean(scores))
        else:
            tasks = self._tasks(scores)
            values, _ = self._utility(np.array([tasks[task] for task in self._normaliser.counted]))
            loss = -math.fsum(values.tolist())
        for price, least, kept in (
            (spec.retention, limits.retention, self._normaliser.retention(scores)),
            (spec.coherence, limits.coherence, self._normaliser.coherence(scores)),
        ):
            loss += price * _lost(kept)
            if least is not None and kept is not None:
                loss += SHORT * max(0.0, least - kept)
        if limits.tokens is not None:
            loss += SHORT * self._excess(scores)
        return loss + spec.depth * self.depth(recipe)

    def point(self, scores: Scores, recipe: Recipe | None = None) -> NDArray[np.float64]:
        """Return the losses of one scored candidate, shape (objectives,); several without constraints."""
        if not self._spec.several:
            return np.array([self.loss(scores, recipe)])
        tasks = self._tasks(scores)
        return np.array([self._one(each, scores, tasks, recipe) for each in self._spec.several])

    def violation(self, scores: Scores) -> float:
        """Return the sum of a candidate's shortfalls from the constraints; 0 where it meets them.

        Whether a task is short is decided by its metric alone. By how much is the mean of what metric and
        smooth companion are short of: a skill that is gone by the metric (0 of 100 right) would otherwise
        give no hint of the way back.
        """
        limits, normaliser = self._spec.constraints, self._normaliser
        short = 0.0
        if limits.tasks is not None:
            metric, smooth = normaliser.task(scores), normaliser.smooth_task(scores)
            for task, limit in self._limits().items():
                if metric[task] < limit:
                    short += 0.5 * (limit - metric[task]) + 0.5 * max(0.0, limit - smooth[task])
        for least, kept in (
            (limits.retention, normaliser.retention(scores)),
            (limits.coherence, normaliser.coherence(scores)),
        ):
            if least is not None and kept is not None:
                short += max(0.0, least - kept)
        return short + self._excess(scores)

    def shortfalls(self, scores: Scores) -> dict[str, tuple[float, float]]:
        """Return the limits that a candidate violates: name -> (what it reaches, the limit)."""
        limits, normaliser = self._spec.constraints, self._normaliser
        reached: dict[str, float | None] = {}
        limits_by_name: dict[str, float | None] = {}
        if limits.tasks is not None:
            limits_by_name, reached = {**self._limits()}, {**normaliser.task(scores)}
        limits_by_name |= {"retention": limits.retention, "coherence": limits.coherence}
        reached |= {"retention": normaliser.retention(scores), "coherence": normaliser.coherence(scores)}
        violated = {
            name: (value, limit)
            for name, limit in limits_by_name.items()
            if limit is not None and (value := reached[name]) is not None and value < limit
        }
        tokens = normaliser.tokens(scores)
        if limits.tokens is not None and tokens is not None and tokens > limits.tokens:
            violated["tokens"] = (tokens, limits.tokens)
        return violated

    def on(self, base: Scores, standard: Scores | None = None) -> Objective:
        """Return this objective for scores on other item blocks.

        base, standard: what the base, and the merge that sets the floors, score there.
        """
        floors = self._standard
        if floors is not None:
            assert standard is not None, "no scores of the merge that sets the floors"
            floors = replace(floors, scores=standard)
        return self._with(self._normaliser.on(base), floors)

    def contributions(self, scores: Scores) -> list[Array]:
        """Return per counted task (items,) what each item adds to the loss; the means sum to `loss`.

        What is no mean over items is linearised around the model's means (the delta method).
        """
        spec, limits, normaliser = self._spec, self._spec.constraints, self._normaliser
        short = [
            SHORT * (least is not None and kept is not None and kept < least)
            for least, kept in (
                (limits.retention, normaliser.retention(scores)),
                (limits.coherence, normaliser.coherence(scores)),
            )
        ]
        parts = normaliser.contributions(
            scores,
            smooth=spec.smooth,
            retention=spec.retention + short[0],
            coherence=spec.coherence + short[1],
        )
        if self._utility.linear and not any(short):
            return parts
        tasks = self._tasks(scores)
        _, slopes = self._utility(np.array([tasks[task] for task in normaliser.counted]))
        for index, (share, slope) in enumerate(zip(normaliser.shares.tolist(), slopes.tolist(), strict=True)):
            parts[index] = (slope / share) * parts[index]
        missing = self.loss(scores) - math.fsum(float(part.mean()) for part in parts)
        return [parts[0] + missing, *parts[1:]]

    def mean(self, scores: Scores) -> float:
        """Return the mean normalised score alone: what tables show."""
        return self._normaliser.mean(scores)

    def depth(self, recipe: Recipe | None) -> float:
        """Return how many layers more than the base's a recipe has, as a share of the base's."""
        if recipe is None or recipe.num_layers is None:
            return 0.0
        assert self._layers is not None, "depth of a stacked recipe, and no base to compare with"
        return recipe.num_layers / self._layers - 1

    def losses(
        self, results: Sequence[Scores | Failure], recipes: Sequence[Recipe] | None = None
    ) -> NDArray[np.float64]:
        """Return the losses of a generation.

        Args:
            results: Scores or failures, one per candidate.
            recipes: The candidates' recipes; only the depth objective needs them.

        Returns:
            Shape (n, objectives), all finite, lower is better. Without other terms a loss is minus the mean
            normalised score: 0 is the base, -1 the specialists.

        With several objectives and constraints the rules of Deb (2000, CMAME 186, section 3) hold: a
        candidate that meets them has losses below INFEASIBLE (those above 0, the base's, are squeezed into
        [0, 1)), one that does not has INFEASIBLE plus its violation in all of them, so that a smaller
        violation dominates a larger one (Deb et al. 2002, section VI). Deb's penalty starts at the worst
        feasible member of the population; a fixed start ranks the same and keeps losses of different
        generations comparable.

        A failure, and a loss that is not finite, gets the worst finite loss of the generation (at least
        0, the base's) plus FAILURE_MARGIN.
        """
        points = np.full((len(results), self.count), np.nan)
        for row, result in enumerate(results):
            if isinstance(result, Scores):
                points[row] = self._constrained(result, recipes[row] if recipes is not None else None)
        return _with_failures(points)

    def scalar_losses(
        self, results: Sequence[Scores | Failure], recipes: Sequence[Recipe] | None = None
    ) -> NDArray[np.float64]:
        """Return the one loss of each result, shape (n,), as if there were not several objectives."""
        spec = self._spec.model_copy(update={"several": ()})
        alone = Objective(spec, self._normaliser, layers=self._layers, standard=self._standard)
        return alone.losses(results, recipes)[:, 0]

    def reference_point(
        self, results: Sequence[Scores | Failure], recipes: Sequence[Recipe] | None = None
    ) -> NDArray[np.float64]:
        """Return the corner up to which hypervolume counts, from the results of what was not searched.

        A tenth of their range behind their worst loss in each objective, so that extremes count too; one
        unit behind it where they are all alike. Nothing that violates a constraint lies before it.
        """
        points = self._points(results, recipes)
        worst, spread = points.max(axis=0), np.ptp(points, axis=0)
        reference: NDArray[np.float64] = worst + np.where(spread > 0, 0.1 * spread, 1.0)
        return np.minimum(reference, INFEASIBLE) if self._spec.constraints else reference

    def units(
        self, results: Sequence[Scores | Failure], recipes: Sequence[Recipe] | None = None
    ) -> NDArray[np.float64]:
        """Return the distance of the best loss in each objective from `reference_point`."""
        best = self._points(results, recipes).min(axis=0)
        units: NDArray[np.float64] = np.maximum(self.reference_point(results, recipes) - best, 1e-9)
        return units

    def _points(
        self, results: Sequence[Scores | Failure], recipes: Sequence[Recipe] | None
    ) -> NDArray[np.float64]:
        """Return the finite losses of results, without the rank of those that violate a constraint."""
        points = np.array(
            [
                self._squeezed(self.point(result, recipes[row] if recipes is not None else None))
                for row, result in enumerate(results)
                if isinstance(result, Scores)
            ]
        )
        finite: NDArray[np.float64] = points[np.isfinite(points).all(axis=1)]
        return finite

    def _with(self, normaliser: Normaliser, standard: Standard | None) -> Objective:
        return Objective(self._spec, normaliser, layers=self._layers, standard=standard)

    def _with_floors(self) -> Utility:
        levels = levels_of(self._normaliser.counted, self.floors())
        return self.utility.above(levels, FLOOR)

    def _constrained(self, scores: Scores, recipe: Recipe | None) -> NDArray[np.float64]:
        if not self._spec.several:
            return np.array([self.loss(scores, recipe)])
        violation = self.violation(scores)
        if violation > 0:
            return np.full(self.count, INFEASIBLE + violation)
        return self._squeezed(self.point(scores, recipe))

    def _squeezed(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self._spec.constraints:
            return point
        over = np.maximum(point, 0.0)
        return np.where(point > 0, over / (1 + over), point)

    def _blend(self, metric: float, smooth: float) -> float:
        share = self._spec.smooth
        return (1 - share) * metric + share * smooth if share else metric

    def _tasks(self, scores: Scores) -> dict[str, float]:
        smooth = self._normaliser.smooth_task(scores)
        return {
            name: self._blend(value, smooth[name]) for name, value in self._normaliser.task(scores).items()
        }

    def _one(
        self,
        objective: str | Mapping[str, float],
        scores: Scores,
        tasks: Mapping[str, float],
        recipe: Recipe | None,
    ) -> float:
        normaliser = self._normaliser
        if isinstance(objective, Mapping):
            total = math.fsum(objective.values())
            return -math.fsum(weight / total * tasks[task] for task, weight in objective.items())
        if objective == "mean":
            return -self._blend(normaliser.mean(scores), normaliser.smooth_mean(scores))
        if objective == "worst":
            return -min(tasks[task] for task in normaliser.weakest)
        if objective == "retention":
            return _lost(normaliser.retention(scores))
        if objective == "coherence":
            return _lost(normaliser.coherence(scores))
        if objective == "tokens":
            tokens_ratio = normaliser.tokens(scores)
            return 0.0 if tokens_ratio is None else tokens_ratio - 1.0
        return self.depth(recipe) if objective == "depth" else -tasks[objective]

    def _excess(self, scores: Scores) -> float:
        """Return by how much the generated tokens exceed their limit."""
        most, tokens = self._spec.constraints.tokens, self._normaliser.tokens(scores)
        return 0.0 if most is None or tokens is None else max(0.0, tokens - most)

    def _limits(self) -> dict[str, float]:
        tasks, duds = self._spec.constraints.tasks, self._normaliser.duds
        if not isinstance(tasks, Mapping):
            tasks = {} if tasks is None else dict.fromkeys(self._normaliser.counted, tasks)
        return {task: limit for task, limit in tasks.items() if task not in duds}


def _lost(kept: float | None) -> float:
    """What is lost of what the base had; more than the base had is no gain."""
    return 0.0 if kept is None else max(0.0, 1.0 - kept)


def _with_failures(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give every row that is not finite its place behind all others."""
    finite = np.isfinite(points).all(axis=1)
    worst = np.maximum(points[finite].max(axis=0), 0.0) if finite.any() else np.zeros(points.shape[1])
    points[~finite] = worst + FAILURE_MARGIN
    return points
