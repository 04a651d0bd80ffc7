"""The scorer: returns stored scores, executes what is missing, and records results as they arrive."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from evomerge.errors import UserError
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split, joined
from evomerge.evaluation.smooth_loss import Gradient
from evomerge.merging.recipe import Recipe
from evomerge.running.batches import Batches, Halved
from evomerge.running.breaker import Breaker
from evomerge.running.earlier_scores import EarlierScores
from evomerge.running.executors import Executor, Streaming, key_of
from evomerge.running.observers import Observer
from evomerge.running.store import RunStore
from evomerge.running.worker import Job, NotBegun, Result, WrittenAnswers
from evomerge.search.ports import Named, OutOfTime


class Scorer:
    """Scores recipes through an executor; every recipe only once per item block in the life of a run.

    batches: the batch sizes in force. failures: in a row, after which BrokenRunError is raised. now: the
    time, in epoch seconds. earlier: another run's scores, which are taken before anything is executed. Raises
    Halved where a batch size turns out too large for the device's memory.
    """

    def __init__(
        self,
        store: RunStore,
        executor: Executor,
        observer: Observer,
        batches: Batches,
        *,
        failures: int = 16,
        now: Callable[[], float] = time.time,
        earlier: EarlierScores | None = None,
    ) -> None:
        self._store, self._executor, self._observer, self._batches = store, executor, observer, batches
        self._breaker, self._now, self._earlier = Breaker(failures), now, earlier
        self.not_after: float | None = None
        """The latest start of a job, in epoch seconds (see `search.ports.CandidateScorer`)."""
        self._asked: set[tuple[str, Split, int]] = set()
        """(recipe, split, block) of earlier calls; the same in every session, which replays the search."""
        self._questions: dict[Split, set[int]] = {split: set() for split in SPLITS}
        """Split -> blocks whose questions are stored."""
        self.seconds = 0.0
        """Time this process spent on the store, without waiting for workers."""
        self._submitted: dict[Hashable, tuple[str, Job, list[Scores]]] = {}
        """Key -> ticket, job and stored scores of what `submit` has begun."""
        self._answered: collections.deque[tuple[str, Scores | Failure]] = collections.deque()
        """Tickets of what `submit` found in the store."""
        self._heard: collections.deque[Result] = collections.deque()
        """Results of submitted jobs that came while `score` waited for its own."""
        self._undone = False
        """Whether something submitted was not begun because of `not_after`."""
        self._too_large: set[int] = set()

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        """Return one result per recipe, in order; failures are recorded and stay failures.

        blocks: the item blocks to score on (default: all of the split). Only those not scored yet are
        executed, in the order given; a failure on one of them is the recipe's failure on the split.

        Raises OutOfTime where something is left undone because of `not_after`, and BrokenRunError after too
        many failures in a row.
        """
        return self._score(recipes, split, phase, blocks, keep_failures=True)

    def require(self, named: Sequence[Named], split: Split, phase: str) -> list[Scores]:
        """Like `score` for recipes the run can't do without: the first failure raises UserError.

        Such a failure is not recorded, and failures just before it are deleted, so that the run can be
        resumed once their cause is removed.
        """
        results = self._score([n.recipe for n in named], split, phase, None, keep_failures=False)
        scores = []
        for entry, result in zip(named, results, strict=True):
            if isinstance(result, Failure):
                self._store.forget_failures()
                smaller = "a smaller executor.batch_size or max_length (in a new run)"
                starved = result.kind == "out_of_memory"
                raise UserError(
                    f"{entry.name} could not be scored on {split}: {result.reason}",
                    fix="every run needs its base and sources scored; "
                    + (
                        f"free some memory and resume, or try {smaller}"
                        if starved
                        else "remove the cause, then resume"
                    ),
                )
            scores.append(result)
        return scores

    def submit(self, ticket: str, recipe: Recipe, blocks: Sequence[int]) -> None:
        """Begin to score a recipe on item blocks of `search`, unless they are stored; `next` has the result.

        Nothing that is under way may be submitted again.
        """
        scores, failure, missing = self._stored_or_taken(recipe, "search", blocks)
        if failure is not None or not missing:
            self._answered.append((ticket, failure or joined(scores)))
        elif self.not_after is not None and self._now() >= self.not_after:
            self._undone = True
        else:
            job = Job(
                recipe=recipe,
                split="search",
                blocks=missing,
                batch_sizes=self._batches.sizes("search", missing),
                not_after=self.not_after,
                questions=self._wants("search", missing, [job for _, job, _ in self._submitted.values()]),
            )
            self._submitted[key_of(job)] = ticket, job, scores
            self._stream.submit([job])

    def next(self) -> tuple[str, Scores | Failure] | None:
        """Wait for a submitted recipe, whichever completes first; return its ticket and result.

        None where none is left. Raises OutOfTime where none is left and some were not begun because of
        `not_after`, and the exceptions of `score`.
        """
        while True:
            if self._answered and not self._too_large:
                return self._answered.popleft()
            result = self._heard.popleft() if self._heard else self._stream.next()
            if result is None:
                break
            started = time.perf_counter()
            ticket, job, scores = self._submitted[key_of(result.job)]
            if self._batches.calls_for_halving(result):
                assert result.block is not None
                self._too_large.add(result.block)
                continue  # wait for all others, or the first failure would decide
            outcome = self._taken(result, {job.recipe.hash: scores}, keep_failures=True)
            if not self._too_large:
                del self._submitted[key_of(job)]
            self.seconds += time.perf_counter() - started
            if outcome is None:
                self._undone = True
            elif not self._too_large:
                return ticket, outcome
        if self._too_large:
            jobs = [job for _, job, _ in self._submitted.values()]
            new = {b: [j.recipe.hash for j in jobs if b in j.blocks] for b in sorted(self._too_large)}
            self._batches.halve("search", new, "asynchronous search")
            raise Halved
        if self._undone:
            raise OutOfTime
        return None

    @property
    def _stream(self) -> Streaming:
        assert isinstance(self._executor, Streaming)
        return self._executor

    def _run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Run jobs, before those that `submit` has begun."""
        if not self._submitted:
            yield from self._executor.run(jobs)
            return
        left = {key_of(job) for job in jobs}
        self._stream.submit(jobs, first=True)
        while left:
            result = self._stream.next()
            assert result is not None
            if key_of(result.job) in left:
                left.remove(key_of(result.job))
                yield result
            else:
                self._heard.append(result)

    def known(
        self, recipes: Sequence[Recipe], split: Split, blocks: Sequence[int]
    ) -> list[Scores | Failure | None]:
        """Return the stored results of recipes on item blocks, None where something is missing."""
        results: list[Scores | Failure | None] = []
        for recipe in recipes:
            scores, failure, missing = self._stored(recipe.hash, split, blocks)
            results.append(failure or (None if missing else joined(scores)))
        return results

    def _score(
        self,
        recipes: Sequence[Recipe],
        split: Split,
        phase: str,
        blocks: Sequence[int] | None,
        *,
        keep_failures: bool,
    ) -> list[Scores | Failure]:
        started = time.perf_counter()
        hashes = [recipe.hash for recipe in recipes]
        results: dict[str, Scores | Failure] = {}
        stored: dict[str, list[Scores]] = {}
        jobs: dict[str, Job] = {}
        blocks = range(self._store.blocks(split)) if blocks is None else blocks
        for hash_, recipe in zip(hashes, recipes, strict=True):
            if hash_ in stored:
                continue
            stored[hash_], failure, missing = self._stored_or_taken(recipe, split, blocks)
            if failure is not None:
                results[hash_] = failure
            elif missing:
                jobs[hash_] = Job(
                    recipe=recipe,
                    split=split,
                    blocks=missing,
                    batch_sizes=self._batches.sizes(split, missing),
                    not_after=self.not_after,
                    questions=self._wants(split, missing, jobs.values()),
                )
            else:
                results[hash_] = joined(stored[hash_])
        self._observer.phase(phase, len(set(hashes)), len(results))
        if jobs and self.not_after is not None and self._now() >= self.not_after:
            raise OutOfTime
        self.seconds += time.perf_counter() - started
        too_large: set[int] = set()
        for result in self._run(list(jobs.values())):
            started = time.perf_counter()
            if self._batches.calls_for_halving(result):
                assert result.block is not None
                too_large.add(result.block)  # wait for all others, or the first failure would decide
            elif (outcome := self._taken(result, stored, keep_failures=keep_failures)) is not None:
                results[result.job.recipe.hash] = outcome
            self.seconds += time.perf_counter() - started
        if too_large:
            new = {b: [h for h in stored if (h, split, b) not in self._asked] for b in sorted(too_large)}
            self._batches.halve(split, new, phase)
            raise Halved
        if self.not_after is not None and len(results) < len(set(hashes)):
            raise OutOfTime
        self._asked.update((hash_, split, block) for hash_ in stored for block in blocks)
        return [results[hash_] for hash_ in hashes]

    def _wants(self, split: Split, blocks: Sequence[int], jobs: Iterable[Job]) -> bool:
        """Say whether the questions of some block are neither stored nor wanted of another job."""
        wanted = {block for job in jobs if job.questions for block in job.blocks}
        for block in {*blocks} - wanted - self._questions[split]:
            if not self._store.questions(split, block):
                return True
            self._questions[split].add(block)
        return False

    def _stored(
        self, recipe: str, split: Split, blocks: Sequence[int]
    ) -> tuple[list[Scores], Failure | None, tuple[int, ...]]:
        """Return what is stored of a recipe: scores on the blocks, a failure, and blocks without either."""
        parts = [self._store.result(recipe, split, block) for block in blocks]
        missing = tuple(block for block, part in zip(blocks, parts, strict=True) if part is None)
        failure = next((part for part in parts if isinstance(part, Failure)), None)
        return [part for part in parts if isinstance(part, Scores)], failure, missing

    def _stored_or_taken(
        self, recipe: Recipe, split: Split, blocks: Sequence[int]
    ) -> tuple[list[Scores], Failure | None, tuple[int, ...]]:
        """Return what `_stored` does, after what another run has of the missing blocks is stored, too."""
        scores, failure, missing = self._stored(recipe.hash, split, blocks)
        earlier = self._earlier if failure is None and missing else None
        if earlier is not None and earlier.take(recipe, split, missing):
            return self._stored(recipe.hash, split, blocks)
        return scores, failure, missing

    def _taken(
        self, result: Result, stored: Mapping[str, Sequence[Scores]], *, keep_failures: bool
    ) -> Scores | Failure | None:
        """Store a result; return it joined with what was stored before, None where nothing was done."""
        recipe, outcome = result.job.recipe, result.outcome
        assert not isinstance(outcome, Gradient | WrittenAnswers)
        if isinstance(outcome, NotBegun):
            if result.parts and result.timing is not None:
                self._store.record_scores(recipe, result.parts, result.timing, questions=result.questions)
            return None
        if result.faults:
            self._observer.noted(f"{recipe.hash[:12]}: tried again after {'; '.join(result.faults)}")
        if isinstance(outcome, Scores):
            assert result.timing is not None
            parts = result.parts or (outcome,)
            self._store.record_scores(
                recipe, parts, result.timing, weights=result.weights, questions=result.questions
            )
            outcome = joined([*stored[recipe.hash], *parts])
        elif keep_failures:
            assert isinstance(result.job, Job)
            self._store.record_failure(recipe, result.job.split, outcome)
        self._observer.scored(recipe, outcome, result.timing)
        if isinstance(outcome, Failure):
            self._breaker.failed(outcome, self._store)
        else:
            self._breaker.succeeded()
        return outcome
