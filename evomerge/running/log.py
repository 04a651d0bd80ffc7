"""The log of a run: what happened and when, as JSON lines for programs and as text for people.

`log.jsonl` and `log.txt` in the run folder hold the same events. Lines are only ever appended, each in one
write, so a killed process leaves at most one torn line, which readers skip. The log is only for reading: the
state of a run is in its store, and a log that can't be written (a full disk) does not stop the run.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evomerge.running.observers import Estimate, Observer
from evomerge.text import in_texts, one_line, redacted

JSON_LINES, TEXT = "log.jsonl", "log.txt"


class RunLog(Observer):
    """Writes the log of the run in a folder: an observer, and as a context manager a handler of `logging`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with RunLog(folder) as log:
    ...     log.event("failed", id="0123456789ab", split="test", kind="crash", reason="died")
    >>> (folder / TEXT).read_text()[20:].rstrip()
    'failed 0123456789ab on test: died (crash)'
    >>> [entry["event"] for entry in read(folder)]
    ['failed']
    """

    def __init__(self, folder: Path) -> None:
        self._files = [_opened(folder / name) for name in (JSON_LINES, TEXT)]
        self._handler = _Handler(self)

    def event(self, event: str, /, **facts: Any) -> None:
        """Append an event: its name and its facts as JSON."""
        facts = in_texts(redacted, facts)
        now = datetime.datetime.now().astimezone()
        line = json.dumps({"at": now.isoformat(timespec="milliseconds"), "event": event, **facts})
        text = one_line(f"{now:%Y-%m-%d %H:%M:%S} {_text(event, facts)}")
        for file, content in zip(self._files, (line, text), strict=True):
            with suppress(OSError):  # no room: the store raises the error
                if file is not None:
                    os.write(file, f"{content}\n".encode())

    def recorded(self, event: str, values: Mapping[str, Any]) -> None:
        """Append what the store committed."""
        self.event(event, **values)

    def phase(self, name: str, jobs: int, known: int) -> None:
        """Append that a batch of recipes starts, unless all are answered from the store."""
        if known < jobs:
            self.event("phase", name=name, jobs=jobs, known=known)

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Append how far the search is."""
        self.event(
            "generation",
            generation=generation,
            evaluations=round(evaluations, 3),
            best=round(best, 6) if best > float("-inf") else None,
        )

    def expected(self, estimate: Estimate) -> None:
        """Append when the run should end, and at what cost."""
        self.event("expected", **estimate.as_data())

    def noted(self, message: str) -> None:
        """Append a message."""
        self.event("note", level="info", module="evomerge", text=message)

    def session(self, versions: Mapping[str, str], **facts: Any) -> None:
        """Append that this process starts to work on the run."""
        self.event(
            "session",
            process=os.getpid(),
            host=socket.gethostname(),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            versions=dict(versions),
            **facts,
        )

    def __enter__(self) -> RunLog:
        logging.getLogger("evomerge").addHandler(self._handler)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:  # this process stops before the run is over
            self.event("stopped", kind=type(error).__name__.strip("_"), reason=_reason(error))
        logging.getLogger("evomerge").removeHandler(self._handler)
        for file in self._files:
            if file is not None:
                os.close(file)
        self._files = []


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first; lines that a killed process tore are left out."""
    events = []
    for line in (folder / JSON_LINES).read_bytes().splitlines():
        with suppress(ValueError):
            if isinstance(event := json.loads(line), dict):
                events.append(event)
    return events


class _Handler(logging.Handler):
    """Logs the records of `logging`; errors still reach the terminal."""

    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.event("note", level=record.levelname.lower(), module=record.name, text=record.getMessage())
        if record.levelno >= logging.ERROR and logging.lastResort is not None:
            logging.lastResort.handle(record)


def _opened(path: Path) -> int | None:
    """Open a log for appending, on a line of its own."""
    with suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")  # the last line was torn
        return file
    return None


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or the name of the signal that ended the process."""
    if isinstance(error, KeyboardInterrupt):
        return signal.Signals(getattr(error, "exit_code", 130) - 128).name
    return (str(error).splitlines() or [""])[0]


def _text(event: str, facts: Mapping[str, Any]) -> str:
    write = _SENTENCES.get(event)
    if write is not None:
        with suppress(KeyError):
            return write(facts)
    return f"{event}: " + ", ".join(f"{name} {value}" for name, value in facts.items())


def _scored(facts: Mapping[str, Any]) -> str:
    means = ", ".join(f"{task} {mean:.4g}" for task, mean in facts["scores"].items())
    blocks = ",".join(map(str, facts["blocks"]))
    return (
        f"scored {facts['id']} on {facts['split']} (blocks {blocks}): {means} "
        f"[{facts['seconds']:.2f} s, worker {facts['worker']}]"
    )


def _expected(facts: Mapping[str, Any]) -> str:
    parts = []
    if facts["ends"] is not None:
        ends = datetime.datetime.fromtimestamp(facts["ends"])
        parts.append(f"the end at about {ends:%Y-%m-%d %H:%M}")
    if facts["cost"] is not None:
        parts.append(f"a cost of {facts['cost']:.2f}, {facts['spent']:.2f} so far")
    return f"expected: {', '.join(parts) or 'end unknown (no limit on time or evaluations)'}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "session": lambda f: (
        f"session of process {f['process']} on {f['host']}: {f['command']} "
        f"({', '.join(f'{name} {version}' for name, version in f['versions'].items())})"
    ),
    "stopped": lambda f: f"stopped ({f['kind']}) {f['reason']}".rstrip(),
    "finished": lambda f: f"finished: {f['reason']}; winner {f['id']} ({f['name']})",
    "phase": lambda f: f"{f['name']}: {f['jobs']} models, {f['known']} known",
    "scored": _scored,
    "failed": lambda f: f"failed {f['id']} on {f['split']}: {f['reason']} ({f['kind']})",
    "asked": lambda f: f"generation {f['generation']} asks for {', '.join(f['ids'])}",
    "arrived": lambda f: f"generation {f['generation']}, candidate {f['position']}: {f['id']}",
    "generation": lambda f: (
        f"generation {f['generation']} done, {f['evaluations']:g} evaluations"
        + ("" if f["best"] is None else f", best so far {100 * f['best']:.1f} points")
    ),
    "expected": _expected,
    "entry": lambda f: f"{f['role']} {f['position']}: {f['id']} ({f['name']})",
    "gradient": lambda f: f"gradient of {f['id']}",
    "note": lambda f: f"{f['level']}: {f['text']}",
}
