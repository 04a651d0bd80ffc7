"""What one gene may be: a range of numbers, whole numbers, or a list of choices, laid over [0, 1].

`value` maps the unit interval to values and `unit` maps them back. Values are rounded, so that `unit` is
an exact inverse: `unit(value(u))` stands for u, and `value` gives the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.search.spaces.space import Coordinate

DIGITS = 6
"""Significant decimal digits of a decoded value. Rounding makes recipes readable and `encode` an exact
inverse; a step of 1e-6 is far below what a 16-bit weight can show."""

Choice = float | int | bool | str


class Domain(Protocol):
    """The values of one gene."""

    @property
    def coordinate(self) -> Coordinate:
        """How the unit interval is cut."""
        ...

    @property
    def kind(self) -> str:
        """One word for people."""
        ...

    def value(self, u: float) -> Choice:
        """Return the value at a point of [0, 1]."""
        ...

    def unit(self, value: Choice) -> float | None:
        """Return the point that stands for a value, or None where it is no value of this gene."""
        ...

    def text(self) -> str:
        """Return the values for people."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuous:
    """Real numbers between two bounds, evenly or evenly in their logarithm.

    grid: a control point of a curve, rounded so that the curve can be inverted: significant digits lie too
        close together near 0 to be told from what interpolation rounds away, so values of a linear range
        lie on a grid of about 1e-6 of the range.

    >>> decade = Continuous(low=0.1, high=10.0, log=True)
    >>> decade.value(0.5), decade.unit(1.0)
    (1.0, 0.5)
    """

    low: float
    high: float
    log: bool = False
    grid: bool = False

    @property
    def coordinate(self) -> Coordinate:
        """One continuous coordinate."""
        return Coordinate()

    @property
    def kind(self) -> str:
        """`real` or `log`."""
        return "log" if self.log else "real"

    def value(self, u: float) -> float:
        """Map [0, 1] to [low, high]."""
        ratio = self.high / self.low if self.log else 0.0
        value = self.low * ratio**u if self.log else self.low + u * (self.high - self.low)
        if self.grid:
            return self.nearest(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def unit(self, value: Choice) -> float | None:
        """Map [low, high] to [0, 1], the inverse of `value`."""
        if isinstance(value, str) or not self.low <= value <= self.high:
            return None
        if self.log:
            unit = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            unit = (value - self.low) / (self.high - self.low)
        return min(max(unit, 0.0), 1.0)

    def nearest(self, value: float) -> float:
        """Return the point of the grid nearest to a value; a bound absorbs the points too near to it."""
        value = min(max(value, self.low), self.high)
        point = round(value, self._decimals(value)) + 0.0  # no minus zero, which would be another recipe
        for bound in (self.low, self.high):
            if abs(point - bound) <= 0.75 * 10.0 ** -self._decimals(bound):
                return bound
        return point

    def text(self) -> str:
        """Return the bounds."""
        return f"{self.low:g} ... {self.high:g}"

    def _decimals(self, value: float) -> int:
        if self.log:
            return DIGITS - 1 - math.floor(math.log10(value))
        return DIGITS - math.floor(math.log10(self.high - self.low))


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Whole numbers between two bounds, both included.

    >>> Whole(low=3, high=6).value(0.9), Whole(low=3, high=6).unit(3)
    (6, 0.125)
    """

    low: int
    high: int

    @property
    def coordinate(self) -> Coordinate:
        """One bin per number."""
        return Coordinate(levels=self.high - self.low + 1)

    @property
    def kind(self) -> str:
        """`integer`."""
        return "integer"

    def value(self, u: float) -> int:
        """Return the number of the bin."""
        return self.low + self.coordinate.level(u)

    def unit(self, value: Choice) -> float | None:
        """Return the middle of the number's bin."""
        if isinstance(value, str) or value != int(value) or not self.low <= value <= self.high:
            return None
        return self.coordinate.middle(int(value) - self.low)

    def text(self) -> str:
        """Return the bounds."""
        return f"{self.low} ... {self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Listed values: names, flags or numbers. Numbers in ascending order count as ordered.

    >>> Choices(values=("ties", "linear", "della")).value(0.5), Choices(values=(False, True)).unit(True)
    ('linear', 0.75)
    """

    values: tuple[Choice, ...]

    @property
    def coordinate(self) -> Coordinate:
        """One bin per choice."""
        numbers = [v for v in self.values if not isinstance(v, str | bool)]
        ascending = len(numbers) == len(self.values) and numbers == sorted(numbers)
        return Coordinate(levels=len(self.values), ordered=ascending)

    @property
    def kind(self) -> str:
        """`flag` or `choice`."""
        return "flag" if set(map(type, self.values)) == {bool} else "choice"

    def value(self, u: float) -> Choice:
        """Return the choice of the bin."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def unit(self, value: Choice) -> float | None:
        """Return the middle of the choice's bin."""
        if value not in self.values:
            return None
        return self.coordinate.middle(self.values.index(value))

    def text(self) -> str:
        """Return the choices, comma-separated."""
        return ", ".join(shown(value) for value in self.values)


def shown(value: Choice) -> str:
    """Return a value as YAML would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence.

    >>> listed(["ties"]), listed(["ties", "della", "sce"])
    ('ties', 'ties, della or sce')
    """
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
