"""Gradients through an executor, each computed only once in the life of a run.

A gradient is stored as a fact named after its recipe and loss, so a run killed during its warm start reads
all finished steps from the store and continues with the same bits. Its `items` are its cost.
"""

from __future__ import annotations

import dataclasses
import time

from evomerge.evaluation.scores import Failure
from evomerge.evaluation.smooth_loss import PASSES, Gradient, SmoothLoss, summed
from evomerge.merging.recipe import Recipe
from evomerge.running.batches import GRADIENTS, Batches
from evomerge.running.executors import Executor
from evomerge.running.observers import Observer
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import GradientJob, WorkerSpec
from evomerge.search.ports import OutOfTime

PHASE = "gradient start"
PARTS = 2
"""Parts of a gradient step that several workers can share."""
WORTH_SHARING = 10_000_000
"""Parameters from which they do: below, a step takes no longer than what every part adds to it."""


def parts_of(worker: WorkerSpec, parameters: int) -> int:
    """Return how many parts a gradient step has; the number of workers changes no bits.

    On GPUs the derivatives by the weights take most of the time, and every part would compute them.
    """
    return PARTS if worker.device == "cpu" and parameters >= WORTH_SHARING else 1


class Slopes:
    """Differentiates losses with respect to the parameters of recipes.

    Where the device runs out of memory, the batch size is halved once, for this and all later steps.

    parts: that a loss is divided into for several workers. It changes the last bits, so that a run keeps the
    number it began with.
    """

    def __init__(
        self, store: RunStore, executor: Executor, observer: Observer, batches: Batches, *, parts: int = 1
    ) -> None:
        self._store, self._executor, self._observer, self._batches = store, executor, observer, batches
        self._wanted_parts = parts
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

    def _parts(self) -> int:
        """Return how many parts a loss of this run is divided into."""
        if (stored := facts.GRADIENT_PARTS.get(self._store)) is not None:
            return stored
        parts = 1 if self._store.gradient_items() else self._wanted_parts  # a run from before there were any
        facts.GRADIENT_PARTS.set(self._store, parts)
        return parts

    def _executed(self, recipe: Recipe, loss: SmoothLoss) -> Gradient | Failure:
        size, losses = self._batches.of(GRADIENTS), loss.parts(self._parts())
        jobs = [GradientJob(recipe=recipe, loss=part, batch_size=size) for part in losses]
        found: dict[str, Gradient | Failure] = {}
        seconds = facts.GRADIENT_SECONDS.get(self._store) or 0.0
        for result in self._executor.run(jobs):
            assert isinstance(result.job, GradientJob)
            assert isinstance(result.outcome, Gradient | Failure)
            if result.faults:
                self._observer.noted(f"{recipe.hash[:12]}: tried again after {'; '.join(result.faults)}")
            found[result.job.loss.key] = result.outcome
            seconds += result.seconds
        facts.GRADIENT_SECONDS.set(self._store, seconds)
        gradients: list[Gradient] = []
        for part in losses:
            outcome = found[part.key]
            if isinstance(outcome, Failure):
                return outcome
            gradients.append(outcome)
        return gradients[0] if len(gradients) == 1 else summed(losses, gradients)
