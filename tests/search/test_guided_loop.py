"""The loop with the surrogate, on a scorer whose truth is known: better winners from as many items."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.special

from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores, joined
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss
from evomerge.merging.recipe import Recipe
from evomerge.search.generations import NOTHING_ADDED
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.racing import RacingSpec
from evomerge.search.spaces.space import Genome
from evomerge.search.surrogate.guide import CHECKED_EVERY, SETTLED, SurrogateSpec
from evomerge.search.warm_start import GradientSpec, WarmStart
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_merge_space import make

SPACE = make("task_arithmetic_layers")
BLOCKS, ITEMS = 4, 15
FULL = 2 * BLOCKS * ITEMS
BEST = np.random.default_rng(8).uniform(0.3, 0.8, SPACE.dimension)
_rng = np.random.default_rng(9)
HARD = {split: _rng.normal(0, 1.2, (2, BLOCKS, ITEMS)) for split in ("search", "select", "test")}
LEANINGS = _rng.normal(0, 0.8, (2, BLOCKS, ITEMS, SPACE.dimension))


def level(genome: Genome) -> float:
    """How far right answers are ahead; what a search is after."""
    return 2.5 - 4.0 * float(((genome - BEST) ** 2).sum())


class Landscape(FakeScorer):
    """Items differ in difficulty, and in what they think of every coordinate. Counts what it executes."""

    def __init__(self, fail_share: float = 0.0) -> None:
        super().__init__(fail_share=fail_share)
        self.executed: set[tuple[str, int]] = set()

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        wanted = (range(BLOCKS) if blocks is None else sorted(blocks)) if split == "search" else (0,)
        self.asked += [(recipe.hash, split, phase) for recipe in recipes]
        found: list[Scores | Failure] = []
        for recipe in recipes:
            failure = self._one(recipe, split, phase)
            if isinstance(failure, Failure):
                found.append(failure)
                continue
            if phase.startswith("generation"):
                self.executed |= {(recipe.hash, block) for block in wanted}
            found.append(joined([self._part(recipe, split, block) for block in wanted]))
        return found

    def _part(self, recipe: Recipe, split: Split, block: int) -> Scores:
        genome = SPACE.encode(recipe)
        sources = recipe.groups[0].sources
        tasks = []
        for index, task in enumerate(("a", "b")):
            hard = HARD[split][index, block]
            if genome is not None:
                margin = level(genome) + LEANINGS[index, block] @ (genome - BEST) - hard
            else:  # a specialist masters its task; everything else is as good as the base
                margin = (3.0 if sources == (task,) else -3.0) - hard
            right = (margin > 0).astype(float)
            tasks.append(
                TaskScores(task=task, metric=right, smooth=scipy.special.expit(margin), margin=margin)
            )
        return Scores(split=split, tasks=tuple(tasks), blocks=(block,))


class Level:
    """Gradients that lead nowhere: a descent ends where it begins."""

    not_after: float | None = None

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient:
        groups = tuple(
            {"weight": (0.0,) * len(np.ravel(group.parameters["weight"]))} for group in recipe.groups
        )
        return Gradient(loss=0.0, groups=groups, values={})


COLD, DESCENDED = WarmStart(), WarmStart(gradients=GradientSpec(steps=2))


class Peak(Landscape):
    """What generations find is worse than where they begin."""

    def _part(self, recipe: Recipe, split: Split, block: int) -> Scores:
        found = super()._part(recipe, split, block)
        if not any(recipe.hash == executed for executed, _ in self.executed):
            return found
        tasks = [
            TaskScores(task=t.task, metric=0 * t.metric, smooth=t.metric, margin=t.metric - 3) for t in found
        ]
        return Scores(split=split, tasks=tuple(tasks), blocks=(block,))


class Items(FakeBudget):
    """Stops before the generation that would take more items than there are."""

    def __init__(self, items: int) -> None:
        super().__init__(10**6)
        self.items = items

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int
    ) -> str | None:
        return "enough" if items + forecast > self.items else None


def search(
    surrogate: SurrogateSpec | None,
    *,
    seed: int,
    evaluations: int = 50,
    scorer: Landscape | None = None,
    racing: float = 1.0,
    optimizer: OptimizerSpec | None = None,
    warm: WarmStart = COLD,
    journal: FakeJournal | None = None,
    **objective: object,
) -> tuple[Outcome, FakeJournal]:
    journal = journal or FakeJournal()
    plan = SearchPlan(
        suite=SUITE,
        space=SPACE,
        template=SPACE.decode(np.full(SPACE.dimension, 0.5)),
        norms={"a": 1.0, "b": 1.0},
        optimizer=optimizer or OptimizerSpec(),
        objective=ObjectiveSpec.model_validate(objective),
        racing=RacingSpec(blocks=BLOCKS, keep=racing),
        surrogate=surrogate,
        finalists=3,
        seed=seed,
        warm=warm,
    )
    found = Search(
        plan,
        scorer=scorer or Landscape(),
        journal=journal,
        budget=Items(evaluations * FULL),
        observer=Quiet(),
        slopes=Level(),
    ).run()
    return found, journal


@functools.cache
def truth(guided: bool, seed: int) -> float:
    outcome, _ = search(SurrogateSpec() if guided else None, seed=seed, evaluations=35)
    genome = SPACE.encode(outcome.winner.recipe)
    assert genome is not None
    return level(genome)


def test_finds_better_winners_from_as_many_items() -> None:
    guided, alone = ([truth(g, seed) for seed in range(3)] for g in (True, False))
    assert np.median(guided) > np.median(alone) + 0.1
    assert sum(a > b for a, b in zip(guided, alone, strict=True)) == 3


def test_the_same_seed_is_the_same_search() -> None:
    first, second = Landscape(), Landscape()
    runs = [search(SurrogateSpec(), seed=1, evaluations=20, scorer=one) for one in (first, second)]
    assert first.asked == second.asked
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].guides == runs[1][1].guides
    assert [t.tobytes() for t in runs[0][1].tells] == [t.tobytes() for t in runs[1][1].tells]


def test_items_are_few_at_first_and_the_winner_has_met_the_most() -> None:
    scorer = Landscape()
    slow = OptimizerSpec(name="random", population=6)  # it soon finds nothing better, and needs more items
    outcome, journal = search(
        SurrogateSpec(blocks=1, share=0.0), seed=0, evaluations=40, scorer=scorer, optimizer=slow
    )
    blocks = [state.blocks for state in journal.guides]
    assert blocks[0] == 1
    assert blocks == sorted(blocks)
    assert blocks[-1] > 1
    met = {hash_: sum(1 for one, _ in scorer.executed if one == hash_) for hash_, _ in scorer.executed}
    finalists = [entry.recipe.hash for role, _, entry in journal.entries if role == "finalist"]
    assert outcome.winner.recipe.hash in finalists
    assert {met[hash_] for hash_ in finalists if hash_ in met} == {blocks[-1]}
    assert min(met.values()) == 1


def test_what_it_did_is_recorded_every_generation() -> None:
    _, journal = search(SurrogateSpec(share=0.25), seed=0, evaluations=20)
    assert len(journal.guides) == len(journal.tells)
    assert journal.guides[0].proposed == 0  # it has not seen any candidate of the optimizer yet
    sizes = [len(losses) for losses in journal.tells]
    assert journal.guides[-1].proposed == round(0.25 * sizes[-1])


def test_failures_and_races_do_not_stop_it() -> None:
    outcome, journal = search(
        SurrogateSpec(blocks=4), seed=0, evaluations=30, scorer=Landscape(fail_share=0.2), racing=0.25
    )
    genome = SPACE.encode(outcome.winner.recipe)
    assert genome is not None
    assert level(genome) > level(np.full(SPACE.dimension, 0.5)) + 0.4  # seeds 0-4 gain 0.56 to 0.81
    assert any((losses >= 1.0).any() for losses in journal.tells)


@pytest.mark.parametrize("objective", [{"depth": 0.1}, {"several": ["a", "b"]}])
def test_is_left_out_where_margins_do_not_make_the_loss(objective: dict[str, object]) -> None:
    _, journal = search(SurrogateSpec(front=False), seed=0, evaluations=5, **objective)
    assert journal.tells
    assert not journal.guides


@pytest.mark.parametrize("frugal", [True, False])
def test_a_search_ends_where_generations_add_nothing_to_gradients(frugal: bool) -> None:
    class Journal(FakeJournal):
        def record_frugal(self, worthwhile: bool) -> bool:
            return frugal and worthwhile  # a run of an older version has no such rule

    outcome, journal = search(
        SurrogateSpec(), seed=0, scorer=Peak(), evaluations=100, warm=DESCENDED, journal=Journal()
    )
    assert (outcome.stopped == NOTHING_ADDED) == frugal
    assert len(journal.tells) <= SETTLED * CHECKED_EVERY or not frugal


def test_a_search_goes_on_where_generations_add_something_or_there_were_no_gradients() -> None:
    for scorer, warm in ((Landscape(), DESCENDED), (Peak(), COLD)):
        outcome, _ = search(SurrogateSpec(), seed=0, scorer=scorer, warm=warm)
        assert outcome.stopped == "enough"
