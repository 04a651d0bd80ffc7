"""The scorer: answers from the store what is known, executes the rest, records results as they land."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.surrogate import Gradient
from evomerge.merging.recipe import Recipe
from evomerge.running.executors import Executor
from evomerge.running.store import RunStore, Timing
from evomerge.running.worker import Job
from evomerge.search.baselines import Named


class Observer(Protocol):
    """Is told what happens in a run, for progress displays."""

    def phase(self, name: str, jobs: int, known: int) -> None:
        """A batch of `jobs` recipes starts, of which `known` are answered from the store."""
        ...

    def scored(self, recipe: Recipe, result: Scores | Failure, timing: Timing | None) -> None:
        """A recipe was just scored, or failed."""
        ...

    def generation_done(self, generation: int, candidates: int, best: float) -> None:
        """A generation was told; `best` is the highest mean normalised `search` score so far."""
        ...


class Scorer:
    """Scores recipes through an executor; every recipe only once per split in the life of a run."""

    def __init__(self, store: RunStore, executor: Executor, observer: Observer) -> None:
        self._store, self._executor, self._observer = store, executor, observer
        self.seconds = 0.0
        """Time this process spent on storing and looking up, not waiting for workers."""

    def score(self, recipes: Sequence[Recipe], split: Split, phase: str) -> list[Scores | Failure]:
        """Return one result per recipe, in order; failures are recorded and stay failures."""
        return self._score(recipes, split, phase, keep_failures=True)

    def require(self, named: Sequence[Named], split: Split, phase: str) -> list[Scores]:
        """Like `score` for recipes the run can't do without: the first failure raises UserError.

        Such a failure is not recorded, so that the run can be resumed once its cause is gone.
        """
        results = self._score([n.recipe for n in named], split, phase, keep_failures=False)
        scores = []
        for entry, result in zip(named, results, strict=True):
            if isinstance(result, Failure):
                raise UserError(
                    f"{entry.name} could not be scored on {split}: {result.reason}",
                    fix="every run needs its base and sources scored; mend this, then resume",
                )
            scores.append(result)
        return scores

    def _score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, *, keep_failures: bool
    ) -> list[Scores | Failure]:
        started = time.perf_counter()
        hashes = [recipe.hash for recipe in recipes]
        results: dict[str, Scores | Failure] = {}
        jobs: dict[str, Job] = {}
        for hash_, recipe in zip(hashes, recipes, strict=True):
            known = self._store.result(hash_, split)
            if known is not None:
                results[hash_] = known
            else:
                jobs.setdefault(hash_, Job(recipe=recipe, split=split))
        self._observer.phase(phase, len(set(hashes)), len(results))
        self.seconds += time.perf_counter() - started
        for result in self._executor.run(list(jobs.values())):
            started = time.perf_counter()
            recipe, outcome = result.job.recipe, result.outcome
            assert not isinstance(outcome, Gradient)
            if isinstance(outcome, Scores):
                assert result.timing is not None
                self._store.record_scores(recipe, outcome, result.timing)
            elif keep_failures:
                self._store.record_failure(recipe, split, outcome)
            results[recipe.hash] = outcome
            self._observer.scored(recipe, outcome, result.timing)
            self.seconds += time.perf_counter() - started
        return [results[hash_] for hash_ in hashes]
