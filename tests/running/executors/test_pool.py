"""The pool's clock: what a stopped process, a suspended machine or a hung worker cost a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.executors.contract import AnyJob
from evomerge.running.executors.pool import Message, Pool
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
