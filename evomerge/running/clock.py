"""The clock of a session: the time, the hours worked on the run, and the moments of wall-clock limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from datetime import time as time_of_day


class Clock:
    """Tells the time of a session.

    Hours are counted by a clock that is never set, so that a step of the wall clock costs no budget.

    now: seconds since the epoch. steady: seconds since some moment, by a clock that is never set (default:
    the system's, or `now` where that is given). started: when the session began (default: now). earlier:
    hours worked on the run in former sessions.

    >>> clock = Clock(now=lambda: 7200.0, started=3600.0, earlier=0.5)
    >>> clock.hours, clock.after(2.0)
    (1.5, 9000.0)
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        *,
        steady: Callable[[], float] | None = None,
        started: float | None = None,
        earlier: float = 0.0,
    ) -> None:
        self.now = now
        self._steady = steady or (time.monotonic if now is time.time else now)
        self._offset = now() - self._steady()
        self.started = now() if started is None else started
        self._earlier = earlier

    @property
    def _set_forward(self) -> float:
        """Seconds by which the wall clock was set forward since the session began."""
        return self.now() - self._steady() - self._offset

    @property
    def hours(self) -> float:
        """Hours worked on the run so far, all sessions together."""
        return self._earlier + (self.now() - self._set_forward - self.started) / 3600

    def after(self, hours: float) -> float:
        """Return when so many hours will have been worked on the run, as seconds since the epoch."""
        return self.started + self._set_forward + 3600 * (hours - self._earlier)


def moment(until: str, after: float) -> float:
    """Return the moment that a time of day or a date-time means, as seconds since the epoch.

    until: "HH:MM" is the next time that local clocks show it after `after`; an ISO date-time is itself,
    local unless it names an offset. Raises ValueError for anything else.

    >>> after = datetime(2026, 11, 22, 18, 0).timestamp()
    >>> shown(moment("08:00", after)), shown(moment("18:30", after)), shown(moment("18:00", after))
    ('2026-11-23 08:00', '2026-11-22 18:30', '2026-11-23 18:00')
    >>> shown(moment("2026-12-24T18:00", after))
    '2026-12-24 18:00'
    """
    day = datetime.fromtimestamp(after).date()
    try:
        of_day = time_of_day.fromisoformat(until.zfill(5))
    except ValueError:
        if ":" not in until:
            raise ValueError(_FORM) from None
        try:
            return datetime.fromisoformat(until).astimezone().timestamp()
        except (ValueError, OverflowError, OSError):  # also years that no clock has
            raise ValueError(_FORM) from None
    if ":" not in until or of_day.tzinfo is not None:
        raise ValueError(_FORM)
    today = datetime.combine(day, of_day).timestamp()
    # By the calendar, not by 24 hours: the night of a clock change is longer or shorter.
    return today if today > after else datetime.combine(day + timedelta(days=1), of_day).timestamp()


_FORM = 'expected a time of day in quotes ("08:00"), or a date and time ("2026-12-24T08:00")'


def fixed(until: str, after: float) -> str:
    """Return the date-time that `moment` finds, as text that means the same whenever it is read."""
    return datetime.fromtimestamp(moment(until, after)).astimezone().isoformat()


def shown(at: float) -> str:
    """Return a moment as people write it, in local time."""
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def brief(at: float, now: float) -> str:
    """Return a moment to come in few letters: the time of day alone, if it is within a day."""
    return datetime.fromtimestamp(at).strftime("%H:%M" if at - now < 86400 else "%m-%d %H:%M")


def span(seconds: float) -> str:
    """Return a duration as text with a unit.

    >>> span(42), span(600), span(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
