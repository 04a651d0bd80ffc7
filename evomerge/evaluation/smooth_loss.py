"""What a gradient is taken of: a smooth stand-in for the loss of a candidate, as plain data.

Accuracies have no slope. In their place each item counts

    sigmoid(margin / softness)

where the margin, in nats, is how far the right answer leads (see `TaskScores`). An item well ahead or far
behind pulls little and one near the border pulls most, as it should where only crossing it counts; with
softness to 0 this is the accuracy itself. All else is the objective's own: each task is divided by its
head-room, and lost retention has its price.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores

PASSES = 3
"""Cost of a gradient in forward passes: one forward, and a backward of twice the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothTask:
    """One task's part of the loss.

    gain: of a skill task, by how much a rise of its mean by 1 lowers the loss; of a retention task, its share
        of the retention. items: which of the split's items take part. base: of a retention task, the base
        model's mean on them.
    """

    task: str
    gain: float
    items: tuple[int, ...]
    base: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothLoss:
    """A loss with a slope: price * max(0, 1 - retention) - sum of gain * mean(sigmoid(margin / softness))."""

    tasks: tuple[SmoothTask, ...]
    price: float
    softness: float

    @property
    def items(self) -> int:
        """Number of items it is computed from."""
        return sum(len(task.items) for task in self.tasks)

    @property
    def key(self) -> str:
        """A hash of all that decides its value."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """A loss and its derivative by every real-valued parameter of a recipe.

    groups: for each tensor group, parameter -> one derivative per source, or one alone where the parameter is
        the group's; nothing for a group whose method can't be differentiated.
    """

    loss: float
    groups: tuple[Mapping[str, tuple[float, ...]], ...]


def smooth_loss(
    normaliser: Normaliser,
    base: Scores,
    *,
    price: float,
    softness: float,
    share: float,
    rng: np.random.Generator,
) -> SmoothLoss:
    """Return the stand-in for minus the mean normalised score plus the price of lost retention.

    base: the base model's scores on the normaliser's split. price: of lost retention. softness: in
    nats. share: of the items of each task that take part, drawn by `rng`; 1 takes all and draws nothing.
    Tasks whose answers have no likelihood (free generation) have no slope and are left out.
    """
    tasks = []
    for name, gain in normaliser.gains().items():
        if base[name].margin is not None:
            items = _drawn(len(base[name].metric), share, rng)
            tasks.append(SmoothTask(task=name, gain=gain, items=items))
    for name, part in normaliser.retention_shares().items() if price else ():
        metric = base[name].metric
        items = _drawn(len(metric), share, rng)
        mean = float(metric[list(items)].mean())
        tasks.append(SmoothTask(task=name, gain=part, items=items, base=mean))
    return SmoothLoss(tasks=tuple(tasks), price=price, softness=softness)


def _drawn(count: int, share: float, rng: np.random.Generator) -> tuple[int, ...]:
    if share >= 1.0:
        return tuple(range(count))
    drawn = rng.choice(count, size=max(1, round(share * count)), replace=False)
    return tuple(int(item) for item in np.sort(drawn))
