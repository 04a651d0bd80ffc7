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
BUDGET = 2 / 3
"""Share of a budget that gradients may take by default."""
LEAST_BUDGET = 0.5
"""Share down to which they make room for a first generation; where that is not enough they take it all."""
ENDS = 2
"""Points that a descent leads to, which are scored on all items."""
FEWEST_STEPS, FEWEST_ITEMS, WANTED_ITEMS = 8, 2, 8
"""Steps below which a descent is not begun by default, the items of the smallest task that a step has at
least, and those that it has where the budget allows."""
SMALLEST_SHARE = 0.05
"""Share of the items below which steps are left out rather than items."""


class GradientSpec(Strict):
    """The `gradients` part of a warm start: Adam on the continuous parameters, before the search.

    A step costs as much as scoring three times its items, which counts towards `budget.evaluations`: the
    default costs as much as 20 candidates.
    """

    steps: int = Field(default=STEPS, ge=1, le=100_000)
    """Steps of Adam."""
    rate: float = Field(default=0.05, gt=0, le=1)
    """First step size, in the unit cube."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each task's `search` items in a step, drawn anew for each step."""
    softness: float = Field(default=0.5, gt=0, le=1000)
    """Width, in nats, of the zone around the border between wrong and right in which an item has a
    gradient."""

    @property
    def cost(self) -> float:
        """The cost of the steps, in full evaluations."""
        return PASSES * self.steps * self.share

    def leaves(self, generation: float, evaluations: float | None) -> bool:
        """Say whether a budget of evaluations pays for the steps, their ends and a generation at that price.

        A price of 0 says that the search goes on in any case.
        """
        return not generation or evaluations is None or self.cost + ENDS + generation <= evaluations


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
    a gradient and a task has answers with a likelihood, as far as two thirds of the budget pay for it (64
    steps, on fewer items each where the budget is small), or the whole budget where it can't pay for as much
    and a generation; `on` takes the defaults below."""

    @field_validator("gradients", mode="before")
    @classmethod
    def _switched(cls, value: object) -> object:
        """YAML reads `on` and `off` as true and false."""
        return {"True": {}, "False": "off", "on": {}}.get(str(value), value)


def automatic(
    spec: GradientSpec, evaluations: float | None, items: int | None = None, generation: float = 0.0
) -> GradientSpec | None:
    """Return what a share of a budget pays for, of `spec`; None where too few steps would be left.

    Steps with fewer items come before fewer steps: 64 steps on 5 % of the items each lead nearly as far as
    64 on 20 %. Small tasks have larger shares, for a step on one item of a task follows that item.

    A first generation is left for where gradients still get half of the budget; else they get all of it.

    evaluations: the whole budget; None where it has no such limit. items: of the smallest task. generation:
    what the first one costs, in evaluations.

    >>> automatic(GradientSpec(), 20).share, automatic(GradientSpec(), 20).steps
    (0.059, 64)
    >>> automatic(GradientSpec(), 12).steps, automatic(GradientSpec(), 4)
    (40, None)
    >>> automatic(GradientSpec(), None, items=40).share  # 8 items of the smallest task
    0.2
    >>> few = automatic(GradientSpec(), 20, items=16)  # 2 items of it
    >>> few.share, few.steps
    (0.125, 30)
    >>> all_of_it = automatic(GradientSpec(), 20, items=16, generation=19)
    >>> all_of_it.share, all_of_it.steps
    (0.125, 48)
    """
    least, wanted = (
        0.0 if items is None else min(1.0, count / items) for count in (FEWEST_ITEMS, WANTED_ITEMS)
    )
    least, wanted = max(SMALLEST_SHARE, least), max(spec.share, wanted)
    if evaluations is None:
        return spec.model_copy(update={"share": wanted})

    def paid(part: float, most: float) -> GradientSpec:
        allowed = (part * evaluations - ENDS) / PASSES
        share = round(min(most, max(least, allowed / spec.steps)), 4)
        return spec.model_copy(update={"share": share, "steps": min(spec.steps, int(allowed / share + 1e-9))})

    decided = paid(BUDGET, wanted)
    if decided.steps < FEWEST_STEPS:
        return None
    if not decided.leaves(generation, evaluations):
        part = (evaluations - generation) / evaluations
        decided = paid(part, wanted)
        if part < LEAST_BUDGET or decided.steps < FEWEST_STEPS:
            decided = paid(1.0, 1.0)
    return decided


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
