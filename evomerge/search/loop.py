"""The run, from references to winner: one deterministic path from generation 0.

The loop does not know whether it is fresh or resumed. It always starts at the beginning; the scorer
answers from the store what is already scored there and executes only the rest, and the journal compares
each ask and tell with what is stored. So an interrupted run ends in the same bits as an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.search import baselines, optimizers
from evomerge.search.baselines import Named
from evomerge.search.genes import Genome, Space
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.selection import Candidate, finalists


class Scorer(Protocol):
    """Scores recipes, each only once in the life of a run.

    seconds: time spent so far on book-keeping, apart from the scoring itself.
    """

    seconds: float

    def score(self, recipes: Sequence[Recipe], split: Split, phase: str) -> list[Scores | Failure]:
        """Return one result per recipe, in order. `phase` is shown to the user."""
        ...

    def require(self, named: Sequence[Named], split: Split, phase: str) -> list[Scores]:
        """Like `score` for recipes the run can't do without: the first failure raises UserError."""
        ...


class Journal(Protocol):
    """Records what the search decided, or checks it against what a former session recorded."""

    def record_ask(
        self, generation: int, genomes: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None: ...

    def record_tell(self, generation: int, losses: NDArray[np.float64], seconds: float) -> None: ...

    def record_entry(self, role: str, position: int, entry: Named) -> None: ...

    def has_ask(self, generation: int) -> bool: ...


class Budget(Protocol):
    """Says when to stop asking."""

    def stop_reason(self, *, generations: int, evaluations: int, population: int) -> str | None: ...


class Observer(Protocol):
    """Is told what happens, for progress displays and logs."""

    def generation_done(self, generation: int, candidates: int, best: float) -> None:
        """A generation was told; `best` is the highest mean normalised `search` score so far."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Everything that determines the search: the same plan and seed end in the same winner.

    template: models, base, dtype, tokenizer and seed of every recipe. norms: task-vector norm per source.
    finalists: how many of the best candidates are scored again on `select`.
    """

    suite: Suite
    space: Space
    template: Recipe
    norms: Mapping[str, float]
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    finalists: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a search ended: the winner, and why no further generation was asked for."""

    winner: Named
    stopped: str


class Search:
    """One run: references, baselines, generations, selection, test."""

    def __init__(
        self, plan: SearchPlan, *, scorer: Scorer, journal: Journal, budget: Budget, observer: Observer
    ) -> None:
        self._plan, self._scorer, self._journal, self._budget = plan, scorer, journal, budget
        self._observer = observer
        self._parents = baselines.parents(plan.template, plan.space.sources)
        self._own: list[tuple[Named, float]] = []

    def run(self) -> Outcome:
        """Search, pick the winner on `select`, and score it with all references on `test`."""
        for position, parent in enumerate(self._parents):
            self._journal.record_entry("parent" if position else "base", max(position - 1, 0), parent)
        objective = Objective(self._plan.objective, self._references("search", self._parents))
        hand_made = self._score_baselines(objective)
        found, favourite, stopped = self._evolve(objective, hand_made)
        winner = self._select(found, favourite)
        self._journal.record_entry("winner", 0, winner)
        self._scorer.require([*self._parents, winner], "test", "test")
        self._scorer.score([named.recipe for named, _ in hand_made], "test", "test of the baselines")
        return Outcome(winner=winner, stopped=stopped)

    def _references(self, split: Split, parents: Sequence[Named]) -> Normaliser:
        """Score base and parents, which everything else is normalised by."""
        scores = self._scorer.require(parents, split, "base and parents")
        by_name = {p.name: s for p, s in zip(parents[1:], scores[1:], strict=True)}
        return Normaliser(self._plan.suite, base=scores[0], parents=by_name)

    def _score_baselines(self, objective: Objective) -> list[tuple[Named, float]]:
        """Score the hand-made merges on `search`; return them with their losses."""
        plan = self._plan
        rows = baselines.hand_made(plan.template, plan.space.sources, plan.norms)
        losses = self._losses(objective, [row.recipe for row in rows], "baselines")
        own = self._losses(objective, [p.recipe for p in self._parents[1:]], "baselines")
        soup = baselines.greedy_soup(
            plan.template,
            plan.space.sources,
            dict(zip(plan.space.sources, own, strict=True)),
            lambda recipe: self._losses(objective, [recipe], "greedy soup")[0],
        )
        self._own = list(zip(self._parents[1:], own, strict=True))
        rows.append(soup)
        losses += self._losses(objective, [soup.recipe], "greedy soup")
        for position, row in enumerate(rows):
            self._journal.record_entry("baseline", position, row)
        return list(zip(rows, losses, strict=True))

    def _losses(self, objective: Objective, recipes: Sequence[Recipe], phase: str) -> list[float]:
        return [float(x) for x in objective.losses(self._scorer.score(recipes, "search", phase))[:, 0]]

    def _start(self, hand_made: Sequence[tuple[Named, float]]) -> Genome:
        """The genome of the best baseline the space can express, else of the best source, else the middle."""
        ranked = [*sorted(hand_made, key=lambda pair: pair[1]), *sorted(self._own, key=lambda pair: pair[1])]
        for named, _ in ranked:
            genome = self._plan.space.encode(named.recipe)
            if genome is not None:
                return genome
        return np.full(self._plan.space.dimension, 0.5)

    def _evolve(
        self, objective: Objective, hand_made: Sequence[tuple[Named, float]]
    ) -> tuple[list[Candidate], Candidate | None, str]:
        """Run generations until the budget or the optimizer says stop."""
        space, journal = self._plan.space, self._journal
        seed = np.random.SeedSequence(self._plan.seed).spawn(1)[0]
        optimizer = optimizers.create(self._plan.optimizer, start=self._start(hand_made), seed=seed)
        found: list[Candidate] = []
        best, generation, asked = -np.inf, 0, 0
        while True:
            started, book_keeping = time.perf_counter(), self._scorer.seconds
            stopped = optimizer.stop_reason()
            if stopped is None:
                genomes = optimizer.ask()
                if not journal.has_ask(generation):  # a stored generation is finished whatever the clock says
                    stopped = self._budget.stop_reason(
                        generations=generation, evaluations=asked, population=len(genomes)
                    )
            if stopped is not None:
                break
            recipes = [space.decode(u) for u in genomes]
            journal.record_ask(generation, genomes, recipes)
            own = time.perf_counter() - started
            results = self._scorer.score(recipes, "search", f"generation {generation}")
            started = time.perf_counter()
            losses = objective.losses(results)
            optimizer.tell(losses)
            own += time.perf_counter() - started + self._scorer.seconds - book_keeping
            journal.record_tell(generation, losses, own)
            found += [
                Candidate(
                    name=f"generation {generation}, candidate {i}", recipe=recipe, loss=float(losses[i, 0])
                )
                for i, recipe in enumerate(recipes)
                if isinstance(results[i], Scores)
            ]
            best = max(best, *(objective.mean(r) for r in results if isinstance(r, Scores)), -np.inf)
            self._observer.generation_done(generation, len(recipes), best)
            generation, asked = generation + 1, asked + len(genomes)
        favourite = None
        if generation and (genome := optimizer.favourite()) is not None:
            favourite = Candidate(name="mean of the search", recipe=space.decode(genome), loss=np.inf)
        return found, favourite, stopped

    def _select(self, found: Sequence[Candidate], favourite: Candidate | None) -> Named:
        """Score the best candidates again on items the search never saw, and return the best of them."""
        if not found:
            raise UserError(
                "no candidate could be scored, so there is no winner",
                fix="look at the failures (evomerge status RUN), then raise the budget and resume",
            )
        chosen = finalists(found, self._plan.finalists) + ([favourite] if favourite else [])
        objective = Objective(self._plan.objective, self._references("select", self._parents))
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self._journal.record_entry("finalist", position, named)
        results = self._scorer.score([c.recipe for c in chosen], "select", "selection")
        if not any(isinstance(result, Scores) for result in results):
            raise UserError(
                "none of the finalists could be scored on `select`, so there is no winner",
                fix="look at the failures (evomerge status RUN), then raise the budget and resume",
            )
        winner = chosen[int(np.argmin(objective.losses(results)[:, 0]))]
        return Named(name=winner.name, recipe=winner.recipe)
