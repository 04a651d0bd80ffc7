"""Worker processes on this machine, which may crash or hang without taking the run with them."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess

from evomerge import steps
from evomerge.errors import UserError
from evomerge.evaluation.sharing import Sharing
from evomerge.running import sockets
from evomerge.running.executors.contract import AnyJob, BuildWorker
from evomerge.running.executors.devices import placed
from evomerge.running.executors.pool import Died, Message, Pool, WorkerStep
from evomerge.running.worker import Worker, WorkerSpec

TERMINATED = 143
"""The exit code of programs that SIGTERM ends."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProcessHandle:
    """A worker process and the driver's end of its pipe."""

    process: BaseProcess
    pipe: connection.Connection


class Processes:
    """Worker processes, each with its own live model; the files of the sources are mapped, and shared."""

    lack = "check the memory: every worker holds its own copy of the model; lower executor.workers"
    lingers = False

    def __init__(self, spec: WorkerSpec, worker: BuildWorker) -> None:
        self._spec, self._worker = spec, worker
        # A fork server that has imported torch and lm_eval once starts each worker in no time.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["evomerge.running.preload"])
            _start_fork_server()

    def start(self, name: str, seat: int) -> ProcessHandle:
        """Start a process that will build a worker for its seat's device."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_serve,
            args=(self._worker, placed(self._spec, seat), name, theirs),
            name=f"evomerge-worker-{name}",
            daemon=True,
        )
        try:
            process.start()
        except (FileNotFoundError, ConnectionError):  # of the fork server's socket
            raise UserError(
                "no worker can be started: the files that connect them to this process were removed",
                expected=f"{sockets.place()} to stay while a run goes on",
                fix="resume; TMPDIR=FOLDER names a folder that nothing sweeps",
            ) from None
        finally:
            theirs.close()
        return ProcessHandle(process=process, pipe=ours)

    def share(self, sharing: Sharing) -> None:
        """Tell the processes still to come what the first decided."""
        self._spec = dataclasses.replace(self._spec, sharing=sharing)

    def give(self, worker: ProcessHandle, job: AnyJob) -> None:
        """Send a job."""
        with contextlib.suppress(ConnectionError):  # it is dead: `wait` finds the end of its pipe
            worker.pipe.send(job)

    def wait(self, workers: Sequence[ProcessHandle], seconds: float) -> list[tuple[ProcessHandle, Message]]:
        """Receive what workers sent; the end of a pipe is a death."""
        ready = connection.wait([worker.pipe for worker in workers], timeout=seconds)
        return [(worker, _received(worker)) for worker in workers if worker.pipe in ready]

    def alive(self, worker: ProcessHandle) -> bool:
        """Say whether the process is there."""
        return worker.process.is_alive()

    def kill(self, worker: ProcessHandle) -> None:
        """Kill the process and wait for it."""
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()

    def close(self, idle: Sequence[ProcessHandle], busy: Sequence[ProcessHandle]) -> None:
        """End the processes: the idle by the end of their pipes, the busy by a signal."""
        for worker in (*idle, *busy):
            worker.pipe.close()
        for worker in busy:
            worker.process.terminate()
        for worker in (*idle, *busy):
            worker.process.join(5)
            worker.process.kill()
            worker.process.join()

    def now(self) -> float:
        """Return the machine's monotonic clock."""
        return time.monotonic()


class LocalProcesses(Pool[ProcessHandle]):
    """Runs jobs in `workers` processes on this machine; see `Pool` for what happens to those that fail."""

    def __init__(
        self, spec: WorkerSpec, *, workers: int, timeout: float, worker: BuildWorker = Worker
    ) -> None:
        super().__init__(Processes(spec, worker), workers=workers, timeout=timeout)


def _received(worker: ProcessHandle) -> Message:
    try:
        return worker.pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionError):
        return Died(reason=f"its worker process died ({_exit(worker.process)})")


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


def _end_in_order_on_sigterm() -> None:
    """Make SIGTERM end a worker through its `finally` clauses, so that it leaves nothing behind.

    Where the signal arrives in a callback whose exceptions Python ignores, the worker ends at once.
    """

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is SystemExit:
            os._exit(TERMINATED)
        sys.__unraisablehook__(what)

    sys.unraisablehook = ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


def _exit(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(build_worker: BuildWorker, spec: WorkerSpec, name: str, pipe: connection.Connection) -> None:
    """The worker process: say what it decided, then answer jobs until the driver's end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_in_order_on_sigterm()
    with contextlib.suppress(EOFError, ConnectionError):  # the driver is gone
        try:
            with steps.told(lambda text: pipe.send(WorkerStep(text=text))):
                worker = build_worker(spec, name)
        except Exception as error:
            pipe.send(error if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            return
        pipe.send(worker.sharing or True)
        while True:
            job = pipe.recv()
            try:
                answer: Message = worker.run(job)
            except UserError as error:  # no worker can score it now
                answer = error
            pipe.send(answer)
