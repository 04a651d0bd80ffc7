"""The circuit breaker: stops a run in which every candidate fails, because the cause lies elsewhere."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from evomerge.errors import BrokenRunError, NoWinnerError
from evomerge.evaluation.scores import Failure
from evomerge.running.store import RunStore


class Breaker:
    """Counts failures in a row, over all workers, splits and generations of a session."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._row: list[Failure] = []

    def succeeded(self) -> None:
        """Note that a candidate was scored."""
        self._row.clear()

    def failed(self, failure: Failure, store: RunStore) -> None:
        """Note that a candidate failed; after too many in a row have the store forget them, and raise.

        So a later session tries them again, and the search repeats itself from the first of them on.

        Raises:
            BrokenRunError: with what went wrong, how often.
        """
        self._row.append(failure)
        if len(self._row) < self._limit:
            return
        store.forget_failures(len(self._row))
        kinds = collections.Counter(f.kind for f in self._row).most_common()
        raise BrokenRunError(
            f"{store.folder}: the last {len(self._row)} candidates all failed "
            f"({', '.join(f'{count} of kind {kind}' for kind, count in kinds)}), so the run was stopped",
            got=_reasons(self._row),
            fix=f"remove the cause, then: evomerge resume {shlex.quote(str(store.folder))} "
            "(they are tried again; where so many are bound to fail, add --failures N)",
        )


@contextmanager
def tried_again(store: RunStore) -> Iterator[None]:
    """Have the store forget what failed since the last success where for that a run ends without a winner."""
    try:
        yield
    except NoWinnerError as error:
        if not (forgotten := store.forget_failures()):
            raise
        raise NoWinnerError(
            error.what,
            got=_reasons(forgotten),
            fix=f"remove the cause, then: evomerge resume {shlex.quote(str(store.folder))} "
            "(what failed is tried again)",
        ) from None


def _reasons(failures: Sequence[Failure]) -> str:
    """Return the last distinct reasons, latest first."""
    reasons = list(dict.fromkeys(failure.reason for failure in reversed(failures)))
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
