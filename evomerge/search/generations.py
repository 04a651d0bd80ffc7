"""The generations of a search: ask, score, tell, until the budget or the optimizer stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluation.scores import Scores
from evomerge.merging.recipe import Recipe
from evomerge.search import pareto, selection
from evomerge.search.ledger import Ledger
from evomerge.search.optimizers import Optimizer
from evomerge.search.ports import (
    CandidateScorer,
    Journal,
    OutOfTime,
    SearchBudget,
    SearchObserver,
)
from evomerge.search.racing import RaceResult, RacingSpec, Views, race
from evomerge.search.selection import Candidate
from evomerge.search.spaces.space import Genome, Space
from evomerge.search.surrogate.front_guide import SURVIVORS, FrontGuide
from evomerge.search.surrogate.guide import Asked, Guide

NOTHING_ADDED = "evolution adds nothing to gradients here: budget saved"
COMPLETED = 0.25
"""Share of the evaluations that is kept, at most, to score the front on all items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The result of the generations.

    candidates: scored on all of `blocks`, each recipe once. favourite: the optimizer's best estimate (CMA-ES:
    the mean), None where it has none.
    """

    candidates: tuple[Candidate, ...]
    blocks: tuple[int, ...]
    favourite: Genome | None
    stopped: str
    guide: Guide | FrontGuide | None

    def estimates(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """Return the estimated losses of candidates on `search`, shape (n,).

        The surrogate's posterior means where it is trusted and every candidate has a genome, else the
        estimates of `selection`.
        """
        genomes = [c.genome for c in candidates if c.genome is not None]
        if self.guide is not None and self.guide.trusted and len(genomes) == len(candidates):
            losses = self.guide.estimates(genomes)
            if losses is not None:
                return losses
        return selection.estimates(candidates)


@dataclass(slots=True)
class Patience:
    """Counts generations in a row without improvement; depends on scores alone.

    >>> patience = Patience()
    >>> for loss in (3.0, 2.0, 2.0, 2.5):
    ...     patience.told(loss)
    >>> patience.stale
    2
    """

    stale: int = 0
    _best: float = np.inf

    def told(self, loss: float) -> None:
        """Record the lowest loss of a generation."""
        self.stale = 0 if loss < self._best else self.stale + 1
        self._best = min(self._best, loss)

    def renewed(self, losses: Sequence[float]) -> None:
        """Restart the count on more items, where the best candidates have these losses."""
        self.stale, self._best = 0, min(losses, default=np.inf)


@dataclass(slots=True, kw_only=True)
class Generations:
    """Runs the generations of a search.

    order: the item blocks, the most informative first. racing: when candidates leave a generation early.
    guide: the surrogate, if any. archive: the front, with several objectives. counted: returns the number of
    items a candidate's loss is computed from. descended: whether the search began where gradients led; then
    it ends where the guide expects nothing better nearby. sated: whether gradients got a budget whose rest
    pays for no generation, so that none is begun.
    """

    space: Space
    optimizer: Optimizer
    scorer: CandidateScorer
    journal: Journal
    budget: SearchBudget
    observer: SearchObserver
    views: Views
    ledger: Ledger
    order: tuple[int, ...]
    racing: RacingSpec
    guide: Guide | FrontGuide | None
    archive: pareto.Archive | None
    counted: Callable[[Scores], int]
    descended: bool = False
    sated: bool = False

    def run(self) -> SearchResult:
        """Run generations until the budget or the optimizer stops the search."""
        candidates: dict[str, Candidate] = {}
        best, generation, pace, patience = -np.inf, 0, 0.0, Patience()
        blocks = self._blocks()
        while True:
            started, book_keeping = time.perf_counter(), self.scorer.seconds
            asked = self._ask_or_stop(generation, pace, patience.stale)
            if isinstance(asked, str):
                stopped = asked
                blocks = blocks if generation else self.order  # gradients alone, which took all items
                break
            recipes = [self.space.decode(u) for u in asked.genomes]
            self.journal.record_ask(generation, asked.genomes, recipes)
            driver_seconds = time.perf_counter() - started
            blocks = self._blocks()
            try:
                with self._until_deadline(generation):
                    raced = race(
                        recipes,
                        scorer=self.scorer,
                        views=self.views,
                        spec=self.racing,
                        order=blocks,
                        phase=f"generation {generation}",
                    )
            except OutOfTime:
                stopped = self.budget.out_of_time(generation, cut=True)
                self._salvage(asked.genomes, recipes, blocks, candidates, generation)
                break
            started = time.perf_counter()
            cost = self.ledger.charge(zip((r.hash for r in recipes), raced.blocks, strict=True))
            pace = cost / (len(recipes) * len(blocks))
            self.optimizer.tell(raced.losses, asked.chosen)
            again = self._teach(asked, raced)
            driver_seconds += time.perf_counter() - started + self.scorer.seconds - book_keeping
            self.journal.record_tell(generation, raced.losses, driver_seconds)
            self._keep_complete(candidates, generation, asked.genomes, recipes, raced)
            self._record(generation, candidates, raced, recipes)
            self._note_course(patience, raced)
            best = max(best, self._best_mean(raced, blocks))
            ended = self._score_again(again or self._unseen(generation), candidates, generation, patience)
            self.journal.record_spent(generation, self.ledger.items)
            self.observer.generation_done(generation, self.ledger.evaluations, best)
            generation += 1
            if ended is not None:
                stopped = ended
                break
            if self.archive is not None and blocks != self._blocks():
                self._fill(candidates, self._blocks())
            blocks = self._blocks()
        blocks = self._completed(candidates, generation, blocks)
        most = max((c.items for c in candidates.values()), default=0)
        return SearchResult(
            candidates=tuple(c for c in candidates.values() if c.items == most),
            blocks=blocks,
            favourite=self.optimizer.favourite() if generation else None,
            stopped=stopped,
            guide=self.guide,
        )

    def _ask_or_stop(self, generation: int, pace: float, stale: int) -> Asked | str:
        """Return the next generation, or why the search stops before it.

        pace: share of the offered items that the last generation was scored on.
        """
        stopped = self.optimizer.stop_reason()
        if stopped is not None:
            return stopped
        if self.descended and self.guide is not None and self.guide.hopeless:
            return "nothing better is expected near where gradients and generations led"
        if self.sated and not generation and not self.journal.has_ask(0):
            spent = f"{self.ledger.evaluations:.4g} evaluations"
            return f"gradients took the budget ({spent}): the rest pays for no generation"
        asked = self._ask()
        if not self.journal.has_ask(generation):  # the budget allowed a stored one when it began
            stopped = self.budget.stop_reason(
                generations=generation,
                items=self.ledger.items,
                forecast=round(pace * len(asked.genomes) * len(self._blocks())) + self._reserve(),
                full=self.ledger.full,
                stale=stale,
            )
        return asked if stopped is None else stopped

    def _keep_complete(
        self,
        candidates: dict[str, Candidate],
        generation: int,
        genomes: NDArray[np.float64],
        recipes: Sequence[Recipe],
        raced: RaceResult,
    ) -> None:
        """Store the candidates of a generation that were scored on all its blocks."""
        for row, genome in enumerate(genomes):
            result = raced.results[row]
            if raced.complete[row] and isinstance(result, Scores):
                name = f"generation {generation}, candidate {row}"
                self._keep(candidates, name, genome, recipes[row], generation, result, raced.losses[row])

    def _best_mean(self, raced: RaceResult, blocks: tuple[int, ...]) -> float:
        """Return the highest mean normalised score of a generation's complete candidates, else -inf."""
        objective = self.views(blocks)
        complete = [r for r, done in zip(raced.results, raced.complete, strict=True) if done]
        return max((objective.mean(r) for r in complete if isinstance(r, Scores)), default=-np.inf)

    def _ask(self) -> Asked:
        if self.guide is None:
            return Asked(genomes=self.optimizer.ask())
        return self.guide.ask(self.optimizer)

    def _reserve(self) -> int:
        """Return the items to keep for the end of the search, where the front is scored on all items."""
        if not isinstance(self.guide, FrontGuide):
            return 0
        full = self.ledger.full
        allowed = self.budget.evaluations(full, self.optimizer.population)
        share = 1 - sum(self.ledger.sizes[block] for block in self._blocks()) / full
        most = SURVIVORS * share if allowed is None else min(SURVIVORS * share, allowed * COMPLETED)
        return int(most * full) if share else 0

    def _completed(
        self, candidates: dict[str, Candidate], generation: int, blocks: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Score what the front is made of on all items; return the blocks that candidates are compared on.

        The guide does not learn from it: a search that goes on, with a larger budget, goes on as it was.
        """
        left = self._reserve()
        if not isinstance(self.guide, FrontGuide) or not left:
            return blocks
        genomes: list[Genome] = []
        for genome in self.guide.survivors():
            price = self.ledger.price([(self.space.decode(genome).hash, self.order)])
            if price <= left:
                genomes.append(genome)
                left -= price
        if not genomes:
            return blocks
        recipes = [self.space.decode(genome) for genome in genomes]
        results = self.scorer.score(recipes, "search", f"generation {generation - 1}, front", self.order)
        self.ledger.charge((recipe.hash, self.order) for recipe in recipes)
        self.journal.record_spent(generation - 1, self.ledger.items)
        losses = self.views(self.order).losses(results, recipes)
        for genome, recipe, result, loss in zip(genomes, recipes, results, losses, strict=True):
            if isinstance(result, Scores):
                self._keep(candidates, "front", genome, recipe, generation, result, loss)
        self._fill(candidates, self.order)
        return self.order

    def _fill(self, candidates: dict[str, Candidate], blocks: Sequence[int]) -> None:
        """Make the front anew, of the candidates that were scored on all of more blocks."""
        assert self.archive is not None
        self.archive.clear()
        most = max((c.items for c in candidates.values()), default=0)
        every = [c for c in candidates.values() if c.items == most]
        recipes = [c.recipe for c in every]
        results = self.scorer.score(recipes, "search", "front", blocks) if recipes else []
        self.archive.add(every, self.views(blocks).losses(results, recipes))

    def _owed(self) -> int:
        """Return the items of candidates that are pending: none between generations."""
        return 0

    def _blocks(self) -> tuple[int, ...]:
        return self.order if self.guide is None else self.guide.blocks

    def _teach(self, asked: Asked, raced: RaceResult) -> list[Genome]:
        """Pass a generation to the guide; return the genomes to score on more items."""
        if self.guide is None:
            return []
        results = [r if isinstance(r, Scores) else None for r in raced.results]
        return self.guide.tell(asked.genomes, results, raced.losses[:, 0])

    def _keep(
        self,
        candidates: dict[str, Candidate],
        name: str,
        genome: Genome,
        recipe: Recipe,
        generation: int,
        scores: Scores,
        loss: NDArray[np.float64],
    ) -> None:
        """Store a candidate with its loss on the most items it was scored on."""
        items = self.counted(scores)
        before = candidates.get(recipe.hash)
        if before is None or before.items < items:
            candidates[recipe.hash] = Candidate(
                name=name if before is None else before.name,
                recipe=recipe,
                loss=float(loss[0]),
                genome=genome,
                generation=generation if before is None else before.generation,
                items=items,
            )

    def _unseen(self, generation: int) -> list[Genome] | str:
        """Now and then score the best genome on items that the search does not use.

        Returns the genomes to score on more items, where it does worse there than its lead here promised, or
        why the search stops.
        """
        if not isinstance(self.guide, Guide):
            return []
        frugal, unseen, genome = self.guide.frugal, self.guide.unseen(), None
        if unseen is not None:
            genome, blocks = unseen
            recipe = self.space.decode(genome)
            if frugal and self._unaffordable([recipe], blocks, generation):
                return []  # and the next generation does not begin
            try:
                with self._until_deadline(generation + 1):
                    phase = f"generation {generation}, unused items"
                    (result,) = self.scorer.score([recipe], "search", phase, blocks)
            except OutOfTime:
                return []  # likewise
            self.ledger.charge([(recipe.hash, blocks)])
            if isinstance(result, Scores):
                self.guide.learn(genome, result)
        if frugal and self.guide.checking and self.guide.check():
            return NOTHING_ADDED
        return self.guide.doubted(genome)

    def _unaffordable(self, recipes: Sequence[Recipe], blocks: Sequence[int], generation: int) -> str | None:
        """Return why the budget does not allow to score recipes on blocks after a generation, if so."""
        known = self.scorer.known(recipes, "search", blocks)
        if all(result is not None for result in known):
            return None  # paid for by an earlier session
        if self.journal.has_ask(generation + 1):
            return None
        return self.budget.stop_reason(
            generations=generation + 1,
            items=self.ledger.items,
            forecast=self.ledger.price((recipe.hash, blocks) for recipe in recipes) + self._owed(),
            full=self.ledger.full,
            stale=0,  # on more items there may be something better
        )

    def _score_again(
        self,
        genomes: Sequence[Genome] | str,
        candidates: dict[str, Candidate],
        generation: int,
        patience: Patience,
    ) -> str | None:
        """Score genomes on all blocks used from now on; return why the search stops instead, if it does.

        genomes: or why it stops.
        """
        if isinstance(genomes, str):
            return genomes
        if not genomes or self.guide is None:
            return None
        blocks = self._blocks()
        recipes = [self.space.decode(u) for u in genomes]
        stopped = self._unaffordable(recipes, blocks, generation)
        if stopped is not None:
            return stopped
        try:
            with self._until_deadline(generation + 1):
                results = self.scorer.score(recipes, "search", f"generation {generation}, more items", blocks)
        except OutOfTime:
            return self.budget.out_of_time(generation + 1, cut=False)
        self.ledger.charge((recipe.hash, blocks) for recipe in recipes)
        losses = self.views(blocks).losses(results, recipes)
        patience.renewed(losses[:, 0].tolist())
        for genome, recipe, result, loss in zip(genomes, recipes, results, losses, strict=True):
            if isinstance(result, Scores):
                self.guide.learn(genome, result)
                if recipe.hash in candidates:
                    self._keep(candidates, "", genome, recipe, generation, result, loss)
        return None

    @contextmanager
    def _until_deadline(self, generation: int) -> Iterator[None]:
        """Let the clock interrupt the scoring in this context; the first generation always runs."""
        self.scorer.not_after = self.budget.deadline() if generation else None
        try:
            yield
        finally:
            self.scorer.not_after = None

    def _salvage(
        self,
        genomes: NDArray[np.float64],
        recipes: Sequence[Recipe],
        blocks: Sequence[int],
        candidates: dict[str, Candidate],
        generation: int,
    ) -> None:
        """Keep the fully scored candidates of a generation that is cut short.

        Its losses are not passed to the optimizer: a resumed run finishes the generation first.
        """
        known = self.scorer.known(recipes, "search", blocks)
        rows = [(i, result) for i, result in enumerate(known) if isinstance(result, Scores)]
        if not rows:
            return
        losses = self.views(blocks).losses([result for _, result in rows], [recipes[i] for i, _ in rows])
        for (i, result), loss in zip(rows, losses, strict=True):
            if self.guide is not None:
                self.guide.learn(genomes[i], result)
            name = f"generation {generation}, candidate {i}"
            self._keep(candidates, name, genomes[i], recipes[i], generation, result, loss)
        if self.archive is not None:
            self.archive.add([candidates[recipes[i].hash] for i, _ in rows], losses)

    def _note_course(self, patience: Patience, raced: RaceResult) -> None:
        """Record whether a generation improved, on the items it was scored on."""
        if self.archive is not None:
            patience.told(-self.archive.hypervolume)
            return
        both = zip(raced.results, raced.complete, raced.losses[:, 0].tolist(), strict=True)
        losses = [loss for result, complete, loss in both if complete and isinstance(result, Scores)]
        patience.told(min(losses, default=np.inf))

    def _record(
        self, generation: int, candidates: dict[str, Candidate], raced: RaceResult, recipes: Sequence[Recipe]
    ) -> None:
        """Store the guide's state and the front so far."""
        if self.guide is not None:
            self.journal.record_guide(generation, self.guide.state())
        if self.archive is not None:
            scored = [i for i, result in enumerate(raced.results) if isinstance(result, Scores)]
            self.archive.add([candidates[recipes[i].hash] for i in scored], raced.losses[scored])
            self.journal.record_front(
                generation, self.archive.hypervolume, self.archive.reference, self.archive.recipes
            )
