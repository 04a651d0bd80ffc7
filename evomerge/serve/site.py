"""The pages as a web application (ASGI): addresses, server-sent events, and the guard before all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomerge.delivery.page import content_policy
from evomerge.errors import ConfigError, UserError
from evomerge.serve.guard import HEADERS, Guard
from evomerge.serve.pages import Pages

EVERY = 1.0
"""Seconds between two looks whether a run has stored something."""
ALIVE = 15
"""Looks without news after which a comment is sent: proxies and tunnels close silent connections."""


def site(pages: Pages, guard: Guard, ended: Callable[[], bool] = lambda: False) -> ASGIApp:
    """Return the application.

    Args:
        pages: what it shows.
        guard: which requests it answers.
        ended: whether the server wants to end, so that open streams of events must.
    """

    async def events(request: Request) -> Response:
        number = request.path_params.get("number")
        await run_in_threadpool(pages.stamp, number)  # an error before the stream begins
        return StreamingResponse(_stamps(pages, number, ended), media_type="text/event-stream")

    return Guarded(
        Starlette(
            routes=[
                Route("/", lambda request: HTMLResponse(pages.index())),
                Route("/events", events),
                Route("/run/{number:int}", _report(pages)),
                Route("/run/{number:int}/events", events),
                Route("/run/{number:int}/candidates", _candidates(pages)),
                Route("/run/{number:int}/candidate/{pick:str}", _candidate(pages)),
            ],
            exception_handlers={UserError: _refused, HTTPException: _http_error},
        ),
        guard,
    )


def _report(pages: Pages) -> Callable[[Request], Response]:
    return lambda request: HTMLResponse(pages.report(request.path_params["number"]))


def _candidates(pages: Pages) -> Callable[[Request], Response]:
    return lambda request: HTMLResponse(pages.candidates(request.path_params["number"]))


def _candidate(pages: Pages) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        number, pick = request.path_params["number"], request.path_params["pick"]
        return HTMLResponse(pages.candidate(number, pick, request.query_params.get("task")))

    return answer


async def _stamps(pages: Pages, number: int | None, ended: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield the stamp of a page as an event, at first and whenever it changed."""
    last, silent = None, 0
    while not ended():
        try:
            stamp = await run_in_threadpool(pages.stamp, number)
        except UserError:  # the run was removed
            return
        silent += 1
        if stamp != last:
            last, silent = stamp, 0
            yield f"data: {stamp}\n\n"
        elif silent >= ALIVE:
            silent = 0
            yield ": nothing new\n\n"
        await asyncio.sleep(EVERY)


def _refused(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}\n", 404 if isinstance(error, ConfigError) else 503)


def _http_error(_: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    return PlainTextResponse("no such page\n" if status == 404 else f"error {status}\n", status)


class Guarded:
    """An application behind a guard; every response gets the headers that protect it."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            return
        request = Request(scope)
        query = scope["query_string"].decode("latin-1")
        headers = request.headers
        refusal = self._guard.refusal(
            request.method, headers.get("host", ""), query, headers.get("cookie", "")
        )
        known = refusal is None and self._guard.named(query)

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                written = MutableHeaders(scope=message)
                written.update(HEADERS | {"Content-Security-Policy": content_policy()})
                if known:
                    written.append("Set-Cookie", self._guard.cookie)
            await send(message)

        app = self._app if refusal is None else PlainTextResponse(refusal[1], refusal[0])
        await app(scope, receive, protected)
