"""What executors and their workers agree on: jobs go in, results come out; failures are values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from evomerge.running.worker import GradientJob, Job, Result, WorkerSpec

AnyJob = Job | GradientJob


class Runs(Protocol):
    """What an executor needs of the worker it builds."""

    def run(self, job: Any) -> Result: ...


BuildWorker = Callable[[WorkerSpec, str], Runs]
"""Makes a worker of a spec and its name; `Worker` is one."""


class Executor(Protocol):
    """Runs jobs. Results come in any order."""

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs and yield a result for each as it completes.

        jobs: asked for the next one only when a worker is free for it; they may be `Orders`. Where the
            results are not taken to the end, what is under way goes on, and the next call yields it too.
        """
        ...

    def close(self) -> None:
        """Stop all work and leave no process behind."""
        ...


@runtime_checkable
class Orders(Protocol):
    """Jobs that depend on who asks: what a worker has in its live model is cheap for it to go on with."""

    def after(self, last: AnyJob | None) -> AnyJob | None:
        """Return the next job for a worker whose last one was `last`, or None if there is none now."""
        ...

    def __iter__(self) -> Iterator[AnyJob]: ...


def key_of(job: AnyJob) -> Hashable:
    """Return what tells a job from all others of a run."""
    if isinstance(job, GradientJob):
        return job.recipe.hash, job.split, job.loss.key
    return job.recipe.hash, job.split, job.blocks, tuple(sorted(job.batch_sizes.items()))
