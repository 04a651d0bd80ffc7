"""Which of the searched candidates deserve a second look, on items the search never saw.

The candidate with the best search score is partly the luckiest one. So the top few are scored again on
the `select` split, together with the optimizer's own favourite, which averages luck away, and the best
there wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.merging.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe the search asked for, and its loss on `search`."""

    name: str
    recipe: Recipe
    loss: float


def finalists(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the `count` best distinct recipes, best first; ties go to the earlier one."""
    best: dict[str, Candidate] = {}
    for candidate in sorted(found, key=lambda c: c.loss):
        best.setdefault(candidate.recipe.hash, candidate)
        if len(best) == count:
            break
    return list(best.values())
