"""The budget: how much a run may ask for before it stops and picks its winner."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, model_validator

from evomerge.schema import Strict


class BudgetSpec(Strict):
    """The `budget` part of a run config; whichever limit comes first ends the search.

    evaluations: of candidates of the optimizer (baselines don't count) on all `search` items; one that
    stops early counts in part, a repeated one not at all. items: the same limit in scored items.
    generations: of the optimizer. hours: of work on the run, all sessions together. All are checked
    between generations, taking the cost of the last for that of the next.
    """

    evaluations: int | None = Field(default=None, ge=1)
    items: int | None = Field(default=None, ge=1)
    generations: int | None = Field(default=None, ge=1)
    hours: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _limited(self) -> BudgetSpec:
        if all(limit is None for limit in (self.evaluations, self.items, self.generations, self.hours)):
            raise ValueError("a budget needs at least one of: evaluations, items, generations, hours")
        return self


class Budget:
    """Says when to stop asking. `hours` returns the hours worked on the run so far."""

    def __init__(self, spec: BudgetSpec, hours: Callable[[], float]) -> None:
        self._spec = spec
        self._hours = hours

    def stop_reason(self, *, generations: int, items: int, forecast: int, full: int) -> str | None:
        """Say why the next generation must not start, or None.

        items: scored so far. forecast: what the next generation will cost. full: of one evaluation.

        The first generation always runs, so that there is something to choose from.
        """
        spec = self._spec
        if generations == 0:
            return None
        if spec.generations is not None and generations >= spec.generations:
            return f"budget of {spec.generations} generations used"
        if spec.evaluations is not None and items + forecast > spec.evaluations * full:
            return f"budget of {spec.evaluations} evaluations used ({items / full:.4g} in whole generations)"
        if spec.items is not None and items + forecast > spec.items:
            return f"budget of {spec.items} items used ({items} in whole generations)"
        if spec.hours is not None and self._hours() >= spec.hours:
            return f"budget of {spec.hours:g} hours used"
        return None
