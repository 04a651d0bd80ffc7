"""Curves: values along the layers that follow from a few control points.

A curve is a matrix of shares: the value of a run of layers is a mean of the control points with the shares
of its row. Shares are not negative and add up to 1, so a curve never leaves the range of its points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.search.spaces.domain import Choice, Continuous

CurveKind = Literal["linear", "smooth"]

DIGITS = 12
"""Significant digits of an interpolated value: enough to find the control points again."""


def shares(rows: int, points: int, kind: CurveKind) -> NDArray[np.float64]:
    """Return the shares of the control points in each of `rows` evenly spaced places, shape (rows, points).

    "linear" joins the points by straight lines. "smooth" is the uniform cubic B-spline that starts at the
    first point and ends at the last one, and only tends towards those between (of lower degree where there
    are fewer than four points): de Boor 1978, A Practical Guide to Splines, chapter IX, recurrence (14).
    `points` must not exceed `rows`.

    >>> shares(3, 2, "linear").tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    assert 1 <= points <= rows
    degree = 1 if kind == "linear" else 3
    degree = min(degree, points - 1)
    pieces = points - degree
    knots = [0.0] * (degree + 1) + [float(i) for i in range(1, pieces)] + [float(pieces)] * (degree + 1)
    table = np.zeros((rows, points))
    for row in range(rows):
        x = pieces * row / (rows - 1) if rows > 1 else 0.0
        first = min(int(x), pieces - 1)  # the piece of the curve that x lies on
        basis = [1.0]
        for order in range(1, degree + 1):
            raised = [0.0] * (order + 1)
            for i, share in enumerate(basis):
                left = knots[first + degree - order + 1 + i]
                right = knots[first + degree + 1 + i]
                part = (x - left) / (right - left)
                raised[i] += share * (1.0 - part)
                raised[i + 1] += share * part
            basis = raised
        table[row, first : first + degree + 1] = basis
    return table


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One curve of a space.

    points: positions of its control points in the genome. rows: positions of its values in the space's
    table of values, one per run of layers.
    """

    domain: Continuous
    points: tuple[int, ...]
    rows: tuple[int, ...]
    shares: NDArray[np.float64]
    inverse: NDArray[Any]

    @classmethod
    def through(
        cls, domain: Continuous, points: Sequence[int], rows: Sequence[int], kind: CurveKind
    ) -> Curve:
        """Return the curve over all rows."""
        table = shares(len(rows), len(points), kind)
        return cls(domain, tuple(points), tuple(rows), table, np.linalg.pinv(table))

    def values(self, points: Sequence[float]) -> list[float]:
        """Return the values of the rows, from those of the control points."""
        given = [math.log(p) for p in points] if self.domain.log else points
        sums = np.zeros(len(self.rows))
        for column, point in enumerate(given):  # in this order on every machine, as no product promises
            sums += self.shares[:, column] * point
        low, high = self.domain.low, self.domain.high
        values = []
        for value in sums.tolist():
            rounded = float(f"{math.exp(value) if self.domain.log else value:.{DIGITS}g}") + 0.0
            values.append(min(max(rounded, low), high))
        return values

    def solve_in(self, table: list[Choice | None]) -> bool:
        """Enter the control points of the rows' values in a table; return whether they lie on such a curve.

        Where the table has no values, nothing is entered.
        """
        given = [float(value) for row in self.rows if (value := table[row]) is not None]
        solution = self.solve(given) if len(given) == len(self.rows) else None
        for position, value in zip(self.points, solution or (), strict=False):
            table[position] = value
        return solution is not None or not given

    def solve(self, values: Sequence[float]) -> list[float] | None:
        """Return the control points of values that lie on such a curve, else None."""
        log, domain = self.domain.log, self.domain
        if any(not domain.low <= value <= domain.high for value in values):
            return None
        targets = np.array([math.log(v) for v in values] if log else values)
        solution = (self.inverse @ targets).tolist()
        points = [domain.nearest(math.exp(x) if log else x) for x in solution]
        return points if self.values(points) == list(values) else None
