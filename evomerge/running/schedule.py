"""The scheduler: the order of jobs, so that workers are also busy at the end of a generation.

It does three things. None of them changes a score, because scores belong to (recipe, split, item block):

- **Longest first.** Jobs are handed out by their expected time, from the past times of a merge and of an item
  block of each split.
- **Blocks as jobs.** A free worker gets one block of a candidate at a time, then the next block of the same
  candidate, whose weights it has. The candidate expected to finish last is shared among workers where no new
  candidate is left or all workers would wait for it, if the shared part takes WORTH times as long as the
  merge it costs. Where sharing can't be worth that, a worker gets all blocks at once. Pieces are joined
  again; a piece that fails is its candidate's failure.
- **Streams.** Where jobs are submitted one by one, no generation waits for the last of them. Then a worker
  stays with its candidate. Others help only when no new one is left: before, they would merge for nothing.
- **Spare work.** Idle workers score what a later phase will certainly need. The results go to the store,
  where the later phase reads them; a job still running by then is awaited instead of started again. A failure
  is not recorded: the later phase tries the job again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation.scores import Failure, Scores, Split, joined
from evomerge.evaluation.sharing import Sharing
from evomerge.merging.recipe import Recipe
from evomerge.running.batches import Batches
from evomerge.running.earlier_scores import EarlierScores
from evomerge.running.executors.contract import AnyJob, Executor, key_of
from evomerge.running.store import RunStore, Timing
from evomerge.running.worker import Job, NotBegun, Result

WORTH = 2.0
"""Least ratio of a piece's scoring time to the time of its merge."""
MEMORY = 0.9
"""Weight of the past in the running means of times."""


class Pace:
    """Running means of the times of merging and scoring, in seconds."""

    def __init__(self) -> None:
        self.merge: float | None = None
        self.blocks: dict[Split, float] = {}

    def learn(self, result: Result, *, warm: bool = False) -> None:
        """Add the times of a job. warm: its worker already had the weights."""
        timing, job = result.timing, result.job
        if timing is None or not isinstance(job, Job):
            return
        if not warm:
            self.merge = _mean(self.merge, timing.merge)
        block = (timing.total - timing.merge) / len(job.blocks)
        self.blocks[job.split] = _mean(self.blocks.get(job.split), block)

    def expected(self, job: AnyJob) -> float:
        """Return the expected time of a job, in seconds once a job of its split was timed."""
        if not isinstance(job, Job):
            return math.inf
        return (self.merge or 0.0) + len(job.blocks) * self.blocks.get(job.split, 1.0)


def _mean(past: float | None, now: float) -> float:
    return now if past is None else MEMORY * past + (1 - MEMORY) * now


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A job that a call of `run` waits for.

    left: blocks not handed out. out: pieces under way. pieces: those done. block: seconds of one of its own
    blocks, None while unknown.
    """

    job: AnyJob
    left: tuple[int, ...]
    out: int = 0
    pieces: list[Result] = field(default_factory=list)
    block: float | None = None


class Scheduler:
    """An executor that reorders the jobs of another one: the same results, in less time."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pace = Pace()
        self._fresh: collections.deque[_Pending] = collections.deque()
        self._begun: list[_Pending] = []
        """Jobs with blocks not handed out: `_fresh` all of them, `_begun` some."""
        self._streaming = False
        """Whether jobs are submitted one by one."""
        self._open: set[_Pending] = set()
        self._under_way: dict[Hashable, _Pending] = {}
        """Pieces handed out, by key."""
        self._warm: set[Hashable] = set()
        """Pieces whose worker already had the weights, by key."""
        self._spare: collections.deque[Job] = collections.deque()
        self._keep: dict[Hashable, Callable[[Result], None]] = {}
        """Receivers of the results of spare jobs, by key."""
        self._spare_out: set[Hashable] = set()
        """Keys of spare jobs handed out."""
        self._adopted: dict[Hashable, _Pending] = {}
        """Pending jobs that are in progress as spare ones."""

    @property
    def sharing(self) -> Sharing | None:
        """That of the other executor."""
        return self._executor.sharing

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[Result]:
        """Run the jobs and yield a result for each as it completes."""
        self._begin(jobs)
        yield from self._completed()

    def submit(self, jobs: Iterable[Job], *, first: bool = False) -> None:
        """Add jobs whose results `next` returns. first: before those that wait."""
        self._streaming = True
        added = [_Pending(job=job, left=job.blocks) for job in jobs]
        self._open.update(added)
        self._fresh = collections.deque([*added, *self._fresh] if first else [*self._fresh, *added])

    def next(self) -> Result | None:
        """Wait for the result of a submitted job, whichever completes first; None where none is left."""
        return next(self._completed(), None)

    def _completed(self) -> Iterator[Result]:
        while self._open:
            answered = False
            for result in self._executor.run(self):
                answered = True
                done = self._take(result)
                if done is not None:
                    yield done
                if not self._open:  # spare jobs go on
                    return
            assert answered or not self._open, "an executor left jobs unanswered"

    def later(self, jobs: Iterable[Job], keep: Callable[[Result], None]) -> None:
        """Run jobs while workers would be idle.

        keep: receives the result of every job that was scored, unless `run` was given the same job by then.
        """
        for job in jobs:
            if key_of(job) not in self._keep:
                self._keep[key_of(job)] = keep
                self._spare.append(job)

    def close(self) -> None:
        """Stop all work and leave no process behind."""
        self._executor.close()

    @property
    def workers(self) -> int:
        """How many jobs the other executor runs at a time."""
        return getattr(self._executor, "workers", 1)

    # -- handing out --------------------------------------------------------------------------------

    def _begin(self, jobs: Iterable[AnyJob]) -> None:
        self._streaming = False
        requested = [_Pending(job=job, left=getattr(job, "blocks", ())) for job in jobs]
        self._open, self._under_way = set(requested), {}
        asked = {key_of(pending.job): pending for pending in requested}
        self._adopted = {key: pending for key, pending in asked.items() if key in self._spare_out}
        self._spare = collections.deque(job for job in self._spare if key_of(job) not in asked)
        for key in asked.keys() - self._spare_out:
            self._keep.pop(key, None)
        rest = [pending for key, pending in asked.items() if key not in self._adopted]
        rest.sort(key=lambda pending: -self._pace.expected(pending.job))
        self._fresh, self._begun = collections.deque(rest), []

    @property
    def ahead(self) -> bool:
        """Whether jobs may be chosen for workers that still start: not where each stays with a candidate."""
        return not self._streaming

    def after(self, last: AnyJob | None) -> AnyJob | None:
        """Return the next job for a worker whose last one was `last`; a scheduler is its own `Orders`."""
        pending, count = self._choose(last)
        if pending is not None:
            return self._piece(pending, count, last)
        if self._spare and self.workers > 1:
            job = self._spare.popleft()
            self._spare_out.add(key_of(job))
            return job
        return None

    def __iter__(self) -> Iterator[AnyJob]:
        last: AnyJob | None = None
        while (last := self.after(last)) is not None:
            yield last

    def _choose(self, last: AnyJob | None) -> tuple[_Pending | None, int]:
        """Return the pending job for a worker, and how many of its blocks."""
        same = next(
            (begun for begun in self._begun if last is not None and begun.job.recipe is last.recipe), None
        )
        if self._streaming and same is None:
            alone = next((begun for begun in self._begun if not begun.out), None)  # its worker died
            if alone is not None:
                return alone, self._at_once(alone)
        others = [begun for begun in self._begun if begun is not same]
        longest = max(others, key=self._rest, default=None)
        if longest is not None and ((same is None and not self._fresh) or self._awaited(longest)):
            worth = self._worth(longest)
            if worth <= len(longest.left):
                return longest, int(worth)
        if same is not None:
            return same, self._at_once(same)
        if self._fresh:
            pending = self._fresh.popleft()
            self._begun.append(pending)
            return pending, self._at_once(pending)
        return next((begun for begun in self._begun if not begun.out), None), 1  # its worker helps others

    def _piece(self, pending: _Pending, count: int, last: AnyJob | None) -> AnyJob:
        """Cut off a piece of a job and record that it is under way."""
        piece = pending.job
        if isinstance(piece, Job):
            piece = piece.part(pending.left[:count])
            pending.left = pending.left[count:]
        if not pending.left:
            self._begun.remove(pending)
        pending.out += 1
        self._under_way[key_of(piece)] = pending
        if last is not None and last.recipe is piece.recipe:
            self._warm.add(key_of(piece))
        return piece

    def _at_once(self, pending: _Pending) -> int:
        """Return how many of a candidate's blocks its worker gets: one if others might help, else all."""
        return 1 if self.workers > 1 and self._worth(pending) < len(pending.left) else len(pending.left)

    def _awaited(self, pending: _Pending) -> bool:
        """Whether one worker needs longer for this candidate than all workers for everything else."""
        if self._streaming:
            return False
        fresh = sum(len(job.left) * self._block(job) for job in self._fresh)
        return self._rest(pending) * self.workers > fresh + sum(map(self._rest, self._begun))

    def _rest(self, pending: _Pending) -> float:
        return len(pending.left) * self._block(pending)

    def _block(self, pending: _Pending) -> float:
        """Return the time of a block of a candidate, in seconds once one was timed."""
        return pending.block or self._pace.blocks.get(pending.job.split, 1.0)

    def _worth(self, pending: _Pending) -> float:
        """Return the least number of blocks worth a merge of their own; infinite while unknown."""
        merge, known = self._pace.merge, pending.block or self._pace.blocks.get(pending.job.split)
        return math.inf if merge is None or not known else max(1, math.ceil(WORTH * merge / known))

    # -- taking in ----------------------------------------------------------------------------------

    def _take(self, result: Result) -> Result | None:
        """Process one result; return the result of a pending job once it is complete."""
        key = key_of(result.job)
        self._pace.learn(result, warm=key in self._warm)
        self._warm.discard(key)
        if key in self._spare_out:
            self._spare_out.remove(key)
            keep = self._keep.pop(key)
            pending = self._adopted.pop(key, None)
            scored = isinstance(result.outcome, Scores)
            if pending is None:
                if scored:
                    keep(result)
                return None
            if not scored:
                self._fresh.append(pending)  # as if it had never been tried
                return None
            self._open.remove(pending)
            return dataclasses.replace(result, job=pending.job)
        if key not in self._under_way:  # of a call that was left early
            return None
        pending = self._under_way.pop(key)
        pending.out -= 1
        pending.pieces.append(result)
        if result.timing is not None and isinstance(result.job, Job):
            pending.block = (result.timing.total - result.timing.merge) / len(result.job.blocks)
        if not isinstance(result.outcome, Scores) and pending.left:
            pending.left = ()  # what is under way are the earlier blocks
            self._begun.remove(pending)
        if pending.out or pending.left:
            return None
        self._open.remove(pending)
        return _whole(pending)


def _whole(pending: _Pending) -> Result:
    """Join the results of pieces: the scores of all, or the first failure."""
    if len(pending.pieces) == 1:
        return dataclasses.replace(pending.pieces[0], job=pending.job)
    assert isinstance(pending.job, Job)
    order = {block: position for position, block in enumerate(pending.job.blocks)}
    pieces = sorted(pending.pieces, key=lambda piece: order[_first_block(piece.job)])
    parts: list[Scores] = []
    for piece in pieces:
        parts += piece.parts or ([piece.outcome] if isinstance(piece.outcome, Scores) else [])
    timings = [piece.timing for piece in pieces if piece.timing is not None]
    failed = next((piece for piece in pieces if isinstance(piece.outcome, Failure)), None)
    if failed is not None:
        return dataclasses.replace(failed, job=pending.job)
    timing = None
    if timings:
        timing = Timing(
            total=sum(timing.total for timing in timings),
            merge=sum(timing.merge for timing in timings),
            forward=sum(timing.forward for timing in timings),
            worker=timings[-1].worker,
        )
    late = next((piece.outcome for piece in pieces if isinstance(piece.outcome, NotBegun)), None)
    return Result(
        job=pending.job,
        outcome=late or joined(parts),
        timing=timing,
        parts=tuple(parts),
        faults=tuple(fault for piece in pieces for fault in piece.faults),
        weights=next((piece.weights for piece in pieces if piece.weights is not None), None),
        questions={block: tasks for piece in pieces for block, tasks in piece.questions.items()},
    )


def _first_block(job: AnyJob) -> int:
    assert isinstance(job, Job)
    return job.blocks[0]


class Foresight:
    """Lets idle workers score what a run will certainly need later, and stores the scores."""

    def __init__(
        self,
        store: RunStore,
        scheduler: Scheduler,
        batches: Batches,
        earlier: EarlierScores | None = None,
    ) -> None:
        self._store, self._scheduler, self._batches, self._earlier = store, scheduler, batches, earlier

    def __call__(self, recipes: Sequence[Recipe], split: Split) -> None:
        """Announce recipes that will be scored on all items of a split."""
        blocks = tuple(range(self._store.blocks(split)))
        self._scheduler.later(
            [
                Job(
                    recipe=recipe,
                    split=split,
                    blocks=blocks,
                    batch_sizes=self._batches.sizes(split, blocks),
                    questions=number == 0 and not self._store.questions(split, blocks[0]),
                )
                for number, recipe in enumerate(recipes)
                if self._store.result(recipe.hash, split) is None
                and not (self._earlier is not None and self._earlier.has(recipe.hash, split))
            ],
            self._store_scores,
        )

    def _store_scores(self, result: Result) -> None:
        assert isinstance(result.outcome, Scores)
        assert result.timing is not None
        assert isinstance(result.job, Job)
        in_force = Batches(self._store, self._batches.size).sizes(result.job.split, result.job.blocks)
        if result.job.batch_sizes != in_force:  # halved since: what it is compared with is scored otherwise
            return
        parts = result.parts or (result.outcome,)
        self._store.record_scores(
            result.job.recipe, parts, result.timing, weights=result.weights, questions=result.questions
        )
