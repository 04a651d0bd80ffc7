"""Several objectives with the surrogate, on a scorer whose truth is known: more front from fewer items."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.special

from evomerge.evaluation.scores import Scores, Split, TaskScores
from evomerge.merging.recipe import Recipe
from evomerge.search import pareto
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.search.fakes import FakeJournal
from tests.search.test_guided_loop import BLOCKS, FULL, HARD, ITEMS, SPACE, Landscape, search

_rng = np.random.default_rng(5)
BESTS = {task: _rng.uniform(0.2, 0.8, SPACE.dimension) for task in ("a", "b")}
LEANINGS = _rng.normal(0, 0.5, (2, BLOCKS, ITEMS, SPACE.dimension))


class Torn(Landscape):
    """Each task has a best place of its own, so that there is a front between the two."""

    def _part(self, recipe: Recipe, split: Split, block: int) -> Scores:
        genome = SPACE.encode(recipe)
        sources = recipe.groups[0].sources
        tasks = []
        for index, task in enumerate(("a", "b")):
            margin = (3.0 if sources == (task,) else -3.0) - HARD[split][index, block]
            if genome is not None and len(sources) > 1:
                away = genome - BESTS[task]
                level = 2.5 - 3.0 * float((away**2).sum())
                margin = level + LEANINGS[index, block] @ away - HARD[split][index, block]
            right = (margin > 0).astype(float)
            tasks.append(
                TaskScores(task=task, metric=right, smooth=scipy.special.expit(margin), margin=margin)
            )
        return Scores(split=split, tasks=tuple(tasks), blocks=(block,))


@functools.cache
def covered(guided: bool, seed: int, evaluations: int) -> float:
    _, journal = run(guided, seed, evaluations)
    recipes = {e.recipe.hash: e.recipe for role, _, e in journal.entries if role == "front"}
    points = []
    for recipe in recipes.values():
        (scores,) = Torn().score([recipe], "test", "truth")
        assert isinstance(scores, Scores)
        points.append([-scores[task].mean for task in ("a", "b")])
    return pareto.hypervolume(np.array(points), np.zeros(2))


def run(guided: bool, seed: int, evaluations: int, **objective: object) -> tuple[Torn, FakeJournal]:
    scorer = Torn()
    _, journal = search(
        SurrogateSpec() if guided else None,
        seed=seed,
        evaluations=evaluations,
        scorer=scorer,
        several=("a", "b"),
        optimizer=OptimizerSpec(),
        **objective,
    )
    return scorer, journal


def test_covers_as_much_as_five_times_the_evaluations_without() -> None:
    assert covered(True, 0, 40) > covered(False, 0, 200)


def test_the_front_is_compared_on_all_items_within_the_budget() -> None:
    scorer, journal = run(True, 0, 24)
    front = {entry.recipe.hash for role, _, entry in journal.entries if role == "front"}
    assert len(front) > 2
    for recipe in front:
        assert {block for hash_, block in scorer.executed if hash_ == recipe} == set(range(BLOCKS))
    assert journal.spent <= 24 * FULL
    assert journal.guides[-1].proposed > 0


def test_the_same_seed_is_the_same_front() -> None:
    runs = [run(True, 1, 16) for _ in range(2)]
    assert runs[0][0].asked == runs[1][0].asked
    assert [t.tobytes() for t in runs[0][1].tells] == [t.tobytes() for t in runs[1][1].tells]


@pytest.mark.parametrize(
    "objective",
    [
        {"several": ["worst", "mean"]},
        {"several": ["mean", {"a": 1.0}, {"b": 1.0}]},
        {"several": ["mean", "a"], "constraints": {"tasks": 0.2}},
    ],
)
def test_guides_any_objectives_that_items_decide(objective: dict[str, object]) -> None:
    _, journal = search(SurrogateSpec(), seed=0, evaluations=24, scorer=Torn(), **objective)
    assert journal.guides[-1].proposed > 0
