"""Gradients through an executor, each computed only once in the life of a run.

A gradient is stored as a fact named after its recipe and loss, so a run killed during its warm start reads
all finished steps from the store and continues with the same bits. Its `items` are its cost.
"""

from __future__ import annotations

import dataclasses
import time

from evomerge.evaluation.scores import Failure
from evomerge.evaluation.smooth_loss import PASSES, Gradient, SmoothLoss
from evomerge.merging.recipe import Recipe
from evomerge.running.batches import GRADIENTS, Batches
from evomerge.running.executors import Executor
from evomerge.running.observers import Observer
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import GradientJob
from evomerge.search.ports import OutOfTime

PHASE = "gradient start"


class Slopes:
    """Differentiates losses with respect to the parameters of recipes.

    Where the device runs out of memory, the batch size is halved once, for this and all later steps.
    """

    def __init__(self, store: RunStore, executor: Executor, observer: Observer, batches: Batches) -> None:
        self._store, self._executor, self._observer, self._batches = store, executor, observer, batches
        self.not_after: float | None = None

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
        """Return a loss and its derivatives, from the store if they are there.

        step, steps: shown to the user. Raises OutOfTime where it is not there and `not_after` has passed.
        """
        self._observer.phase(PHASE, steps, step)
        if (stored := facts.GRADIENT.of(recipe.hash, loss.key).get(self._store)) is not None:
            if "reason" in stored:
                return Failure(kind=stored["kind"], reason=stored["reason"])
            groups = tuple(
                {name: tuple(values) for name, values in group.items()} for group in stored["groups"]
            )
            return Gradient(loss=stored["loss"], groups=groups, values=stored.get("values", {}))
        if self.not_after is not None and time.time() >= self.not_after:
            raise OutOfTime
        outcome = self._executed(recipe, loss)
        starved = isinstance(outcome, Failure) and outcome.kind == "out_of_memory"
        if starved and self._batches.may_halve(GRADIENTS):
            self._batches.halve_gradients(PHASE)
            outcome = self._executed(recipe, loss)
        if isinstance(outcome, Failure):
            self._observer.scored(recipe, outcome, None)
            self._observer.noted(f"gradients end at step {step + 1} of {steps}: {outcome.reason}")
            fact = dataclasses.asdict(outcome)
        else:
            groups = tuple(dict(group) for group in outcome.groups)
            fact = {"loss": outcome.loss, "groups": groups, "values": dict(outcome.values)}
        self._store.record_gradient(recipe.hash, loss.key, {**fact, "items": PASSES * loss.items})
        return outcome

    def _executed(self, recipe: Recipe, loss: SmoothLoss) -> Gradient | Failure:
        size = self._batches.of(GRADIENTS)
        (result,) = self._executor.run([GradientJob(recipe=recipe, loss=loss, batch_size=size)])
        assert isinstance(result.outcome, Gradient | Failure)
        if result.faults:
            self._observer.noted(f"{recipe.hash[:12]}: tried again after {'; '.join(result.faults)}")
        return result.outcome
