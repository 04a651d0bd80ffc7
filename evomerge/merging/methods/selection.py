"""Order statistics of magnitudes: the threshold of the k largest elements, ties by lowest index.

`boundary` computes one threshold by selection. `Spectrum` sorts a tensor's magnitudes once and then looks up
the threshold for any k, so that a search can change densities cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

MANY = 1 << 62


@dataclass(frozen=True, slots=True)
class Boundary:
    """The k largest elements: all magnitudes above `magnitude`, and the first `ties` equal to it.

    A magnitude of 0 keeps everything, since keeping zeros changes nothing; infinity keeps nothing.
    """

    magnitude: float
    ties: int


NOTHING = Boundary(float("inf"), MANY)
EVERYTHING = Boundary(0.0, MANY)


def boundary(magnitudes: ndarray[Any, Any], count: int, *, reorder: bool = False) -> Boundary:
    """Return the boundary of the `count` largest of some magnitudes, (n,) float32.

    reorder: whether the array may be reordered, which saves a copy.

    >>> import numpy
    >>> boundary(numpy.array([1.0, 3.0, 1.0, 2.0]), 3)
    Boundary(magnitude=1.0, ties=1)
    """
    import numpy

    if count <= 0:
        return NOTHING
    rank = len(magnitudes) - count
    if rank <= 0:
        return EVERYTHING
    ordered = magnitudes if reorder else magnitudes.copy()
    ordered.partition(rank)
    limit = float(ordered[rank])
    above = int(numpy.count_nonzero(ordered[rank:] > ordered[rank]))
    return Boundary(limit, count - above) if limit else EVERYTHING


class Spectrum:
    """All boundaries of one tensor, from its magnitudes sorted once.

    Stored as the distinct magnitudes and the number of elements above each (12 bytes per distinct one), or
    as the sorted magnitudes (4 bytes each), whichever is smaller: differences of bfloat16 weights have few
    distinct magnitudes.
    """

    def __init__(self, magnitudes: ndarray[Any, Any]) -> None:
        """Sort the magnitudes, (n,) float32, in place."""
        import numpy

        ordered = magnitudes
        ordered.sort()
        self._count = len(ordered)
        ends = numpy.append(numpy.flatnonzero(ordered[1:] != ordered[:-1]) + 1, self._count)
        self._values, self._minus_above = ordered, None
        if 12 * len(ends) < 4 * self._count:
            self._values, self._minus_above = ordered[ends - 1], ends - self._count

    @property
    def nbytes(self) -> int:
        """The memory it takes, in bytes."""
        return int(self._values.nbytes + (0 if self._minus_above is None else self._minus_above.nbytes))

    def boundary(self, count: int) -> Boundary:
        """Return what the function `boundary` returns for the same magnitudes.

        >>> import numpy
        >>> Spectrum(numpy.array([1.0, 3.0, 1.0, 2.0])).boundary(3)
        Boundary(magnitude=1.0, ties=1)
        """
        if count <= 0:
            return NOTHING
        if count >= self._count:
            return EVERYTHING
        if self._minus_above is None:
            limit = float(self._values[self._count - count])
            above = self._count - int(self._values.searchsorted(self._values[self._count - count], "right"))
        else:  # the first magnitude with fewer than `count` elements above it
            place = int(self._minus_above.searchsorted(-count, "right"))
            limit, above = float(self._values[place]), -int(self._minus_above[place])
        return Boundary(limit, count - above) if limit else EVERYTHING
