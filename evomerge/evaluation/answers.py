"""Answers as code: a task's `process_results`, carried out where a model's answers can do no harm.

A small process beside the worker (`evaluation.answer_server`) loads the task and forks a child with limits
for each item (`evaluation.sandbox`). It has none of the worker's environment variables that could hold
secrets. An answer that fails in any way (it raises, exits, hangs, takes too much memory) scores 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.suite import Suite
from evomerge.files import temporary_parent

_KEPT = (
    *("PATH", "LANG", "LC_ALL", "HOME", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "OPENBLAS_CORETYPE"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HUGGINGFACE_HUB_CACHE"),
)
"""Environment variables that the server needs to find libraries and data sets."""

_SET = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1"),
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # an answer that iterates over a set has one result
    "TOKENIZERS_PARALLELISM": "false",
}


class IsolatedMetrics:
    """Compute a task's metrics of an item like `process_results`, with the answer executed in a sandbox.

    Args:
        suite: the suite of the task.
        task: its name.
        permissions: what the user allowed.
        metrics: names of the task's metrics, which are 0 where an answer fails.

    Raises:
        ConfigError: the task can't be loaded in another process.
    """

    def __init__(self, suite: Suite, task: str, permissions: Permissions, metrics: Iterable[str]) -> None:
        self._job = (suite, task, permissions)
        self._metrics = set(metrics)
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(self, doc: Any, results: Any) -> dict[str, float]:
        """Return metric -> value."""
        values: dict[str, float] = {}
        for _ in range(2):  # a server that dies may be the answer's doing, or an accident: one more attempt
            self._server = server = self._server or self._started()
            try:
                values = _asked(server, (doc, results))
                break
            except (OSError, ValueError):
                server.kill()
                self._server = None
        self._metrics |= values.keys()
        return dict.fromkeys(self._metrics, 0.0) | values

    def _started(self) -> subprocess.Popen[bytes]:
        """Start a server and wait until it has loaded the task."""
        server = launch("evomerge.evaluation.answer_server", self)
        reply: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            reply = _asked(server, self._job) or {}
        if "ready" not in reply:
            raise ConfigError(
                f"task {self._job[1]!r} can't be loaded in the process that executes answers",
                got=str(reply.get("error", "the process ended")),
            )
        return server


def _asked(server: subprocess.Popen[bytes], message: object) -> Any:
    """Send a message, and return the line of JSON that answers it. Raises OSError, ValueError."""
    assert server.stdin is not None
    assert server.stdout is not None
    pickle.dump(message, server.stdin)
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def launch(module: str, owner: object) -> subprocess.Popen[bytes]:
    """Start a module as a server that ends with its owner; its argument is a folder of its own."""
    folder = tempfile.TemporaryDirectory(
        prefix="evomerge-answers-", dir=temporary_parent(), ignore_cleanup_errors=True
    )
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", module, folder.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder.name,
        env=_environment(folder.name),
        start_new_session=True,  # Ctrl-C is the worker's to handle
    )
    weakref.finalize(owner, _stop, server, folder)
    return server


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of a server: none of the worker's variables that could hold secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = os.pathsep.join(place for place in sys.path if place)
    return {
        **kept,
        **_SET,
        "PYTHONPATH": path,
        "TMPDIR": folder,
        "HF_METRICS_CACHE": str(Path(folder) / "metrics"),
    }


def _stop(server: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    """End a server that is idle."""
    server.kill()
    for pipe in (server.stdin, server.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    server.wait()
    folder.cleanup()
