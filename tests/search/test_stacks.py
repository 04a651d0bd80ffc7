"""Hand-made stacks: the best one starts a search of layer paths, which ends early where paths do not pay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores
from evomerge.merging.recipe import Recipe
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.racing import RacingSpec
from evomerge.search.spaces.layer_path import LayerPathSpace
from evomerge.search.stacks import COST, Outlook
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_layer_path import space, template

BLOCKS = 4


class Paths(FakeScorer):
    """Scores a path by the share of its lower half from `a` and of its upper half from `b`; merges all alike.

    merges: what every merge of weights scores.
    """

    def __init__(self, merges: float, fail: frozenset[str] = frozenset()) -> None:
        super().__init__(fail)
        self.merges = merges

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        self.asked += [(recipe.hash, split, phase) for recipe in recipes]
        wanted = tuple(range(BLOCKS if split == "search" else 1)) if blocks is None else tuple(blocks)
        return [self._on(recipe, split, wanted) for recipe in recipes]

    def _on(self, recipe: Recipe, split: Split, blocks: tuple[int, ...]) -> Scores | Failure:
        if recipe.hash in self.fail:
            return Failure(kind="error", reason="told to fail")
        tasks = []
        for task, target in (("a", "a"), ("b", "b")):
            items = np.full(10 * len(blocks), self._value(recipe, task, target))
            tasks.append(TaskScores(task=task, metric=items, smooth=items))
        return Scores(split=split, tasks=tuple(tasks), blocks=blocks)

    def _value(self, recipe: Recipe, task: str, target: str) -> float:
        first = recipe.groups[0]
        if first.method == "linear" and len(first.sources) == 1:
            return 0.0 if first.sources == ("base",) else float(first.sources == (task,))
        if first.method != "passthrough":
            return self.merges
        depth = recipe.num_layers or 6
        half = range(depth // 2) if task == "a" else range(depth // 2, depth)
        makers = [next(g for g in recipe.groups if layer in (g.layers or ())).sources[0] for layer in half]
        return float(np.mean([maker == target for maker in makers]))


class Budget(FakeBudget):
    """Allows some evaluations as well."""

    def __init__(self, generations: int, allowed: float | None = 40.0) -> None:
        super().__init__(generations)
        self.allowed = allowed

    def evaluations(self, full: int, population: int) -> float | None:
        return self.allowed


def search(
    scorer: Paths, journal: FakeJournal, *, stacks: int = COST, paths: LayerPathSpace | None = None
) -> Outcome:
    plan = SearchPlan(
        suite=SUITE,
        space=paths or space(),
        template=template("a", "b"),
        norms={"a": 1.0, "b": 1.0},
        optimizer=OptimizerSpec(),
        objective=ObjectiveSpec(kind="mean"),
        finalists=3,
        seed=0,
        racing=RacingSpec(blocks=BLOCKS),
        population=8,
        layers=6,
        stacks=stacks,
    )
    return Search(plan, scorer=scorer, journal=journal, budget=Budget(20), observer=Quiet()).run()


def test_the_best_stack_starts_the_search() -> None:
    scorer, journal = Paths(merges=0.4), FakeJournal()
    outcome = search(scorer, journal)
    assert [(entry.name, position) for role, position, entry in journal.entries if role == "start"] == [
        ("a up to layer 2, then b", 0)
    ]
    probed = {recipe for recipe, _, phase in scorer.asked if phase == "stacks"}
    assert probed >= {recipe.hash for _, recipe in space().stacks(("a", "b"), 99)}
    assert outcome.stopped == "enough"


def test_a_run_begun_without_stacks_has_none() -> None:
    scorer, journal = Paths(merges=0.4), FakeJournal()
    search(scorer, journal, stacks=0)
    assert not [entry for role, _, entry in journal.entries if role == "start"]
    assert not [phase for _, _, phase in scorer.asked if phase == "stacks"]


def test_where_no_path_is_as_good_as_a_merge_the_search_ends_after_a_part_of_its_budget() -> None:
    scorer, journal = Paths(merges=1.5), FakeJournal()
    outcome = search(scorer, journal)
    assert outcome.stopped == "after 25% of the budget no path is as good as uniform average"
    asks = [number for kind, number in journal.events if kind == "ask"]
    assert 1 <= len(asks) < 20
    assert outcome.winner.recipe.groups[0].method == "passthrough"


def test_stacks_that_fail_are_no_start() -> None:
    everything = frozenset(recipe.hash for _, recipe in space().stacks(("a", "b"), 99))
    journal = FakeJournal()
    assert search(Paths(merges=0.4, fail=everything), journal).stopped == "enough"
    assert not [entry for role, _, entry in journal.entries if role == "start"]


def test_a_space_without_stacks_is_searched_as_it_is() -> None:
    journal = FakeJournal()
    assert search(Paths(merges=0.4), journal, paths=space(shortest=0.5, longest=0.9)).stopped == "enough"


@pytest.mark.parametrize(
    ("allowed", "items", "best", "stops"),
    [(40, 99, 0.1, False), (40, 100, 0.1, True), (40, 100, 0.5, False), (None, 999, 0.1, False)],
)
def test_when_a_search_is_given_up(allowed: float | None, items: int, best: float, *, stops: bool) -> None:
    budget = Budget(99, allowed)
    outlook = Outlook(
        budget, Quiet(), means={"stack": 0.0, "merge": 0.5, "a": 0.3}, stack="stack", full=10, population=4
    )
    outlook.generation_done(0, 1.0, best)
    found = outlook.stop_reason(generations=1, items=items, forecast=0, full=10, stale=0)
    assert found == ("after 25% of the budget no path is as good as merge" if stops else None)
    assert outlook.stop_reason(generations=0, items=items, forecast=0, full=10, stale=0) is None
    assert outlook.stop_reason(generations=99, items=0, forecast=0, full=10, stale=0) == "enough"
