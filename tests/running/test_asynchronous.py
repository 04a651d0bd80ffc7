"""Runs without generations: pools that finish in any order, kills, repeats, and want of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import BrokenRunError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.batches import decisions
from evomerge.running.executors.contract import Orders
from evomerge.running.schedule import Scheduler
from evomerge.running.store import RunStore, facts
from evomerge.running.store.inspection import inspect
from evomerge.running.worker import GradientJob, Job, Result, WorkerSpec
from tests.conftest import write_suite
from tests.running import quick
from tests.running.hungry import BATCH, InOne, Small, session

pytestmark = pytest.mark.end_to_end

WORKERS = 4


class Killed(Exception):
    """The end of a session in the middle of its work."""


class Shuffled:
    """Workers of a formula that finish in an order that `seed` draws; `dead` ends the session."""

    sharing = None

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        seed: int,
        dead: Callable[[], bool] = lambda: False,
        workers: int = WORKERS,
    ) -> None:
        self._worker, self._dead, self.workers = quick.Formula(spec), dead, workers
        self._rng = np.random.default_rng(seed)
        self._busy: list[tuple[int, Any]] = []
        self._last: list[Any] = [None] * workers
        self.ran: list[Job | GradientJob] = []

    def run(self, jobs: Iterable[Job | GradientJob]) -> Iterator[Result]:
        assert isinstance(jobs, Orders)
        while True:
            for worker in set(range(self.workers)) - {worker for worker, _ in self._busy}:
                if (job := jobs.after(self._last[worker])) is not None:
                    self._busy.append((worker, job))
            if not self._busy:
                return
            worker, job = self._busy.pop(int(self._rng.integers(len(self._busy))))
            self._last[worker] = job
            if self._dead():
                raise Killed
            self.ran.append(job)
            yield self._worker.run(job)

    def close(self) -> None: ...


Start = Callable[..., str]


def arrived(folder: Path, count: int) -> Callable[[], bool]:
    """Return what says whether the run in a folder has recorded so many arrivals."""

    def enough() -> bool:
        with RunStore.read(folder) as store:
            return len(store.arrivals()) >= count

    return enough


@pytest.fixture
def start(config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run, or continue, an asynchronous run in a folder; return the digest of its store."""
    path = config(
        optimizer={"population": 7, "async": True},
        budget={"generations": 5},
        racing={"blocks": 4},
        surrogate={"blocks": 1},
        executor={"name": "local", "workers": WORKERS},
    )
    write_suite(tmp_path, generate=False)

    def start(folder: str, executor: Callable[[WorkerSpec], Any], **budget: Any) -> str:
        monkeypatch.setattr(compose.executors, "build", lambda _, spec: executor(spec))
        compose.start(RunConfig.load(path, out=str(tmp_path / folder), **budget), Silent())
        with RunStore.read(tmp_path / folder) as store:
            return store.digest()

    return start


def test_a_finished_run_repeats_itself_without_scoring_anything(start: Start, tmp_path: Path) -> None:
    first = start("run", lambda spec: Shuffled(spec, seed=1))
    made: list[Shuffled] = []

    def again(spec: WorkerSpec) -> Shuffled:
        made.append(Shuffled(spec, seed=2))
        return made[0]

    assert start("run", again) == first
    assert not made[0].ran
    with RunStore.read(tmp_path / "run") as store:
        assert facts.PENDING.get(store) == [[0, 5]]
        assert facts.PROPOSED.get(store) == len(store.arrivals()) == 35
        assert not list(inspect(store._db, contents=True).problems())
    assert start("other", lambda spec: Shuffled(spec, seed=2)) != first  # another order, another search


@pytest.mark.parametrize("count", [12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 30))])
def test_killed_it_goes_on_from_the_order_that_is_stored(start: Start, tmp_path: Path, count: int) -> None:
    with pytest.raises(Killed):
        start("run", lambda spec: Shuffled(spec, seed=1, dead=arrived(tmp_path / "run", count)))
    with RunStore.read(tmp_path / "run") as store:
        before = store.arrivals()
        assert len(before) >= count
    ended = start("run", lambda spec: Shuffled(spec, seed=2))
    with RunStore.read(tmp_path / "run") as store:
        assert store.arrivals()[: len(before)] == before
        assert len(store.arrivals()) == 35
    assert start("run", lambda spec: Shuffled(spec, seed=3)) == ended


def test_a_generation_that_is_not_full_at_the_end_is_shown_like_any_other(
    start: Start, tmp_path: Path
) -> None:
    start("run", lambda spec: Shuffled(spec, seed=1), evaluations=6)
    with RunStore.read(tmp_path / "run") as store:
        *whole, last = store.generations()
        assert len(whole) > 1
        assert last.losses is None
        assert 0 < len(last.recipes) < 7
        scored = len(store.scored_blocks("search"))
        assert scored > len(store.arrivals())
    for command in ("report", "status", "doctor"):
        found = CliRunner().invoke(app, [command, str(tmp_path / "run")])
        assert found.exit_code == 0, found.output
    candidate = CliRunner().invoke(app, ["show", str(tmp_path / "run"), last.recipes[0][:12]])
    assert candidate.exit_code == 0, candidate.output


def test_one_worker_is_one_order(start: Start) -> None:
    assert start("one", quick.InProcess) == start("two", quick.InProcess)


def test_more_workers_than_it_began_with(start: Start, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start("run", lambda spec: Shuffled(spec, seed=1, dead=arrived(tmp_path / "run", 12)))
    ended = start("run", lambda spec: Shuffled(spec, seed=2, workers=8))
    with RunStore.read(tmp_path / "run") as store:
        changes = facts.PENDING.require(store)
        assert [count for _, count in changes] == [5, 10]
        assert 0 < changes[1][0] < 35
    assert start("run", lambda spec: Shuffled(spec, seed=3, workers=8)) == ended


def test_failures_of_another_cause_are_tried_again_with_all_that_rests_on_them(
    start: Start, tmp_path: Path
) -> None:
    class Broken(Shuffled):
        """From the hundredth result on, everything fails."""

        def run(self, jobs: Iterable[Job | GradientJob]) -> Iterator[Result]:
            for result in super().run(jobs):
                if len(self.ran) < 100:
                    yield result
                else:
                    yield Result(job=result.job, outcome=Failure(kind="error", reason="no disk"))

    with pytest.raises(BrokenRunError, match="no disk"):
        start("run", lambda spec: Broken(spec, seed=1))
    start("run", lambda spec: Shuffled(spec, seed=2))
    with RunStore.read(tmp_path / "run") as store:
        assert not any(failure.reason == "no disk" for _, _, failure in store.failures())
        assert len(store.arrivals()) == 35


def test_a_batch_that_does_not_fit_is_halved_for_what_is_pending(tmp_path: Path) -> None:
    session(tmp_path / "plain", Scheduler(InOne(Small(frozenset()))), workers=1)
    with RunStore.read(tmp_path / "plain") as store:
        hungry = store.generations()[1].recipes[2]
        (block, *_) = store.scored_blocks("search")[hungry]
    small = Small(frozenset({("search", block, hungry)}))
    executor = InOne(small)
    session(tmp_path / "run", Scheduler(executor), workers=1)
    with RunStore.read(tmp_path / "run") as store:
        (made,) = decisions(store)
        assert (made.split, made.block, made.size, made.before) == ("search", block, BATCH // 2, BATCH)
        assert isinstance(store.result(hungry, "search", block), Scores)
        assert not store.failures()
        ended = store.digest()
    session(tmp_path / "run", Scheduler(InOne(small)), workers=1)
    with RunStore.read(tmp_path / "run") as store:
        assert store.digest() == ended


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"several": ["mean", "retention"]}}, "it is for one objective, and there are 2"),
        ({"optimizer": {"name": "nsga2", "async": True}}, "nsga2 learns from whole generations only"),
    ],
)
def test_what_it_can_not_do_is_refused_by_check(
    config: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path = config(**{"optimizer": {"async": True}, **changes})
    found = CliRunner().invoke(app, ["check", str(path)])
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
    assert "Traceback" not in found.output
