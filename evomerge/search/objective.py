"""The objective: Scores on the `search` split become one loss per candidate, lower is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores
from evomerge.schema import Strict

FAILURE_MARGIN = 1.0
"""How much worse than the worst finite loss a failed candidate is: one whole specialist."""


class ObjectiveSpec(Strict):
    """The `objective` part of a run config.

    smooth: share, in [0, 1], of the continuous companion of the metrics (probability of the gold
        answer). Accuracies tie often and move in steps; the companion never does.
    retention: loss per unit of the base model's general ability that is lost.
    """

    smooth: float = Field(default=0.3, ge=0, le=1)
    retention: float = Field(default=0.2, ge=0)


class Objective:
    """The loss of a candidate: minus its mean normalised score, plus a price for lost retention.

    The unit is the same everywhere: 1 is the distance from the base to a specialist.
    """

    def __init__(self, spec: ObjectiveSpec, normaliser: Normaliser) -> None:
        self._spec = spec
        self._normaliser = normaliser

    def loss(self, scores: Scores) -> float:
        """Return the loss of one scored candidate."""
        smooth = self._spec.smooth
        gain = (1 - smooth) * self._normaliser.mean(scores)
        if smooth:
            gain += smooth * self._normaliser.smooth_mean(scores)
        retention = self._normaliser.retention(scores)
        lost = 0.0 if retention is None else max(0.0, 1.0 - retention)
        return self._spec.retention * lost - gain

    def on(self, base: Scores) -> Objective:
        """Return this objective for scores on other item blocks, of which `base` is the base's scores."""
        return Objective(self._spec, self._normaliser.on(base))

    def contributions(self, scores: Scores) -> list[NDArray[np.float64]]:
        """Return per counted task (items,) what each item adds to the loss; the means sum to `loss`."""
        return self._normaliser.contributions(
            scores, smooth=self._spec.smooth, retention=self._spec.retention
        )

    def mean(self, scores: Scores) -> float:
        """Return the mean normalised score alone: what tables show."""
        return self._normaliser.mean(scores)

    def losses(self, results: Sequence[Scores | Failure]) -> NDArray[np.float64]:
        """Return the losses of a generation, shape (n, 1), all finite.

        A failure, and a loss that is not finite, gets the worst finite loss of the generation (at least
        0, the base's) plus FAILURE_MARGIN.
        """
        losses = np.array([np.nan if isinstance(r, Failure) else self.loss(r) for r in results])
        finite = np.isfinite(losses)
        worst = max(0.0, float(losses[finite].max())) if finite.any() else 0.0
        losses[~finite] = worst + FAILURE_MARGIN
        return losses[:, None]
