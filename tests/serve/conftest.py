"""A real server in a thread of the test, and a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from evomerge.serve import server
from evomerge.serve.guard import Guard

Serve = Callable[..., tuple[httpx.Client, Guard]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server of some folders; returns a client that knows the token, and the guard."""
    ends: list[Callable[[], None]] = []

    def start(*places: Path) -> tuple[httpx.Client, Guard]:
        bound = server.listening(0)
        made, guard = server.server(places, bound.getsockname()[1])
        thread = threading.Thread(target=made.run, kwargs={"sockets": [bound]})
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{guard.port}", timeout=60, headers={"Cookie": guard.cookie}
        )

        def end() -> None:
            client.close()
            made.should_exit = True
            thread.join(20)
            bound.close()
            assert not thread.is_alive()

        thread.start()
        ends.append(end)
        while not made.started:
            time.sleep(0.01)
        return client, guard

    yield start
    for end in ends:
        end()
