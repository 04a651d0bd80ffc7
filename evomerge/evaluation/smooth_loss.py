"""A differentiable surrogate of a candidate's loss, as plain data.

The gradient of an accuracy is zero. So each item counts as

    sigmoid(margin / softness)

where the margin, in nats, is the lead of the right answer (see `TaskScores`). Items near the border have the
largest gradient, and items far from it almost none; in the limit of softness 0 this is the accuracy. The rest
is as in the objective: each task is divided by its headroom, and lost retention has a price. Items that
have their specialist's distributions count by the agreement with these instead, see `agreement`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores

PASSES = 3
"""Cost of a gradient in forward passes: one forward pass, and a backward pass of twice the work."""

ACTIVATIONS = 2**29
"""Bytes that a gradient's activations may take; of a larger model half as much as its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothTask:
    """One task's part of the loss.

    gain: for a skill task, minus the loss's change per unit of the task's mean; for a retention task, its
        share of the retention.
    items: numbers of the split's items that take part.
    base: for a retention task, the base model's mean on these items; None for a skill task.
    """

    task: str
    gain: float
    items: tuple[int, ...]
    base: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothLoss:
    """The loss price * max(0, 1 - retention) - sum of gain * mean(sigmoid(margin / softness)).

    limit: least retention and the price of a unit below it, which is added; None without a limit.
    """

    tasks: tuple[SmoothTask, ...]
    price: float
    softness: float
    limit: tuple[float, float] | None = None

    @property
    def items(self) -> int:
        """Number of items that take part."""
        return sum(len(task.items) for task in self.tasks)

    @property
    def key(self) -> str:
        """A hash of everything that determines its value."""
        data = dataclasses.asdict(self)
        if self.limit is None:
            del data["limit"]  # gradients that were stored before it existed keep their keys
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def parts(self, count: int) -> list[SmoothLoss]:
        """Return losses on fewer items each, whose sum this one is: at most `count`, none of them empty.

        Texts stay together, for what is lost of them is not a sum over items.
        """
        found: list[list[SmoothTask]] = [[] for _ in range(count)]
        for number, task in enumerate(self.tasks):
            if task.base is not None:
                found[-1].append(task)
                continue
            for place, tasks in enumerate(found):  # odd items go to another part with each task
                if items := task.items[(place + number) % count :: count]:
                    gain = task.gain * (len(items) / len(task.items))
                    tasks.append(dataclasses.replace(task, gain=gain, items=items))
        return [dataclasses.replace(self, tasks=tuple(tasks)) for tasks in found if tasks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """A loss and its derivatives with respect to the real-valued parameters of a recipe.

    groups: for each tensor group, parameter -> one derivative per source, or a single one for a parameter of
        the group; empty for a group whose method can't be differentiated.
    values: skill task -> mean of sigmoid(margin / softness), or of the agreement, over the items that took
        part.
    """

    loss: float
    groups: tuple[Mapping[str, tuple[float, ...]], ...]
    values: Mapping[str, float] = field(default_factory=dict)


def summed(losses: Sequence[SmoothLoss], gradients: Sequence[Gradient]) -> Gradient:
    """Return the gradient of the sum of some losses from theirs."""
    values: dict[str, list[tuple[int, float]]] = {}
    for loss, gradient in zip(losses, gradients, strict=True):
        for task in loss.tasks:
            if task.task in gradient.values:
                row = values.setdefault(task.task, [])
                row.append((len(task.items), gradient.values[task.task]))
    groups = [
        {name: tuple(map(math.fsum, zip(*(each[name] for each in group), strict=True))) for name in group[0]}
        for group in zip(*(gradient.groups for gradient in gradients), strict=True)
    ]
    return Gradient(
        loss=math.fsum(gradient.loss for gradient in gradients),
        groups=tuple(groups),
        values={
            task: math.fsum(count * mean for count, mean in row) / sum(count for count, _ in row)
            for task, row in values.items()
        },
    )


def smooth_loss(
    normaliser: Normaliser,
    base: Scores,
    *,
    gains: Mapping[str, float],
    price: float,
    softness: float,
    share: float,
    rng: np.random.Generator,
    limit: tuple[float, float] | None = None,
    taught: Collection[str] = (),
) -> SmoothLoss:
    """Return the surrogate of minus what the skills are worth plus the price of lost retention.

    Other tasks whose answers have no likelihood (free generation without a companion) can't be
    differentiated and are left out.

    Args:
        normaliser: of the split whose items are used.
        base: the base model's scores on that split.
        gains: skill task -> what a unit of its mean is worth.
        price: the loss per unit of lost retention.
        softness: width of the sigmoid, in nats.
        share: share of each task's items that take part, drawn by `rng`; 1 takes all items and draws nothing.
        rng: draws the items.
        limit: least retention, and the price of a unit below it.
        taught: skill tasks whose items count by the agreement with their specialist, see `agreement`.
    """
    tasks = []
    for name, gain in gains.items():
        if base[name].margin is not None or name in taught:
            items = _drawn(len(base[name].metric), share, rng)
            tasks.append(SmoothTask(task=name, gain=gain, items=items))
    for name, part in normaliser.retention_shares().items() if price or limit else ():
        metric = base[name].metric
        items = _drawn(len(metric), share, rng)
        mean = float(metric[list(items)].mean())
        tasks.append(SmoothTask(task=name, gain=part, items=items, base=mean))
    return SmoothLoss(tasks=tuple(tasks), price=price, softness=softness, limit=limit)


def _drawn(count: int, share: float, rng: np.random.Generator) -> tuple[int, ...]:
    if share >= 1.0:
        return tuple(range(count))
    drawn = rng.choice(count, size=max(1, round(share * count)), replace=False)
    return tuple(int(item) for item in np.sort(drawn))
