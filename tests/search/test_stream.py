"""The search without generations: what it finds, that it repeats itself, that workers have work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec, create
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.ports import OutOfTime
from evomerge.search.racing import RacingSpec
from evomerge.search.spaces.space import Coordinate
from evomerge.search.stream import pending
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, Quiet
from tests.search.test_guided_loop import BLOCKS, FULL, SPACE, Items, Landscape, level

NAMES = ("cma_es", "catcma", "tpe", "random", "sobol")


class Interrupted(Exception):
    """The process was killed."""


class Crew(Landscape):
    """Workers that score one candidate each, in an order that `seed` draws, or as `order` (hashes) says.

    journal: where arrivals are recorded. die_at: how many arrivals it is interrupted after. busy: how many
    candidates were submitted each time one was waited for.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        journal: FakeJournal | None = None,
        seed: int = 0,
        order: Sequence[str] = (),
        die_at: int | None = None,
        death: type[Exception] = Interrupted,
        fail_share: float = 0.0,
    ) -> None:
        super().__init__(fail_share=fail_share)
        self.workers, self.order, self.die_at, self.death = workers, order, die_at, death
        self.journal = FakeJournal() if journal is None else journal
        self.rng = np.random.default_rng(seed)
        self.busy: list[int] = []

    def next(self) -> tuple[str, Scores | Failure] | None:
        self.busy.append(len(self.submitted))
        arrived = len(self.journal.order)
        if arrived == self.die_at:
            raise self.death
        hashes = [recipe.hash for _, recipe, _ in self.submitted]
        due = int(self.rng.integers(min(self.workers, len(hashes))))
        if arrived < len(self.order) and self.order[arrived] in hashes:
            due = hashes.index(self.order[arrived])
        self.pick = lambda _: due
        return super().next()


def search(
    crew: Crew,
    *,
    seed: int = 0,
    evaluations: int = 20,
    guided: bool = True,
    budget: FakeBudget | None = None,
    **optimizer: object,
) -> Outcome:
    plan = SearchPlan(
        suite=SUITE,
        space=SPACE,
        template=SPACE.decode(np.full(SPACE.dimension, 0.5)),
        norms={"a": 1.0, "b": 1.0},
        optimizer=OptimizerSpec.model_validate({"async": True, **optimizer}),
        objective=ObjectiveSpec(),
        racing=RacingSpec(blocks=BLOCKS),
        surrogate=SurrogateSpec(blocks=1) if guided else None,
        finalists=3,
        seed=seed,
    )
    return Search(
        plan,
        scorer=crew,
        journal=crew.journal,
        budget=budget or Items(evaluations * FULL),
        observer=Quiet(),
        workers=crew.workers,
    ).run()


def going_on(journal: FakeJournal) -> FakeJournal:
    """The journal of the next session."""
    after = FakeJournal()
    after.stored, after.most_proposed = journal.order, journal.most_proposed
    return after


def all_of(journal: FakeJournal) -> tuple[list[bytes], list[str]]:
    return [losses.tobytes() for losses in journal.tells], journal.order


def truth(recipe: Recipe) -> float:
    genome = SPACE.encode(recipe)
    assert genome is not None
    return level(genome)


def test_finds_what_a_search_of_generations_finds() -> None:
    for workers in (1, 4):
        found = [truth(search(Crew(workers), seed=seed).winner.recipe) for seed in range(2)]
        assert min(found) > 2.2  # the best there is has 2.5, the best hand-made merge less than 2


def test_there_is_always_a_candidate_for_every_worker_until_the_budget_is_spent() -> None:
    crew = Crew(8)
    search(crew, evaluations=30)
    last = crew.busy.index(next(count for count in crew.busy if count < 8))
    assert last > 50
    assert crew.busy[last:] == list(range(7, 0, -1))  # those under way when the budget was spent
    assert pending(8) - 1 < min(crew.busy[: last - 10])


@pytest.mark.parametrize("workers", [1, 8])
def test_it_spends_its_budget_and_no_more(workers: int) -> None:
    crew = Crew(workers)
    search(crew, evaluations=20)
    assert 18 < len(crew.executed) / BLOCKS <= 20


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_interrupted_anywhere_and_gone_on_it_ends_in_the_same_bits(workers: int) -> None:
    whole = Crew(workers, seed=3)
    outcome, order = search(whole), whole.journal.order
    assert len(order) > 40
    for moment in (0, 11, 30, len(order) - 2):
        first = Crew(workers, order=order, die_at=moment)
        with pytest.raises(Interrupted):
            search(first)
        assert first.journal.order == order[:moment]
        again = Crew(workers, order=order, journal=going_on(first.journal))
        assert search(again) == outcome
        assert all_of(again.journal) == all_of(whole.journal)


def test_a_finished_search_repeats_itself_from_its_order_alone() -> None:
    first, other = Crew(6, seed=1), Crew(6, seed=2)
    outcome = search(first)
    again = Crew(6, seed=2, journal=going_on(first.journal))
    assert search(again) == outcome
    assert all_of(again.journal) == all_of(first.journal)
    assert set(again.busy) == {1}  # scored again, one by one: this scorer stores nothing
    search(other)
    assert other.journal.order != first.journal.order


def test_with_a_larger_budget_it_goes_on_as_if_it_had_had_it() -> None:
    short, long = Crew(), Crew()
    search(short, evaluations=8)
    outcome = search(long, evaluations=12)
    longer = Crew(journal=going_on(short.journal))
    assert search(longer, evaluations=12) == outcome
    assert all_of(longer.journal) == all_of(long.journal)


def test_what_the_clock_cuts_off_is_left_out() -> None:
    class Timed(FakeBudget):
        def out_of_time(self, generations: int, *, cut: bool) -> str:
            return f"out of time after {generations}, {cut}"

    crew = Crew(4, die_at=30, death=OutOfTime)
    outcome = search(crew, guided=False, budget=Timed(10**6), population=8)
    assert outcome.stopped == "out of time after 3, True"
    assert len(crew.journal.order) == 30
    assert len(crew.journal.tells) == 3


@pytest.mark.parametrize("workers", [1, 6])
def test_a_number_of_generations_is_kept(workers: int) -> None:
    crew = Crew(workers)
    assert search(crew, budget=FakeBudget(3), population=10).stopped == "enough"
    assert [len(losses) for losses in crew.journal.tells] == [10, 10, 10]
    assert len(crew.journal.order) == 30


def test_failures_get_one_defined_loss_and_the_search_goes_on() -> None:
    crew = Crew(4, fail_share=0.3)
    search(crew)
    assert np.isfinite(np.concatenate(crew.journal.tells)).all()
    assert len(crew.journal.tells) > 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guided", [False, True])
def test_every_optimizer_that_is_offered_searches_so(name: str, guided: bool) -> None:
    first, again = Crew(3), Crew(3)
    for crew in (first, again):
        search(crew, evaluations=8 if guided else 20, guided=guided, name=name, population=6)
    assert len(first.journal.tells) > 2
    assert all_of(first.journal) == all_of(again.journal)


@pytest.mark.parametrize(
    ("name", "objectives", "message"),
    [
        ("auto", 2, "it is for one objective, and there are 2"),
        ("catcma", 2, "it is for one objective, and there are 2"),
        ("nsga2", 1, "nsga2 learns from whole generations only"),
        ("nsga3", 1, "nsga3 learns from whole generations only"),
    ],
)
def test_what_it_can_not_do_is_refused(name: str, objectives: int, message: str) -> None:
    spec = OptimizerSpec.model_validate({"name": name, "async": True})
    with pytest.raises(ConfigError, match=message) as error:
        create(
            spec,
            coordinates=[Coordinate()] * 3,
            objectives=objectives,
            starts=[np.full(3, 0.5)],
            seed=np.random.SeedSequence(0),
        )
    assert "leave optimizer.async out" in str(error.value)


def test_runs_without_it_keep_their_config() -> None:
    assert "async" not in str(OptimizerSpec().model_dump())
    written = OptimizerSpec.model_validate({"async": True}).model_dump(mode="json")
    assert written["async"] is True
    assert OptimizerSpec.model_validate(written).async_
