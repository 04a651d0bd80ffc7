"""Budgets: whatever ends a search ends it in time, once, and in the middle of nothing that matters."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evomerge.delivery.progress import Silent
from evomerge.errors import ConfigError
from evomerge.running.budget import Budget, BudgetSpec, Stop, replaced
from evomerge.running.clock import Clock, moment
from evomerge.running.forecast import SAFETY
from evomerge.running.observers import Estimate
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import Job
from evomerge.schema import parse
from evomerge.search.plan import Outcome
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.running.nights import POPULATION, Simulated, Time, course, spend_night
from tests.search.test_guided_loop import BLOCKS, FULL

EVENING = moment("2026-11-22T18:00", 0.0)
LONGEST = (20.0 + 5.0 * BLOCKS) * 1.25


@contextmanager
def fresh() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def uneven(job: Job) -> float:
    """Seconds between 75 and 125 % of the usual, by the recipe."""
    return (20.0 + 5.0 * len(job.blocks)) * (0.75 + int(job.recipe.hash[:4], 16) / 131072)


def stored(folder: Path, *names: facts.Fact[object]) -> list[object]:
    with RunStore.read(folder) as store:
        return [fact.get(store) for fact in names]


@functools.cache
def whole_night(seed: int, generations: int, guided: bool) -> tuple[object, ...]:
    """What an unbroken run of so many generations finds: its course, its winner, what it spent."""
    with fresh() as folder:
        surrogate = SurrogateSpec(blocks=1) if guided else None
        budget = BudgetSpec(generations=generations)
        outcome = spend_night(folder, Simulated(Time()), budget, seed=seed, surrogate=surrogate)
        return course(folder), outcome.winner.recipe.hash, stored(folder, facts.SPENT)


# -- limits of the clock --------------------------------------------------------------------------------


def limited(kind: str, seconds: float, start: float) -> BudgetSpec:
    match kind:
        case "hours":
            return BudgetSpec(hours=seconds / 3600)
        case "cost":
            return BudgetSpec.model_validate({"cost": {"per_hour": 2.5, "max": 2.5 * seconds / 3600}})
        case _:
            return BudgetSpec(until=shown_exactly(start + seconds))


def shown_exactly(at: float) -> str:
    return datetime.fromtimestamp(at).isoformat()


@pytest.mark.end_to_end
@settings(max_examples=3, deadline=None)
@given(
    kind=st.sampled_from(["hours", "cost", "until"]),
    seconds=st.floats(1.0, 1.5),
    workers=st.integers(1, 4),
    guided=st.booleans(),
)
def test_the_clock_ends_the_search_early_enough_for_the_finish(
    kind: str, seconds: float, workers: int, guided: bool
) -> None:
    """No job of the search begins after its deadline, and the winner is there in time."""
    executor = Simulated(Time(EVENING), workers=workers, seconds=uneven)
    with fresh() as folder:
        spec = limited(kind, seconds * (1200 + 2200 / workers), EVENING)
        limit = spec.clock_limit(Clock(executor.time))
        assert limit is not None
        surrogate = SurrogateSpec(blocks=1) if guided else None
        outcome = spend_night(folder, executor, spec, surrogate=surrogate)
        assert str(limit) in outcome.stopped
        assert executor.time() - 1.0 <= limit.at
        asked = [job for _, job in executor.begun if job.not_after is not None]
        assert asked
        assert all(at < job.not_after for at, job in executor.begun if job.not_after is not None)
        begun = max(at for at, job in executor.begun if job.not_after is not None)
        kept = limit.at - asked[-1].not_after  # type: ignore[operator]
        assert 0 < kept < 0.5 * (limit.at - EVENING) + SAFETY * 20 * LONGEST
        assert begun > asked[-1].not_after - (POPULATION + 1) * LONGEST  # type: ignore[operator]
        (stop,) = stored(folder, facts.STOP)
        assert stop["reason"] == outcome.stopped  # type: ignore[index]


@pytest.mark.end_to_end
@settings(max_examples=1, deadline=None)
@given(seconds=st.integers(2000, 3000), seed=st.integers(0, 1), guided=st.booleans())
@example(seconds=2420, seed=0, guided=True)  # it ends right after the best met further items
def test_a_night_cut_short_and_gone_on_with_ends_like_an_unbroken_one(
    seconds: int, seed: int, guided: bool
) -> None:
    surrogate = SurrogateSpec(blocks=1) if guided else None
    with fresh() as folder:
        executor = Simulated(Time(EVENING), seconds=uneven)
        first = spend_night(
            folder, executor, BudgetSpec(hours=seconds / 3600), seed=seed, surrogate=surrogate
        )
        told = sum(losses is not None for _, losses in course(folder))
        # Nothing is done while nothing is raised, by the same winner.
        count = len(executor.begun)
        for again in (BudgetSpec(hours=seconds / 3600), BudgetSpec(hours=seconds / 3600, generations=500)):
            same = spend_night(folder, executor, again, seed=seed, surrogate=surrogate)
            assert (same.winner.recipe, same.stopped) == (first.winner.recipe, first.stopped)
            assert len(executor.begun) == count
        # Raised, it goes on.
        generations = told + 2
        last = spend_night(
            folder, executor, BudgetSpec(generations=generations), seed=seed, surrogate=surrogate
        )
        assert last.stopped == f"budget of {generations} generations used"
        found = (course(folder), last.winner.recipe.hash, stored(folder, facts.SPENT))
        assert found == whole_night(seed, generations, guided)


@pytest.mark.end_to_end
def test_what_was_scored_in_full_of_a_generation_cut_short_may_win(tmp_path: Path) -> None:
    """One candidate after another: the last generation is cut somewhere, and its best is not lost."""
    cut = chosen = 0
    for number in range(4):
        executor = Simulated(Time(EVENING), workers=1)
        folder = tmp_path / str(number)
        spend_night(folder, executor, BudgetSpec(hours=(3900 + 45 * number) / 3600))
        with RunStore.read(folder) as store:
            last = store.generations()[-1]
            finalists = {entry.recipe.hash for entry in store.entries("finalist")}
            done = [r for r in last.recipes if store.result(r, "search") is not None]
        if last.losses is None and done:
            cut += 1
            assert len(done) < POPULATION
            chosen += bool(finalists & set(done))
    assert cut >= 3
    assert chosen


def test_the_first_generation_always_runs(tmp_path: Path) -> None:
    outcome = spend_night(tmp_path / "run", Simulated(Time(EVENING)), BudgetSpec(hours=0.001))
    assert "budget of 0.001 hours used" in outcome.stopped
    assert [losses is not None for _, losses in course(tmp_path / "run")] == [True]


def test_a_time_of_day_is_meant_anew_by_every_session_until_it_ended_the_search(tmp_path: Path) -> None:
    class Killed(Silent):
        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            raise KeyboardInterrupt

    executor = Simulated(Time(EVENING), seconds=lambda job: 300.0 * len(job.blocks))
    nightly = BudgetSpec(until="08:00")
    with pytest.raises(KeyboardInterrupt):
        spend_night(tmp_path / "run", executor, nightly, observer=Killed())
    executor.time.at = EVENING + 86400
    outcome = spend_night(tmp_path / "run", executor, nightly)
    assert outcome.stopped.startswith("until 2026-11-24 08:00 (")
    assert EVENING + 86400 < executor.time() < EVENING + 86400 + 14 * 3600
    executor.time.at = EVENING + 2 * 86400
    count = len(executor.begun)
    assert spend_night(tmp_path / "run", executor, nightly) == outcome  # it is finished
    assert len(executor.begun) == count
    given = replaced(nightly.model_dump(), {"until": "08:00"}, executor.time())
    outcome = spend_night(tmp_path / "run", executor, BudgetSpec.model_validate(given))
    assert outcome.stopped.startswith("until 2026-11-25 08:00 (")
    assert len(executor.begun) > count


def test_hours_and_cost_count_all_sessions(tmp_path: Path) -> None:
    executor = Simulated(Time(EVENING))
    spend_night(tmp_path / "run", executor, BudgetSpec(generations=2))
    worked = (executor.time() - EVENING) / 3600
    executor.time.at += 86400
    began = executor.time()
    spend_night(tmp_path / "run", executor, BudgetSpec(hours=worked + 0.5))
    assert worked / 4 < (executor.time() - began) / 3600 <= 0.5


# -- limits that count ----------------------------------------------------------------------------------


@pytest.mark.end_to_end
@settings(max_examples=2, deadline=None)
@given(limit=st.integers(6, 24), guided=st.booleans(), keep=st.sampled_from([0.3, 1.0]))
def test_no_count_is_overshot_by_more_than_a_generation(limit: int, guided: bool, keep: float) -> None:
    surrogate = SurrogateSpec(blocks=1, share=0.0) if guided else None
    for budget in (BudgetSpec(evaluations=limit), BudgetSpec(items=limit * FULL)):
        with fresh() as folder:
            outcome = spend_night(folder, Simulated(Time()), budget, surrogate=surrogate, keep=keep)
            ((_, items),) = stored(folder, facts.SPENT)  # type: ignore[misc]
            assert "used" in outcome.stopped
            assert limit * FULL - 2 * POPULATION * FULL < items <= limit * FULL + POPULATION * FULL


def test_candidates_are_not_scored_again_on_more_items_beyond_the_budget(tmp_path: Path) -> None:
    """The refresh of the best when blocks are added is paid for like a generation."""
    spent: list[float] = []

    class Hears(Silent):
        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            spent.append(evaluations)

    def spend(name: str, limit: int) -> Outcome:
        budget = BudgetSpec(evaluations=limit)
        slow = SurrogateSpec(blocks=1, share=0.0)  # it soon finds nothing better, and needs more items
        executor = Simulated(Time())
        return spend_night(
            tmp_path / name, executor, budget, surrogate=slow, optimizer="random", observer=Hears()
        )

    spend("long", 40)
    steps = [after - before for before, after in itertools.pairwise([0.0, *spent])]
    grown = next(i for i, step in enumerate(steps) if step > 1.5 * POPULATION / BLOCKS)
    limit = math.ceil(spent[grown - 1] + POPULATION / BLOCKS)
    assert limit < spent[grown]
    outcome = spend("short", limit)
    assert outcome.stopped.startswith(f"budget of {limit} evaluations used")
    ((generation, items),) = stored(tmp_path / "short", facts.SPENT)  # type: ignore[misc]
    assert generation == grown
    assert items <= limit * FULL
    later = spend("short", 40)
    assert course(tmp_path / "short") == course(tmp_path / "long")
    with RunStore.read(tmp_path / "long") as store:
        assert store.entries("winner")[0] == later.winner


@pytest.mark.end_to_end
@pytest.mark.parametrize(("several", "patience"), [((), 3), (("a", "b"), 1)])
def test_patience_ends_every_session_at_the_same_generation(
    tmp_path: Path, several: tuple[str, ...], patience: int
) -> None:
    class Stops(Silent):
        def __init__(self, after: int) -> None:
            self.after = after

        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            if generation == self.after:
                raise KeyboardInterrupt

    def spend(name: str, patience: int, after: int = -1) -> Outcome:
        budget = BudgetSpec(patience=patience, generations=60)
        name_of = "nsga2" if several else "cma_es"
        executor = Simulated(Time())
        return spend_night(
            tmp_path / name, executor, budget, several=several, optimizer=name_of, observer=Stops(after)
        )

    outcome = spend("whole", patience)
    assert outcome.stopped == f"nothing better in {patience} generation{'s' if patience > 1 else ''}"
    told = len(course(tmp_path / "whole"))
    assert patience < told < 60
    for after in sorted({0, told - 2, told - 1}):
        with pytest.raises(KeyboardInterrupt):
            spend("cut", patience, after)
    assert spend("cut", patience) == outcome
    assert course(tmp_path / "cut") == course(tmp_path / "whole")
    spend("cut", patience + 1)
    assert len(course(tmp_path / "cut")) > told


# -- what is expected -----------------------------------------------------------------------------------


class Expects(Silent):
    """Keeps all estimates."""

    def __init__(self) -> None:
        self.seen: list[Estimate] = []

    def expected(self, estimate: Estimate) -> None:
        self.seen.append(estimate)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "limits",
    [{"evaluations": 60}, {"items": 60 * FULL}, {"generations": 10}, {"hours": 1.0}, {"until": "19:00"}],
    ids=lambda limits: next(iter(limits)),
)
def test_the_end_and_the_cost_are_estimated_from_the_first_generation_on(
    tmp_path: Path, limits: dict[str, object]
) -> None:
    executor, observer = Simulated(Time(EVENING), seconds=uneven), Expects()
    budget = BudgetSpec.model_validate({**limits, "cost": {"per_hour": 3.0}})
    spend_night(tmp_path / "run", executor, budget, observer=observer)
    ended = executor.time() - 1.0
    assert len(observer.seen) == len([g for g in course(tmp_path / "run") if g[1] is not None])
    for estimate in observer.seen:
        assert estimate.ends is not None
        assert estimate.cost is not None
        assert estimate.spent == pytest.approx(3.0 * (estimate.made - EVENING) / 3600)
        assert estimate.ends - EVENING == pytest.approx(ended - EVENING, rel=0.25)
        assert estimate.cost == pytest.approx(3.0 * (estimate.ends - EVENING) / 3600)
    ((clock),) = stored(tmp_path / "run", facts.CLOCK)
    assert clock["estimate"] == observer.seen[-1].as_data()  # type: ignore[index]
    observer.seen.clear()
    spend_night(tmp_path / "run", executor, budget, observer=observer)
    assert not observer.seen  # a replay has no pace


# -- the parts ------------------------------------------------------------------------------------------


def test_whichever_limit_comes_first(tmp_path: Path) -> None:
    time = Time(EVENING)
    clock = Clock(time, earlier=1.0)
    spec = BudgetSpec.model_validate(
        {"hours": 5, "until": "23:00", "cost": {"per_hour": 2, "max": 7}, "generations": 9}
    )
    limit = spec.clock_limit(clock)
    assert limit is not None
    assert (limit.name, limit.at) == ("cost", EVENING + 2.5 * 3600)
    seen: list[Stop] = []
    budget = Budget(spec, clock, reserve=lambda: 600.0, record=seen.append)
    assert budget.timed
    assert budget.deadline() == limit.at - 600

    def reason(generations: int) -> str | None:
        return budget.stop_reason(generations=generations, items=0, forecast=0, full=1)

    assert reason(3) is None
    assert reason(9) == "budget of 9 generations used"
    time.at = limit.at - 600
    assert reason(0) is None
    assert reason(4) == "budget of 7 at 2 per hour used (10 min kept for selection and test)"
    (stop,) = seen
    assert (stop.limit, stop.at, stop.generations) == ("cost", 3.5, 4)
    for changes, holds in (
        ({}, True),
        ({"hours": 50}, True),
        ({"cost": {"per_hour": 2, "max": 8}}, False),
        ({"cost": {"per_hour": 1, "max": 7}}, False),
        ({"cost": None}, False),
        ({"cost": {"per_hour": 2, "max": 6}}, True),
    ):
        given = BudgetSpec.model_validate(spec.model_dump() | changes)
        assert stop.holds(given, time()) is holds, changes


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"until": 1110}, 'in quotes ("08:00")'),
        ({"until": "8"}, "a time of day"),
        ({"until": "25:00"}, "a time of day"),
        ({"until": "2026-13-01T08:00"}, "a time of day"),
        ({"until": "tomorrow"}, "a time of day"),
        ({"until": "2026-11-23"}, "a time of day"),
        ({"cost": {"max": 3}}, "missing key 'budget.cost.per_hour'"),
        ({"cost": {"per_hour": 3}}, "needs at least one of"),
        ({"cost": {"per_hour": 0, "max": 3}}, "budget.cost.per_hour"),
        ({"patience": 0}, "patience"),
        ({"failures": 9}, "needs at least one of"),
    ],
)
def test_mistakes_in_a_budget(limits: dict[str, object], message: str) -> None:
    from evomerge.schema import Strict

    class Config(Strict):
        budget: BudgetSpec

    with pytest.raises(ConfigError) as error:
        parse(Config, {"budget": limits}, "config.yaml")
    assert message in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    after=st.floats(1.5e9, 2.2e9), minutes=st.integers(0, 1439), seconds=st.integers(0, 59) | st.just(None)
)
def test_a_time_of_day_is_its_next_occurrence(after: float, minutes: int, seconds: int | None) -> None:
    of_day = f"{minutes // 60:02}:{minutes % 60:02}" + ("" if seconds is None else f":{seconds:02}")
    found = moment(of_day, after)
    assert 0 < found - after <= 25 * 3600
    assert datetime.fromtimestamp(found).strftime("%H:%M:%S").startswith(of_day)
    assert moment(of_day, found - 1e-3) == found


def test_a_clock_that_is_set_costs_no_hours() -> None:
    wall, steady = [1000.0], [50.0]
    clock = Clock(lambda: wall[0], steady=lambda: steady[0], earlier=1.0)
    steady[0] += 3600
    for step in (0, 86_400, -7200):  # as it should be, set forward by a day, set back by two hours
        wall[0] = 4600.0 + step
        assert clock.hours == pytest.approx(2.0)
        assert clock.after(3.0) - clock.now() == pytest.approx(3600)
