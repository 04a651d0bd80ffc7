"""The errors a user can cause: each says what is wrong, what was expected, what was found and what to do.

They are picklable, because workers raise them in other processes, and they never carry a traceback to
the terminal: the command line prints the sentence and exits with code 2. `assert` is kept for our own
invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what evomerge was given.

    `what` is one sentence. The other parts are printed on lines of their own where they are known.
    """

    def __init__(
        self, what: str, *, expected: str | None = None, got: str | None = None, fix: str | None = None
    ) -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        lines = [what]
        lines += [
            f"  {label}: {part}"
            for label, part in (("expected", expected), ("got", got), ("do", fix))
            if part is not None
        ]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.expected, self.got, self.fix)


def _rebuild(
    kind: type[UserError], what: str, expected: str | None, got: str | None, fix: str | None
) -> UserError:
    return kind(what, expected=expected, got=got, fix=fix)


class ConfigError(UserError):
    """A YAML file (run config, preset, suite or recipe) that does not say something runnable."""


class ModelError(UserError):
    """A model or adapter folder that can't be used: missing, damaged, or of another architecture."""


class StoreError(UserError):
    """A run folder that can't be used: damaged, locked, or belonging to another config."""


class ReplayError(StoreError):
    """A stored run whose search can't be replayed exactly here (other library versions, say)."""


class BrokenRunError(UserError):
    """A run in which nothing works any more: too many candidates failed in a row."""


class NoWinnerError(UserError):
    """A search that found nothing to pick a winner from."""


class NonFiniteError(UserError):
    """Weights or logits that are NaN or infinite."""


class DiskError(UserError):
    """The disk can't take what was asked: no room, no permission, or something is there already."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest valid one if there is one, and all of them.

    >>> nearest("tie", ["linear", "ties"])
    "did you mean 'ties'? Valid: linear, ties"
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    start = f"did you mean {close[0]!r}? " if close else ""
    return f"{start}Valid: {', '.join(names)}"
