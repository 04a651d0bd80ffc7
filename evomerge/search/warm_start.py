"""Warm start: begin the search from recipes that are already good, and from gradients (`search.descent`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from evomerge.evaluation.smooth_loss import PASSES
from evomerge.schema import Strict
from evomerge.search.ports import Named

STEPS = 64
SHARE = 2 / 3
"""Share of a budget that gradients may take by default."""
ENDS = 2
"""Points that a descent leads to, which are scored on all items."""
FEWEST = 8
"""Steps below which a descent is not begun by default."""


class GradientSpec(Strict):
    """The `gradients` part of a warm start: Adam on the continuous parameters, before the search.

    A step costs as much as scoring three times its items, which counts towards `budget.evaluations`: the
    default costs as much as 39 candidates.
    """

    steps: int = Field(default=STEPS, ge=1, le=100_000)
    """Steps of Adam."""
    rate: float = Field(default=0.05, gt=0, le=1)
    """First step size, in the unit cube."""
    share: float = Field(default=0.2, gt=0, le=1)
    """Share of each task's `search` items in a step, drawn anew for each step."""
    softness: float = Field(default=0.5, gt=0, le=1000)
    """Width, in nats, of the zone around the border between wrong and right in which an item has a
    gradient."""


class WarmStartSpec(Strict):
    """The `warm_start` part of a run config: what is scored beside the baselines and may seed the search."""

    run: str | None = None
    """The folder of another run on models with the same names, finished or not. Its winner and best
    candidates are taken where the space can express them."""
    recipes: tuple[str, ...] = ()
    """recipe.yaml or mergekit YAML files over this run's models. A recipe that the space can't express is
    scored and may win, but does not seed the search."""
    gradients: GradientSpec | Literal["auto", "off"] = "auto"
    """Gradient steps from the best known point before the search. `auto`: where the space has a method with
    a gradient and a task has answers with a likelihood, as many steps (at most 64) as two thirds of the
    budget pay for; `on` takes the defaults below."""

    @field_validator("gradients", mode="before")
    @classmethod
    def _switched(cls, value: object) -> object:
        """YAML reads `on` and `off` as true and false."""
        return {"True": {}, "False": "off", "on": {}}.get(str(value), value)


def automatic_steps(spec: GradientSpec, evaluations: float | None) -> int:
    """Return how many steps of `spec`, at most, a share of a budget pays for; 0 where too few would be left.

    evaluations: the whole budget; None where it has no such limit.

    >>> automatic_steps(GradientSpec(), 60), automatic_steps(GradientSpec(), 12)
    (63, 9)
    >>> automatic_steps(GradientSpec(), 8), automatic_steps(GradientSpec(), None)
    (0, 64)
    """
    if evaluations is None:
        return spec.steps
    steps = int((SHARE * evaluations - ENDS) / (PASSES * spec.share))
    return min(spec.steps, steps) if steps >= FEWEST else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """What a search starts from besides its baselines. gradients: None where none are followed. automatic:
    whether the search decides how many steps it takes, and whether any."""

    recipes: tuple[Named, ...] = ()
    gradients: GradientSpec | None = None
    automatic: bool = False


def distinct(named: Sequence[Named]) -> list[Named]:
    """Return the entries without those whose recipe an earlier one has."""
    by_hash: dict[str, Named] = {}
    for entry in named:
        by_hash.setdefault(entry.recipe.hash, entry)
    return list(by_hash.values())
