"""The winner: finalists are scored on `select`, which the search never saw, and one of them is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import NoWinnerError
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.search import pareto, selection
from evomerge.search.compromise import Compromise
from evomerge.search.generations import SearchResult
from evomerge.search.objective import Objective
from evomerge.search.ports import CandidateScorer, Journal, Named
from evomerge.search.racing import Views, clearly_worse
from evomerge.search.selection import Candidate
from evomerge.search.spaces.space import Genome, Space

GRADIENT_START = "gradient start"
"""Name of the point that gradients led to."""
CLEAR = 0.05
"""Level at which a candidate must be better on `select` to take the place of that point."""

COMPROMISES = 3
"""One of so many finalists of a front is there as a good compromise, the others to stand for all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Chooses the winner of a search.

    finalists: how many candidates are scored again. counted: returns the number of items a candidate's loss
    is computed from. on_select: returns the objective on `select`. ahead: receives recipes that will surely
    be scored on a split, so that workers which are idle while soups are tried one by one can begin.
    """

    space: Space
    scorer: CandidateScorer
    journal: Journal
    finalists: int
    counted: Callable[[Scores], int]
    on_select: Callable[[], Objective]
    ahead: Callable[[Sequence[Recipe], Split], None]

    def best(
        self, starts: Sequence[Candidate], searched: SearchResult, views: Views
    ) -> tuple[Named, Named | None]:
        """Score the finalists on `select`, which the search never saw, and return the winner.

        Also returns the candidate that is best on `search` by the mean alone, where floors, constraints or
        balance made another the winner.
        """
        candidates = [*starts, *searched.candidates]
        if not candidates:
            raise _no_winner("no candidate could be scored")
        chosen = self._finalists(candidates, searched, views(searched.blocks))
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self.journal.record_entry("finalist", position, named)
        self.journal.trim_entries("finalist", len(chosen))
        again = self.on_select()
        results = self.scorer.score([c.recipe for c in chosen], "select", "selection")
        scored = [(c, r) for c, r in zip(chosen, results, strict=True) if isinstance(r, Scores)]
        if not scored:
            raise _no_winner("none of the finalists could be scored on `select`")
        candidates = list(dict.fromkeys([*candidates, *chosen]))
        estimates = dict(zip(candidates, searched.estimates(candidates), strict=True))
        held_out = again.losses([r for _, r in scored], [c.recipe for c, _ in scored])[:, 0]
        feasible = [i for i, (_, r) in enumerate(scored) if not again.violation(r)]
        allowed = feasible or [int(np.argmin([again.violation(r) for _, r in scored]))]
        best = allowed[
            selection.winner(
                np.array([estimates[scored[i][0]] for i in allowed]),
                held_out[allowed],
                items=(scored[0][0].items, self.counted(scored[0][1])),
            )
        ]
        for index in allowed:
            if scored[index][0].name == GRADIENT_START and not self._clearly_better(
                again, scored[best][1], scored[index][1]
            ):
                best = index
        winner = scored[best][0]
        self.journal.record_chosen_on(searched.blocks)
        self.scorer.score([winner.recipe], "search", "winner on all items")
        unlimited = self._unlimited(candidates, winner, searched.blocks, views(searched.blocks))
        return Named(name=winner.name, recipe=winner.recipe), unlimited

    def _unlimited(
        self, candidates: Sequence[Candidate], winner: Candidate, blocks: Sequence[int], objective: Objective
    ) -> Named | None:
        """Return the candidate that is best by the mean alone, None where that is the winner."""
        free = objective.unlimited
        if free is None:
            return None
        recipes = [candidate.recipe for candidate in candidates]
        scores = self.scorer.score(recipes, "search", "winner on all items", blocks)
        losses = free.losses(scores, recipes)[:, 0]
        best = candidates[int(np.argmin(losses))]
        return None if best.recipe == winner.recipe else Named(name=best.name, recipe=best.recipe)

    @staticmethod
    def _clearly_better(objective: Objective, scores: Scores, others: Scores) -> bool:
        """Say whether a candidate is better than another on `select` beyond sampling error."""
        parts = [objective.contributions(each) for each in (scores, others)]
        return clearly_worse(parts, totals=None, keep=1, level=CLEAR)[1]

    def _finalists(
        self, candidates: Sequence[Candidate], searched: SearchResult, objective: Objective
    ) -> list[Candidate]:
        """Return the candidates with the best estimates, their soup and the optimizer's favourite."""
        decode = self.space.decode

        def score(name: str, genome: Genome, generation: int) -> Candidate | None:
            recipe = decode(genome)
            (result,) = self.scorer.score([recipe], "search", name, searched.blocks)
            if isinstance(result, Failure):
                return None
            return Candidate(
                name=name,
                recipe=recipe,
                loss=float(objective.losses([result], [recipe])[0, 0]),
                genome=genome,
                generation=generation,
                items=self.counted(result),
            )

        chosen = selection.finalists(candidates, self.finalists, searched.estimates(candidates))
        chosen += [c for c in candidates if c.name == GRADIENT_START and c not in chosen]
        self.ahead([candidate.recipe for candidate in chosen], "select")
        extra = [
            selection.greedy_soup(
                chosen,
                self.space.coordinates,
                lambda genome: score("soup of the finalists", genome, chosen[0].generation),
            )
        ]
        if searched.favourite is not None:
            extra.append(score("mean of the search", searched.favourite, candidates[-1].generation))
        distinct_ = {c.recipe.hash: c for c in reversed([*chosen, *(e for e in extra if e is not None)])}
        return list(reversed(distinct_.values()))

    def on_front(
        self,
        archive: pareto.Archive,
        blocks: Sequence[int],
        objective: Objective,
        *,
        parents: Sequence[Recipe],
        hand_made: Sequence[Recipe],
    ) -> Named:
        """Score representatives of the front on `select` and return the compromise there.

        Hand-made merges are scored there too, so that plots can show them beside the front.

        blocks, objective: of `search`, that the front was found on.
        """
        if not archive.members:
            raise _no_winner("no candidate could be scored")

        def judge(objective: Objective, split: Split, blocks: Sequence[int] | None) -> Compromise:
            recipes = [*parents, *hand_made]
            results = self.scorer.score(recipes, split, "selection", blocks)
            scored = [(r, s) for r, s in zip(recipes, results, strict=True) if isinstance(s, Scores)]
            return Compromise(objective, scored, [s for r, s in scored if r in hand_made])

        recipes = [candidate.recipe for candidate in archive.members]
        results = self.scorer.score(recipes, "search", "selection", blocks)
        members = [(r, s) for r, s in zip(recipes, results, strict=True) if isinstance(s, Scores)]
        first = judge(objective, "search", blocks).ranked(members)[: -(-self.finalists // COMPROMISES)]
        chosen = archive.finalists(self.finalists, first)
        for position, candidate in enumerate(chosen):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self.journal.record_entry("finalist", position, named)
        self.journal.trim_entries("finalist", len(chosen))
        for position, candidate in enumerate(archive.members):
            named = Named(name=candidate.name, recipe=candidate.recipe)
            self.journal.record_entry("front", position, named)
        self.journal.trim_entries("front", len(archive.members))
        results = self.scorer.score([c.recipe for c in chosen], "select", "selection")
        scored = [(c, s) for c, s in zip(chosen, results, strict=True) if isinstance(s, Scores)]
        compromise = judge(self.on_select(), "select", None)
        if not scored:
            raise _no_winner("none of the finalists could be scored on `select`")
        winner, _ = scored[compromise.best([(c.recipe, s) for c, s in scored])]
        return Named(name=winner.name, recipe=winner.recipe)


def _no_winner(reason: str) -> NoWinnerError:
    return NoWinnerError(
        f"{reason}, so there is no winner",
        fix="look at the failures (evomerge status RUN), then raise the budget and resume",
    )
