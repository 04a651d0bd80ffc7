"""The winner of a front: never below what the best hand-made merge has, if a member of the front is not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, TaskScores
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search.compromise import Compromise
from evomerge.search.objective import Objective, ObjectiveSpec
from tests.search.fakes import SUITE

ITEMS = 400


def scored(a: float, b: float) -> Scores:
    """A model with so many of the items right, always the same first ones."""
    places = (np.arange(ITEMS) + 0.5) / ITEMS
    tasks = [TaskScores(task=t, metric=(places < share).astype(float)) for t, share in (("a", a), ("b", b))]
    return Scores(split="select", tasks=tuple(tasks))


def recipe(number: int) -> Recipe:
    group = TensorGroup(method="linear", sources=("a",))
    return Recipe(models={"base": "base", "a": "a"}, base="base", groups=(group,), seed=number)


BASE, PARENTS = scored(0.0, 0.0), {"a": scored(1.0, 0.02), "b": scored(0.02, 1.0)}
MERGES = [scored(0.4, 0.4), scored(0.2, 0.3)]


def chosen(members: list[tuple[float, float]], merges: list[Scores] = MERGES, **spec: object) -> int:
    objective = Objective(
        ObjectiveSpec.model_validate({"several": ["a", "b"], **spec}),
        Normaliser(SUITE, base=BASE, parents=PARENTS),
    )
    unsearched = [(recipe(-1 - i), s) for i, s in enumerate([BASE, *PARENTS.values(), *merges])]
    compromise = Compromise(objective, unsearched, merges)
    return compromise.best([(recipe(i), scored(*member)) for i, member in enumerate(members)])


@pytest.mark.parametrize("spec", [{}, {"several": ["a", "mean"]}, {"several": ["mean", "worst"]}])
def test_a_copy_of_a_parent_is_no_compromise(spec: Mapping[str, object]) -> None:
    assert chosen([(1.0, 0.02), (0.45, 0.42), (0.02, 1.0)], **spec) == 1


def test_no_skill_falls_below_the_best_merge() -> None:
    # The first has the best mean, but has given up a skill.
    assert chosen([(0.95, 0.3), (0.42, 0.41)]) == 1
    assert chosen([(0.95, 0.39), (0.45, 0.385)]) == 0  # within sampling error


def test_the_mean_does_not_fall_below_the_best_merge() -> None:
    # Each skill is within sampling error of the merge, but the mean is below it.
    assert chosen([(0.39, 0.39), (0.385, 0.42)]) == 1


def test_where_no_member_keeps_everything_the_one_that_misses_least_is_chosen() -> None:
    assert chosen([(0.9, 0.1), (0.7, 0.33), (0.3, 0.3)]) == 1


def test_other_members_do_not_move_it() -> None:
    members = [(0.5, 0.6), (0.55, 0.5), (0.7, 0.4)]
    for extremes in ([], [(1.0, 0.0)], [(0.0, 1.0)], [(1.0, 0.0), (0.0, 1.0)]):
        assert chosen([*members, *extremes]) == 0


def test_constraints_come_first() -> None:
    assert chosen([(0.5, 0.5), (0.8, 0.3)], constraints={"tasks": {"a": 0.7}}) == 1


def test_without_hand_made_merges_it_is_the_knee() -> None:
    assert chosen([(0.9, 0.1), (0.3, 0.3)], merges=[]) == 1
