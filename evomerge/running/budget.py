"""The budget: how much a run may ask for before it stops and picks its winner."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, model_validator

from evomerge.schema import Strict


class BudgetSpec(Strict):
    """The `budget` part of a run config; whichever limit comes first ends the search.

    evaluations: candidates asked for by the optimizer (baselines don't count). generations: of the
    optimizer. hours: of work on the run, all sessions together, checked between generations.
    """

    evaluations: int | None = Field(default=None, ge=1)
    generations: int | None = Field(default=None, ge=1)
    hours: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _limited(self) -> BudgetSpec:
        if self.evaluations is None and self.generations is None and self.hours is None:
            raise ValueError("a budget needs at least one of: evaluations, generations, hours")
        return self


class Budget:
    """Says when to stop asking. `hours` returns the hours worked on the run so far."""

    def __init__(self, spec: BudgetSpec, hours: Callable[[], float]) -> None:
        self._spec = spec
        self._hours = hours

    def stop_reason(self, *, generations: int, evaluations: int, population: int) -> str | None:
        """Say why the next generation, of `population` candidates, must not start, or None.

        The first generation always runs, so that there is something to choose from.
        """
        spec = self._spec
        if generations == 0:
            return None
        if spec.generations is not None and generations >= spec.generations:
            return f"budget of {spec.generations} generations used"
        if spec.evaluations is not None and evaluations + population > spec.evaluations:
            return f"budget of {spec.evaluations} evaluations used ({evaluations} in whole generations)"
        if spec.hours is not None and self._hours() >= spec.hours:
            return f"budget of {spec.hours:g} hours used"
        return None
