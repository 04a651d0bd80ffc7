"""Retries after transient faults, such as a file server's time-out or a broken connection.

All other errors would happen again: mistakes of the user, weights and logits that are not finite, lack of
memory. Device errors are not retried either: after most of them the process can't use the device any more.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from evomerge.errors import UserError

ATTEMPTS = 4
"""Number of attempts."""
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
    """Whether a fault may not occur again in a second attempt.

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
    """Call a function, again after transient faults, with growing waits between the attempts.

    faults: receives one line per failed attempt that was followed by another.

    Raises the exception of the last attempt.
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
