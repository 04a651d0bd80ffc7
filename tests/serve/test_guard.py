"""Who is answered: the table of hosts, tokens, cookies and methods."""

from __future__ import annotations

import pytest

from evomerge.serve.guard import Guard

GUARD = Guard(port=8000, token="secret")
HOST = "127.0.0.1:8000"
KNOWN = "evomerge-8000=secret"


@pytest.mark.parametrize(
    ("method", "host", "query", "cookies", "status"),
    [
        ("GET", HOST, "token=secret", "", None),
        ("GET", HOST, "task=a&token=secret", "", None),
        ("GET", HOST, "", KNOWN, None),
        ("GET", HOST, "", f"other=1; {KNOWN}", None),
        ("HEAD", "localhost:8000", "", KNOWN, None),
        ("GET", "localhost", "", KNOWN, None),
        ("GET", "localhost:9000", "", KNOWN, None),  # through a tunnel
        ("GET", HOST, "", "", 403),
        ("GET", HOST, "token=", "", 403),
        ("GET", HOST, "token=secre", "", 403),
        ("GET", HOST, "token=secret2", "", 403),
        ("GET", HOST, "token=%C3%A9%00", "", 403),
        ("GET", HOST, "TOKEN=secret", "", 403),
        ("GET", HOST, "", "evomerge-8000=other", 403),
        ("GET", HOST, "", "evomerge-8001=secret", 403),
        ("GET", HOST, "", "evomerge-8000=\udcff", 403),
        ("GET", HOST, "", "a=b=c;;\x00", 403),
        ("GET", "", "token=secret", KNOWN, 403),
        ("GET", "example.com", "token=secret", KNOWN, 403),
        ("GET", "127.0.0.1.example.com", "token=secret", KNOWN, 403),
        ("GET", "127.0.0.1:8000@example.com", "token=secret", KNOWN, 403),
        ("GET", "localhost:x", "token=secret", KNOWN, 403),
        ("GET", "0.0.0.0:8000", "token=secret", KNOWN, 403),
        ("POST", HOST, "", KNOWN, 405),
        ("DELETE", HOST, "token=secret", "", 405),
        ("POST", HOST, "", "", 403),
    ],
)
def test_which_requests_are_answered(
    method: str, host: str, query: str, cookies: str, status: int | None
) -> None:
    refusal = GUARD.refusal(method, host, query, cookies)
    assert (None if refusal is None else refusal[0]) == status


def test_every_server_has_a_token_of_its_own() -> None:
    tokens = {Guard(port=1).token for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 32 for token in tokens)


def test_the_cookie_is_kept_from_scripts_and_other_sites() -> None:
    assert GUARD.cookie == "evomerge-8000=secret; Path=/; HttpOnly; SameSite=Strict"
    assert GUARD.address == "http://127.0.0.1:8000/?token=secret"
