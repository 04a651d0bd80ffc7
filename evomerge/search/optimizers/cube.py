"""What optimizers need of the unit cube's coordinates: which are continuous, whole numbers or names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.search.spaces.space import Coordinate


class Cube:
    """The coordinates of a search space that can vary at all, sorted by kind.

    width: number of all coordinates. free: indices among them of those with more than one value; arrays
    that an algorithm sees have one column for each. levels: bins per column, 0 where it is continuous.
    continuous, ordered, named: indices of columns. A coordinate with two levels counts as named: between
    two there is no order to use.

    >>> cube = Cube([Coordinate(), Coordinate(levels=1), Coordinate(levels=4)])
    >>> cube.dimension, cube.snap(np.array([[0.3, 0.3]])), cube.expand(np.array([[0.3, 0.375]]))
    (2, array([[0.3  , 0.375]]), array([[0.3  , 0.5  , 0.375]]))
    """

    def __init__(self, coordinates: Sequence[Coordinate]) -> None:
        self.free = np.array([i for i, c in enumerate(coordinates) if c.levels != 1], dtype=int)
        self.width = len(coordinates)
        kept = [coordinates[i] for i in self.free]
        self.dimension = len(kept)
        self.levels = np.array([c.levels or 0 for c in kept], dtype=int)
        ordered = np.array([c.ordered for c in kept], dtype=bool)
        self.continuous = np.flatnonzero(self.levels == 0)
        self.ordered = np.flatnonzero((self.levels > 2) & ordered)
        self.named = np.flatnonzero((self.levels == 2) | ((self.levels > 2) & ~ordered))
        self._discrete = np.flatnonzero(self.levels)

    def snap(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rows, shape (n, dimension), inside the cube and in the middles of their bins."""
        rows = np.clip(np.asarray(rows, dtype=np.float64), 0.0, 1.0)
        rows[:, self._discrete] = self.middles(self.bins(rows))
        return rows

    def bins(self, rows: NDArray[np.float64]) -> NDArray[np.int_]:
        """Return the bins of the discrete columns of rows, shape (n, discrete)."""
        levels = self.levels[self._discrete]
        bins: NDArray[np.int_] = np.minimum((rows[:, self._discrete] * levels).astype(int), levels - 1)
        return bins

    def middles(self, bins: NDArray[np.int_]) -> NDArray[np.float64]:
        """Return the middles of bins of the discrete columns, shape (n, discrete)."""
        middles: NDArray[np.float64] = (bins + 0.5) / self.levels[self._discrete]
        return middles

    def bin(self, column: int | np.int_, u: float) -> int:
        """Return the bin of one value of a discrete column."""
        return min(int(u * self.levels[column]), int(self.levels[column]) - 1)

    def middle(self, column: int | np.int_, bin_: int | np.int_) -> float:
        """Return the middle of one bin of a discrete column."""
        return float((bin_ + 0.5) / self.levels[column])

    def expand(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rows of the free columns, shape (n, dimension), with the constant ones beside them."""
        full = np.full((len(rows), self.width), 0.5)
        full[:, self.free] = rows
        return full

    def default_population(self) -> int:
        """Return 4 + floor(3 ln dimension) (Hansen 2016, eq. 48)."""
        return 4 + math.floor(3 * math.log(max(self.dimension, 2)))
