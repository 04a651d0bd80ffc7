"""Uniform random search (Bergstra and Bengio 2012): what every claim of a search is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evomerge.search.optimizers.cube import Cube


class Random:
    """Points drawn uniformly; learns nothing. population: candidates per generation."""

    fixed = 0

    def __init__(self, cube: Cube, *, population: int | None = None, seed: np.random.SeedSequence) -> None:
        self.population = population or cube.default_population()
        self._cube = cube
        self._generator = np.random.default_rng(seed)

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then new ones."""
        return np.vstack([given, self._generator.random((count - len(given), self._cube.dimension))])

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Learn nothing."""

    def stop_reason(self) -> None:
        """Return None: there is always another point."""

    def favourite(self) -> None:
        """Return None: random search estimates no optimum."""
