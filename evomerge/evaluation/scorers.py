"""Scorers: a user's Python function that scores answers, called in a process beside the worker.

The function gets the answer and the item's row and returns a number, or several by name. An error, a value of
another type or a call that takes too long is an error here; the process is then started again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.evaluation.answers import launch
from evomerge.evaluation.permissions import Permissions

SECONDS = 10.0
"""What one call may take."""
START_SECONDS = 120.0
"""What loading the code may take."""
SCORE = "score"
"""The name of the metric, where the function returns one number."""


class AnswerScorer:
    """Score answers with a user's function.

    Args:
        task: the suite's name of the task, for messages.
        code: `module:function`, or `file.py:function` with the whole path of the file.
        permissions: what the user allowed.
        seconds: what one call may take.

    Raises:
        ConfigError: code of the suite may not run.
    """

    def __init__(self, task: str, code: str, permissions: Permissions, *, seconds: float = SECONDS) -> None:
        if not permissions.trust_tasks:
            raise ConfigError(
                f"task {task!r} would run Python code: the scorer {code}",
                expected="a task without code, or your permission to run it",
                fix="read that code first; if you trust it, set trust_tasks: true in the run config, "
                "or add --trust-tasks",
            )
        self._task, self._code, self._seconds = task, code, seconds
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(self, answer: str, row: Mapping[str, Any]) -> dict[str, float]:
        """Return metric -> value.

        Raises:
            ConfigError: the function can't be loaded.
            ValueError: it raised, took too long, or returned something else.
        """
        server = self._server = self._server or self._started()
        reply = self._asked(server, {"answer": answer, "item": dict(row)}, self._seconds)
        if "error" in reply:
            raise ValueError(f"the scorer {self._name}: {reply['error']}")
        value = reply.get("value")
        values = value if isinstance(value, dict) else {SCORE: value}
        numbers: dict[str, float] = {}
        for name, number in values.items():
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(
                    f"the scorer {self._name} returned {str(number)[:80]!r} for {name!r}; "
                    "expected a finite number, or a dict of names and finite numbers"
                )
            numbers[str(name)] = float(number)
        return numbers

    @property
    def _name(self) -> str:
        place, _, function = self._code.rpartition(":")
        return f"{Path(place).name}:{function}"

    def _asked(self, server: subprocess.Popen[bytes], message: object, seconds: float) -> dict[str, Any]:
        try:
            assert server.stdin is not None
            server.stdin.write(json.dumps(message).encode() + b"\n")
            server.stdin.flush()
            reply: dict[str, Any] = json.loads(_line(server, seconds))
            return reply
        except (OSError, ValueError) as error:
            server.kill()
            self._server = None
            late = isinstance(error, TimeoutError)
            reason = f"took more than {seconds:g} seconds" if late else "ended its process"
            raise ValueError(f"the scorer {self._name} {reason}") from None

    def _started(self) -> subprocess.Popen[bytes]:
        server = launch("evomerge.evaluation.scorer_server", self)
        reply: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            reply = self._asked(server, self._code, START_SECONDS)
        if "ready" not in reply:
            raise ConfigError(
                f"task {self._task!r}: the scorer {self._code} can't be loaded",
                got=str(reply.get("error", "its process ended, or took too long")),
            )
        return server


def _line(server: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return the next line of a process; raise TimeoutError or OSError."""
    assert server.stdout is not None
    pipe, deadline, content = server.stdout.fileno(), time.monotonic() + seconds, b""
    while not content.endswith(b"\n"):
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        if not (part := os.read(pipe, 65536)):
            raise OSError("the process ended")
        content += part
    return content
