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
        """Record a scored candidate."""
        self._row.clear()

    def failed(self, failure: Failure, store: RunStore) -> None:
        """Record a failed candidate; after too many in a row delete these failures from the store and raise.

        A later session then tries them again, and the search repeats itself from the first of them on.

        Raises:
            BrokenRunError: Too many candidates failed in a row; it lists kinds and reasons.
        """
        self._row.append(failure)
        if len(self._row) < self._limit:
            return
        store.forget_failures(len(self._row))
        kinds = collections.Counter(f.kind for f in self._row).most_common()
        raise BrokenRunError(
            f"{store.folder}: the last {len(self._row)} candidates all failed "
            f"({', '.join(f'{count} of kind {kind}' for kind, count in kinds)}); the run was stopped",
            got=_reasons(self._row),
            fix=f"remove the cause, then: evomerge resume {shlex.quote(str(store.folder))} "
            "(failed candidates are tried again; if this many failures are expected, add --failures N)",
        )


@contextmanager
def tried_again(store: RunStore) -> Iterator[None]:
    """Delete the failures since the last success if, because of them, the run ends without a winner."""
    try:
        yield
    except NoWinnerError as error:
        if not (forgotten := store.forget_failures()):
            raise
        raise NoWinnerError(
            error.what,
            got=_reasons(forgotten),
            fix=f"remove the cause, then: evomerge resume {shlex.quote(str(store.folder))} "
            "(failed candidates are tried again)",
        ) from None


def _reasons(failures: Sequence[Failure]) -> str:
    """Return the last distinct reasons, latest first."""
    reasons = list(dict.fromkeys(failure.reason for failure in reversed(failures)))
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
