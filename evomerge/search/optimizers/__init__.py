"""Optimizers: ask for genomes, tell their losses. One file each; `create` builds one by name.

An optimizer works in the unit cube, minimises, owns its random generator, and is exactly replayable:
told the same losses it asks for the same genomes, bit for bit, in any process.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomerge.schema import Strict
from evomerge.search.genes import Genome
from evomerge.search.optimizers.cma_es import CmaEs

__all__ = ["Optimizer", "OptimizerSpec", "create"]


class Optimizer(Protocol):
    """The contract every optimizer meets (tests/search/test_optimizers.py holds the table)."""

    def ask(self) -> NDArray[np.float64]:
        """Return the next generation, shape (n, dimension), values in [0, 1], read-only."""
        ...

    def tell(self, losses: NDArray[np.float64]) -> None:
        """Take the losses of the last asked generation, shape (n, objectives), all finite."""
        ...

    def stop_reason(self) -> str | None:
        """Say why another generation is pointless, or None."""
        ...

    def favourite(self) -> Genome | None:
        """Return the genome the optimizer itself believes in most (CMA-ES: the mean), if it has one."""
        ...


class OptimizerSpec(Strict):
    """The `optimizer` part of a run config.

    sigma: initial standard deviation in the unit cube. population: candidates per generation (default:
    the algorithm's own, 4 + 3 ln(dimension)).
    """

    name: Literal["cma_es"] = "cma_es"
    sigma: float = Field(default=0.15, gt=0, le=1)
    population: int | None = Field(default=None, ge=4)


def create(spec: OptimizerSpec, *, start: Genome, seed: np.random.SeedSequence) -> Optimizer:
    """Build the optimizer a run config names, starting around `start`."""
    return _OPTIMIZERS[spec.name](start, sigma=spec.sigma, population=spec.population, seed=seed)


_OPTIMIZERS = {"cma_es": CmaEs}
