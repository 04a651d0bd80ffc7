"""The scheduler: whatever it does with pieces, order and spare work, results are those of plain execution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge import compose
from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores, joined
from evomerge.running import executors
from evomerge.running.batches import Batches
from evomerge.running.executors import ExecutorSpec, devices, resolve, worker_count
from evomerge.running.executors.contract import Orders
from evomerge.running.schedule import Foresight, Scheduler, _Pending, _whole
from evomerge.running.store import RunStore, Timing
from evomerge.running.worker import Job, NotBegun, Result
from tests.running.fakes import recipe, spec


def part(job: Job, block: int) -> Scores:
    value = job.recipe.seed + block / 64
    return Scores(split=job.split, tasks=(TaskScores(task="t", metric=np.array([value])),), blocks=(block,))


def answer(job: Job, *, failing: frozenset[tuple[int, int]], merge: float) -> Result:
    """What a worker answers: the first failing block is the job's failure."""
    for block in job.blocks:
        if (job.recipe.seed, block) in failing:
            return Result(job=job, outcome=Failure(kind="error", reason=f"block {block}"))
    parts = tuple(part(job, block) for block in job.blocks)
    timing = Timing(total=merge + len(parts), merge=merge, forward=len(parts), worker="0")
    return Result(job=job, outcome=joined(parts), timing=timing, parts=parts)


class Crew:
    """An executor of `workers`. given: all jobs handed out, in order.

    seed: of the order in which they finish; None for that in which they began.
    """

    def __init__(
        self,
        workers: int,
        *,
        seed: int | None = None,
        merge: float = 0.1,
        failing: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.workers, self.merge, self.failing = workers, merge, frozenset(failing)
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.given: list[Job] = []
        self.busy: list[tuple[int, Job]] = []
        self.last: list[Job | None] = [None] * workers

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        assert isinstance(jobs, Orders)
        while True:
            for worker in set(range(self.workers)) - {worker for worker, _ in self.busy}:
                next_job = jobs.after(self.last[worker])
                if next_job is not None:
                    assert isinstance(next_job, Job)
                    self.given.append(next_job)
                    self.busy.append((worker, next_job))
            if not self.busy:
                return
            chosen = 0 if self.rng is None else int(self.rng.integers(len(self.busy)))
            worker, done = self.busy.pop(chosen)
            last, self.last[worker] = self.last[worker], done
            warm = last is not None and last.recipe is done.recipe
            yield answer(done, failing=self.failing, merge=0.0 if warm else self.merge)

    def close(self) -> None: ...


def job(number: int, blocks: int = 1, split: Split = "search") -> Job:
    return Job(recipe=recipe(number), split=split, blocks=tuple(range(blocks)))


def same(one: Result, other: Result) -> bool:
    if isinstance(one.outcome, Failure) or isinstance(other.outcome, Failure):
        return one.outcome == other.outcome
    assert isinstance(one.outcome, Scores)
    assert isinstance(other.outcome, Scores)
    return one.outcome.same_as(other.outcome) and all(
        a.same_as(b) for a, b in zip(one.parts, other.parts, strict=True)
    )


@given(
    batches=st.lists(
        st.lists(
            st.permutations(range(6)).flatmap(lambda p: st.integers(1, 6).map(lambda n: p[:n])), max_size=7
        ),
        min_size=1,
        max_size=4,
    ),
    workers=st.integers(1, 5),
    merge=st.sampled_from([0.0, 0.3, 5.0]),
    failing=st.sets(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6),
    seed=st.integers(0, 99),
)
def test_every_job_is_answered_once_as_if_it_had_been_run_alone(
    batches: list[list[list[int]]],
    workers: int,
    merge: float,
    failing: set[tuple[int, int]],
    seed: int,
) -> None:
    scheduler = Scheduler(Crew(workers, seed=seed, merge=merge, failing=failing))
    kept: list[Result] = []
    spare = [job(number, 2, "test") for number in range(20, 26)]
    scheduler.later(spare, kept.append)
    number = 0
    for batch in batches:
        asked = []
        for blocks in batch:
            asked.append(Job(recipe=recipe(number), split="search", blocks=tuple(blocks)))
            number += 1
        found = {result.job.recipe.seed: result for result in scheduler.run(asked)}
        assert len(found) == len(asked)
        for each in asked:
            alone = answer(each, failing=frozenset(failing), merge=merge)
            assert found[each.recipe.seed].job is each
            assert same(found[each.recipe.seed], alone)
    taken = {result.job.recipe.seed for result in kept}
    rest = [each for each in spare if each.recipe.seed not in taken]
    found = {result.job.recipe.seed: result for result in scheduler.run(rest)}
    assert set(found) == {each.recipe.seed for each in rest}
    for each in spare:
        alone = answer(each, failing=frozenset(failing), merge=merge)
        one = next((r for r in (*kept, *found.values()) if r.job.recipe.seed == each.recipe.seed), None)
        assert one is not None
        assert same(one, alone)
        assert each.recipe.seed not in taken or isinstance(alone.outcome, Scores)


@pytest.mark.parametrize(
    ("merge", "help_", "merges"),
    [
        (0.1, 1, 2),  # an eighth of a candidate is worth a merge
        (0.9, 2, 2),
        (1.9, 4, 2),
        (9.0, 8, 1),  # two workers merging would take longer
    ],
)
def test_others_help_with_the_blocks_of_a_candidate_where_that_pays(
    merge: float, help_: int, merges: int
) -> None:
    crew = Crew(2, merge=merge)
    scheduler = Scheduler(crew)
    list(scheduler.run([job(1, 8)]))
    assert [len(each.blocks) for each in crew.given] == [8]  # nothing is known of merging yet
    crew.given.clear()
    (result,) = scheduler.run([job(2, 8)])
    sizes = [len(each.blocks) for each in crew.given]
    assert sum(sizes) == 8
    assert max(sizes) == help_
    assert result.timing is not None
    assert result.timing.merge == pytest.approx(merge * merges)
    assert result.timing.total == pytest.approx(8 + merge * merges)


def test_a_worker_goes_on_with_the_candidate_whose_weights_it_has() -> None:
    crew = Crew(2)
    scheduler = Scheduler(crew)
    list(scheduler.run([job(0, 8)]))
    results = list(scheduler.run([job(number, 8) for number in range(1, 7)]))
    merges = sum(result.timing.merge for result in results if result.timing is not None) / crew.merge
    assert round(merges) <= 7  # one each, and a little help with the last


def test_help_comes_to_a_candidate_that_all_would_wait_for() -> None:
    class Slow(Crew):
        """One candidate takes a hundred times as long."""

        def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
            for result in super().run(jobs):
                assert result.timing is not None
                if result.job.recipe.seed == 1:
                    timing = dataclasses.replace(result.timing, total=100.0 * len(result.parts))
                    result = dataclasses.replace(result, timing=timing)
                yield result

    crew = Slow(2)
    scheduler = Scheduler(crew)
    list(scheduler.run([job(0, 8)]))
    crew.given.clear()
    list(scheduler.run([job(number, 8) for number in range(1, 7)]))
    order = [each.recipe.seed for each in crew.given]
    assert order[:4] == [1, 2, 1, 1]  # known after its first block; then both work on it
    assert order.index(3) > max(i for i, number in enumerate(order) if number == 1) - 2


@given(
    arrivals=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    workers=st.integers(1, 5),
    failing=st.sets(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=6),
    seed=st.integers(0, 99),
)
def test_jobs_submitted_one_by_one_are_answered_once_as_if_run_alone(
    arrivals: list[int], workers: int, failing: set[tuple[int, int]], seed: int
) -> None:
    scheduler = Scheduler(Crew(workers, seed=seed, failing=failing))
    jobs = {number: job(number, blocks) for number, blocks in enumerate(arrivals)}
    waiting = list(jobs.values())
    found: dict[int, Result] = {}
    scheduler.submit(waiting[:3])
    waiting = waiting[3:]
    while (result := scheduler.next()) is not None:
        assert result.job.recipe.seed not in found
        found[result.job.recipe.seed] = result
        scheduler.submit(waiting[:1], first=len(waiting) % 2 == 0)
        waiting = waiting[1:]
    assert found.keys() == jobs.keys()
    for number, result in found.items():
        assert same(result, answer(jobs[number], failing=frozenset(failing), merge=0.1))
    assert [r.job.recipe.seed for r in scheduler.run([job(99)])] == [99]  # and batches go on


def test_where_jobs_come_one_by_one_a_worker_stays_with_its_candidate_while_there_are_others() -> None:
    crew = Crew(3, seed=0)
    scheduler = Scheduler(crew)
    list(scheduler.run([job(0, 8)]))
    scheduler.submit([job(number, 8) for number in range(1, 5)])
    merges = 0.0
    for number in range(5, 25):
        result = scheduler.next()
        assert result is not None
        assert result.timing is not None
        merges += result.timing.merge
        scheduler.submit([job(number, 8)])
    assert round(merges / crew.merge) == 20  # one for each


def test_a_candidate_whose_worker_died_is_not_left_behind() -> None:
    scheduler = Scheduler(Crew(2))
    list(scheduler.run([job(0, 8)]))
    scheduler._executor = Crew(2)
    scheduler.submit([job(number, 8) for number in range(1, 30)])
    begun = scheduler.after(None)
    assert isinstance(begun, Job)
    scheduler._take(answer(begun, failing=frozenset(), merge=0.1))  # and its worker is never heard of again
    follows = scheduler.after(None)
    assert follows is not None
    assert follows.recipe is begun.recipe


def test_the_longest_come_first() -> None:
    crew = Crew(1)
    list(Scheduler(crew).run([job(1, 2), job(2, 6), job(3, 4), job(4, 6)]))
    assert [each.recipe.seed for each in crew.given] == [2, 4, 3, 1]


def test_spare_work_waits_for_idle_workers_and_nobody_waits_for_it() -> None:
    crew = Crew(3)
    scheduler = Scheduler(crew)
    kept: list[Result] = []
    scheduler.later([job(number, split="test") for number in (91, 92, 93, 94)], kept.append)
    results = list(scheduler.run([job(1), job(2)]))
    assert [each.recipe.seed for each in crew.given[:3]] == [1, 2, 91]
    assert {result.job.recipe.seed for result in results} == {1, 2}
    assert len(crew.busy) == 2  # the spare ones go on
    crew.given.clear()
    list(scheduler.run([job(number) for number in (3, 4, 5)]))
    assert [each.recipe.seed for each in crew.given][:3] == [3, 4, 5]


def test_spare_work_under_way_is_waited_for_and_not_done_twice() -> None:
    crew = Crew(2)
    scheduler = Scheduler(crew)
    kept: list[Result] = []
    scheduler.later([job(91, split="test"), job(92, split="test")], kept.append)
    assert len(list(scheduler.run([job(1)]))) == 1
    assert [each.recipe.seed for _, each in crew.busy] == [91]
    found = list(scheduler.run([job(91, split="test"), job(92, split="test")]))
    assert {result.job.recipe.seed for result in found} == {91, 92}
    assert [each.recipe.seed for each in crew.given] == [1, 91, 92]
    assert kept == []


def test_spare_work_that_fails_is_forgotten_and_met_again(tmp_path: Path) -> None:
    crew = Crew(2, failing=[(91, 0)])
    scheduler = Scheduler(crew)
    with RunStore.create(tmp_path, {}) as store:
        foresee = Foresight(store, scheduler, Batches(store, 8))
        foresee([recipe(91), recipe(92)], "test")
        foresee([recipe(91)], "test")  # said twice, done once
        for number in range(8):
            list(scheduler.run([job(number)]))
        assert store.failures() == []
        assert store.result(recipe(91).hash, "test") is None
        assert isinstance(store.result(recipe(92).hash, "test"), Scores)
        (again,) = scheduler.run([job(91, split="test")])
        assert again.outcome == Failure(kind="error", reason="block 0")
        foresee([recipe(92)], "test")  # it is there
        assert not list(scheduler.run([]))
    assert sorted(each.recipe.seed for each in crew.given if each.split == "test") == [91, 91, 92]


def test_spare_work_in_batches_that_were_halved_since_is_not_kept(tmp_path: Path) -> None:
    scheduler = Scheduler(Crew(2))
    with RunStore.create(tmp_path, {}) as store:
        batches = Batches(store, 8)
        Foresight(store, scheduler, batches)([recipe(91)], "test")
        batches.halve("test", {0: []}, "selection")
        for number in range(4):
            list(scheduler.run([job(number)]))
        assert store.result(recipe(91).hash, "test") is None
        Foresight(store, scheduler, Batches(store, 8))([recipe(91)], "test")
        for number in range(4, 8):
            list(scheduler.run([job(number)]))
        assert isinstance(store.result(recipe(91).hash, "test"), Scores)


def test_pieces_that_came_too_late_keep_what_the_others_scored() -> None:
    crew = Crew(1)
    scheduler = Scheduler(crew)
    whole = job(1, blocks=2)
    scored, late = whole.part([0]), whole.part([1])
    wanted = _Pending(job=whole, left=())
    wanted.pieces = [Result(job=late, outcome=NotBegun()), *scheduler.run([scored])]
    found = _whole(wanted)
    assert isinstance(found.outcome, NotBegun)
    assert [part.blocks for part in found.parts] == [(0,)]
    assert found.timing is not None


def test_one_worker_is_never_given_spare_work() -> None:
    crew = Crew(1)
    scheduler = Scheduler(crew)
    scheduler.later([job(91, split="test")], lambda result: None)
    list(scheduler.run([job(1), job(2)]))
    assert [each.recipe.seed for each in crew.given] == [1, 2]


def test_a_batch_that_was_left_early_does_not_disturb_the_next() -> None:
    scheduler = Scheduler(Crew(2))
    next(scheduler.run([job(1), job(2), job(3)]))
    assert {result.job.recipe.seed for result in scheduler.run([job(4), job(5)])} == {4, 5}


# -- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "gpus", "device", "workers", "places"),
    [
        ({}, 0, "cpu", 4, ["cpu", "cpu"]),
        ({}, 3, "cuda", 3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
        ({"workers": 4}, 2, "cuda", 4, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ({"device": "cuda:1"}, 2, "cuda:1", 1, ["cuda:1", "cuda:1"]),
        ({"device": "cpu"}, 2, "cpu", 4, ["cpu", "cpu"]),
        ({"device": "cpu", "workers": 2}, 0, "cpu", 2, ["cpu", "cpu"]),
        ({"name": "ray"}, 0, "cpu", 1, ["cpu"]),
        ({"name": "ray", "workers": 8, "resources": {"GPU": 0.5}}, 0, "cuda", 8, []),
        ({"name": "ray", "workers": 8, "device": "cuda"}, 0, "cuda", 8, []),
        ({"name": "inline", "workers": 8}, 0, "cpu", 1, ["cpu"]),
    ],
)
def test_every_worker_gets_its_device_and_its_share_of_the_cores(
    given_: dict[str, object],
    gpus: int,
    device: str,
    workers: int,
    places: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (devices, compose.executors):
        monkeypatch.setattr(module, "gpus", lambda: gpus)
        monkeypatch.setattr(module, "cores", lambda: 4)
        monkeypatch.setattr(module, "check_device", lambda device: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wanted = ExecutorSpec.model_validate(given_)
    found, dtype, threads = resolve(wanted)
    assert (found, worker_count(wanted)) == (device, workers)
    assert dtype == ("float32" if device == "cpu" else "bfloat16")
    assert threads == (1 if wanted.name == "ray" else max(1, 4 // workers))
    if wanted.name != "ray":
        base = dataclasses.replace(spec(), device=found)
        assert [devices.placed(base, seat).device for seat in range(len(places))] == places


def test_address_and_resources_belong_to_ray() -> None:
    with pytest.raises(ValueError, match="`name: ray`"):
        ExecutorSpec(resources={"GPU": 1})
    assert ExecutorSpec(name="ray", address="10.0.0.1:6379").needs == {"CPU": 1.0}
    assert ExecutorSpec(name="ray", threads=4, resources={"fast": 1}).needs == {"CPU": 4.0, "fast": 1.0}


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "expected"), [(4, 1, 2, 2), (2, 1, 8, 2), (4, 4, 8, 2), (3, 16, 8, 1)]
)
def test_workers_on_one_processor_share_its_cores(
    workers: int, threads: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "cores", lambda: cores)
    spec = ExecutorSpec(name="local", device="cpu", workers=workers, threads=threads)
    assert executors.at_once(spec) == expected
    assert executors.at_once(ExecutorSpec(name="inline", device="cpu", threads=16)) == 1
