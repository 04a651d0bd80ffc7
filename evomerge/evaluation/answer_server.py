"""The process that scores answers which are executed: `python -m evomerge.evaluation.answer_server FOLDER`.

It reads pickles of its parent from standard input (a task, then items) and answers each with a line of JSON.
FOLDER holds the cache of metrics, to which answers can write.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from evomerge.evaluation import sandbox, tasks


def main() -> None:
    """Serve until standard input ends."""
    metrics = Path(sys.argv[1]) / "metrics"
    metrics.mkdir(exist_ok=True)
    inbox = sys.stdin.buffer
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints is no answer

    def reply(message: object) -> None:
        outbox.write(json.dumps(message).encode() + b"\n")
        outbox.flush()

    suite, name, permissions = pickle.load(inbox)
    try:
        task = tasks.load(suite, [name], permissions)[0]
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    os.environ[tasks.EXECUTES] = "1"
    reply({"ready": True})
    while True:
        try:
            doc, results = pickle.load(inbox)
        except EOFError:
            return
        reply(_values(sandbox.run(functools.partial(_scored, task, doc, results), writable=[metrics])))


def _scored(task: Any, doc: Any, results: Any) -> bytes:
    values = task.process_results(doc, results)
    numbers = {str(name): float(value) for name, value in values.items() if tasks.is_number(value)}
    return json.dumps(numbers).encode()


def _values(answer: bytes | None) -> dict[str, float]:
    """Return the finite numbers of an answer, which may be forged."""
    try:
        values = json.loads(answer or b"{}")
        return {name: value for name, value in values.items() if math.isfinite(value)}
    except (ValueError, TypeError, AttributeError):
        return {}


if __name__ == "__main__":
    main()
