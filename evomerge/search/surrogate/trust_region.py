"""The trust region: where the surrogate is trusted, and the genomes it proposes.

Around the best genome known lies a box. In it the model's loss is minimised, once as predicted and then
with optimism, each time in the light of the genomes already chosen, so that a batch also looks where the
model knows least (Desautels, Krause and Burdick 2014, "Parallelizing exploration-exploitation tradeoffs").
Discrete coordinates are changed one at a time, whichever change is predicted to be best, each followed by
another descent of the continuous ones; as many may differ from the best genome's as the size of the box
allows (a Hamming ball beside the box: Wan et al. 2021, arXiv:2102.07188).
The proposals of a batch keep to the whole box, half of it and a quarter in turn, so that a model which
promises too much far away costs a part of the batch only. The next box follows the best of them: it grows
where that kept what the model promised and shrinks where none is better (the ratio rule of Conn, Gould and
Toint 2000; for Gaussian processes Eriksson et al. 2019, arXiv:1910.01739).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.margins import LossOf, Model, Pending

START, LARGEST, SMALLEST = 0.2, 0.5, 0.03
"""Half of the box's edge, in the unit cube."""
GROW, SHRINK = 2.0, 0.5
KEPT = 0.3
"""Share of the promised improvement from which on the box grows."""
MOST_CHANGES = 3
"""Discrete coordinates in which a proposal may differ from the best genome."""
LADDER = (1.0, 0.5, 0.25)
"""Shares of the box that the proposals of a batch keep to, in turn."""
OPTIMISM = 0.5
"""In posterior standard deviations, for all but the first proposal in each share of the box."""
_STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Genomes (n, dimension), and half of the edge of the box that each kept to."""

    genomes: NDArray[np.float64]
    radii: tuple[float, ...]


class TrustRegion:
    """A box in the unit cube, and its radius."""

    def __init__(self, coordinates: Sequence[Coordinate], *, seed: np.random.SeedSequence) -> None:
        self._continuous = np.array([c.levels is None for c in coordinates])
        self._discrete = [(i, c) for i, c in enumerate(coordinates) if c.levels is not None and c.levels > 1]
        self._generator = np.random.default_rng(seed)
        self.radius = START

    @property
    def collapsed(self) -> bool:
        """Whether the box is as small as it gets: on these items there is nothing more to find nearby."""
        return self.radius <= SMALLEST

    def reset(self) -> None:
        """Believe again in half the first box: the items changed."""
        self.radius = START / 2

    def propose(
        self,
        model: Model,
        loss_of: LossOf,
        centre: Genome,
        count: int,
        *,
        known: Collection[bytes] = (),
        pending: Sequence[Genome] = (),
        first: int = 0,
    ) -> Proposals:
        """Return `count` genomes to score next, the most trusted first.

        known: genomes scored already, as bytes. pending: genomes whose scores are still to come. first: how
        many of the batch were proposed before. There are fewer than `count` where nothing else is in reach,
        which discrete coordinates alone can come to.
        """
        taken = {*known, *(genome.tobytes() for genome in pending)}
        chosen: list[Genome] = []
        radii: list[float] = []
        with threadpool_limits(1):
            for number in range(first, first + count):
                radius = self.radius * LADDER[number % len(LADDER)]
                jitter = 0.3 * radius * self._generator.standard_normal(len(centre))
                optimism = 0.0 if number < len(LADDER) else OPTIMISM
                predicted = _Predicted(model, loss_of, optimism=optimism, pending=[*pending, *chosen])
                proposal = self._best_in(predicted, centre, jitter, radius, taken)
                if proposal is not None:
                    chosen.append(proposal)
                    radii.append(radius)
                    taken.add(proposal.tobytes())
        return Proposals(genomes=np.array(chosen).reshape(-1, len(centre)), radii=tuple(radii))

    def learn(
        self, *, before: float, promised: Sequence[float], reached: Sequence[float], radii: Sequence[float]
    ) -> None:
        """Move to the best proposal; before: the best loss so far; promised, reached, radii: per proposal."""
        best = int(np.argmin(reached))
        if reached[best] >= before:
            self.radius = max(SHRINK * self.radius, SMALLEST)
        elif reached[best] < before - KEPT * max(before - promised[best], 0.0):
            self.radius = min(max(GROW * radii[best], SMALLEST), LARGEST)
        else:
            self.radius = max(radii[best], SMALLEST)

    def _best_in(
        self, predicted: _Predicted, centre: Genome, jitter: Genome, radius: float, taken: Collection[bytes]
    ) -> Genome | None:
        """Return the untaken genome of the lowest loss met in a box and its Hamming ball."""
        low, high = np.clip(centre - radius, 0.0, 1.0), np.clip(centre + radius, 0.0, 1.0)
        low, high = np.where(self._continuous, low, centre), np.where(self._continuous, high, centre)
        here, loss = predicted.minimise(np.clip(centre + jitter, low, high), low, high)
        met = [(loss, here)]
        for _ in range(self._changes(radius)):
            neighbours = list(self._neighbours(here))
            losses = predicted.losses(neighbours)
            met += zip(losses, neighbours, strict=True)
            best = int(np.argmin(losses))
            if losses[best] >= loss:
                break
            fixed, changed = ~self._continuous, neighbours[best]
            low, high = np.where(fixed, changed, low), np.where(fixed, changed, high)
            here, loss = predicted.minimise(changed, low, high)
            met.append((loss, here))
        untaken = [pair for pair in met if pair[1].tobytes() not in taken]
        if not untaken and not self._continuous.any():
            return None
        return min(untaken or met, key=lambda pair: pair[0])[1]

    def _changes(self, radius: float) -> int:
        """How many discrete coordinates may differ from the best genome's."""
        return min(len(self._discrete), MOST_CHANGES, max(1, round(radius * len(self._discrete))))

    def _neighbours(self, genome: Genome) -> Iterator[Genome]:
        """Yield the genomes that differ in one discrete coordinate; whole numbers by one."""
        for index, coordinate in self._discrete:
            assert coordinate.levels is not None
            own = coordinate.level(genome[index])
            for level in range(coordinate.levels):
                if level == own or (coordinate.ordered and abs(level - own) > 1):
                    continue
                changed = genome.copy()
                changed[index] = coordinate.middle(level)
                yield changed


class _Predicted:
    """The loss a model predicts, and its slope, in the light of genomes already chosen."""

    def __init__(self, model: Model, loss_of: LossOf, *, optimism: float, pending: Sequence[Genome]) -> None:
        self._model, self._loss_of, self._optimism = model, loss_of, optimism
        self._pending = Pending(model, pending) if pending else None

    def __call__(self, genome: Genome) -> tuple[float, NDArray[np.float64]]:
        found = self._model.predict(genome, optimism=self._optimism, pending=self._pending)
        value, slope = self._loss_of(found.values)
        return value, slope @ found.slopes

    def losses(self, genomes: Sequence[Genome]) -> list[float]:
        """Return the losses of some genomes, without slopes."""
        values = self._model.values(genomes, optimism=self._optimism, pending=self._pending)
        return [self._loss_of(each)[0] for each in values]

    def minimise(self, start: Genome, low: Genome, high: Genome) -> tuple[Genome, float]:
        """Descend in a box with L-BFGS-B; return the genome and the loss there."""
        if np.array_equal(low, high):
            return start, self(start)[0]
        result = scipy.optimize.minimize(
            self,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"maxiter": _STEPS},
        )
        return np.clip(result.x, low, high), float(result.fun)
