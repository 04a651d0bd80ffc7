"""Errors that a user can cause: each says what is wrong, what was expected, what it got and what to do.

They are picklable, because workers raise them in other processes. The command line prints their text
without a traceback and exits with code 2. `assert` is for invariants of our own code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

from evomerge.text import redacted


class UserError(ValueError):
    """A mistake in evomerge's input. Secrets in addresses are left out of its text.

    Args:
        what: the problem in one sentence.
        expected: what would be valid, printed as `expected: ...`.
        got: what was there instead, printed as `got: ...`.
        fix: what the user can do, printed as `do: ...`.
    """

    def __init__(
        self, what: str, *, expected: str | None = None, got: str | None = None, fix: str | None = None
    ) -> None:
        what = redacted(what)
        expected, got, fix = (part and redacted(part) for part in (expected, got, fix))
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        lines = [what]
        lines += [
            f"  {label}: {part}"
            for label, part in (("expected", expected), ("got", got), ("do", fix))
            if part is not None
        ]
        super().__init__("\n".join(lines))

    def with_more(self, what: str) -> Self:
        """Return the same error with one more thing to do."""
        fix = what if self.fix is None else f"{self.fix}; {what}"
        return type(self)(self.what, expected=self.expected, got=self.got, fix=fix)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.expected, self.got, self.fix)


def _rebuild(
    kind: type[UserError], what: str, expected: str | None, got: str | None, fix: str | None
) -> UserError:
    return kind(what, expected=expected, got=got, fix=fix)


class ConfigError(UserError):
    """A YAML file (run config, preset, suite or recipe) or an argument that is not valid."""


class ModelError(UserError):
    """A model or adapter folder that can't be used: missing, damaged, or of another architecture."""


class StoreError(UserError):
    """A run folder that can't be used: damaged, locked, or belonging to another config."""


class ReplayError(StoreError):
    """A stored run whose search can't be replayed exactly here, e.g. with other library versions."""


class ClusterError(UserError):
    """A cluster that runs the workers and can't be reached, or was lost while they worked."""


class BrokenRunError(UserError):
    """A run that was stopped because too many candidates failed in a row."""


class NoWinnerError(UserError):
    """A search without any scored candidate to choose a winner from."""


class NonFiniteError(UserError):
    """Weights or logits that are NaN or infinite."""


class DiskError(UserError):
    """A file or folder that can't be written: no room, no permission, or it exists already."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest valid name, if any is close, and all valid names.

    >>> nearest("tie", ["linear", "ties"])
    "did you mean 'ties'? Valid: linear, ties"
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    start = f"did you mean {close[0]!r}? " if close else ""
    return f"{start}Valid: {', '.join(names)}"


class JudgeError(UserError):
    """The judge of a suite can't be asked, so that nothing can be scored now; it is no candidate's fault."""
