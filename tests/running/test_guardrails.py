"""Guardrails: transient faults are tried again, and when everything fails the run stops and forgets it."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evomerge.delivery.course import Course
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import BrokenRunError, NonFiniteError, NoWinnerError, StoreError, UserError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.running import retries
from evomerge.running.budget import BudgetSpec
from evomerge.running.executors import LocalProcesses
from evomerge.running.store import RunStore, facts, file
from evomerge.running.worker import Job, NotBegun, Result, Worker
from evomerge.search.ports import Named
from evomerge.stored import StoredRun
from tests.running.fakes import TIMING, recipe, scores, spec
from tests.running.nights import Simulated, Time, spend_night


class OutOfMemory(RuntimeError):
    """As torch's is."""


class Fails:
    """Raises an error a few times before it answers."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.asked = error, times, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return "answer"


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), True),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), True),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("of unknown cause"), False),
        (OutOfMemory("CUDA out of memory"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (NonFiniteError("logits are not finite"), False),
        (UserError("no such task"), False),
        (ValueError("bad luck"), False),
    ],
    ids=repr,
)
def test_only_transient_faults_are_tried_again(error: Exception, again: bool) -> None:
    waits: list[float] = []
    faults: list[str] = []
    work = Fails(error, 2)
    if again:
        assert retries.insist(work, faults, sleep=waits.append) == "answer"
        assert waits == [1.0, 2.0]
        assert faults == [f"{type(error).__name__}: {error}"] * 2
    else:
        with pytest.raises(type(error)):
            retries.insist(work, faults, sleep=waits.append)
        assert (work.asked, waits, faults) == (1, [], [])


def test_there_is_an_end_to_it() -> None:
    waits: list[float] = []
    work = Fails(OSError(errno.EIO, "Input/output error"), 99)
    with pytest.raises(OSError, match="Input/output error"):
        retries.insist(work, [], sleep=waits.append)
    assert work.asked == retries.ATTEMPTS == len(waits) + 1


class Bench:
    """A workbench whose files are out of reach for a while."""

    model = SimpleNamespace(parameters=list)

    def __init__(self, trouble: Fails, kept: int = 0) -> None:
        self._trouble, self.kept = trouble, kept

    def load(self, recipe: object) -> None:
        self._trouble()

    def give_way(self) -> bool:
        kept, self.kept = self.kept, 0
        return kept > 0


class Judge:
    """A harness that gives everybody the same scores."""

    forward_seconds = 0.5

    def items(self, split: str, block: int) -> tuple[str, int]:
        return split, block

    def weights_changed(self) -> None:
        pass

    def evaluate(self, model: object, items: tuple[str, int], *, batch_size: int) -> Scores:
        return dataclasses.replace(scores(1, items[0]), blocks=(items[1],))


def worker(trouble: Fails, kept: int = 0) -> Worker:
    made = Worker.__new__(Worker)
    made.name, made._bench, made._harness = "0", Bench(trouble, kept), Judge()  # type: ignore[assignment]
    made._device, made._batch_size = "cpu", 8
    return made


@pytest.fixture
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)


@pytest.mark.usefixtures("_no_waits")
def test_a_worker_scores_a_candidate_after_all_and_says_what_it_took() -> None:
    trouble = Fails(OSError(errno.ESTALE, "Stale file handle"), 2)
    job = Job(recipe=recipe(1), split="search", blocks=(0, 1))
    result = pickle.loads(pickle.dumps(worker(trouble).run(job)))
    assert isinstance(result.outcome, Scores)
    assert [part.blocks for part in result.parts] == [(0,), (1,)]
    assert result.faults == ("OSError: [Errno 116] Stale file handle",) * 2


@pytest.mark.usefixtures("_no_waits")
@pytest.mark.parametrize(
    ("error", "reason", "asked"),
    [
        (OSError(errno.EIO, "Input/output error"), "(in 4 attempts)", 4),
        (MemoryError("no room"), "out of memory while merging", 1),
    ],
)
def test_a_worker_gives_up_in_the_end(error: Exception, reason: str, asked: int) -> None:
    trouble = Fails(error, 99)
    outcome = worker(trouble).run(Job(recipe=recipe(1), split="search")).outcome
    assert isinstance(outcome, Failure)
    assert outcome.reason.endswith(reason)
    assert trouble.asked == asked


def test_sources_leave_a_gpu_before_a_candidate_fails_for_lack_of_memory() -> None:
    job = Job(recipe=recipe(1), split="search")
    lucky, unlucky = Fails(MemoryError("no room"), 1), Fails(MemoryError("no room"), 9)
    crowded = worker(lucky, kept=5)
    assert isinstance(crowded.run(job).outcome, Scores)
    assert lucky.asked == 2
    assert crowded._bench.kept == 0  # type: ignore[attr-defined]
    outcome = worker(unlucky, kept=5).run(job).outcome
    assert outcome == Failure(kind="out_of_memory", reason="out of memory while merging")
    assert unlucky.asked == 2


def test_a_worker_begins_nothing_after_the_deadline() -> None:
    trouble = Fails(ValueError(), 0)
    late = Job(recipe=recipe(1), split="search", not_after=time.time() - 1)
    assert worker(trouble).run(late).outcome == NotBegun()
    assert trouble.asked == 0
    early = dataclasses.replace(late, not_after=time.time() + 60)
    assert isinstance(worker(trouble).run(early).outcome, Scores)


class Punctual:
    """A real worker's attitude in a process of its own."""

    sharing = None

    def __init__(self, spec: object, name: str) -> None:
        self._worker = worker(Fails(ValueError(), 0))

    def run(self, job: Job) -> object:
        return self._worker.run(job)


def test_worker_processes_answer_late_jobs_too() -> None:
    pool = LocalProcesses(spec(), workers=2, timeout=20, worker=Punctual)  # type: ignore[arg-type]
    try:
        jobs = [
            Job(recipe=recipe(n), split="search", not_after=time.time() + (60 if n < 3 else -1))
            for n in range(6)
        ]
        found = {r.job.recipe.seed: r.outcome for r in pool.run(jobs)}  # type: ignore[union-attr]
    finally:
        pool.close()
    assert [number for number, outcome in sorted(found.items()) if outcome == NotBegun()] == [3, 4, 5]


# -- when everything fails ------------------------------------------------------------------------------


@pytest.mark.end_to_end
@pytest.mark.parametrize("down", [35, 44, 60])
def test_when_everything_fails_the_run_stops_and_a_resumed_one_is_as_if_nothing_had_been(
    tmp_path: Path, down: int
) -> None:
    """The row of failures goes through told generations; nothing of it is left."""
    budget = BudgetSpec(generations=8, failures=10)
    spend_night(tmp_path / "whole", Simulated(Time()), budget)
    executor = Simulated(Time(), down=down)
    with pytest.raises(BrokenRunError) as error:
        spend_night(tmp_path / "run", executor, budget)
    message = str(pickle.loads(pickle.dumps(error.value)))
    assert "the last 10 candidates all failed (10 of kind error)" in message
    assert "the disk is gone" in message
    assert f"evomerge resume {tmp_path / 'run'}" in message
    with RunStore.read(tmp_path / "run") as kept:
        assert not kept.failures()
        assert len(kept.scored_blocks("search")) > 20
    executor.down = 1e9
    spend_night(tmp_path / "run", executor, budget)
    with RunStore.read(tmp_path / "run") as one, RunStore.read(tmp_path / "whole") as other:
        assert one.digest() == other.digest()


def test_a_few_failures_are_a_few_failures(tmp_path: Path) -> None:
    class Flaky(Simulated):
        def _result(self, job: Job, number: int) -> Result:
            result = super()._result(job, number)
            bad = number > 34 and job.split == "search" and number % 3 > 0
            failed = Failure(kind="non_finite", reason="NaN")
            return dataclasses.replace(result, outcome=failed, timing=None, parts=()) if bad else result

    budget = BudgetSpec(generations=6, failures=3)
    told: list[float] = []

    class Hears(Silent):
        def generation_done(self, generation: int, evaluations: float, best: float) -> None:
            told.append(evaluations)

    spend_night(tmp_path / "run", Flaky(Time()), budget, observer=Hears())
    with RunStore.read(tmp_path / "run") as kept:
        assert len(kept.failures()) > 10
        assert (
            Course(Summary(StoredRun(kept))).evaluations() == told[-1] == 6 * 6
        )  # the failed are charged, too


def test_finalists_that_all_fail_are_tried_again(tmp_path: Path) -> None:
    class Unlucky(Simulated):
        lucky = False

        def _result(self, job: Job, number: int) -> Result:
            if not self.lucky and job.split == "select" and job.recipe.groups[0].method == "task_arithmetic":
                return Result(job=job, outcome=Failure(kind="timeout", reason="took too long"))
            return super()._result(job, number)

    budget, executor = BudgetSpec(generations=3), Unlucky(Time())
    with pytest.raises(NoWinnerError, match="none of the finalists") as error:
        spend_night(tmp_path / "run", executor, budget)
    assert "took too long" in str(error.value)
    executor.lucky = True
    outcome = spend_night(tmp_path / "run", executor, budget)
    assert outcome == spend_night(tmp_path / "whole", Simulated(Time()), budget)


def test_failures_before_a_success_are_kept(tmp_path: Path) -> None:
    """Also those of an earlier session count, where nothing was scored since."""
    bad = Failure(kind="crash", reason="died")
    with RunStore.create(
        tmp_path / "run", {facts.CONFIG: {"models": {"base": "base", "sources": {}}}}
    ) as made:
        made.record_failure(recipe(1), "search", bad)
        made.record_scores(recipe(2), scores(2), TIMING)
        made.record_failure(recipe(3), "search", bad)
    with RunStore.open(tmp_path / "run") as again:
        again.record_failure(recipe(4), "select", bad)
        again.record_entry("finalist", 0, Named(name="f", recipe=recipe(4)))
        assert again.forget_failures() == [bad, bad]
        assert [hash_ for hash_, _, _ in again.failures()] == [recipe(1).hash]
        assert again.forget_failures() == []
        assert again.forget_failures(5) == [bad]
        assert not again.failures()


def test_a_store_that_stays_locked_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "BUSY", 0.1)
    with RunStore.create(tmp_path / "run", {}) as made:
        other = sqlite3.connect(tmp_path / "run" / "run.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program has locked it"):
            facts.NORMS.set(made, {})
        other.execute("ROLLBACK")
        other.close()
        facts.NORMS.set(made, {})
        assert facts.NORMS.get(made) == {}


def test_events_keep_their_order_where_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed since the last success is found by time, also by a session whose clock is behind."""
    with RunStore.create(tmp_path, {}) as made:
        made.begin_session({})
        made.record_scores(recipe(1), scores(1), TIMING)
    earlier = time.time() - 86_400
    monkeypatch.setattr("evomerge.running.store.store.time.time", lambda: earlier)
    failure = Failure(kind="error", reason="x")
    with RunStore.open(tmp_path) as made:
        made.begin_session({})
        made.record_failure(recipe(2), "search", failure)
        made.record_scores(recipe(3), scores(3), TIMING)
        made.record_failure(recipe(4), "search", failure)
        assert made.forget_failures() == [failure]
        assert made.hours() < 1
