"""Ports: what the search needs from outside, as protocols, and the records that cross that border.

`running` implements the protocols (scoring, storing, budgets, gradients); tests use fakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss
from evomerge.merging.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A recipe with the name it has in tables and in the verdict."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideState:
    """What the guide did in a generation, for the store and the report.

    correlation: Spearman's, of the last predictions with what was measured; None while there are too few.
    proposed: candidates it proposed itself. blocks: item blocks scored. radius: of the trust region.
    """

    correlation: float | None
    proposed: int
    blocks: int
    radius: float


class OutOfTime(Exception):  # noqa: N818  (nothing went wrong)
    """The scorer began no further job because its `not_after` had passed."""


class CandidateScorer(Protocol):
    """Scores recipes, each only once in the life of a run.

    seconds: time spent so far on book-keeping, apart from the scoring itself. not_after: the moment, in epoch
    seconds, from which on no job is begun; what is under way is finished and stored, then `score` raises
    OutOfTime unless all requested scores are known.
    """

    seconds: float
    not_after: float | None

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

    def submit(self, ticket: str, recipe: Recipe, blocks: Sequence[int]) -> None:
        """Begin to score a recipe on item blocks of `search`, and return at once; `next` has the result."""
        ...

    def next(self) -> tuple[str, Scores | Failure] | None:
        """Wait for a submitted recipe, whichever completes first; return its ticket and result.

        None where none is left. Raises OutOfTime where none is left and some were not begun because of
        `not_after`.
        """
        ...

    def known(
        self, recipes: Sequence[Recipe], split: Split, blocks: Sequence[int]
    ) -> list[Scores | Failure | None]:
        """Return what recipes are known to have scored on blocks, None where `score` has work to do."""
        ...


class Journal(Protocol):
    """Records what the search decided, or checks it against what an earlier session recorded."""

    def record_ask(
        self, generation: int, genomes: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None: ...

    def record_arrival(
        self, generation: int, position: int, genome: NDArray[np.float64], recipe: Recipe
    ) -> None:
        """Record the next candidate of an asynchronous search whose scores are complete.

        position: in the generation that it will be told in.
        """
        ...

    def arrivals(self) -> Sequence[str]:
        """Return the recipes (hashes) of all recorded arrivals, in order."""
        ...

    def record_pending(self, arrived: int, count: int) -> Sequence[tuple[int, int]]:
        """Record how many candidates are pending from an arrival on.

        Returns all that was recorded, in order: (number of arrivals, candidates pending from then on).
        """
        ...

    def record_proposed(self, count: int) -> None:
        """Record how many candidates an asynchronous search has proposed; replays change nothing."""
        ...

    def proposed(self) -> int:
        """Return how many candidates an asynchronous search had proposed, in any session."""
        ...

    def record_tell(self, generation: int, losses: NDArray[np.float64], seconds: float) -> None: ...

    def record_guide(self, generation: int, state: GuideState) -> None: ...

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None: ...

    def record_spent(self, generation: int, items: int) -> None: ...

    def has_ask(self, generation: int) -> bool: ...

    def record_entry(self, role: str, position: int, entry: Named) -> None: ...

    def trim_entries(self, role: str, count: int) -> None: ...

    def record_chosen_on(self, blocks: Sequence[int]) -> None:
        """Record the item blocks of `search` that the finalists were chosen on."""
        ...

    def record_descent(self, steps: int, share: float) -> tuple[int, float]:
        """Record how many gradient steps a search takes, and their share of the items.

        Returns what it began with.
        """
        ...

    def record_frugal(self, worthwhile: bool) -> bool:
        """Record that the search stops where generations add nothing to gradients.

        Returns whether it does; a search that began before there was such a rule goes on without.
        """
        ...


class SearchBudget(Protocol):
    """Says when to stop asking."""

    @property
    def timed(self) -> bool:
        """Whether the clock may end the search."""
        ...

    def evaluations(self, full: int, population: int) -> float | None:
        """Return how many full evaluations it allows, None where only other limits end it.

        full: items of one. population: candidates of a generation.
        """
        ...

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int
    ) -> str | None: ...

    def deadline(self) -> float | None:
        """Return when the last job of the search may begin, in epoch seconds; None: at any time."""
        ...

    def out_of_time(self, generations: int, *, cut: bool) -> str:
        """Return why the clock ends the search after so many generations. cut: in the middle of the next."""
        ...


class SearchObserver(Protocol):
    """Receives the events of a search, for progress displays, logs and trackers."""

    def phase(self, name: str, jobs: int, known: int) -> None:
        """A batch of `jobs` recipes starts, of which `known` are answered from the store."""
        ...

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """The losses of a generation were passed to the optimizer.

        evaluations: spent so far, all generations. best: the highest mean normalised `search` score so far.
        """
        ...

    def noted(self, message: str) -> None:
        """Something worth a line, such as a specialist that is no better than the base."""
        ...


class GradientSource(Protocol):
    """Differentiates losses with respect to recipes' parameters, each only once in the life of a run.

    not_after: as in CandidateScorer; what is not known then raises OutOfTime.
    """

    not_after: float | None

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
        """Return a loss and its derivatives. step, steps: shown to the user."""
        ...
