"""All candidates of a run as a table: where each came from, what it scored, its genes by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.delivery.course import Course
from evomerge.delivery.summary import Summary
from evomerge.running.store import facts
from evomerge.search.spaces.kinds import gene_value

GENEALOGY = 12
"""Most ancestors that a page lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneOfRun:
    """A gene of the run's search space: its name and how its place in [0, 1] reads."""

    name: str
    facts: dict[str, Any]

    def value(self, u: float) -> float | int | bool | str:
        """Return the value at a point of [0, 1]; the point itself in runs that did not store the bounds."""
        return gene_value(self.facts, u) if self.facts else round(u, 4)

    @property
    def number(self) -> bool:
        """Whether it is a range of numbers."""
        return "choices" not in self.facts

    @property
    def ends(self) -> tuple[str, str]:
        """The values at both ends, for people."""
        low, high = self.value(0.0), self.value(1.0)
        return tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in (low, high))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """A recipe that the optimizer asked for, when it did so first.

    names: it has elsewhere, like "TIES 0.4" or "winner". genome: shape (genes,), values in [0, 1]. losses:
    as the optimizer got them, None before. mean, tasks: normalised scores on the `blocks` item blocks of
    `search` it was scored on, None without any; 0 = base, 1 = specialists. failure: why there are none.
    """

    recipe: str
    generation: int
    position: int
    names: tuple[str, ...]
    genome: NDArray[np.float64]
    losses: tuple[float, ...] | None
    mean: float | None
    tasks: dict[str, float]
    blocks: int
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The candidates of a run in the order they were first asked for, and the genes of its search space."""

    genes: tuple[GeneOfRun, ...]
    rows: tuple[CandidateRow, ...]
    blocks: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scored(self) -> list[CandidateRow]:
        """Those with a score."""
        return [row for row in self.rows if row.mean is not None]

    def find(self, recipe: str) -> CandidateRow | None:
        """Return the candidate with a recipe (its hash); None where the optimizer never asked for it."""
        return next((row for row in self.rows if row.recipe == recipe), None)

    def genealogy(self, recipe: str) -> list[CandidateRow]:
        """Return how the search got to a candidate: it, then again and again the nearest earlier record.

        A record was the best of all until then. Optimizers like CMA-ES draw from a distribution, so
        candidates have no parents; the nearest record is what they came from, more or less.

        Args:
            recipe: hash of the candidate's recipe.

        Returns:
            The candidate first; empty where it is not among them.
        """
        end = self.find(recipe)
        if end is None:
            return []
        best, records = -np.inf, []
        for row in self.rows:
            if row is end:
                break
            if row.mean is not None and row.mean > best:
                best = row.mean
                records.append(row)
        chain = [end]
        while records and len(chain) < GENEALOGY:
            distances = [float(np.linalg.norm(row.genome - chain[-1].genome)) for row in records]
            nearest = int(np.argmin(distances))
            chain.append(records[nearest])
            records = records[:nearest]
        return chain


def candidates(summary: Summary, course: Course) -> Candidates:
    """Return the candidates of a run.

    Args:
        summary: of a finished or unfinished run.
        course: of the same run.
    """
    store = summary.store
    failed = {recipe: failure.reason for recipe, split, failure in store.failures() if split == "search"}
    names: dict[str, list[str]] = {}
    for role in ("baseline", "start", "descent", "finalist", "winner"):
        for named in store.entries(role):
            known = names.setdefault(named.recipe.hash, [])
            name = "winner" if role == "winner" else named.name
            if name not in known:
                known.append(name)
    rows: dict[str, CandidateRow] = {}
    genes = 0
    for generation in store.generations():
        genes = generation.genomes.shape[1]
        for position, recipe in enumerate(generation.recipes):
            if recipe in rows:
                continue
            score, losses = course.score(recipe), generation.losses
            rows[recipe] = CandidateRow(
                recipe=recipe,
                generation=generation.number,
                position=position,
                names=tuple(names.get(recipe, ())),
                genome=generation.genomes[position],
                losses=None if losses is None else tuple(losses[position].tolist()),
                mean=None if score is None else score.mean,
                tasks={} if score is None else score.tasks,
                blocks=0 if score is None else score.blocks,
                failure=failed.get(recipe),
            )
    described = facts.GENES.get(store) or []
    if len(described) != genes:
        described = [{} for _ in range(genes)]
    return Candidates(
        genes=tuple(
            GeneOfRun(name=gene.get("name", f"gene {number}"), facts=gene)
            for number, gene in enumerate(described)
        ),
        rows=tuple(rows.values()),
        blocks=course.blocks,
    )


def most_important(table: Candidates, found: Sequence[tuple[int, float]], count: int) -> list[int]:
    """Return up to `count` numbers of genes, most important first; the first ones where nothing is known."""
    ranked = [gene for gene, _ in found] or list(range(len(table.genes)))
    return ranked[:count]
