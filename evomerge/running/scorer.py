"""The scorer: returns stored scores, executes what is missing, and records results as they arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from evomerge.errors import UserError
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split, joined
from evomerge.evaluation.smooth_loss import Gradient
from evomerge.merging.recipe import Recipe
from evomerge.running.batches import Batches, Halved
from evomerge.running.breaker import Breaker
from evomerge.running.executors import Executor
from evomerge.running.observers import Observer
from evomerge.running.store import RunStore
from evomerge.running.worker import Job, NotBegun, Result
from evomerge.search.ports import Named, OutOfTime


class Scorer:
    """Scores recipes through an executor; every recipe only once per item block in the life of a run.

    batches: the batch sizes in force. failures: in a row, after which BrokenRunError is raised. now: the
    time, in epoch seconds. Raises Halved where a batch size turns out too large for the device's memory.
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
    ) -> None:
        self._store, self._executor, self._observer, self._batches = store, executor, observer, batches
        self._breaker, self._now = Breaker(failures), now
        self.not_after: float | None = None
        """The latest start of a job, in epoch seconds (see `search.ports.CandidateScorer`)."""
        self._asked: set[tuple[str, Split, int]] = set()
        """(recipe, split, block) of earlier calls; the same in every session, which replays the search."""
        self._questions: dict[Split, set[int]] = {split: set() for split in SPLITS}
        """Split -> blocks whose questions are stored."""
        self.seconds = 0.0
        """Time this process spent on the store, without waiting for workers."""

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
            stored[hash_], failure, missing = self._stored(hash_, split, blocks)
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
        for result in self._executor.run(list(jobs.values())):
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

    def _taken(
        self, result: Result, stored: Mapping[str, Sequence[Scores]], *, keep_failures: bool
    ) -> Scores | Failure | None:
        """Store a result; return it joined with what was stored before, None where nothing was done."""
        recipe, outcome = result.job.recipe, result.outcome
        assert not isinstance(outcome, Gradient)
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
