"""Second tries for faults that pass by themselves: a file server that hiccups, a connection that breaks.

Everything else is a candidate's own: what is wrong with it now is wrong with it later. That goes for
mistakes of the user, for weights and logits that are not finite, and for want of memory. Errors of a device
are not tried again either: after most of them the process can't use it any more.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from evomerge.errors import UserError

ATTEMPTS = 4
"""How often something is tried in all."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before the second attempt, doubled before each further one, up to the longest."""

_PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR, errno.EBUSY),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)

Answer = TypeVar("Answer")


def transient(error: BaseException) -> bool:
    """Say whether a fault may be gone when the same is tried again.

    >>> transient(OSError(errno.EIO, "Input/output error")), transient(ConnectionResetError())
    (True, True)
    >>> transient(FileNotFoundError()), transient(MemoryError()), transient(UserError("no such task"))
    (False, False, False)
    """
    if isinstance(error, UserError):
        return False
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno in _PASSING)


def insist(
    work: Callable[[], Answer], faults: list[str], *, sleep: Callable[[float], None] = time.sleep
) -> Answer:
    """Do some work, again after transient faults, with growing waits between the attempts.

    faults: gets a line for every attempt that failed and was followed by another one.

    Raises whatever the last attempt raised.
    """

    def note(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        faults.append(f"{type(error).__name__}: {error}")

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
        retry=tenacity.retry_if_exception(transient),
        before_sleep=note,
        sleep=sleep,
        reraise=True,
    )(work)
