"""Local worker processes: every job gets an answer, whatever its worker does; no process stays behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.executors import ExecutorSpec, LocalProcesses, worker_count
from evomerge.running.worker import Job
from tests.running.fakes import CRASH, DIE_ONCE, EXIT, HANG, RAISE, Obedient, recipe, scores, spec


def jobs(*numbers: int) -> list[Job]:
    return [Job(recipe=recipe(n), split="search") for n in numbers]


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalProcesses]:
    executor = LocalProcesses(spec(), workers=2, timeout=6, worker=Obedient)
    yield executor
    executor.close()


def outcomes(pool: LocalProcesses, *numbers: int) -> dict[int, Scores | Failure]:
    return {result.job.recipe.seed: result.outcome for result in pool.run(jobs(*numbers))}


def test_every_job_is_answered_in_any_order(pool: LocalProcesses) -> None:
    found = outcomes(pool, *range(20))
    assert set(found) == set(range(20))
    for number, outcome in found.items():
        assert isinstance(outcome, Scores)
        assert outcome.same_as(scores(number))


def test_nothing_to_do(pool: LocalProcesses) -> None:
    assert outcomes(pool) == {}


@pytest.mark.parametrize(
    ("order", "kind", "reason"),
    [
        (CRASH, "crash", "its worker process died (signal SIGKILL)"),
        (EXIT, "crash", "its worker process died (exit code 7)"),
        (HANG, "timeout", "took longer than 6 s"),
        (RAISE, "error", "ValueError: bad luck"),
    ],
)
def test_a_bad_candidate_is_a_failure_and_the_others_are_scored(
    pool: LocalProcesses, order: int, kind: str, reason: str
) -> None:
    found = outcomes(pool, 1, order, 2, 3)
    assert found.pop(order) == Failure(kind=kind, reason=reason)  # type: ignore[arg-type]
    assert all(isinstance(outcome, Scores) for outcome in found.values())
    assert len(found) == 3


def test_a_job_whose_worker_was_killed_once_is_scored_after_all(pool: LocalProcesses, tmp_path: Path) -> None:
    flag = tmp_path / "already-died"
    job = Job(recipe=recipe(DIE_ONCE, str(flag)), split="search")
    (result,) = pool.run([job])
    assert flag.exists()
    assert isinstance(result.outcome, Scores)


def test_an_idle_worker_that_died_costs_no_candidate(pool: LocalProcesses) -> None:
    outcomes(pool, 1, 2, 3)
    for process in pool._processes:
        process.process.kill()
        process.process.join()
    found = outcomes(pool, 4, 5, 6)
    assert {number: type(outcome) for number, outcome in found.items()} == dict.fromkeys((4, 5, 6), Scores), (
        found
    )


def test_all_workers_crashing_at_once(pool: LocalProcesses) -> None:
    found = outcomes(pool, CRASH, EXIT, 4)
    assert isinstance(found[CRASH], Failure)
    assert isinstance(found[EXIT], Failure)
    assert isinstance(found[4], Scores)


@pytest.mark.parametrize(
    ("device", "message"), [("broken", "no such device"), ("deadly", "died while loading the models")]
)
def test_a_worker_that_cannot_start_is_the_users_business(device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LocalProcesses(spec(device), workers=2, timeout=5, worker=Obedient)


def test_closing_in_the_middle_leaves_no_process() -> None:
    executor = LocalProcesses(spec(), workers=2, timeout=60, worker=Obedient)
    running = executor.run(jobs(1, HANG, HANG))
    next(running)
    pids = [p.process.pid for p in executor._processes]
    assert len(pids) == 2
    executor.close()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker_count() -> None:
    assert worker_count(ExecutorSpec(workers=3)) == 3
    assert worker_count(ExecutorSpec(name="inline", workers=3)) == 1
    assert worker_count(ExecutorSpec()) >= 1
