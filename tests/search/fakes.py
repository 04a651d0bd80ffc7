"""Stand-ins for the rooms around the search: a scorer with known answers, a journal in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.search.ports import GuideState, Named

SUITE = Suite.model_validate(
    {
        "name": "fake",
        "tasks": [
            {
                "task": name,
                "metric": "acc",
                "specialist": name,
                "splits": {"search": "search", "select": "select", "test": "test"},
            }
            for name in ("a", "b")
        ],
    }
)
TARGET = {"a": 0.8, "b": 0.6}


class FakeScorer:
    """Scores weights by their distance from TARGET; the base scores 0, source `a` masters task `a`.

    fail: recipes (by hash) that fail. Counts what it was asked for in `asked`.
    """

    seconds = 0.0

    def __init__(self, fail: frozenset[str] = frozenset(), fail_share: float = 0.0) -> None:
        self.asked: list[tuple[str, Split, str]] = []
        self.fail, self.fail_share = fail, fail_share
        self.submitted: list[tuple[str, Recipe, tuple[int, ...]]] = []
        self.pick: Callable[[int], int] = lambda count: 0
        """Which of so many submitted recipes is done next."""

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        self.asked += [(recipe.hash, split, phase) for recipe in recipes]
        return [self._one(recipe, split, phase) for recipe in recipes]

    def require(self, named: Sequence[Named], split: Split, phase: str) -> list[Scores]:
        results = self.score([n.recipe for n in named], split, phase)
        return [r for r in results if isinstance(r, Scores)]

    def submit(self, ticket: str, recipe: Recipe, blocks: Sequence[int]) -> None:
        self.submitted.append((ticket, recipe, tuple(blocks)))

    def next(self) -> tuple[str, Scores | Failure] | None:
        if not self.submitted:
            return None
        ticket, recipe, blocks = self.submitted.pop(self.pick(len(self.submitted)))
        (result,) = self.score([recipe], "search", "generation", blocks)
        return ticket, result

    def known(
        self, recipes: Sequence[Recipe], split: Split, blocks: Sequence[int]
    ) -> list[Scores | Failure | None]:
        return [None] * len(recipes)

    def _one(self, recipe: Recipe, split: Split, phase: str) -> Scores | Failure:
        unlucky = phase.startswith("generation") and int(recipe.hash[:4], 16) < self.fail_share * 65536
        if recipe.hash in self.fail or unlucky:
            return Failure(kind="error", reason="told to fail")
        group = recipe.groups[0]
        weights = dict(zip(group.sources, group.parameters.get("weight", (0.5, 0.5)), strict=False))
        alone = group.method == "linear" and len(group.sources) == 1
        tasks = []
        for task, target in TARGET.items():
            if alone:
                value = 1.0 if group.sources == (task,) else 0.0
            else:
                value = max(0.0, 1.0 - abs(weights.get(task, 0.0) - target))
            items = np.full(10, value)
            tasks.append(TaskScores(task=task, metric=items, smooth=items))
        return Scores(split=split, tasks=tuple(tasks))


class FakeJournal:
    """Keeps all records, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.entries: list[tuple[str, int, Named]] = []
        self.tells: list[NDArray[np.float64]] = []
        self.fronts: list[tuple[float, NDArray[np.float64], list[str]]] = []
        self.guides: list[GuideState] = []
        self.order: list[str] = []
        self.stored: list[str] = []
        """Arrivals of an earlier session, by recipe."""
        self.most_proposed = 0

    def record_ask(self, generation: int, genomes: NDArray[np.float64], recipes: Sequence[Recipe]) -> None:
        self.events.append(("ask", generation))

    def record_tell(self, generation: int, losses: NDArray[np.float64], seconds: float) -> None:
        self.events.append(("tell", generation))
        self.tells.append(losses)

    def record_entry(self, role: str, position: int, entry: Named) -> None:
        self.entries.append((role, position, entry))

    def trim_entries(self, role: str, count: int) -> None:
        self.entries = [e for e in self.entries if e[0] != role or e[1] < count]

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None:
        self.fronts.append((hypervolume, reference, [recipe.hash for recipe in recipes]))

    def record_guide(self, generation: int, state: GuideState) -> None:
        self.guides.append(state)

    def record_spent(self, generation: int, items: int) -> None:
        self.spent = items

    def has_ask(self, generation: int) -> bool:
        return False

    def record_arrival(
        self, generation: int, position: int, genome: NDArray[np.float64], recipe: Recipe
    ) -> None:
        self.events.append(("arrival", (generation, position)))
        self.order.append(recipe.hash)

    def arrivals(self) -> list[str]:
        return list(self.stored)

    def record_pending(self, arrived: int, count: int) -> list[tuple[int, int]]:
        return [(0, count)]

    def record_proposed(self, count: int) -> None:
        self.most_proposed = max(self.most_proposed, count)

    def proposed(self) -> int:
        return self.most_proposed

    def record_chosen_on(self, blocks: Sequence[int]) -> None:
        self.chosen_on = tuple(blocks)

    def record_descent(self, steps: int, share: float) -> tuple[int, float]:
        self.steps, self.share = steps, share
        return steps, share

    def record_frugal(self, worthwhile: bool) -> bool:
        return worthwhile


class FakeBudget:
    """Stops after a number of generations."""

    def __init__(self, generations: int) -> None:
        self.generations = generations

    timed = False

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int
    ) -> str | None:
        return "enough" if generations >= self.generations else None

    def deadline(self) -> float | None:
        return None

    def evaluations(self, full: int, population: int) -> float | None:
        return None


class Quiet:
    """An observer that looks away."""

    def phase(self, name: str, jobs: int, known: int) -> None: ...

    def generation_done(self, generation: int, evaluations: float, best: float) -> None: ...

    def noted(self, message: str) -> None: ...
