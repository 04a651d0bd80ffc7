"""The run, from references to winner: one deterministic path from generation 0.

The loop does not know whether it is fresh or resumed. It always starts at the beginning; the scorer
answers from the store what is already scored there and executes only the rest, and the journal compares
each ask and tell with what is stored. So an interrupted run ends in the same bits as an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.search import baselines, optimizers, selection
from evomerge.search.baselines import Named
from evomerge.search.genes import Genome, Space
from evomerge.search.ledger import Ledger
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.racing import NO_RACING, RacingSpec, Views, block_order, race
from evomerge.search.selection import Candidate, finalists


class Scorer(Protocol):
    """Scores recipes, each only once in the life of a run.

    seconds: time spent so far on book-keeping, apart from the scoring itself.
    """

    seconds: float

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        """Return one result per recipe, in order. `phase` is shown to the user.

        blocks: item blocks of the split to score on; None means all.
        """
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

    def trim_entries(self, role: str, count: int) -> None: ...

    def has_ask(self, generation: int) -> bool: ...

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None: ...


class Budget(Protocol):
    """Says when to stop asking."""

    def stop_reason(self, *, generations: int, items: int, forecast: int, full: int) -> str | None: ...


class Observer(Protocol):
    """Is told what happens, for progress displays and logs."""

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """A generation was told.

        evaluations: spent so far, all generations. best: the highest mean normalised `search` score so far.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Everything that determines the search: the same plan and seed end in the same winner.

    template: models, base, dtype, tokenizer and seed of every recipe. norms: task-vector norm per source.
    finalists: how many of the best candidates are scored again on `select`, beside their soup and the
        optimizer's favourite.
    """

    suite: Suite
    space: Space
    template: Recipe
    norms: Mapping[str, float]
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    finalists: int
    seed: int
    racing: RacingSpec = NO_RACING


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
        found, favourite, stopped = self._evolve(objective, hand_made)
        winner = self._select(found, favourite, objective)
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

    def _starts(self, hand_made: Sequence[tuple[Named, float]]) -> list[Genome]:
        """The different genomes of the baselines the space can express, best first, else its middle."""
        genomes: dict[bytes, Genome] = {}
        for named, _ in sorted(hand_made, key=lambda pair: pair[1]):
            genome = self._plan.space.encode(named.recipe)
            if genome is not None:
                genomes.setdefault(genome.tobytes(), genome)
        return list(genomes.values()) or [np.full(self._plan.space.dimension, 0.5)]

    def _evolve(
        self, objective: Objective, hand_made: Sequence[tuple[Named, float]]
    ) -> tuple[list[Candidate], Genome | None, str]:
        """Run generations until the budget or the optimizer says stop."""
        space, journal = self._plan.space, self._journal
        seed = np.random.SeedSequence(self._plan.seed).spawn(1)[0]
        optimizer = optimizers.create(
            self._plan.optimizer, coordinates=space.coordinates, starts=self._starts(hand_made), seed=seed
        )
        found: list[Candidate] = []
        views, order, ledger = self._blocks(objective, hand_made)
        best, generation, pace = -np.inf, 0, 0.0
        while True:
            started, book_keeping = time.perf_counter(), self._scorer.seconds
            stopped = optimizer.stop_reason()
            if stopped is None:
                genomes = optimizer.ask()
                if not journal.has_ask(generation):  # a stored generation is finished whatever the clock says
                    stopped = self._budget.stop_reason(
                        generations=generation,
                        items=ledger.items,
                        forecast=round(pace * len(genomes)),
                        full=ledger.full,
                    )
            if stopped is not None:
                break
            recipes = [space.decode(u) for u in genomes]
            journal.record_ask(generation, genomes, recipes)
            own = time.perf_counter() - started
            raced = race(
                recipes,
                scorer=self._scorer,
                views=views,
                spec=self._plan.racing,
                order=order,
                phase=f"generation {generation}",
            )
            started = time.perf_counter()
            losses = raced.losses
            pace = ledger.charge(zip((r.hash for r in recipes), raced.blocks, strict=True)) / len(recipes)
            optimizer.tell(losses)
            found += [
                self._candidate(
                    f"generation {generation}, candidate {i}", genomes[i], generation, result, objective
                )
                for i, result in enumerate(results)
                if isinstance(result, Scores)
            ]
            own += time.perf_counter() - started + self._scorer.seconds - book_keeping
            journal.record_tell(generation, losses, own)
            found += [
                Candidate(
                    name=f"generation {generation}, candidate {i}", recipe=recipe, loss=float(losses[i, 0])
                )
                for i, recipe in enumerate(recipes)
                if raced.complete[i]
            ]
            whole = [r for r, done in zip(raced.results, raced.complete, strict=True) if done]
            best = max(best, *(objective.mean(r) for r in whole if isinstance(r, Scores)), -np.inf)
            self._observer.generation_done(generation, ledger.evaluations, best)
            generation += 1
        favourite = None
        if generation and (genome := optimizer.favourite()) is not None:
            favourite = Candidate(name="mean of the search", recipe=space.decode(genome), loss=np.inf)
        return found, favourite, stopped

    def _blocks(
        self, objective: Objective, hand_made: Sequence[tuple[Named, float]]
    ) -> tuple[Views, tuple[int, ...], Ledger]:
        """Return the objective on each item block, the order to score them in, and the ledger of the search.

        Whatever was scored before the first generation is answered by the store, and free.
        """
        named = [*self._parents, *(named for named, _ in hand_made)]
        blocks = range(self._plan.racing.blocks)
        parts = [
            self._scorer.score([n.recipe for n in named], "search", "baselines", [block]) for block in blocks
        ]
        base = [part for (part, *_) in parts if isinstance(part, Scores)]
        views = Views(objective, base)
        ledger = Ledger(views.sizes)
        for one in named:
            ledger.give(one.recipe.hash, blocks)
        scored = [own for own in zip(*parts, strict=True) if not any(isinstance(p, Failure) for p in own)]
        return views, block_order(views, cast(list[tuple[Scores, ...]], scored)), ledger

    def _select(self, found: Sequence[Candidate], favourite: Candidate | None) -> Named:
        """Score the best candidates again on items the search never saw, and return the best of them."""
        if not found:
            raise UserError(
                "no candidate could be scored, so there is no winner",
                fix="look at the failures (evomerge status RUN), then raise the budget and resume",
            )
        chosen = self._finalists(found, favourite, objective)
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self._journal.record_entry("finalist", position, named)
        self._journal.trim_entries("finalist", len(chosen))
        again = Objective(self._plan.objective, self._references("select", self._parents))
        results = self._scorer.score([c.recipe for c in chosen], "select", "selection")
        scored = [(c, r) for c, r in zip(chosen, results, strict=True) if isinstance(r, Scores)]
        if not scored:
            raise UserError(
                "none of the finalists could be scored on `select`, so there is no winner",
                fix="look at the failures (evomerge status RUN), then raise the budget and resume",
            )
        everyone = list(dict.fromkeys([*found, *chosen]))
        believed = dict(zip(everyone, self._estimates(everyone), strict=True))
        best = selection.winner(
            np.array([believed[c] for c, _ in scored]),
            again.losses([r for _, r in scored])[:, 0],
            items=(scored[0][0].items, self._items(scored[0][1])),
        )
        return Named(name=scored[best][0].name, recipe=scored[best][0].recipe)

    def _finalists(
        self, found: Sequence[Candidate], favourite: Genome | None, objective: Objective
    ) -> list[Candidate]:
        """Return the candidates believed best, their soup and the optimizer's favourite, each once."""

        def score(name: str, genome: Genome, generation: int) -> Candidate | None:
            result = self._scorer.score([self._plan.space.decode(genome)], "search", name)[0]
            if isinstance(result, Failure):
                return None
            return self._candidate(name, genome, generation, result, objective)

        chosen = selection.finalists(found, self._plan.finalists, self._estimates(found))
        extra = [
            selection.greedy_soup(
                chosen,
                self._plan.space.coordinates,
                lambda genome: score("soup of the finalists", genome, chosen[0].generation),
            )
        ]
        if favourite is not None:
            extra.append(score("mean of the search", favourite, found[-1].generation))
        distinct = {c.recipe.hash: c for c in reversed([*chosen, *(e for e in extra if e is not None)])}
        return list(reversed(distinct.values()))
