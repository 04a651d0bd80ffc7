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
from evomerge.search import baselines, optimizers, pareto
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

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None: ...


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
    layers: of the base model, which recipes of another depth are measured by.
    """

    suite: Suite
    space: Space
    template: Recipe
    norms: Mapping[str, float]
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    finalists: int
    seed: int
    layers: int | None = None


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

    def run(self) -> Outcome:
        """Search, pick the winner on `select`, and score it with all references on `test`."""
        for position, parent in enumerate(self._parents):
            self._journal.record_entry("parent" if position else "base", max(position - 1, 0), parent)
        objective = self._objective("search")
        hand_made = self._score_baselines(objective)
        archive = self._archive(objective, hand_made) if objective.count > 1 else None
        found, favourite, stopped = self._evolve(objective, hand_made, archive)
        if archive is None:
            winner = self._select(found, favourite)
        else:
            winner = self._select_on_front(archive, hand_made)
        self._journal.record_entry("winner", 0, winner)
        self._scorer.require([*self._parents, winner], "test", "test")
        self._scorer.score([named.recipe for named, _ in hand_made], "test", "test of the baselines")
        return Outcome(winner=winner, stopped=stopped)

    def _references(self, split: Split, parents: Sequence[Named]) -> Normaliser:
        """Score base and parents, which everything else is normalised by."""
        scores = self._scorer.require(parents, split, "base and parents")
        by_name = {p.name: s for p, s in zip(parents[1:], scores[1:], strict=True)}
        return Normaliser(self._plan.suite, base=scores[0], parents=by_name)

    def _objective(self, split: Split) -> Objective:
        references = self._references(split, self._parents)
        return Objective(self._plan.objective, references, layers=self._plan.layers)

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
        rows.append(soup)
        losses += self._losses(objective, [soup.recipe], "greedy soup")
        for position, row in enumerate(rows):
            self._journal.record_entry("baseline", position, row)
        return list(zip(rows, losses, strict=True))

    def _losses(self, objective: Objective, recipes: Sequence[Recipe], phase: str) -> list[float]:
        results = self._scorer.score(recipes, "search", phase)
        return [float(x) for x in objective.scalar_losses(results, recipes)]

    def _start(self, hand_made: Sequence[tuple[Named, float]]) -> Genome:
        """The genome of the best baseline the space can express, else the middle of the space."""
        for named, _ in sorted(hand_made, key=lambda pair: pair[1]):
            genome = self._plan.space.encode(named.recipe)
            if genome is not None:
                return genome
        return np.full(self._plan.space.dimension, 0.5)

    def _evolve(
        self,
        objective: Objective,
        hand_made: Sequence[tuple[Named, float]],
        archive: pareto.Archive | None = None,
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
            losses = objective.losses(results, recipes)
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
            if archive is not None:
                scored = [i for i, result in enumerate(results) if isinstance(result, Scores)]
                archive.add(found[len(found) - len(scored) :], losses[scored])
                journal.record_front(generation, archive.hypervolume, archive.reference, archive.recipes)
            best = max(best, *(objective.mean(r) for r in results if isinstance(r, Scores)), -np.inf)
            self._observer.generation_done(generation, len(recipes), best)
            generation, asked = generation + 1, asked + len(genomes)
        favourite = None
        if generation and (genome := optimizer.favourite()) is not None:
            favourite = Candidate(name="mean of the search", recipe=space.decode(genome), loss=np.inf)
        return found, favourite, stopped

    def _archive(self, objective: Objective, hand_made: Sequence[tuple[Named, float]]) -> pareto.Archive:
        """An empty front, measured from what was not searched."""
        recipes = [named.recipe for named in (*self._parents, *(named for named, _ in hand_made))]
        known = self._scorer.score(recipes, "search", "baselines")
        return pareto.Archive(objective.reference_point(known, recipes))

    def _select_on_front(self, archive: pareto.Archive, hand_made: Sequence[tuple[Named, float]]) -> Named:
        """Score candidates that stand for the front on `select`, and return the knee there.

        What was not searched is scored there too, so that the front can be seen beside it.
        """
        if not archive.members:
            raise _no_winner("no candidate could be scored")
        chosen = archive.finalists(self._plan.finalists)
        objective = self._objective("select")
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self._journal.record_entry("finalist", position, named)
        recipes = [candidate.recipe for candidate in chosen]
        results = self._scorer.score(recipes, "select", "selection")
        self._scorer.score([named.recipe for named, _ in hand_made], "select", "selection")
        scored = [i for i, result in enumerate(results) if isinstance(result, Scores)]
        if not scored:
            raise _no_winner("none of the finalists could be scored on `select`")
        winner = chosen[scored[pareto.knee(objective.losses(results, recipes)[scored])]]
        return Named(name=winner.name, recipe=winner.recipe)

    def _select(self, found: Sequence[Candidate], favourite: Candidate | None) -> Named:
        """Score the best candidates again on items the search never saw, and return the best of them."""
        if not found:
            raise _no_winner("no candidate could be scored")
        chosen = finalists(found, self._plan.finalists) + ([favourite] if favourite else [])
        objective = self._objective("select")
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self._journal.record_entry("finalist", position, named)
        results = self._scorer.score([c.recipe for c in chosen], "select", "selection")
        if not any(isinstance(result, Scores) for result in results):
            raise _no_winner("none of the finalists could be scored on `select`")
        losses = objective.losses(results, [c.recipe for c in chosen])
        winner = chosen[int(np.argmin(losses[:, 0]))]
        return Named(name=winner.name, recipe=winner.recipe)


def _no_winner(reason: str) -> UserError:
    return UserError(
        f"{reason}, so there is no winner",
        fix="look at the failures (evomerge status RUN), then raise the budget and resume",
    )
