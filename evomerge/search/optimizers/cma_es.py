"""CMA-ES (Hansen and Ostermeier 2001; Hansen 2016, arXiv:1604.00772) with restarts, through pycma.

>>> from evomerge.search.spaces.space import Coordinate
>>> from evomerge.search.optimizers.cube import Cube
>>> seed = np.random.SeedSequence(0)
>>> algorithm = CmaEs(Cube([Coordinate()] * 3), starts=np.full((1, 3), 0.5), sigma=0.2, seed=seed)
>>> for _ in range(60):
...     rows = algorithm.sample(algorithm.population, np.empty((0, 3)))
...     algorithm.learn(np.arange(len(rows)), ((rows - 0.7) ** 2).sum(axis=1, keepdims=True))
>>> algorithm.favourite().round(3)
array([0.7, 0.7, 0.7])
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.search.optimizers.cube import Cube

Restarts = Literal["none", "ipop", "bipop"]

SEPARABLE_ABOVE = 200
"""Coordinates above which the covariance is kept diagonal (sep-CMA-ES, Ros and Hansen 2008): a full one
learns in O(n^2) evaluations, far more than a merge search has, and costs O(n^3)."""
_MOST_DOUBLINGS = 9


class CmaEs:
    """CMA-ES in the unit cube; a run that converged is followed by one with a larger population.

    starts: (k, dimension); the first run begins at the first row, restarts at the next ones, and at
    uniformly drawn points when they are used up. sigma: initial standard deviation. population:
    candidates per generation of the first run, by default 4 + floor(3 ln(dimension)) (Hansen 2016, eq. 48).
    restarts: "ipop" doubles the population each time (Auger and Hansen 2005); "bipop" spends as many
    evaluations on small populations and small steps (Hansen 2009); "none" stops.

    The generator is ours and is injected, because pycma's own `seed` leaves its state in numpy's global
    generator.
    """

    fixed = 0

    def __init__(
        self,
        cube: Cube,
        *,
        starts: NDArray[np.float64],
        sigma: float = 0.15,
        population: int | None = None,
        restarts: Restarts = "ipop",
        seed: np.random.SeedSequence,
    ) -> None:
        self._dimension = cube.dimension
        self._starts = list(starts)
        self._sigma, self._restarts = sigma, restarts
        self._first = self.population = population or cube.default_population()
        self._normal = _Normal(seed)
        self._generator = np.random.default_rng(
            np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, 1))
        )
        self._doublings = 0
        self._spent = {"large": 0, "small": 0}
        self._regime = "large"
        self._best: tuple[float, NDArray[np.float64]] | None = None
        self._last = np.inf
        self._es = self._begin(self._first, sigma)

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then samples of the normal distribution."""
        new = count - len(given)
        drawn = self._es.ask(number=max(new, 1))[:new]  # it takes no tell without an ask
        # pycma is told the given rows as they are: it then treats them as points from elsewhere and
        # shortens their steps (Hansen 2011, arXiv:1110.4181).
        self._sampled = [self._padded(row) for row in given] + list(drawn)
        rows: NDArray[np.float64] = np.clip(np.array(self._sampled)[:, : self._dimension], 0.0, 1.0)
        return rows

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Update the distribution, and begin the next run where this one has converged."""
        self._es.tell([self._sampled[i] for i in chosen], losses[:, 0].tolist())
        self._spent[self._regime] += len(chosen)
        self._last = float(np.median(losses))
        if self._restarts != "none" and self._doublings < _MOST_DOUBLINGS and self._es.stop():
            self._restart()

    def stop_reason(self) -> str | None:
        """Say that the last run has converged and no other will follow, or None."""
        reasons = self._es.stop()
        return f"CMA-ES converged ({', '.join(sorted(reasons))})" if reasons else None

    def favourite(self) -> NDArray[np.float64]:
        """Return the mean of the search distribution, shape (dimension,), inside the unit cube.

        After a restart: of the run whose last generation had the lowest median loss.
        """
        if self._best is not None and self._best[0] <= self._last:
            return self._best[1]
        mean = np.array(self._es.result.xfavorite, dtype=np.float64)
        return np.clip(mean[: self._dimension], 0.0, 1.0)

    def _begin(self, population: int, sigma: float) -> Any:
        start = self._starts.pop(0) if self._starts else self._generator.random(self._dimension)
        options: dict[str, Any] = {
            "randn": self._normal,
            "seed": np.nan,
            "bounds": [0.0, 1.0],
            "popsize": population,
            "CMA_diagonal": self._dimension > SEPARABLE_ABOVE,
            "CMA_mirrors": 0,  # pairs of samples make no sense where only some rows are told
            "verbose": -9,
            "verb_log": 0,
            # Merge scores are noisy and tie often: plateaus are no reason to stop, a tiny step is.
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolflatfitness": 10**9,
            "tolstagnation": 10**9,
            "tolx": 1e-6,
        }
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # pycma warns where matplotlib, which only its plots need, is missing
            import cma
            from cma.sigma_adaptation import CMAAdaptSigmaCSA
        options["AdaptSigma"] = CMAAdaptSigmaCSA  # sep-CMA's own, two-point, needs pairs of samples too
        return cma.CMAEvolutionStrategy(self._padded(start), sigma, options)

    def _restart(self) -> None:
        mean = self.favourite()
        self._best = (min(self._last, self._best[0]) if self._best else self._last, mean)
        self._last = np.inf
        small = self._restarts == "bipop" and self._spent["small"] < self._spent["large"]
        if small:
            self._regime = "small"
            largest = self._first * 2**self._doublings
            share = self._generator.random() ** 2
            self.population = max(4, int(self._first * (0.5 * largest / self._first) ** share))
            sigma = self._sigma * 10 ** (-2 * self._generator.random())
        else:
            self._regime = "large"
            self._doublings += 1
            self.population = self._first * 2**self._doublings
            sigma = self._sigma
        self._es = self._begin(self.population, sigma)

    def _padded(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give a single coordinate a second one beside it, without effect: pycma needs two."""
        return np.append(row, 0.5) if self._dimension == 1 else np.array(row)


class _Normal:
    """Standard normal draws for pycma from a generator of our own."""

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> NDArray[np.float64]:
        return self._generator.standard_normal(shape)
