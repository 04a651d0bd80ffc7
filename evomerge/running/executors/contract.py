"""The contract between executors and workers: jobs go in, results come out; failures are values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from evomerge.evaluation.sharing import Sharing
from evomerge.running.worker import DistributionsJob, GradientJob, Job, Result, WorkerSpec

AnyJob = Job | GradientJob | DistributionsJob


class Runs(Protocol):
    """What an executor needs of the worker it builds.

    sharing: what the worker decided, if it was not told; the executor tells the others.
    """

    sharing: Sharing | None

    def run(self, job: Any) -> Result:
        """Run a job; raise UserError where no worker can run one now, because the run's inputs changed."""
        ...


BuildWorker = Callable[[WorkerSpec, str], Runs]
"""Makes a worker of a spec and its name; `Worker` is one."""


class Executor(Protocol):
    """Runs jobs. Results come in any order."""

    @property
    def sharing(self) -> Sharing | None:
        """Whether requests share rows, which the first worker decided; None where no worker says."""
        ...

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs and yield a result for each as it completes.

        jobs: The next one is taken only when a worker is free; they may be `Orders`. If the caller stops
            early, jobs under way continue, and the next call yields their results too.

        Raises UserError where workers can't go on because the run's inputs changed.
        """
        ...

    def close(self) -> None:
        """Stop all work and leave no process behind."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """An executor that also takes jobs one by one."""

    def submit(self, jobs: Iterable[Job], *, first: bool = False) -> None:
        """Add jobs whose results `next` returns. first: before those that wait."""
        ...

    def next(self) -> Result | None:
        """Wait for the result of a submitted job, whichever completes first; None where none is left."""
        ...


@runtime_checkable
class Orders(Protocol):
    """Jobs chosen per worker: a worker continues cheaply with the weights in its live model.

    ahead: whether a job may be chosen for a worker that still starts. The first idle worker takes it, and
    leaves its own candidate to others.
    """

    @property
    def ahead(self) -> bool: ...

    def after(self, last: AnyJob | None) -> AnyJob | None:
        """Return the next job for a worker whose last one was `last`, or None if there is none now."""
        ...

    def __iter__(self) -> Iterator[AnyJob]: ...


def key_of(job: AnyJob) -> Hashable:
    """Return a key that identifies a job within a run."""
    if isinstance(job, GradientJob):
        return job.recipe.hash, job.split, job.loss.key
    if isinstance(job, DistributionsJob):
        return job.recipe.hash, job.tasks
    return job.recipe.hash, job.split, job.blocks, tuple(sorted(job.batch_sizes.items()))
