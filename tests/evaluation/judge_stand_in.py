"""A stand-in for an OpenAI-compatible server on this machine: what a judge is asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, KEY = "judge-7b", "sk-stand-in-5ecret"


def by_length(question: str) -> str:
    """Judge an answer by its number of words, up to 10."""
    answer = re.search(
        r"Answer to grade:\n(.*?)\n\nEnd your reply", question + "\n\nEnd your reply", re.DOTALL
    )
    words = len(answer.group(1).split()) if answer else 0
    return f"It has {words} words.\nScore: {min(words, 10)}"


@dataclass
class JudgeServer:
    """What the server does. failing: how many of the next requests answer 503.

    last: number of requests after which all answer 503. asked: what it was asked. most: requests at one time.
    key: the one it wants.
    """

    url: str = ""
    judge: Callable[[str], str] = by_length
    model: str = MODEL
    root: str = "/models/judge-7b"
    key: str | None = None
    failing: int = 0
    last: int = 10**9
    delay: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    waiting: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, Any]:
        """Return status and JSON of one request."""
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": f"wrong key {authorization}"}}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.model, "root": self.root}]}
        with self.lock:
            self.asked.append(body)
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            failing = self.failing > 0 or len(self.asked) > self.last
            self.failing = max(0, self.failing - 1)
        time.sleep(self.delay)
        with self.lock:
            self.waiting -= 1
        if failing:
            return 503, {"error": {"message": "busy"}}
        reply = self.judge(body["messages"][0]["content"])
        return 200, {
            "model": self.model,
            "choices": [{"message": {"role": "assistant", "content": reply}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7},
        }


@contextmanager
def serving() -> Iterator[JudgeServer]:
    """Serve until the block ends."""
    state = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body: dict[str, Any]) -> None:
            status, content = state.answer(self.path, body, self.headers.get("Authorization"))
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (301, 302, 307):
                self.send_header("Location", content)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *arguments: Any) -> None:
            del format, arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
