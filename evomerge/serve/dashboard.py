"""A run in optuna-dashboard: its candidates as trials of a study in memory, behind the same guard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
import optuna_dashboard

from evomerge.delivery.candidates import candidates
from evomerge.delivery.course import Course
from evomerge.delivery.study import as_study
from evomerge.delivery.summary import Summary
from evomerge.serve.guard import HEADERS, HOST, Guard, cannot_listen

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
"""The dashboard's own: notes on trials and the like, which end with it."""

Start = Callable[..., Any]


def storage(summary: Summary) -> tuple[optuna.storages.BaseStorage, int]:
    """Return a run as a study in memory, and the number of its trials.

    One objective is the mean normalised score, to be maximised. Several are minus the losses that the
    optimizer got, each to be maximised.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        table = candidates(summary, Course(summary))
        names = summary.objective.names if summary.objective.several else ("mean score on search",)
        memory = optuna.storages.InMemoryStorage()
        study = optuna.create_study(
            storage=memory, study_name=summary.store.folder.name, directions=["maximize"] * len(names)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(names))
        as_study(table, study)
    finally:
        optuna.logging.set_verbosity(before)
    return memory, len(table)


def guarded(app: Callable[..., Iterable[bytes]], guard: Guard) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application behind a guard."""

    def answer(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        refusal = guard.refusal(
            environ["REQUEST_METHOD"], environ.get("HTTP_HOST", ""), query, environ.get("HTTP_COOKIE", "")
        )
        extra = list(HEADERS.items())
        if refusal is not None:
            status, text = refusal
            start(f"{status} Refused", [("Content-Type", "text/plain"), *extra])
            return [text.encode()]
        if guard.named(query):
            extra.append(("Set-Cookie", guard.cookie))
        return app(environ, lambda status, headers, *more: start(status, [*headers, *extra], *more))

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing: a request's address may have the token."""


def show(memory: optuna.storages.BaseStorage, *, port: int, say: Callable[[str], None]) -> None:
    """Serve optuna-dashboard over a storage until SIGINT or SIGTERM.

    port: 0 takes a free one. say: receives the address. Raises ConfigError where the port is taken.
    """
    try:
        server = _Server((HOST, port), _Quiet)
    except OSError as error:
        raise cannot_listen(port, error) from None
    with server, suppress(KeyboardInterrupt):
        guard = Guard(port=server.server_port, methods=METHODS)
        server.set_app(guarded(optuna_dashboard.wsgi(memory), guard))
        say(guard.address)
        server.serve_forever()
