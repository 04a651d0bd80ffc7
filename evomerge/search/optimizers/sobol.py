"""A scrambled Sobol sequence (Sobol 1967; Owen 1998), through scipy: even cover, nothing learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.search.optimizers.cube import Cube

_BLOCK = 64
"""Points are drawn from scipy by this power of two, as the sequence's balance asks for."""


class Sobol:
    """Points of one scrambled sequence, in order. population: candidates per generation."""

    fixed = 0

    def __init__(self, cube: Cube, *, population: int | None = None, seed: np.random.SeedSequence) -> None:
        from scipy.stats import qmc

        if cube.dimension > qmc.Sobol.MAXDIM:
            raise ConfigError(
                f"optimizer sobol: {cube.dimension} coordinates, and the sequence has {qmc.Sobol.MAXDIM}",
                fix="use random",
            )
        self.population = population or cube.default_population()
        self._sequence = qmc.Sobol(cube.dimension, scramble=True, rng=np.random.default_rng(seed))
        self._drawn = np.empty((0, cube.dimension))

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then the next of the sequence."""
        wanted = count - len(given)
        while len(self._drawn) < wanted:
            self._drawn = np.vstack([self._drawn, self._sequence.random(_BLOCK)])
        rows, self._drawn = self._drawn[:wanted], self._drawn[wanted:]
        return np.vstack([given, rows])

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Learn nothing."""

    def stop_reason(self) -> None:
        """Return None: there is always another point."""

    def favourite(self) -> None:
        """Return None: a Sobol sequence estimates no optimum."""
