"""Steps of long work: what works says what it does, and a display may listen.

Without a listener nothing happens. Worker processes pass their steps on to the process that started them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def say(step: str) -> None:
    """Tell the latest listener what is being done."""
    if _listeners:
        _listeners[-1](step)


@contextmanager
def told(listener: Callable[[str], None]) -> Iterator[None]:
    """Listen to the steps inside the block.

    >>> with told(print):
    ...     say("tokenising 1/3 tasks")
    tokenising 1/3 tasks
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
