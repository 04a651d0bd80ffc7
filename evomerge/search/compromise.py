"""The compromise of a front: the member that a run with several objectives declares its winner.

It must not be worse than what anybody gets without a search: its mean not below that of the best hand-made
merge, and no skill below that merge's, less sampling error. Among the members that meet this (else those that
miss it least) it is the knee, see `pareto.knee`.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.evaluation.scores import Scores
from evomerge.merging.recipe import Recipe
from evomerge.search import pareto
from evomerge.search.objective import Objective

Member = tuple[Recipe, Scores]


class Compromise:
    """Ranks members of a front.

    objective: the run's, on the items of all scores. unsearched: base, parents and hand-made merges.
    hand_made: of these the merges.
    """

    def __init__(
        self, objective: Objective, unsearched: Sequence[Member], hand_made: Sequence[Scores]
    ) -> None:
        self._objective = objective
        scores, recipes = [s for _, s in unsearched], [r for r, _ in unsearched]
        self._reference = objective.reference_point(scores, recipes)
        self._units = objective.units(scores, recipes)
        self._mean, self._floors = -float("inf"), dict[str, float]()
        if hand_made:
            best = max(hand_made, key=objective.mean)
            self._mean = objective.mean(best)
            self._floors = objective.floors_of(best)

    def shortfall(self, scores: Scores) -> float:
        """Return by how much a member misses what the best hand-made merge has; 0 where it does not."""
        reached = self._objective.normaliser.task(scores)
        short = max(0.0, self._mean - self._objective.mean(scores))
        return short + sum(max(0.0, floor - reached[task]) for task, floor in self._floors.items())

    def best(self, members: Sequence[Member]) -> int:
        """Return the index of the compromise."""
        return self.ranked(members)[0]

    def ranked(self, members: Sequence[Member]) -> list[int]:
        """Return the indices of at least one member, the best compromise first."""
        scores = [scores for _, scores in members]
        losses = self._objective.losses(scores, [recipe for recipe, _ in members])
        worth = pareto.worth(losses, self._reference, self._units)
        return sorted(
            range(len(members)),
            key=lambda i: (self._objective.violation(scores[i]), self.shortfall(scores[i]), -worth[i], i),
        )
