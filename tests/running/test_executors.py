"""The contract of all executors: every job is answered, whatever its worker does; no process stays behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.executors import Executor, Inline, LocalProcesses
from evomerge.running.executors.ray_actors import RayActors
from evomerge.running.worker import Job
from tests.running.fakes import (
    CRASH,
    DIE_ONCE,
    EXIT,
    HANG,
    HUNGRY,
    MEET,
    RAISE,
    Obedient,
    recipe,
    scores,
    spec,
)

Build = Callable[..., Executor]


def inline(device: str = "cpu", **_: Any) -> Executor:
    return Inline(spec(device), worker=Obedient)


def local(device: str = "cpu", *, timeout: float = 4) -> Executor:
    return LocalProcesses(spec(device), workers=2, timeout=timeout, worker=Obedient)


def ray(device: str = "cpu", *, timeout: float = 4, **changes: Any) -> RayActors:
    given = {"address": "auto", "needs": {"CPU": 1.0}, "workers": 2, **changes}
    return RayActors(spec(device), timeout=timeout, worker=Obedient, **given)


BUILDS = {"inline": inline, "local": local, "ray": ray}
ALL, WITH_WORKERS = ["inline", "local", "ray"], ["local", "ray"]
DEATH = {
    "local": "its worker process died (signal SIGKILL)",
    "ray": "its Ray actor died",
}


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest) -> Build:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return BUILDS[request.param]


@pytest.fixture(scope="module")
def pool(build: Build) -> Iterator[Executor]:
    executor = build()
    yield executor
    executor.close()


def over(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", names, indirect=True, scope="module")


def jobs(*numbers: int, base: str = "base") -> list[Job]:
    return [Job(recipe=recipe(n, base), split="search") for n in numbers]


def outcomes(pool: Executor, *numbers: int) -> dict[int, Any]:
    return {result.job.recipe.seed: result.outcome for result in pool.run(jobs(*numbers))}


def both_processes(pool: Executor, folder: Path) -> list[int]:
    """Return the numbers of the processes of two workers."""
    folder.mkdir()
    pair = [Job(recipe=recipe(MEET, str(folder)), split=split) for split in ("search", "test")]  # type: ignore[arg-type]
    found = {int(result.timing.worker) for result in pool.run(pair) if result.timing is not None}
    assert len(found) == 2
    return list(found)


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Say whether a process ends within some seconds; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


# -- every executor ---------------------------------------------------------------------------------


@over(ALL)
def test_every_job_is_answered_in_any_order(pool: Executor) -> None:
    found = outcomes(pool, *range(20))
    assert set(found) == set(range(20))
    for number, outcome in found.items():
        assert isinstance(outcome, Scores)
        assert outcome.same_as(scores(number))


@over(ALL)
def test_the_order_of_the_jobs_changes_no_result(pool: Executor) -> None:
    forth, back = outcomes(pool, *range(8)), outcomes(pool, *reversed(range(8)))
    assert set(forth) == set(back)
    assert all(forth[number].same_as(back[number]) for number in forth)


@over(ALL)
def test_nothing_to_do(pool: Executor) -> None:
    assert outcomes(pool) == {}


@over(ALL)
@pytest.mark.parametrize(
    ("order", "kind", "reason"),
    [(RAISE, "error", "ValueError: bad luck"), (HUNGRY, "out_of_memory", "out of memory")],
)
def test_what_a_worker_reports_is_a_failure(pool: Executor, order: int, kind: Any, reason: str) -> None:
    found = outcomes(pool, 1, order, 2)
    assert found.pop(order) == Failure(kind=kind, reason=reason)
    assert all(isinstance(outcome, Scores) for outcome in found.values())
    assert len(found) == 2


@over(ALL)
def test_a_job_is_asked_for_when_a_worker_is_free(pool: Executor) -> None:
    asked = 0

    def source() -> Iterator[Job]:
        nonlocal asked
        for job in jobs(*range(12)):
            asked += 1
            yield job

    for done, _ in enumerate(pool.run(source()), start=1):
        assert asked <= done + 2
    assert asked == 12


@over(ALL)
def test_a_worker_that_cannot_start_is_the_users_business(build: Build) -> None:
    with pytest.raises(UserError, match="no such device"):
        build("broken")


# -- those with workers that may die ----------------------------------------------------------------


@over(WITH_WORKERS)
@pytest.mark.parametrize(
    ("order", "kind", "reason"),
    [(CRASH, "crash", DEATH), (HANG, "timeout", "took longer than 4 s")],
)
def test_a_bad_candidate_is_a_failure_and_the_others_are_scored(
    pool: Executor, build: Build, order: int, kind: Any, reason: Any
) -> None:
    found = outcomes(pool, 1, order, 2, 3)
    expected = reason if isinstance(reason, str) else reason[build.__name__]
    assert found.pop(order) == Failure(kind=kind, reason=expected)
    assert all(isinstance(outcome, Scores) for outcome in found.values())
    assert len(found) == 3


@over(WITH_WORKERS)
def test_a_job_whose_worker_was_killed_once_is_scored_after_all(pool: Executor, tmp_path: Path) -> None:
    flag = tmp_path / "already-died"
    (result,) = pool.run(jobs(DIE_ONCE, base=str(flag)))
    assert flag.exists()
    assert isinstance(result.outcome, Scores)


@over(WITH_WORKERS)
def test_an_idle_worker_that_died_costs_no_candidate(pool: Executor, tmp_path: Path) -> None:
    for pid in both_processes(pool, tmp_path / "meeting"):
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
    found = outcomes(pool, 4, 5, 6)
    assert {n: type(outcome) for n, outcome in found.items()} == dict.fromkeys((4, 5, 6), Scores), found


@over(["local"])
def test_all_workers_crashing_at_once(pool: Executor) -> None:
    found = outcomes(pool, CRASH, EXIT, 4)
    assert found[CRASH] == Failure(kind="crash", reason="its worker process died (signal SIGKILL)")
    assert found[EXIT] == Failure(kind="crash", reason="its worker process died (exit code 7)")
    assert isinstance(found[4], Scores)


@over(WITH_WORKERS)
def test_what_is_under_way_when_nobody_listens_comes_with_the_next_results(
    pool: Executor, tmp_path: Path
) -> None:
    running = pool.run(jobs(1, DIE_ONCE, base=str(tmp_path / "flag")))
    first = next(running)
    del running
    rest = [first, *pool.run(jobs(2, 3))]
    assert {result.job.recipe.seed for result in rest} == {1, DIE_ONCE, 2, 3}
    assert len(rest) == 4


@over(WITH_WORKERS)
def test_a_worker_that_dies_loading_the_models_is_the_users_business(build: Build) -> None:
    with pytest.raises(
        UserError, match=r"no worker could load the models: its (worker process|Ray actor) died"
    ):
        build("deadly", timeout=5)


@over(WITH_WORKERS)
def test_closing_in_the_middle_leaves_no_process(build: Build, tmp_path: Path) -> None:
    executor = build(timeout=60)
    pids = both_processes(executor, tmp_path / "meeting")
    running = executor.run(jobs(1, HANG, HANG))
    next(running)
    executor.close()
    assert all(gone(pid) for pid in pids)
