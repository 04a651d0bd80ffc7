"""The contract of all executors: every job is answered, whatever its worker does; no process stays behind."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from evomerge import compose, steps
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import UserError
from evomerge.evaluation.scores import SPLITS, Failure, Scores
from evomerge.evaluation.sharing import Sharing
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running.executors import Executor, Inline, LocalProcesses
from evomerge.running.executors.pool import Died
from evomerge.running.executors.ray_actors import Actors, RayActors
from evomerge.running.store import RunStore, Timing
from evomerge.running.worker import Job, Result, WorkerSpec
from tests.conftest import config_data, write_suite
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
WITH_WORKERS: list[Any] = ["local", pytest.param("ray", marks=pytest.mark.end_to_end)]
ALL: list[Any] = ["inline", *WITH_WORKERS]
RAY_SLOW: list[Any] = ["local", pytest.param("ray", marks=pytest.mark.slow)]
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


def over(names: list[Any]) -> pytest.MarkDecorator:
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


def check_a_bad_candidate(pool: Executor, order: int, expected: Failure) -> None:
    found = outcomes(pool, 1, order, 2, 3)
    assert found.pop(order) == expected
    assert all(isinstance(outcome, Scores) for outcome in found.values())
    assert len(found) == 3


@over(WITH_WORKERS)
def test_a_candidate_that_crashes_is_a_failure_and_the_others_are_scored(
    pool: Executor, build: Build
) -> None:
    check_a_bad_candidate(pool, CRASH, Failure(kind="crash", reason=DEATH[build.__name__]))


@pytest.mark.end_to_end
@over(RAY_SLOW)
def test_a_candidate_that_hangs_is_a_failure_and_the_others_are_scored(pool: Executor) -> None:
    check_a_bad_candidate(pool, HANG, Failure(kind="timeout", reason="took longer than 4 s"))


@over(WITH_WORKERS)
def test_a_job_whose_worker_was_killed_once_is_scored_after_all(pool: Executor, tmp_path: Path) -> None:
    flag = tmp_path / "already-died"
    (result,) = pool.run(jobs(DIE_ONCE, base=str(flag)))
    assert flag.exists()
    assert isinstance(result.outcome, Scores)


@over(RAY_SLOW)
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


@over(RAY_SLOW)
def test_a_worker_that_dies_loading_the_models_is_the_users_business(build: Build) -> None:
    with pytest.raises(
        UserError, match=r"no worker could load the models: its (worker process|Ray actor) died"
    ):
        build("deadly", timeout=5)


@over(RAY_SLOW)
def test_closing_in_the_middle_leaves_no_process(build: Build, tmp_path: Path) -> None:
    executor = build(timeout=60)
    pids = both_processes(executor, tmp_path / "meeting")
    running = executor.run(jobs(1, HANG, HANG))
    next(running)
    executor.close()
    assert all(gone(pid) for pid in pids)


# -- Ray alone ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_only_a_lost_node_had_is_scored_elsewhere(ray_cluster: Any, tmp_path: Path) -> None:
    """Two workers, one on a node that goes away in the middle of a candidate."""
    node = ray_cluster.add_node(num_cpus=1, resources={"seat": 1}, object_store_memory=80 * 2**20)
    other = ray_cluster.add_node(num_cpus=1, resources={"seat": 1}, object_store_memory=80 * 2**20)
    executor = ray(needs={"CPU": 1.0, "seat": 1.0}, workers=None, timeout=60)
    try:
        assert executor.workers == 2
        both_processes(executor, tmp_path / "meeting")
        folder = tmp_path / "again"
        folder.mkdir()
        running = executor.run([*jobs(MEET, base=str(folder)), *jobs(1, 2, 3)])
        found = [next(running)]  # one works, one waits for a second in vain
        ray_cluster.remove_node(node)
        (folder / "second").touch()
        found += running
        assert {result.job.recipe.seed for result in found} == {MEET, 1, 2, 3}
        assert all(isinstance(result.outcome, Scores) for result in found)
    finally:
        executor.close()
        ray_cluster.remove_node(other)


class Flaky:
    """Stands in for Ray: actors that answer, or are out of reach for a while."""

    def __init__(self, exceptions: Any, answers: list[Any]) -> None:
        self.exceptions, self.answers, self.sent = exceptions, answers, 0

    def remote(self, *_: object) -> Any:
        self.sent += 1
        return self

    def options(self, **_: object) -> Any:
        return self

    @property
    def begin(self) -> Flaky:
        return self

    process = run = begin

    def get(self, *_: object, timeout: float = 0) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_initialized(self) -> bool:
        return False

    def wait(self, answers: list[Any], **_: object) -> Any:
        return answers, []


@pytest.mark.end_to_end
def test_an_actor_out_of_reach_is_asked_again_with_growing_pauses(ray_cluster: Any) -> None:
    import ray.exceptions as exceptions

    def away() -> Exception:
        return exceptions.ActorUnavailableError("no connection", None)

    (job,) = jobs(1)
    for answers, expected, sent in (
        ([away(), away(), 17, Result(job=job, outcome=scores(1))], [Result], 3),  # back after two questions
        ([away(), exceptions.ActorDiedError()], [Died], 2),
        ([exceptions.ActorDiedError()], [Died], 1),
    ):
        fake = Flaky(exceptions, answers)
        actors = Actors(fake, spec(), Obedient, {"CPU": 1.0})
        worker = actors.start("0", 0)
        actors.give(worker, job)
        fake.sent = 1
        found = actors.wait([worker], 1.0)
        while not found:
            found = actors.wait([worker], 1.0)
        assert [type(message) for _, message in found] == expected
        assert fake.answers == []
        assert fake.sent >= sent


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needs": {"CPU": 1.0, "warp": 1.0}}, "no node of the Ray cluster has room for a worker"),
        ({"needs": {"CPU": 64.0}}, "a node with CPU 64"),
    ],
)
def test_a_cluster_without_what_a_worker_needs(ray_cluster: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ray(**changes)


@pytest.mark.end_to_end
def test_models_must_lie_at_the_same_place_on_every_node(ray_cluster: Any) -> None:
    worker = dataclasses.replace(spec(), models={"base": "/nowhere/base", "a": "/nowhere/base+/nowhere/lora"})
    with pytest.raises(UserError, match=r"node \S+ of the Ray cluster lacks /nowhere/base") as error:
        RayActors(worker, address="auto", needs={"CPU": 1.0}, workers=1, timeout=5, worker=Obedient)
    assert "3 of 3 missing there" in str(error.value)


def test_without_ray_there_is_one_sentence(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = config(generate=False, executor={"name": "ray"})
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 2
    assert "ray is not installed" in result.output
    assert "pip install 'evomerge[ray]'" in result.output
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_is_not_there_is_the_users_business() -> None:
    """In a process of its own, because this one is connected to a cluster."""
    code = """
from evomerge.errors import UserError
from tests.running.executors.test_executors import ray
try:
    ray(address="127.0.0.1:1")
except UserError as error:
    print(error.what)
"""
    done = python(code)
    assert done.stdout == "executor.address: no Ray cluster at '127.0.0.1:1'\n", done


@pytest.mark.slow
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_ray_of_our_own_ends_with_us(end: str) -> None:
    """In the middle of a job: when it is closed, and when the driver dies, which Ray takes a while to see."""
    code = """
import os, signal, sys
from tests.running.executors.test_executors import HANG, jobs, ray
if __name__ == "__main__":
    executor = ray(address="local", timeout=60)
    results = list(executor.run(jobs(1, 2, 3)))
    print(len(results), os.environ["RAY_SESSION_TEST"])
    running = executor.run(jobs(1, HANG, HANG))
    next(running)
    if sys.argv[1] == "closed":
        executor.close()
    else:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    mark = f"{os.getpid()}-{end}"
    done = python(code, end, RAY_SESSION_TEST=mark)
    assert done.stdout.split() == ["3", mark], done
    assert done.stderr == ""
    deadline = time.monotonic() + (90 if end == "killed" else 10)
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def python(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of a few lines."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def marked(value: str) -> list[str]:
    """Return the command lines of all processes with RAY_SESSION_TEST=value in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and f"RAY_SESSION_TEST={value}".encode() in (
                folder / "environ"
            ).read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    return found


# -- a run --------------------------------------------------------------------------------------------


class Murderer(Silent):
    """Kills the workers when the sixth result arrives, in the middle of the baselines."""

    def __init__(self, victims: Callable[[], set[int]]) -> None:
        self.scores, self.killed = 0, 0
        self.victims, self.before = victims, victims()

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        self.scores += 1
        if self.scores == 6:
            for pid in self.victims() - self.before:
                os.kill(pid, signal.SIGKILL)
                self.killed += 1


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def acting() -> set[int]:
    """Return the processes of Ray actors."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and (folder / "cmdline").read_bytes().startswith(b"ray::Actor"):
                found.add(int(folder.name))
    return found


@pytest.fixture(scope="module")
def unbroken(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in this process."""
    folder = tmp_path_factory.mktemp("unbroken")
    return ran(tiny_zoo, folder, {"name": "inline"}, Silent())


def ran(zoo: Path, folder: Path, executor: dict[str, Any], observer: Any) -> Path:
    write_suite(folder, generate=False)
    executor = {"threads": 1, "batch_size": 32, **executor}
    data = config_data(zoo, folder, budget={"generations": 1}, executor=executor)
    (folder / "config.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    compose.start(RunConfig.load(folder / "config.yaml"), observer)
    return folder / "run"


@pytest.mark.end_to_end
@over(RAY_SLOW)
def test_a_run_whose_workers_are_killed_in_the_middle_ends_in_the_same_bits(
    build: Build, unbroken: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    """Also with the spare work that idle workers do: `test` scores of what is certain to be tested."""
    watched = Murderer({"local": children, "ray": acting}[build.__name__])
    folder = ran(tiny_zoo, tmp_path, {"name": build.__name__, "workers": 2}, watched)
    assert watched.killed
    with RunStore.read(unbroken) as plain, RunStore.read(folder) as store:
        assert store.failures() == []
        assert store.digest() == plain.digest()


class Deciding(Obedient):
    """Decides like nobody else, unless it was told."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        super().__init__(spec, name)
        self.told = spec.sharing
        self.sharing = spec.sharing or Sharing(scored=name in ("0", "inline"), generated=True)

    def run(self, job: Job) -> Result:
        return dataclasses.replace(super().run(job), weights=repr((self.told, self.sharing)))


def test_the_first_worker_decides_for_all_of_them(tmp_path: Path) -> None:
    first = Sharing(scored=True, generated=True)
    assert Inline(spec("cpu"), worker=Deciding).sharing == first
    pool = LocalProcesses(spec("cpu"), workers=2, timeout=60, worker=Deciding)
    try:
        assert pool.sharing == first
        jobs = [Job(recipe=recipe(MEET, str(tmp_path)), split=split) for split in SPLITS[:2]]
        results = list(pool.run(jobs))  # they wait for each other
    finally:
        pool.close()
    assert {result.weights for result in results} == {repr((None, first)), repr((first, first))}


def test_the_first_worker_tells_its_steps(config: Callable[..., Path]) -> None:
    prepared = prepare(RunConfig.load(config(generate=False)))
    told: list[str] = []
    with steps.told(told.append):
        LocalProcesses(prepared.worker, workers=1, timeout=600).close()
    assert told[0] == "reading tasks"
    assert "tokenising 1/3 tasks for search" in told
    assert told[-2:] == ["loading models", "trying the model out"]
