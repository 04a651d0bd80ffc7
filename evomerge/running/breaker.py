"""The circuit breaker: when everything fails, stop; the candidates are not to blame."""

from __future__ import annotations

import collections
import shlex

from evomerge.errors import BrokenRunError
from evomerge.evaluation.scores import Failure
from evomerge.running.store import RunStore


class Breaker:
    """Counts failures in a row, over all workers, splits and generations of a session."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._row = 0

    def succeeded(self) -> None:
        """Note that a candidate was scored."""
        self._row = 0

    def failed(self, failure: Failure, store: RunStore) -> None:
        """Note that a candidate failed; after too many in a row have the store forget them, and raise.

        So a later session tries them again, and the search repeats itself from the first of them on.

        Raises:
            BrokenRunError: with what went wrong, how often.
        """
        self._row += 1
        if self._row < self._limit:
            return
        forgotten = store.forget_failures() or [failure]
        kinds = collections.Counter(f.kind for f in forgotten).most_common()
        reasons = list(dict.fromkeys(f.reason for f in reversed(forgotten)))
        raise BrokenRunError(
            f"{store.folder}: the last {len(forgotten)} candidates all failed "
            f"({', '.join(f'{count} of kind {kind}' for kind, count in kinds)}), so the run was stopped",
            got="; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else ""),
            fix=f"mend the cause, then: evomerge resume {shlex.quote(str(store.folder))} "
            "(they are tried again; where so many are bound to fail, add --failures N)",
        )
