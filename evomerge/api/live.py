"""Runs while they go on: in the terminal, as pages for a browser, and in optuna's dashboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evomerge.api.runs import AnyPath, load
from evomerge.api.view import View
from evomerge.delivery import watch as watch_delivery
from evomerge.errors import ConfigError
from evomerge.running.store.file import FILE, content_state

REDRAW, SHARE = 1.0, 10.0
"""Seconds between two frames, and of how many times what it takes the store is read at most."""


def frame(run: AnyPath) -> View:
    """Return a run's state as `watch` shows it."""
    with load(run).opened() as summary:
        data = watch_delivery.as_data(summary)
    return View(data, lambda width: watch_delivery.text(data))


def watch(
    run: AnyPath,
    show: Callable[[View], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> View:
    """Show a run again and again until no process works on it, and return its last state.

    The store is read when it has changed, and seldom enough not to slow the run down.

    Args:
        run: the run folder.
        show: receives each frame.
        sleep: waits for some seconds.
    """
    file, state, due, view = Path(run) / FILE, None, 0.0, None
    while True:
        now = content_state(file)
        if view is None or (now != state and time.monotonic() >= due) or not _held(run):
            began, state = time.monotonic(), now
            view = frame(run)
            due = time.monotonic() + SHARE * (time.monotonic() - began)
        show(view)
        if view.data["state"] != "running":
            return view
        sleep(REDRAW)


def _held(run: AnyPath) -> bool:
    from evomerge.running.store.file import holder

    return holder(Path(run)) is not None


def serve(
    folders: Sequence[AnyPath] = ("runs",),
    *,
    port: int = 0,
    say: Callable[[str, int], None] = lambda address, runs: print(address),  # noqa: T201
) -> None:
    """Serve the pages of runs on this machine, until Ctrl-C or SIGTERM.

    Args:
        folders: run folders, and folders with runs.
        port: 0 takes a free one.
        say: receives the address, which has the token, and the number of runs.

    Raises:
        ConfigError: a folder is missing, the port is taken, or the extra `serve` is not installed.
    """
    server: Any = _extra("serve", "evomerge.serve.server")
    server.serve([Path(folder) for folder in folders], port=port, say=say)


def dashboard(
    run: AnyPath,
    *,
    port: int = 0,
    say: Callable[[str, int], None] = lambda address, trials: print(address),  # noqa: T201
) -> None:
    """Show a run's candidates in optuna-dashboard on this machine, until Ctrl-C or SIGTERM.

    Args:
        run: the run folder.
        port: 0 takes a free one.
        say: receives the address, which has the token, and the number of trials.

    Raises:
        ConfigError: the port is taken, or the extra `dashboard` is not installed.
    """
    server: Any = _extra("dashboard", "evomerge.serve.dashboard")
    with load(run).opened() as summary:
        storage, trials = server.storage(summary)
    server.show(storage, port=port, say=lambda address: say(address, trials))


def _extra(name: str, module: str) -> Any:
    """Import a module that needs an extra; raise ConfigError where that is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("evomerge"):
            raise
        raise ConfigError(
            f"{name}: the package {error.name} is missing", fix=f"pip install 'evomerge[{name}]'"
        ) from None
