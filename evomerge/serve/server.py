"""The servers: of the pages, and of optuna-dashboard; both on this machine only, until a signal ends them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from evomerge.delivery.run_list import find_runs
from evomerge.serve.guard import HOST, Guard, cannot_listen
from evomerge.serve.pages import Pages
from evomerge.serve.site import site


def listening(port: int) -> socket.socket:
    """Return a socket that listens on this machine; port 0 takes a free one. Raises ConfigError."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise cannot_listen(port, error) from None


def server(places: Sequence[Path], port: int) -> tuple[uvicorn.Server, Guard]:
    """Return a server of the pages of runs that is not started yet, and its guard. port: it listens on."""
    guard = Guard(port=port)
    config = uvicorn.Config(
        lambda: None,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    made = uvicorn.Server(config)
    config.app = site(Pages(places), guard, ended=lambda: made.should_exit)
    return made, guard


def serve(places: Sequence[Path], *, port: int, say: Callable[[str, int], None]) -> None:
    """Serve the pages of runs until SIGINT or SIGTERM.

    Args:
        places: run folders, and folders with runs.
        port: 0 takes a free one.
        say: receives the address and the number of runs before the first request.

    Raises:
        ConfigError: a place is no folder, or the port is taken.
    """
    runs = find_runs(places, none=True)
    with listening(port) as bound, suppress(KeyboardInterrupt):
        made, guard = server(places, bound.getsockname()[1])
        say(guard.address, len(runs))
        made.run(sockets=[bound])
