"""Text that is safe to show and to keep: control characters and secrets made visible or hidden.

Names, paths and messages come from files of other people. A terminal would obey control characters in them,
and an address in them may hold a password.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, invisible ones (of them those of `_INVISIBLE`), lone surrogates,
line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Invisible characters that scripts and emojis need."""
_SUSPECT = re.compile("[^\n\t\x20-\x7e\xa1-\xac\xae-\u0377]")
"""Everything but the characters that are certainly harmless."""

SECRET_NAMES = (
    "token|password|passwd|passphrase|pwd|secret|api_?key|access_?key|private_?key|account_?key|key|"
    "credentials?|auth|authorization|signature|sig"
)
_SECRET = re.compile(
    r"(?P<user>(?<=://)(?:[^\s/?#]*@|[^\s/?#@:]*:(?!\d+(?:[/?#\s]|$))[^\s]*?@))"
    rf"|(?P<name>[?&;](?:[\w.~%-]*[-_.])?(?:{SECRET_NAMES})=)(?P<value>[^&;#\s'\"]+)",
    re.IGNORECASE,
)
REFERENCE = re.compile(r"\$\{(\w+)\}")
"""A reference to an environment variable."""
HIDDEN = "***"


def printable(text: str) -> str:
    r"""Return a text in which control characters are written out; line breaks and tabs stay.

    These are control characters of terminals, characters that change the direction of the text, and what
    can't be encoded as UTF-8.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    return _SUSPECT.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    if unicodedata.category(character) not in _CONTROLS or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """Return a text as `printable`, with line breaks and tabs written out too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def redacted(text: str) -> str:
    """Return a text without the secrets in its addresses: users with passwords, and secret parameters.

    References to environment variables, `${NAME}`, are no secrets and stay.

    >>> redacted("https://ann:pw@host/x?api_key=123&key=${KEY}")
    'https://***@host/x?api_key=***&key=${KEY}'
    """
    return _SECRET.sub(_hidden, text)


def holds_secret(text: str) -> bool:
    """Say whether `redacted` would hide something.

    >>> holds_secret("https://ann:${PASSWORD}@host"), holds_secret("https://ann:pw@host")
    (False, True)
    """
    return redacted(text) != text


def _hidden(match: re.Match[str]) -> str:
    user, colon, password = (match["user"] or "").removesuffix("@").partition(":")
    secrets = (password if colon else user, match["value"] or "")
    if not any(REFERENCE.sub("", secret).replace(HIDDEN, "") for secret in secrets):
        return match[0]
    return f"{HIDDEN}@" if match["user"] else f"{match['name']}{HIDDEN}"


def in_texts(change: Callable[[str], str], data: Any) -> Any:
    """Return plain data with a function applied to every text in it, also to keys.

    >>> in_texts(str.upper, {"a": ["b", 1]})
    {'A': ['B', 1]}
    """
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {in_texts(change, key): in_texts(change, value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [in_texts(change, value) for value in data]
    return data
