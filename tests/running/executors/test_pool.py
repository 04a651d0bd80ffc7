"""The pool's clock: what a stopped process, a suspended machine or a hung worker cost a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.executors.contract import AnyJob
from evomerge.running.executors.pool import Died, Message, Pool
from evomerge.running.worker import Job, Result
from tests.running.fakes import TIMING, recipe, scores


@dataclass
class Handle:
    """A worker of the fake backend; done: when its job is, by the backend's clock."""

    job: AnyJob | None = None
    done: float = 0.0


class Backend:
    """One worker that takes `takes` seconds a job; at `stop` everything stands still for `still` seconds."""

    lack, lingers = "", False

    def __init__(self, *, takes: float, stop: float = 1e9, still: float = 0.0) -> None:
        self.time, self.takes, self.stop, self.still = 0.0, takes, stop, still

    def start(self, name: str, seat: int) -> Handle:
        return Handle()

    def give(self, worker: Handle, job: AnyJob) -> None:
        worker.job, worker.done = job, self.time + self.takes

    def wait(self, workers: Sequence[Handle], seconds: float) -> list[tuple[Handle, Message]]:
        (worker,) = workers
        if worker.job is None:
            return [(worker, True)]
        end = min(self.time + seconds, worker.done)
        if self.time <= self.stop < end:
            end, worker.done, self.stop = end + self.still, worker.done + self.still, 1e9
        self.time = end
        if self.time < worker.done:
            return []
        assert isinstance(worker.job, Job)
        return [(worker, Result(job=worker.job, outcome=scores(1), timing=TIMING))]

    def alive(self, worker: Handle) -> bool:
        return True

    def kill(self, worker: Handle) -> None:
        pass

    def close(self, idle: Sequence[Handle], busy: Sequence[Handle]) -> None:
        pass

    def now(self) -> float:
        return self.time


def outcome(backend: Backend) -> object:
    pool = Pool(backend, workers=1, timeout=600)
    (result,) = pool.run([Job(recipe=recipe(1), split="search")])
    return result.outcome


def test_time_in_which_everything_stood_still_is_no_candidates() -> None:
    assert isinstance(outcome(Backend(takes=500, stop=300, still=3600)), Scores)
    assert isinstance(outcome(Backend(takes=599, stop=598, still=100_000)), Scores)


def test_a_worker_that_takes_too_long_is_found_all_the_same() -> None:
    found = outcome(Backend(takes=601, stop=300, still=3600))
    assert isinstance(found, Failure)
    assert (found.kind, found.reason) == ("timeout", "took longer than 600 s")


@dataclass(eq=False)
class Member:
    """A worker of a fake crowd; at: when it is heard of next."""

    at: float
    job: AnyJob | None = None
    dies: bool = False


class Crowd:
    """Two workers that take 10 s a job. The first job of the second kills it; its successor needs 100 s."""

    lack, lingers = "", False

    def __init__(self) -> None:
        self.time = 0.0
        self.started: list[Member] = []
        self.given: list[tuple[Member, AnyJob]] = []

    def start(self, name: str, seat: int) -> Member:
        self.started.append(Member(at=self.time + (100 if len(self.started) > 1 else 0)))
        return self.started[-1]

    def give(self, worker: Member, job: AnyJob) -> None:
        self.given.append((worker, job))
        worker.dies = self.started.index(worker) == 1
        worker.job, worker.at = job, self.time + (1 if worker.dies else 10)

    def wait(self, workers: Sequence[Member], seconds: float) -> list[tuple[Member, Message]]:
        worker = min(workers, key=lambda each: each.at)
        self.time = max(self.time, worker.at)
        if worker.job is None:
            return [(worker, True)]
        if worker.dies:
            return [(worker, Died(reason="it died"))]
        assert isinstance(worker.job, Job)
        return [(worker, Result(job=worker.job, outcome=scores(1), timing=TIMING))]

    def alive(self, worker: Member) -> bool:
        return True

    def kill(self, worker: Member) -> None: ...

    def close(self, idle: Sequence[Member], busy: Sequence[Member]) -> None: ...

    def now(self) -> float:
        return self.time


class Chosen:
    """Jobs chosen per worker: remembers after which job each was handed out."""

    ahead = False

    def __init__(self, count: int) -> None:
        self.count = count
        self.after_job: dict[str, AnyJob | None] = {}

    def after(self, last: AnyJob | None) -> AnyJob | None:
        if len(self.after_job) == self.count:
            return None
        job = Job(recipe=recipe(len(self.after_job)), split="search")
        self.after_job[job.recipe.hash] = last
        return job

    def __iter__(self) -> Iterator[AnyJob]:
        raise AssertionError("a pool asks for each worker")


def test_while_a_worker_starts_the_others_get_what_was_chosen_for_them() -> None:
    crowd, jobs = Crowd(), Chosen(20)
    pool = Pool(crowd, workers=2, timeout=600)
    assert len(list(pool.run(jobs))) == 20
    first, second, third = crowd.started
    mine = [job for worker, job in crowd.given if worker is first]
    lost = next(job for worker, job in crowd.given if worker is second)
    assert lost in mine  # tried again at once
    assert len(mine) > 9
    for before, job in pairwise(mine):
        assert job is lost or jobs.after_job[job.recipe.hash] is before
    assert any(worker is third for worker, _ in crowd.given)
