"""Hand-made stacks, the start of a search of layer paths, and when such a search is given up.

Before the search, the lower layers of one model are put under the upper layers of another, for the best
models and a few cuts. They show at little cost whether the models' layers fit on one another, and the best of
them is where the search begins.

Paths combine what lies at different depths. Skills that share their layers are combined by merging weights,
and then no path is as good as a hand-made merge. So a search that has not come to the best of those after a
part of its budget ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from evomerge.evaluation.scores import Scores
from evomerge.merging.recipe import Recipe
from evomerge.search.ports import CandidateScorer, Named, SearchBudget, SearchObserver
from evomerge.search.racing import Views
from evomerge.search.spaces.space import Genome, Space

COST = 4
"""Evaluations that scoring the stacks costs at most."""
PATIENCE = 0.25
"""Share of the budget after which a path must be as good as the best that was known before the search."""


@runtime_checkable
class Stacking(Protocol):
    """A space of layer paths."""

    def stacks(self, models: Sequence[str], most: int) -> list[tuple[str, Recipe]]:
        """Return names and recipes of hand-made stacks of some models, the best models first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredStacks:
    """What hand-made stacks scored on one item block: the best one, all with their genomes, and the items."""

    best: Named | None
    examples: tuple[tuple[Genome, Scores], ...] = ()
    items: int = 0


def score_stacks(
    space: Space, models: Sequence[str], *, scorer: CandidateScorer, views: Views, cost: int, block: int = 0
) -> ScoredStacks:
    """Score hand-made stacks on one item block.

    Args:
        space: The paths that the search may take; where it is another kind of space, there are no stacks.
        models: Names of the models, the best first.
        scorer: Scores recipes on item blocks of `search`.
        views: The objective, on any set of blocks.
        cost: Evaluations on all items that the stacks may cost.
        block: The item block.
    """
    found = space.stacks(models, cost * len(views.blocks)) if isinstance(space, Stacking) else []
    if not found:
        return ScoredStacks(best=None)
    recipes = [recipe for _, recipe in found]
    results = scorer.score(recipes, "search", "stacks", [block])
    losses = views([block]).losses(results, recipes)[:, 0]
    examples = [
        (genome, result)
        for recipe, result in zip(recipes, results, strict=True)
        if isinstance(result, Scores) and (genome := space.encode(recipe)) is not None
    ]
    name, recipe = found[int(np.argmin(losses))]
    return ScoredStacks(
        best=Named(name=name, recipe=recipe) if examples else None,
        examples=tuple(examples),
        items=sum(scores.items for _, scores in examples),
    )


class Outlook:
    """The budget of a search of layer paths, and the observer that tells it what was found.

    means: mean normalised score of everything that was known before the search, by name. stack: the best
    hand-made stack among them. full: items of an evaluation. population: candidates of a generation.
    """

    def __init__(
        self,
        budget: SearchBudget,
        observer: SearchObserver,
        *,
        means: Mapping[str, float],
        stack: str,
        full: int,
        population: int,
    ) -> None:
        self._budget, self._observer = budget, observer
        self._allowed = budget.evaluations(full, population)
        self._best = means.get(stack, -np.inf)
        self._rival = max((name for name in means if name != stack), key=lambda name: means[name])
        self._needed = means[self._rival]

    @property
    def timed(self) -> bool:
        """Whether the clock may end the search."""
        return self._budget.timed

    def evaluations(self, full: int, population: int) -> float | None:
        """Return how many full evaluations the budget allows."""
        return self._budget.evaluations(full, population)

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int
    ) -> str | None:
        """Say that the budget is used, or that no path came to what was known."""
        stopped = self._budget.stop_reason(
            generations=generations, items=items, forecast=forecast, full=full, stale=stale
        )
        if stopped is not None or self._allowed is None or not generations:
            return stopped
        if items < PATIENCE * self._allowed * full or self._best >= self._needed:
            return None
        return f"after {PATIENCE:.0%} of the budget no path is as good as {self._rival}"

    def deadline(self) -> float | None:
        """Return when the last job of the search may begin."""
        return self._budget.deadline()

    def out_of_time(self, generations: int, *, cut: bool) -> str:
        """Return why the clock ends the search."""
        return self._budget.out_of_time(generations, cut=cut)

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Pass it on."""
        self._observer.phase(name, jobs, known)

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Take in the best score so far, and pass it on."""
        self._best = max(self._best, best)
        self._observer.generation_done(generation, evaluations, best)

    def noted(self, message: str) -> None:
        """Pass it on."""
        self._observer.noted(message)
