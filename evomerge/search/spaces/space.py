"""Genomes (points of the unit cube), the kinds of their coordinates, and the contract of search spaces.

Optimizers see only the coordinates of a space; spaces do not depend on optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.merging.recipe import Recipe

Genome = NDArray[np.float64]
"""Shape (dimension,), values in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """One coordinate of the unit cube.

    levels: None where it is continuous; else [0, 1] is cut into that many equal bins, all points of a
        bin mean the same, and its middle stands for it.
    ordered: whether neighbouring bins are alike (whole numbers are, names are not).
    length: of the unit interval, where distances between genomes are measured (`movement.py`).

    >>> Coordinate(levels=4).level(0.6), Coordinate(levels=4).middle(2)
    (2, 0.625)
    """

    levels: int | None = None
    ordered: bool = True
    length: float = 1.0

    def level(self, u: float) -> int:
        """Return the bin of a value in [0, 1]."""
        assert self.levels is not None
        return min(int(u * self.levels), self.levels - 1)

    def middle(self, level: int) -> float:
        """Return the middle of a bin."""
        assert self.levels is not None
        return (level + 0.5) / self.levels


def continuous(coordinates: Sequence[Coordinate]) -> bool:
    """Say whether gradients can move all coordinates: none has several levels."""
    return all(coordinate.levels in (None, 1) for coordinate in coordinates)


class Space(Protocol):
    """The contract of every kind of search space: a genome stands for a recipe, and back."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the models that are merged, without the base."""
        ...

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        ...

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        """The kind of every coordinate, in genome order."""
        ...

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Args:
            genome: Shape (dimension,), values in [0, 1].

        Raises:
            ValueError: The shape is wrong or a value lies outside [0, 1].
        """
        ...

    def encode(self, recipe: Recipe) -> Genome | None:
        """Return the canonical genome of a recipe, or None where the space can't express it.

        `encode(decode(u))` is the canonical form of `u`: bins at their middles, 0.5 for coordinates without
        effect. `decode` gives the same recipe for both.
        """
        ...

    def describe(self) -> str:
        """Return one line for people."""
        ...


LARGEST_DIMENSION = 5000
"""Most genes of a space: no budget searches more, and optimizers that learn how pairs of genes act together
take their square of memory."""


def check_dimension(where: str, dimension: int, fix: str) -> None:
    """Raise ConfigError for a space of too many genes."""
    if dimension > LARGEST_DIMENSION:
        raise ConfigError(
            f"{where}: too many genes", expected=f"at most {LARGEST_DIMENSION}", got=str(dimension), fix=fix
        )
