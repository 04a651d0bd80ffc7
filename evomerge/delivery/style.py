"""The common style of all output: how numbers, intervals and times are written, and tables."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table

if TYPE_CHECKING:
    from evomerge.evaluation.statistics import Interval

MISSING = "-"
"""What a table shows where a value does not exist."""


# Numbers ------------------------------------------------------------------------------------------------


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of decimals, without a sign on zero; `-` for None and NaN.

    >>> decimal(0.12345), decimal(-1e-9, 1), decimal(None), decimal(float("nan"))
    ('0.123', '0.0', '-', '-')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent, or a normalised score in points, both hundredths; no unit, no sign on zero.

    >>> percent(0.1234), percent(0.5, 0), percent(-1e-9), percent(None)
    ('12.3', '50', '0.0', '-')
    """
    return decimal(None if share is None else 100 * share, digits)


def difference(share: float) -> str:
    """Return a difference of shares or normalised scores in hundredths, with its sign.

    >>> difference(0.0321), difference(-0.5), difference(-1e-9)
    ('+3.2', '-50.0', '+0.0')
    """
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def bounds(low: float, high: float) -> str:
    """Return the ends of an interval in hundredths.

    >>> bounds(-0.01, 0.254)
    '[-1.0, 25.4]'
    """
    return f"[{percent(low)}, {percent(high)}]"


COARSE, USELESS = 0.1, 0.5
"""Half an interval's length from which on decimals, and the estimate itself, say nothing."""


def plus_minus(interval: Interval, digits: int = 1) -> str:
    """Return an interval in hundredths as its estimate ± half its length, as in `12.3 ±4.5`.

    Without decimals where it is long; where it is longer than the whole scale, only its ends.

    >>> from evomerge.evaluation.statistics import Interval
    >>> plus_minus(Interval(estimate=0.1234, low=0.10, high=0.15)), plus_minus(
    ...     Interval(estimate=1.0, low=-0.01, high=1.99)
    ... )
    ('12.3 ±2.5', '-1 to 199')
    """
    half = (interval.high - interval.low) / 2
    if half >= USELESS:
        return f"{percent(interval.low, 0)} to {percent(interval.high, 0)}"
    digits = 0 if half >= COARSE else digits
    return f"{percent(interval.estimate, digits)} ±{percent(half, digits)}"


def points(score: float) -> str:
    """Return a normalised score that is shown without its interval, in whole points.

    Far beyond the specialists the scale is too short to be read off.

    >>> points(0.523), points(2.222), points(-3.0)
    ('52 points', 'more than 150 points', 'less than -150 points')
    """
    if abs(score) > 1.5:
        return "more than 150 points" if score > 0 else "less than -150 points"
    return f"{percent(score, 0)} points"


def p_value(p: float) -> str:
    """Return a p-value with two significant digits.

    >>> p_value(0.04321), p_value(3e-7)
    ('0.043', '3e-07')
    """
    return f"{p:.2g}"


def elapsed(seconds: float) -> str:
    """Return a duration as a stopwatch shows it.

    >>> elapsed(75.9), elapsed(3725)
    ('1:15', '1:02:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit.

    >>> age(-0.1), age(59), age(600), age(9000), age(200000)
    ('0 s', '59 s', '10 min', '2 h', '2 d')
    """
    passed = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed // length} {unit}"
    return f"{passed} s"


def size(count: int) -> str:
    """Return a number of bytes in its largest unit, of 1000 each.

    >>> size(999), size(1500), size(10_768_384), size(3 * 10**12)
    ('999 B', '1.5 kB', '11 MB', '3.0 TB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"


def of_blocks(scored: int, total: int) -> str:
    """Return on how many item blocks something was scored, nothing where it was all.

    >>> of_blocks(2, 8), of_blocks(8, 8)
    (' (2 of 8 item blocks)', '')
    """
    return "" if scored == total else f" ({scored} of {total} item blocks)"


def short_task(task: str, suite: str) -> str:
    """Return a task's name without the suite's.

    >>> short_task("demo_sort", "demo")
    'sort'
    """
    return task.removeprefix(f"{suite}_")


def capital(sentence: str) -> str:
    """Return a sentence with a capital first letter, the rest as it is.

    >>> capital("weakest task: MMLU")
    'Weakest task: MMLU'
    """
    return sentence[:1].upper() + sentence[1:]


def quoted(text: str) -> str:
    """Return a text as a shell takes it for one word.

    >>> quoted("TIES 0.4"), quoted("linear")
    ("'TIES 0.4'", 'linear')
    """
    return shlex.quote(text)


FILTERS = {
    "age": age,
    "capital": capital,
    "decimal": decimal,
    "difference": difference,
    "p_value": p_value,
    "percent": percent,
    "quoted": quoted,
    "size": size,
}
"""How templates write numbers and sentences."""


# Terminal tables ----------------------------------------------------------------------------------------


def words(header: str) -> Column:
    """Return a left-aligned column; long cells continue on the next line."""
    return Column(header, overflow="fold")


def numbers(header: str, *, wrap: bool = False) -> Column:
    """Return a right-aligned column; wrap: whether a long header may continue on the next line."""
    return Column(header, justify="right", no_wrap=not wrap, overflow="fold")


def table(*columns: Column, title: str | None = None, caption: str | None = None) -> Table:
    """Return an empty table in the style of all commands: a line below the header, no frame."""
    return Table(
        *columns,
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
