"""The pool: hands jobs to workers and handles workers that die, hang or can't start.

A `WorkerBackend` starts and ends the workers (processes on this machine, actors of a Ray cluster). The rules
are the same for all: a worker that dies is replaced and its job is tried a second time, because the cause may
lie outside the candidate, and a second scoring gives the same bits. A second death is a `crash` of the job. A
worker that exceeds the timeout is killed, which is a `timeout` of its job. Workers are started when there is
a job for them; the pool continues without a worker that can't start, unless it is the only one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from evomerge import steps
from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure
from evomerge.evaluation.sharing import Sharing
from evomerge.running.executors.contract import AnyJob, Orders, key_of
from evomerge.running.worker import Result

H = TypeVar("H")

START_SECONDS = 600.0
"""How long a worker may take to load the models, at least."""
WAIT_SECONDS = 1.0
"""How long the pool waits for messages at a time, so that it notices when it was stopped itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """A worker ended; reason: part of a sentence, equal for equal causes; kind: of its job's failure."""

    reason: str
    kind: Literal["crash", "out_of_memory"] = "crash"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStep:
    """A step of a worker that starts; see `evomerge.steps`."""

    text: str


Message = Literal[True] | Sharing | UserError | str | Result | Died | WorkerStep
"""What is heard of a worker: that it is ready, or what it decided then; why it can't be (a mistake of the
user's, or what else), a result, its death, or a step on its way."""


class WorkerBackend(Protocol[H]):
    """Starts, feeds and ends workers of one kind. H is its handle of one."""

    lack: str
    """Advice where not a single worker can start."""
    lingers: bool
    """Whether workers that can't start yet may go on waiting for their place while others work."""

    def start(self, name: str, seat: int) -> H:
        """Start a worker and return at once. seat: the index of its place, from 0."""
        ...

    def share(self, sharing: Sharing) -> None:
        """Tell the workers still to come what the first decided."""
        ...

    def give(self, worker: H, job: AnyJob) -> None:
        """Hand a job to an idle worker; if the worker is dead, `wait` reports it."""
        ...

    def wait(self, workers: Sequence[H], seconds: float) -> list[tuple[H, Message]]:
        """Return the messages of starting and busy workers, after `seconds` at the latest."""
        ...

    def alive(self, worker: H) -> bool:
        """Say whether an idle worker can take a job."""
        ...

    def kill(self, worker: H) -> None:
        """End a worker at once."""
        ...

    def close(self, idle: Sequence[H], busy: Sequence[H]) -> None:
        """End all workers and wait for them to be gone."""
        ...

    def now(self) -> float:
        """Return the time in seconds."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class _Member(Generic[H]):
    handle: H
    seat: int
    deadline: float
    ready: bool = False
    job: AnyJob | None = None
    last: AnyJob | None = None


class _InOrder:
    """Jobs in one order, for any worker."""

    ahead = True

    def __init__(self, jobs: Iterable[AnyJob]) -> None:
        self._jobs = iter(jobs)

    def after(self, last: AnyJob | None) -> AnyJob | None:
        return next(self._jobs, None)

    def __iter__(self) -> Iterator[AnyJob]:
        return self._jobs


class Pool(Generic[H]):
    """An executor over a backend: keeps up to `workers` workers busy.

    timeout: seconds a job may take. Raises UserError where not a single worker can start.
    """

    def __init__(self, backend: WorkerBackend[H], *, workers: int, timeout: float) -> None:
        self.workers = workers
        self.sharing: Sharing | None = None
        self._backend, self._timeout = backend, timeout
        self._patience = max(timeout, START_SECONDS)
        self._started = 0
        self._members: list[_Member[H]] = []
        self._waiting: collections.deque[AnyJob] = collections.deque()
        self._deaths: collections.Counter[Hashable] = collections.Counter()
        self._done: collections.deque[Result] = collections.deque()
        try:
            self._start()
            while not self._members[0].ready:
                self._listen()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs, keeping every worker busy; yield results as they complete."""
        orders = jobs if isinstance(jobs, Orders) else _InOrder(jobs)
        while True:
            while self._done:  # also of an earlier call that was left early
                yield self._done.popleft()
            self._employ(orders)
            if not self._waiting and not any(member.job for member in self._members):
                return
            self._listen()

    def close(self) -> None:
        """Stop all workers, busy or not, and wait for them to be gone."""
        idle = [m.handle for m in self._members if m.ready and m.job is None]
        busy = [m.handle for m in self._members if not m.ready or m.job is not None]
        self._members.clear()
        self._waiting.clear()
        self._backend.close(idle, busy)

    def _employ(self, orders: Orders) -> None:
        """Give idle workers their next jobs; start workers while there are more jobs than idle ones."""
        while True:
            idle = next((m for m in self._members if m.ready and m.job is None), None)
            starting = sum(not member.ready for member in self._members)
            full = len(self._members) >= self.workers
            if idle and self._waiting:
                if self._backend.alive(idle.handle):
                    self._give(idle, self._waiting.popleft())
                else:  # it died idle: no candidate's doing
                    self._lost(idle, "crash", "")
            elif not idle and full and (len(self._waiting) >= starting or self._must_wait(orders)):
                return
            elif not idle and len(self._waiting) > starting:
                self._start()
            elif (job := orders.after(idle.last if idle else None)) is not None:
                self._waiting.append(job)
            else:
                return

    def _must_wait(self, orders: Orders) -> bool:
        """Say whether the next job is chosen only when a worker asks; some will, for they work."""
        return not orders.ahead and any(member.job for member in self._members)

    def _give(self, member: _Member[H], job: AnyJob) -> None:
        member.job = member.last = job
        member.deadline = self._backend.now() + self._timeout
        self._backend.give(member.handle, job)

    def _listen(self) -> None:
        """Wait for the next message and process it."""
        busy = [m for m in self._members if m.job is not None or not m.ready]
        begun = self._backend.now()
        seconds = min(max(0.0, min(m.deadline for m in busy) - begun), WAIT_SECONDS)
        heard = self._backend.wait([m.handle for m in busy], seconds)
        stopped = self._backend.now() - begun - seconds
        if stopped > WAIT_SECONDS:  # this process was stopped (SIGSTOP, a suspended machine), and workers too
            for member in busy:
                member.deadline += stopped
        by_handle = {id(member.handle): member for member in busy}
        for handle, message in heard:
            self._hear(by_handle.pop(id(handle)), message)
        now = self._backend.now()
        for member in by_handle.values():
            if now < member.deadline:
                continue
            if member.ready:
                self._lost(member, "timeout", f"took longer than {self._timeout:g} s")
            elif self._backend.lingers and any(other.ready for other in self._members):
                member.deadline = now + self._patience
            else:
                self._lost(member, "timeout", f"it took longer than {self._patience:g} s")

    def _hear(self, member: _Member[H], message: Message) -> None:
        if isinstance(message, Died):
            self._lost(member, message.kind, message.reason)
        elif isinstance(message, Result):
            assert member.job is not None
            self._deaths.pop(key_of(member.job), None)
            self._done.append(dataclasses.replace(message, job=member.job))
            member.job = None
        elif isinstance(message, WorkerStep):
            if not any(other.ready for other in self._members):  # the first worker is waited for
                steps.say(message.text)
        elif isinstance(message, UserError):
            raise message
        elif isinstance(message, str):
            raise UserError(f"a worker could not start: {message}", fix="try it alone: evomerge check CONFIG")
        else:
            member.ready = True
            if self.sharing is None and isinstance(message, Sharing):
                self.sharing = message
                self._backend.share(message)

    def _start(self) -> None:
        taken = {member.seat for member in self._members}
        seat = next(seat for seat in range(len(taken) + 1) if seat not in taken)
        handle = self._backend.start(str(self._started), seat)
        self._started += 1
        deadline = self._backend.now() + self._patience
        self._members.append(_Member(handle=handle, seat=seat, deadline=deadline))

    def _lost(
        self, member: _Member[H], kind: Literal["crash", "timeout", "out_of_memory"], reason: str
    ) -> None:
        """Replace a dead worker; its job is tried again after the first death and fails after the second."""
        self._backend.kill(member.handle)
        self._members.remove(member)
        if not member.ready:
            self._stillborn(reason)
            return
        self._start()
        if member.job is None:
            return
        key = key_of(member.job)
        self._deaths[key] += 1
        if kind != "timeout" and self._deaths[key] == 1:
            self._waiting.appendleft(member.job)
            return
        del self._deaths[key]
        self._done.append(Result(job=member.job, outcome=Failure(kind=kind, reason=reason)))

    def _stillborn(self, reason: str) -> None:
        """Continue with fewer workers where one could not start; without any, raise UserError."""
        self.workers = len(self._members)
        if not self._members:
            raise UserError(f"no worker could load the models: {reason}", fix=self._backend.lack)
