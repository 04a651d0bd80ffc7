"""What is run when, so that workers are busy also where a generation ends. Results don't depend on it.

Three things are done, none of which changes a score, because scores belong to (recipe, split, item block):

- **Longest first.** Jobs are handed out by the time they are expected to take: what a merge and an item
  block of each split took so far.
- **Blocks as jobs.** A free worker gets a candidate's blocks as long as these are no more than its share of
  all that is left (1 / workers: guided self-scheduling, Polychronopoulos & Kuck 1987, *IEEE Trans. Computers*
  36), so the last pieces of a batch are the smallest. A piece costs a merge of its own, so it is at least
  WORTH times as long as one. Pieces are put together again; one that fails is its candidate's failure.
- **Spare work.** What is certain to be asked for later is given to workers that have nothing else to do.
  Nobody waits for it: its results go to the store, where the later phase finds them; what is still under way
  by then is waited for instead of done twice. A failure is forgotten: the later phase meets it again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation.scores import Failure, Scores, Split, joined
from evomerge.merging.recipe import Recipe
from evomerge.running.executors.contract import AnyJob, Executor, key_of
from evomerge.running.store import RunStore, Timing
from evomerge.running.worker import GradientJob, Job, Result

WORTH = 2.0
"""How many times as long as its merge the scoring of a piece must take."""
MEMORY = 0.9
"""Weight of the past in the running means of what things take."""


class Pace:
    """Running means of what merging and scoring took, in seconds."""

    def __init__(self) -> None:
        self._merge: float | None = None
        self._blocks: dict[Split, float] = {}

    def learn(self, result: Result) -> None:
        """Take note of what a job took."""
        timing, job = result.timing, result.job
        if timing is None or isinstance(job, GradientJob):
            return
        self._merge = _mean(self._merge, timing.merge)
        block = (timing.total - timing.merge) / len(job.blocks)
        self._blocks[job.split] = _mean(self._blocks.get(job.split), block)

    def expected(self, job: AnyJob) -> float:
        """Return how long a job will take; in unknown units where nothing is known of its split."""
        if isinstance(job, GradientJob):
            return math.inf
        return (self._merge or 0.0) + len(job.blocks) * self._blocks.get(job.split, 1.0)

    def least(self, split: Split) -> float:
        """Return how many blocks a piece must have to be worth its merge; infinite while that is unknown."""
        block = self._blocks.get(split)
        if block is None or self._merge is None:
            return math.inf
        return max(1, math.ceil(WORTH * self._merge / block)) if block > 0 else math.inf


def _mean(past: float | None, now: float) -> float:
    return now if past is None else MEMORY * past + (1 - MEMORY) * now


@dataclass(slots=True, kw_only=True, eq=False)
class _Wanted:
    """A job somebody waits for. left: blocks not handed out. out: pieces under way. pieces: those done."""

    job: AnyJob
    left: tuple[int, ...]
    out: int = 0
    pieces: list[Result] = field(default_factory=list)


class Scheduler:
    """An executor in front of another one: the same results, in less time."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pace = Pace()
        self._queue: list[_Wanted] = []
        self._open: set[_Wanted] = set()
        self._under_way: dict[Hashable, _Wanted] = {}
        """Pieces handed out, by key."""
        self._spare: collections.deque[Job] = collections.deque()
        self._keep: dict[Hashable, Callable[[Result], None]] = {}
        """What happens to the results of spare jobs, by key."""
        self._given: set[Hashable] = set()
        """Spare jobs handed out."""
        self._adopted: dict[Hashable, _Wanted] = {}
        """Jobs somebody waits for that are under way as spare ones."""

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs and yield a result for each as it completes."""
        self._begin(jobs)
        while self._open:
            found = False
            for result in self._executor.run(self._orders()):
                found = True
                done = self._take(result)
                if done is not None:
                    yield done
                if not self._open:  # spare jobs go on
                    return
            assert found or not self._open, "an executor left jobs unanswered"

    def later(self, jobs: Iterable[Job], keep: Callable[[Result], None]) -> None:
        """Have jobs done when workers would be idle.

        keep: is given the result of each that was scored, unless `run` was asked for it by then.
        """
        for job in jobs:
            if key_of(job) not in self._keep:
                self._keep[key_of(job)] = keep
                self._spare.append(job)

    def close(self) -> None:
        """Stop all work and leave no process behind."""
        self._executor.close()

    @property
    def _workers(self) -> int:
        return getattr(self._executor, "workers", 1)

    # -- handing out --------------------------------------------------------------------------------

    def _begin(self, jobs: Iterable[AnyJob]) -> None:
        wanted = [_Wanted(job=job, left=getattr(job, "blocks", ())) for job in jobs]
        self._open, self._under_way = set(wanted), {}
        asked = {key_of(each.job): each for each in wanted}
        self._adopted = {key: each for key, each in asked.items() if key in self._given}
        self._spare = collections.deque(job for job in self._spare if key_of(job) not in asked)
        for key in asked.keys() - self._given:
            self._keep.pop(key, None)
        rest = [each for key, each in asked.items() if key not in self._adopted]
        self._queue = sorted(rest, key=lambda each: -self._pace.expected(each.job))

    def _orders(self) -> Iterator[AnyJob]:
        """Yield the next job whenever a worker is free."""
        while self._queue:
            yield self._next_piece()
        while self._spare and self._workers > 1:
            job = self._spare.popleft()
            self._given.add(key_of(job))
            yield job

    def _next_piece(self) -> AnyJob:
        wanted = self._queue[0]
        piece = wanted.job
        if isinstance(piece, Job):
            count = self._share(wanted, piece.split)
            piece = piece.part(wanted.left[:count])
            wanted.left = wanted.left[count:]
        if not wanted.left or isinstance(piece, GradientJob):
            self._queue.pop(0)
        wanted.out += 1
        self._under_way[key_of(piece)] = wanted
        return piece

    def _share(self, wanted: _Wanted, split: Split) -> int:
        """Return how many of a candidate's blocks the next free worker gets."""
        whole, least = len(wanted.left), self._pace.least(split)
        count = max(math.ceil(sum(len(each.left) for each in self._queue) / self._workers), least)
        return whole if whole - count < least else int(count)

    # -- taking in ----------------------------------------------------------------------------------

    def _take(self, result: Result) -> Result | None:
        """Deal with one result; return that of a job somebody waits for, once it is whole."""
        self._pace.learn(result)
        key = key_of(result.job)
        if key in self._given:
            self._given.remove(key)
            keep = self._keep.pop(key)
            wanted = self._adopted.pop(key, None)
            scored = isinstance(result.outcome, Scores)
            if wanted is None:
                if scored:
                    keep(result)
                return None
            if not scored:
                self._queue.append(wanted)  # as if it had never been tried
                return None
            self._open.remove(wanted)
            return dataclasses.replace(result, job=wanted.job)
        if key not in self._under_way:  # of a call that was left early
            return None
        wanted = self._under_way.pop(key)
        wanted.out -= 1
        wanted.pieces.append(result)
        if isinstance(result.outcome, Failure) and wanted.left:
            wanted.left = ()
            self._queue.remove(wanted)
        if wanted.out or wanted.left:
            return None
        self._open.remove(wanted)
        return _whole(wanted)


def _whole(wanted: _Wanted) -> Result:
    """Put the results of pieces together: the scores of all, or the failure that comes first."""
    if len(wanted.pieces) == 1:
        return dataclasses.replace(wanted.pieces[0], job=wanted.job)
    assert isinstance(wanted.job, Job)
    order = {block: position for position, block in enumerate(wanted.job.blocks)}
    pieces = sorted(wanted.pieces, key=lambda piece: order[_first_block(piece.job)])
    for piece in pieces:
        if isinstance(piece.outcome, Failure):
            return dataclasses.replace(piece, job=wanted.job)
    parts = [part for piece in pieces for part in (piece.parts or (piece.outcome,))]
    timings = [piece.timing for piece in pieces if piece.timing is not None]
    scores = [part for part in parts if isinstance(part, Scores)]
    return Result(
        job=wanted.job,
        outcome=joined(scores),
        timing=Timing(
            total=sum(timing.total for timing in timings),
            merge=sum(timing.merge for timing in timings),
            forward=sum(timing.forward for timing in timings),
            worker=timings[-1].worker,
        ),
        parts=tuple(scores),
    )


def _first_block(job: AnyJob) -> int:
    assert isinstance(job, Job)
    return job.blocks[0]


class Foresight:
    """Has idle workers score what a run is certain to ask for later, into its store."""

    def __init__(self, store: RunStore, scheduler: Scheduler) -> None:
        self._store, self._scheduler = store, scheduler

    def __call__(self, recipes: Sequence[Recipe], split: Split) -> None:
        """Foresee that recipes will be scored on all of a split."""
        blocks = tuple(range(self._store.blocks(split)))
        self._scheduler.later(
            [
                Job(recipe=recipe, split=split, blocks=blocks)
                for recipe in recipes
                if self._store.result(recipe.hash, split) is None
            ],
            self._store_scores,
        )

    def _store_scores(self, result: Result) -> None:
        assert isinstance(result.outcome, Scores)
        assert result.timing is not None
        self._store.record_scores(result.job.recipe, result.parts or (result.outcome,), result.timing)
