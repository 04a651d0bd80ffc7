"""The process that calls a user's scorer: `python -m evomerge.evaluation.scorer_server`.

It reads lines of JSON from standard input (the function's place, then answers with their items) and answers
each with a line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scorer prints is no answer

    def reply(message: object) -> None:
        outbox.write(json.dumps(message, default=repr).encode() + b"\n")
        outbox.flush()

    try:
        function = loaded(json.loads(sys.stdin.readline()))
    except BaseException as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply({"value": _plain(function(message["answer"], message["item"]))})
        except BaseException as error:
            reply({"error": f"{type(error).__name__}: {error}"})


def loaded(code: str) -> Callable[[str, dict[str, Any]], Any]:
    """Return the function at `module:function` or `file.py:function`; whatever its code raises."""
    place, _, name = code.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        sys.path.insert(0, str(path.parent))  # modules beside it
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function: Callable[[str, dict[str, Any]], Any] = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is no function")
    return function


def _plain(value: Any) -> Any:
    """Return numbers of libraries, such as numpy, as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    item = getattr(value, "item", None)
    return item() if callable(item) else value


if __name__ == "__main__":
    main()
