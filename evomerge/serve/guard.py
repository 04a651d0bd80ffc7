"""Who may see the pages: requests to this machine by its own name that know the server's token.

Other users of the machine, and web pages that the user's browser has open, can reach the port as well. They
lack the token: it is random, stands in the address that the command prints, and goes into a cookie that
scripts can't read and that requests from other sites don't carry. Requests under another host name are
refused, so that a foreign name that points to this machine (DNS rebinding) is of no use.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from evomerge.errors import ConfigError

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PARAMETER = "token"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every response says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Decides which requests are answered.

    port: of the server; cookies don't know ports, so the cookie's name has it. methods: that are answered.
    """

    port: int
    methods: tuple[str, ...] = ("GET", "HEAD")
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def address(self) -> str:
        """The address for the browser."""
        return f"http://{HOST}:{self.port}/?{PARAMETER}={self.token}"

    @property
    def cookie(self) -> str:
        """The cookie that makes later requests known, as the value of Set-Cookie."""
        return f"{self._name}={self.token}; Path=/; HttpOnly; SameSite=Strict"

    @property
    def _name(self) -> str:
        return f"evomerge-{self.port}"

    def refusal(self, method: str, host: str, query: str, cookies: str) -> tuple[int, str] | None:
        """Return status and text with which a request is refused, None where it is answered.

        Args:
            method: of the request, like "GET".
            host: the header Host.
            query: the part of the address after "?".
            cookies: the header Cookie.
        """
        name, _, port = host.partition(":")
        if name.lower() not in NAMES or (port and not port.isdigit()):
            return 403, "this server answers under 127.0.0.1 and localhost only\n"
        if not self.named(query) and not self._same(_cookie(cookies, self._name)):
            return 403, "open the address that the command printed: it has the token\n"
        if method not in self.methods:
            return 405, f"only {', '.join(self.methods)}\n"
        return None

    def named(self, query: str) -> bool:
        """Say whether an address has the token."""
        return any(map(self._same, parse_qs(query).get(PARAMETER, ())))

    def _same(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(errors="replace"), self.token.encode())


def _cookie(header: str, name: str) -> str:
    try:
        cookies: Mapping[str, object] = SimpleCookie(header)
    except CookieError:
        return ""
    return str(getattr(cookies.get(name), "value", ""))


def cannot_listen(port: int, error: OSError) -> ConfigError:
    """Return the error for a port that a server can't have."""
    return ConfigError(
        f"--port {port}: can't listen there",
        got=os.strerror(error.errno or 0),
        fix="choose another port, or leave the option out to get a free one",
    )
