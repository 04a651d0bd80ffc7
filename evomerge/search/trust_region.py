"""The trust region: where the surrogate is believed, and the genomes it would try next.

Around the best genome known lies a box. In it the model's loss is minimised, once as predicted and then
with optimism, each time in the light of the genomes already chosen, so that a batch also looks where the
model knows least (Desautels, Krause and Burdick 2014, "Parallelizing exploration-exploitation tradeoffs").
The box grows while proposals keep what the model promised and shrinks while they don't (Powell's and
Conn, Gould and Toint's ratio rule, 2000; for Gaussian processes Eriksson et al. 2019, arXiv:1910.01739).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.search.genes import Coordinate, Genome
from evomerge.search.surrogate import LossOf, Model, Pending

START, LARGEST, SMALLEST = 0.2, 0.5, 0.05
"""Half of the box's edge, in the unit cube."""
GROW, SHRINK = 1.4, 0.7
KEPT = 0.3
"""Share of the promised improvement from which on the box grows."""
OPTIMISM = 0.5
"""In posterior standard deviations, for all but the first proposal of a batch."""
_STEPS = 60


class TrustRegion:
    """A box in the unit cube, and how far it is believed. Only continuous coordinates are moved."""

    def __init__(self, coordinates: Sequence[Coordinate], *, seed: np.random.SeedSequence) -> None:
        self._moved = np.array([c.levels is None for c in coordinates])
        self._generator = np.random.default_rng(seed)
        self.radius = START

    @property
    def moves(self) -> bool:
        """Whether there is a coordinate to move at all."""
        return bool(self._moved.any())

    @property
    def collapsed(self) -> bool:
        """Whether the box is as small as it gets: on these items there is nothing more to find nearby."""
        return self.radius <= SMALLEST

    def reset(self) -> None:
        """Believe again in half the first box: the items changed."""
        self.radius = START / 2

    def propose(
        self, model: Model, loss_of: LossOf, centre: Genome, count: int
    ) -> tuple[NDArray[np.float64], float]:
        """Return (count, dimension) genomes to score next, and the loss predicted for the first."""
        low = np.clip(centre - self.radius, 0.0, 1.0)
        high = np.clip(centre + self.radius, 0.0, 1.0)
        low, high = np.where(self._moved, low, centre), np.where(self._moved, high, centre)
        chosen: list[Genome] = []
        promised = np.inf
        with threadpool_limits(1):
            for number in range(count):
                jitter = 0.3 * self.radius * self._generator.standard_normal(len(centre))
                start = np.clip(centre + jitter, low, high)
                pending = Pending(model, chosen) if chosen else None
                found, loss = _minimise(
                    model, loss_of, start, low, high, optimism=OPTIMISM if number else 0.0, pending=pending
                )
                if not number:
                    promised = loss
                chosen.append(found)
        return np.array(chosen), promised

    def learn(self, *, before: float, promised: float, reached: float) -> None:
        """Grow or shrink: the best loss before, what was promised for now, and the best reached now."""
        if reached < before - KEPT * max(before - promised, 0.0):
            self.radius = min(GROW * self.radius, LARGEST)
        elif reached >= before:
            self.radius = max(SHRINK * self.radius, SMALLEST)


def _minimise(
    model: Model,
    loss_of: LossOf,
    start: Genome,
    low: Genome,
    high: Genome,
    *,
    optimism: float,
    pending: Pending | None,
) -> tuple[Genome, float]:
    """Minimise the predicted loss in a box with L-BFGS-B; return the genome and the loss there."""

    def loss(genome: Genome) -> tuple[float, NDArray[np.float64]]:
        found = model.predict(genome, optimism=optimism, pending=pending)
        value, slope = loss_of(found.values)
        return value, slope @ found.slopes

    result = scipy.optimize.minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(low, high, strict=True)),
        options={"maxiter": _STEPS},
    )
    genome = np.clip(result.x, low, high)
    return genome, float(result.fun)
