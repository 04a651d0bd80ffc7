"""Executors: where jobs run. Submit them, take results as they complete; failures are values.

`Inline` runs them in this process; `LocalProcesses` in worker processes that may crash or hang without
taking the run with them. Building an executor builds its first worker, so that a mistake in models or
suite shows before anything is stored.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

from pydantic import Field

from evomerge.errors import ConfigError, UserError
from evomerge.evaluation.scores import Failure
from evomerge.running import sockets
from evomerge.running.worker import GradientJob, Job, Result, Worker, WorkerSpec
from evomerge.schema import Strict


class ExecutorSpec(Strict):
    """The `executor` part of a run config.

    workers: processes (default: one per core). threads: of each worker (default: the cores divided among
    them, or OMP_NUM_THREADS). timeout: seconds a candidate may take on one split. batch_size: requests
    per forward pass. dtype: of the forward pass; "auto" is float32 on a CPU and bfloat16 on a GPU.
    max_length: in tokens; default the model's own. attention: the implementation transformers uses.
    low_memory: keep no statistics of trimmed task vectors (docs/performance.md); the weights are the same.
    generation: what continues prompts, the live model or vLLM beside it (docs/devices.md).
    """

    name: Literal["local", "inline"] = "local"
    workers: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    timeout: float = Field(default=3600.0, gt=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(default=64, ge=1)
    max_length: int | None = Field(default=None, ge=8)
    attention: str | None = None
    low_memory: bool = False
    generation: Literal["transformers", "vllm"] = "transformers"


class Runs(Protocol):
    """What a worker process needs of its worker."""

    def run(self, job: Any) -> Result: ...


class Executor(Protocol):
    """Runs jobs. Results come in any order."""

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        """Run the jobs and yield a result for each as it completes."""
        ...

    def close(self) -> None:
        """Stop all work and leave no process behind."""
        ...


class Inline:
    """Runs jobs one after the other in this process: no isolation, no timeout, no start-up cost."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker(spec, "inline")

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        """Run the jobs in order."""
        for job in jobs:
            yield self._worker.run(job)

    def close(self) -> None:
        """Nothing to stop."""


@dataclass(slots=True, kw_only=True)
class _Process:
    process: BaseProcess
    pipe: connection.Connection
    ready: bool = False
    job: Job | GradientJob | None = None
    deadline: float = 0.0


class LocalProcesses:
    """Runs jobs in `workers` processes on this machine, each with its own live model.

    A worker that dies is replaced and its job tried once more: whoever killed the worker may not have
    meant the candidate, and scoring again gives the same bits. A second death is a `crash` of the job. A
    worker that exceeds `timeout` seconds is killed, and that is a `timeout` of its job. Raises UserError
    where not a single worker can start.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        workers: int,
        timeout: float,
        worker: Callable[[WorkerSpec, str], Runs] = Worker,
    ) -> None:
        self._spec, self._timeout, self.workers, self._worker = spec, timeout, workers, worker
        # A fork server that has imported torch and lm_eval once starts each worker in no time.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["evomerge.running.preload"])
            _start_fork_server()
        self._started = 0
        self._processes: list[_Process] = []
        self._waiting: collections.deque[Job | GradientJob] = collections.deque()
        self._deaths: collections.Counter[tuple[str, str]] = collections.Counter()
        try:
            self._processes.append(self._start())
            self._await_ready(self._processes[0])
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job | GradientJob]) -> Iterator[Result]:
        """Run the jobs, keeping every worker busy; yield results as they complete."""
        waiting = self._waiting = collections.deque(jobs)
        self._deaths.clear()
        while len(self._processes) < min(self.workers, len(waiting)):
            self._processes.append(self._start())
        while waiting or any(p.job for p in self._processes):
            for process in list(self._processes):
                if waiting and process.ready and process.job is None:
                    if process.process.is_alive():
                        self._give(process, waiting.popleft())
                    else:  # it died idle: no candidate's doing
                        self._lost(process, "crash", "")
            busy = [p for p in self._processes if p.job or not p.ready]
            soonest = min((p.deadline for p in busy), default=time.monotonic() + 1)
            connection.wait([p.pipe for p in busy], timeout=max(0.0, soonest - time.monotonic()))
            for process in busy:
                result = self._collect(process)
                if result is not None:
                    yield result

    def close(self) -> None:
        """Stop all workers, busy or not, and wait for them to be gone."""
        for process in self._processes:
            process.pipe.close()  # an idle worker ends by itself at the end of its pipe
            if process.job is not None or not process.ready:
                process.process.terminate()
        for process in self._processes:
            process.process.join(5)
            process.process.kill()
            process.process.join()
        self._processes.clear()

    def _give(self, process: _Process, job: Job | GradientJob) -> None:
        process.job = job
        process.deadline = time.monotonic() + self._timeout
        with contextlib.suppress(ConnectionError):  # it is dead: `_collect` finds the end of its pipe
            process.pipe.send(process.job)

    def _collect(self, process: _Process) -> Result | None:
        """Take what a worker has sent, if anything; replace it if it died or is overdue."""
        try:
            if process.pipe.poll():
                return self._received(process, process.pipe.recv())
        except (EOFError, ConnectionError):
            return self._lost(process, "crash", f"its worker process died ({_exit(process.process)})")
        if time.monotonic() >= process.deadline:
            return self._lost(process, "timeout", f"took longer than {self._timeout:g} s")
        return None

    def _lost(self, process: _Process, kind: Literal["crash", "timeout"], reason: str) -> Result | None:
        """Replace a worker; its job is tried again after a first death, else it has failed."""
        job = process.job
        process.process.kill()
        process.process.join()
        process.pipe.close()
        self._processes.remove(process)
        if not process.ready:
            self._stillborn(process)
            return None
        self._processes.append(self._start())
        if job is None:
            return None
        key = job.recipe.hash, job.split
        self._deaths[key] += 1
        if kind == "crash" and self._deaths[key] == 1:
            self._waiting.appendleft(job)
            return None
        return Result(job=job, outcome=Failure(kind=kind, reason=reason))

    def _start(self) -> _Process:
        ours, theirs = self._context.Pipe()
        name = str(self._started)
        self._started += 1
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(self._worker, self._spec, name, theirs),
            name=f"evomerge-worker-{name}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Process(process=process, pipe=ours, deadline=time.monotonic() + max(self._timeout, 600.0))

    def _await_ready(self, process: _Process) -> None:
        while not process.ready:
            connection.wait([process.pipe], timeout=1.0)
            self._collect(process)

    def _received(self, process: _Process, message: object) -> Result | None:
        if not process.ready:
            self._greeted(process, message)
            return None
        process.job = None
        assert isinstance(message, Result)
        return message

    def _greeted(self, process: _Process, message: Any) -> None:
        if isinstance(message, UserError):
            raise message
        if isinstance(message, str):
            raise UserError(f"a worker could not start: {message}", fix="try it alone: evomerge check CONFIG")
        process.ready = True

    def _stillborn(self, process: _Process) -> None:
        """Go on with fewer workers where one could not start; without any, raise UserError."""
        self.workers = len(self._processes)
        if not self._processes:
            raise UserError(
                f"a worker process died while loading the models ({_exit(process.process)})",
                fix="check the memory: every worker holds its own copy of the model; lower executor.workers",
            )


def _start_fork_server() -> None:
    """Start the fork server with SIGINT blocked, which its workers inherit.

    Ctrl-C reaches the whole process group, but what it means is the driver's to decide.
    """
    resource_tracker.ensure_running()  # first, because starting it unblocks the signal again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with sockets.swept():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(
    build_worker: Callable[[WorkerSpec, str], Runs], spec: WorkerSpec, name: str, pipe: connection.Connection
) -> None:
    """The worker process: say ready, then answer jobs until the driver's end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end leaves nothing behind
    with contextlib.suppress(EOFError, ConnectionError):  # the driver is gone
        try:
            worker = build_worker(spec, name)
        except Exception as error:
            pipe.send(error if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            return
        pipe.send(True)
        while True:
            pipe.send(worker.run(pipe.recv()))


def build(spec: ExecutorSpec, worker: WorkerSpec) -> Executor:
    """Build the executor a run config names."""
    if spec.name == "inline":
        return Inline(worker)
    return LocalProcesses(worker, workers=worker_count(spec), timeout=spec.timeout)


def worker_count(spec: ExecutorSpec) -> int:
    """Return how many workers a config means: one per core, unless it says so."""
    if spec.name == "inline":
        return 1
    return _cores() if spec.workers is None else spec.workers


def resolve(spec: ExecutorSpec) -> tuple[str, str, int]:
    """Return (device, dtype of the forward pass, threads per worker) that a config means here."""
    import torch

    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    threads = spec.threads
    if threads is None:
        limit = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(limit) if limit.isdecimal() and int(limit) else max(1, _cores() // worker_count(spec))
    return device, dtype, threads


def _check_device(device: str) -> None:
    """Raise ConfigError for a device that torch does not know or does not have here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"executor.device: {device!r} can't be used here",
            expected="auto, cpu, cuda, cuda:N or mps, where torch has it",
            got=str(error).splitlines()[0],
        ) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
