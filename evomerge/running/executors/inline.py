"""The executor without processes: jobs run one after the other where the search runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evomerge.running.executors.contract import AnyJob, BuildWorker
from evomerge.running.worker import Result, Worker, WorkerSpec


class Inline:
    """Runs jobs one after the other in this process: no isolation, no timeout, no start-up cost."""

    workers = 1

    def __init__(self, spec: WorkerSpec, *, worker: BuildWorker = Worker) -> None:
        self._worker = worker(spec, "inline")
        self.sharing = self._worker.sharing

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs in order."""
        for job in jobs:
            yield self._worker.run(job)

    def close(self) -> None:
        """Nothing to stop."""
