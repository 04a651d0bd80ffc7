"""An asynchronous search: there is always a next candidate, and no generation that a worker waits for.

A number of candidates is pending at any time, somewhat more than there are workers. As soon as fewer are, the
guide and the optimizer propose some more, which the pending ones are known to. Candidates are taken as they
arrive, that is when they are scored on all item blocks in use. The guide learns from each at once; the
optimizer learns from as many as it has in a generation, whenever they were drawn. There are no races: they
need rivals that are scored at the same time.

The order of arrivals is all that such a search depends on beside its seed and the scores. The journal records
it, so a search is a function of what is stored. A session begins with the recorded arrivals, in their order,
then submits what is pending, and goes on. With one worker the order is that of the proposals.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluation.scores import Failure, Scores
from evomerge.merging.recipe import Recipe
from evomerge.search.generations import Generations, Patience, SearchResult
from evomerge.search.ports import OutOfTime
from evomerge.search.racing import RaceResult
from evomerge.search.selection import Candidate
from evomerge.search.spaces.space import Genome
from evomerge.search.surrogate.front_guide import FrontGuide
from evomerge.search.surrogate.guide import Expected, Guide

SPARE = 0.25
"""Candidates that wait for a worker, for each worker."""
STEPS = 4
"""Times that candidates are proposed for each generation of the optimizer."""


def pending(workers: int) -> int:
    """Return how many candidates keep some workers busy.

    >>> pending(1), pending(2), pending(64)
    (1, 3, 80)
    """
    return workers + math.ceil(SPARE * workers) if workers > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A candidate that was proposed; number: how many were before."""

    number: int
    genome: Genome
    recipe: Recipe
    expected: Expected

    @property
    def ticket(self) -> str:
        """The name under which the scorer knows it."""
        return str(self.number)


@dataclass(slots=True, kw_only=True)
class Stream(Generations):
    """Runs a search without generations. workers: how many score at a time."""

    workers: int
    _pending: dict[str, Proposal] = field(default_factory=dict)
    _under_way: set[str] = field(default_factory=set)
    _twins: list[Proposal] = field(default_factory=list)
    _replayed: collections.deque[str] = field(default_factory=collections.deque)
    _group: list[tuple[Proposal, Scores | Failure]] = field(default_factory=list)
    _candidates: dict[str, Candidate] = field(default_factory=dict)
    _patience: Patience = field(default_factory=Patience)
    _generation: int = 0
    _proposed: int = 0
    _best: float = -np.inf
    _live: bool = False
    _last_blocks: tuple[int, ...] | None = None

    def run(self) -> SearchResult:
        """Propose and take candidates until the budget or the optimizer stops the search."""
        self._replayed.extend(self.journal.arrivals())
        changes = self.journal.record_pending(len(self._replayed), pending(self.workers))
        stopped, arrived = None, 0
        since = time.perf_counter()
        while True:
            room = [count for first, count in changes if first <= arrived][-1]
            while stopped is None and len(self._pending) < room:
                stopped = self._stop_reason()
                if stopped is None:
                    self._propose()
            if not self._pending:
                break
            begun = time.perf_counter() - self.scorer.seconds
            try:
                proposal, result = self._next()
            except OutOfTime:
                stopped = stopped or self.budget.out_of_time(self._generation, cut=True)
                break
            since += time.perf_counter() - self.scorer.seconds - begun
            arrived += 1
            self._take(proposal, result)
            if len(self._group) == self.optimizer.population and self._last_blocks is None:
                stopped = self._tell(time.perf_counter() - since, last=stopped is not None) or stopped
                since = time.perf_counter()
        if self._generation:
            self.journal.record_spent(self._generation - 1, self.ledger.items)
        most = max((c.items for c in self._candidates.values()), default=0)
        return SearchResult(
            candidates=tuple(c for c in self._candidates.values() if c.items == most),
            blocks=self._blocks(),
            favourite=self.optimizer.favourite() if self._generation else None,
            stopped=stopped or "",
            guide=self.guide,
        )

    # -- proposing -----------------------------------------------------------------------------------

    @property
    def _asked(self) -> tuple[int, int]:
        """Whole generations proposed so far, and candidates beyond."""
        more, rest = divmod(len(self._group) + len(self._pending), self.optimizer.population)
        return self._generation + more, rest

    @property
    def _count(self) -> int:
        """How many candidates are proposed next."""
        population = self.optimizer.population
        return min(max(1, population // STEPS), population - self._asked[1])

    def _stop_reason(self) -> str | None:
        """Return why nothing more is proposed, or None."""
        stopped = self.optimizer.stop_reason()
        if stopped is not None:
            return stopped
        if self.descended and self.guide is not None and self.guide.hopeless:
            return "nothing better is expected near where gradients and generations led"
        if self.journal.proposed() > self._proposed:  # the budget allowed it when it was proposed
            return None
        each = sum(self.ledger.sizes[block] for block in self._blocks())
        return self.budget.stop_reason(
            generations=self._asked[0],
            items=self.ledger.items + self._owed(),
            forecast=self._count * each,
            full=self.ledger.full,
            stale=self._patience.stale,
        )

    def _owed(self) -> int:
        blocks = self._blocks()
        return self.ledger.price((each.recipe.hash, blocks) for each in self._pending.values())

    def _propose(self) -> None:
        """Propose some candidates, and submit them unless their arrivals are recorded."""
        count = self._count
        self._announce()
        if self._guide is None:
            genomes, expected = self.optimizer.draw(count), [Expected()] * count
        else:
            waiting = [each.genome for each in self._pending.values()]
            genomes, expected = self._guide.ask_more(self.optimizer, count, waiting)
        for genome, each in zip(genomes, expected, strict=True):
            recipe = self.space.decode(genome)
            proposal = Proposal(number=self._proposed, genome=genome, recipe=recipe, expected=each)
            self._pending[proposal.ticket] = proposal
            self._proposed += 1
        self.journal.record_proposed(self._proposed)
        if self._live:
            for proposal in list(self._pending.values())[-count:]:
                self._submit(proposal)

    def _submit(self, proposal: Proposal) -> None:
        """Have a candidate scored; an equal one that is under way is waited for."""
        if proposal.recipe.hash in self._under_way:
            self._twins.append(proposal)
            return
        self._under_way.add(proposal.recipe.hash)
        with self._until_deadline(proposal.number // self.optimizer.population):
            self.scorer.submit(proposal.ticket, proposal.recipe, self._blocks())

    # -- taking --------------------------------------------------------------------------------------

    def _next(self) -> tuple[Proposal, Scores | Failure]:
        """Return the next candidate that is scored: as recorded, then as they arrive."""
        if self._replayed:
            return self._repeated(self._replayed.popleft())
        if not self._live:
            self._live = True
            self._announce()
            for proposal in self._pending.values():
                self._submit(proposal)
        while True:
            arrived = self.scorer.next()
            assert arrived is not None
            proposal, result = self._pending[arrived[0]], arrived[1]
            self._under_way.remove(proposal.recipe.hash)
            if isinstance(result, Failure) or set(self._blocks()) <= set(result.blocks):
                break
            self._submit(proposal)  # blocks were added since
        twin = next((each for each in self._twins if each.recipe.hash == proposal.recipe.hash), None)
        if twin is not None:
            self._twins.remove(twin)
            self._submit(twin)
        return proposal, result

    def _repeated(self, recipe: str) -> tuple[Proposal, Scores | Failure]:
        """Return the candidate whose arrival is recorded; its scores are made again where they are gone."""
        first = next(iter(self._pending.values()))  # the journal says so if the recorded one is not there
        proposal = next((each for each in self._pending.values() if each.recipe.hash == recipe), first)
        (result,) = self.scorer.known([proposal.recipe], "search", self._blocks())
        if result is None:
            self._submit(proposal)
            again = self.scorer.next()
            assert again is not None
            self._under_way.remove(proposal.recipe.hash)
            result = again[1]
        return proposal, result

    def _take(self, proposal: Proposal, result: Scores | Failure) -> None:
        """Record an arrival, pay for it, and learn from it."""
        genome, recipe, blocks = proposal.genome, proposal.recipe, self._blocks()
        generation, position = self._generation, len(self._group)
        self.journal.record_arrival(generation, position, genome, recipe)
        del self._pending[proposal.ticket]
        self._group.append((proposal, result))
        self.ledger.charge([(recipe.hash, blocks)])
        if self._guide is not None:
            self._guide.learn_arrival(genome, result if isinstance(result, Scores) else None)
        if isinstance(result, Scores):
            (loss,) = self.views(blocks).losses([result], [recipe])
            name = f"generation {generation}, candidate {position}"
            self._keep(self._candidates, name, genome, recipe, generation, result, loss)

    def _tell(self, seconds: float, *, last: bool) -> str | None:
        """Tell the optimizer as many arrivals as it has in a generation; return why the search stops.

        last: nothing is proposed any more, so that no blocks are added.
        """
        generation, blocks, group = self._generation, self._blocks(), self._group
        genomes = np.array([proposal.genome for proposal, _ in group])
        recipes, results = [proposal.recipe for proposal, _ in group], [result for _, result in group]
        losses = self.views(blocks).losses(results, recipes)
        raced = RaceResult(
            results=tuple(results),
            losses=losses,
            blocks=(blocks,) * len(group),
            complete=tuple(isinstance(result, Scores) for result in results),
        )
        self.optimizer.absorb(genomes, losses)
        again = self._judged(genomes, results, losses, [proposal.expected for proposal, _ in group])
        self.journal.record_tell(generation, losses, seconds)
        self._record(generation, self._candidates, raced, recipes)
        self._note_course(self._patience, raced)
        self._best = max(self._best, self._best_mean(raced, blocks))
        self._group = []
        ended = None
        if not last:
            more = again or self._unseen(generation)
            ended = self._score_again(more, self._candidates, generation, self._patience)
        if ended is not None or (last and again):
            self._last_blocks = blocks
        self.journal.record_spent(generation, self.ledger.items)
        self.observer.generation_done(generation, self.ledger.evaluations, self._best)
        self._generation += 1
        self._announce()
        return ended

    def _judged(
        self,
        genomes: NDArray[np.float64],
        results: Sequence[Scores | Failure],
        losses: NDArray[np.float64],
        expected: Sequence[Expected],
    ) -> list[Genome]:
        """Pass a generation to the guide; return the genomes to score on more items."""
        if self._guide is None:
            return []
        scores = [result if isinstance(result, Scores) else None for result in results]
        return self._guide.tell_arrived(genomes, scores, losses[:, 0], expected)

    @property
    def _guide(self) -> Guide | None:
        assert not isinstance(self.guide, FrontGuide), "a search for several objectives has generations"
        return self.guide

    def _blocks(self) -> tuple[int, ...]:
        return self._last_blocks or Generations._blocks(self)

    def _announce(self) -> None:
        """Say how far the generation is that candidates arrive for."""
        population = self.optimizer.population
        known = len(self._group) if self._live else population
        self.observer.phase(f"generation {self._generation}", population, known)
