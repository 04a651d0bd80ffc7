"""CMA-ES (Hansen and Ostermeier 2001; Hansen 2016, arXiv:1604.00772), through pycma.

>>> optimizer = CmaEs(np.full(3, 0.5), sigma=0.2, seed=np.random.SeedSequence(0))
>>> for _ in range(100):
...     genomes = optimizer.ask()
...     optimizer.tell(((genomes - 0.7) ** 2).sum(axis=1, keepdims=True))
>>> optimizer.favourite().round(3)
array([0.7, 0.7, 0.7])
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma warns where matplotlib, which only its plots need, is missing
    import cma


class CmaEs:
    """One CMA-ES run in the unit cube.

    start: (dimension,) initial mean. sigma: initial standard deviation. population: candidates per
    generation, by default 4 + floor(3 ln(dimension)) (Hansen 2016, eq. 48).

    The generator is ours and is injected, because pycma's own `seed` leaves its state in numpy's global
    generator. BLAS runs on one thread inside ask and tell: with more, the bits of the eigenvectors
    depend on the machine.
    """

    def __init__(
        self,
        start: NDArray[np.float64],
        *,
        sigma: float = 0.15,
        population: int | None = None,
        seed: np.random.SeedSequence,
    ) -> None:
        options: dict[str, Any] = {
            "randn": _Normal(seed),
            "seed": np.nan,
            "bounds": [0.0, 1.0],
            "verbose": -9,
            "verb_log": 0,
            # Merge scores are noisy and tie often: plateaus are no reason to stop, a tiny step is.
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolflatfitness": 10**9,
            "tolstagnation": 10**9,
            "tolx": 1e-6,
        }
        if population is not None:
            options["popsize"] = population
        self._dimension = len(start)
        self._asked: list[NDArray[np.float64]] | None = None
        with threadpool_limits(1):
            self._es = cma.CMAEvolutionStrategy(np.clip(start, 0.0, 1.0), sigma, options)

    def ask(self) -> NDArray[np.float64]:
        """Return the next generation, shape (population, dimension), read-only."""
        if self._asked is not None:
            raise RuntimeError("CmaEs.ask: tell the losses of the last generation first")
        with threadpool_limits(1):
            self._asked = self._es.ask()
        genomes = np.clip(np.array(self._asked, dtype=np.float64), 0.0, 1.0)
        genomes.setflags(write=False)
        return genomes

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Take the losses of the last generation, shape (population, 1), finite, lower is better."""
        if self._asked is None:
            raise RuntimeError("CmaEs.tell: ask for a generation first")
        losses = np.asarray(losses, dtype=np.float64)
        if losses.shape != (len(self._asked), 1):
            raise ValueError(f"CmaEs.tell: losses have shape ({len(self._asked)}, 1), got {losses.shape}")
        if not np.isfinite(losses).all():
            raise ValueError("CmaEs.tell: losses must be finite; give failures a loss first")
        with threadpool_limits(1):
            self._es.tell(self._asked, losses[:, 0].tolist())
        self._asked = None

    def stop_reason(self) -> str | None:
        """Say why another generation is pointless, or None."""
        reasons = self._es.stop()
        return f"CMA-ES converged ({', '.join(sorted(reasons))})" if reasons else None

    def favourite(self) -> NDArray[np.float64]:
        """Return the mean of the search distribution, shape (dimension,), inside the unit cube."""
        return np.clip(np.array(self._es.result.xfavorite, dtype=np.float64), 0.0, 1.0)


class _Normal:
    """Standard normal draws for pycma from a generator of our own."""

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> NDArray[np.float64]:
        return self._generator.standard_normal(shape)
