"""Run as a program: kill runs at every kind of stored event, resume them, print what they stored in the end.

One process imports everything; every run is a fork of it. Usage: python -m tests.running.crash CONFIG FOLDER
WORKERS MODE [KIND ...] with a MODE of

    chain   one run, whose driver is killed at one kind of event after the other
    both    the same, its workers killed with it
    workers one run, whose workers are all killed at the first event of every kind
    each    a run for every kind of event, whose driver is killed in the middle of its occurrences
    all     the same, its workers killed with it
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from evomerge.running.store import RunStore
from tests.running import quick

_writing = RunStore._writing
_rename = Path.rename
_events: list[str] = []


def label(frame: Any) -> str:
    """Name a stored event: what was recorded, and of which kind."""
    told, name = frame.f_locals, frame.f_code.co_name
    if name == "write_value":
        return f"fact {told['key'].split()[0]}"
    if name == "record_scores":
        return f"scores {told['parts'][0].split}"
    if name in ("record_entry", "trim_entries"):
        return f"{name.split('_')[0]} {told['role']}"
    return str(name).removeprefix("record_")


def strike_at(moments: dict[str, tuple[int, bool]], target: str, pids: Path) -> None:
    """Make this process kill itself, its workers or both at some of its stored events.

    moments: kind of event -> at which of its occurrences (from 1), and whether before its commit. pids: where
    to note the workers' process ids.
    """

    def strike() -> None:
        children = multiprocessing.active_children()
        pids.write_text(json.dumps([child.pid for child in children]))
        if target != "driver":
            for child in children:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
        if target != "workers":
            os.kill(os.getpid(), signal.SIGKILL)

    def when(kind: str) -> tuple[bool, bool]:
        """Note an event; say whether to strike before its commit, and after."""
        _events.append(kind)
        number, before = moments.get(kind, (0, False))
        now = _events.count(kind) == number
        return now and before, now and not before

    @contextmanager
    def writing(store: RunStore) -> Iterator[Any]:
        before, after = when(label(sys._getframe(2)))
        with _writing(store) as db:
            yield db
            if before:
                strike()
        if after:
            strike()

    def rename(path: Path, to: Path) -> Path:
        ours = path.name.startswith(".run.sqlite.new")
        before, after = when("create") if ours else (False, False)
        if before:
            strike()
        renamed = _rename(path, to)
        if after:
            strike()
        return renamed

    RunStore._writing = writing  # type: ignore[assignment, method-assign]
    Path.rename = rename  # type: ignore[assignment, method-assign]


def forked(work: Callable[[], object]) -> int:
    """Do some work in a fork of this process; return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            sys.stderr.flush()
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def main(config_path: Path, folder: Path, workers: int, mode: str, kinds: list[str]) -> None:
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent

    forkserver.set_forkserver_preload = lambda *_: None  # a formula needs no torch
    pids = folder / "pids.json"

    def go_on(name: str) -> None:
        compose.start(RunConfig.load(config_path, out=str(folder / name)), Silent())

    def struck(name: str, moments: dict[str, tuple[int, bool]], target: str) -> int:
        def work() -> None:
            strike_at(moments, target, pids)
            go_on(name)

        return forked(work)

    def is_killed(status: int) -> bool:
        orphans = wait_for_end(json.loads(pids.read_text()))
        assert not orphans, orphans
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    def note(name: str) -> None:
        strike_at({}, "driver", pids)
        go_on(name)
        (folder / "events.json").write_text(json.dumps(_events))

    compose.executors.build = quick.build(0)
    go_on("warm")  # imports, caches
    assert forked(lambda: note("whole")) == 0
    compose.executors.build = quick.build(workers)
    events = json.loads((folder / "events.json").read_text())
    kinds = kinds or list(dict.fromkeys(events))
    target = {"chain": "driver", "each": "driver", "workers": "workers"}.get(mode, "both")
    found = {}
    if mode == "workers":
        assert struck("struck", dict.fromkeys(kinds, (1, False)), target) == 0
        assert not is_killed(0)
        found[", ".join(kinds)] = facts(folder / "struck")
    elif mode in ("chain", "both"):
        for number, kind in enumerate(sorted(kinds, key=events.index)):
            assert is_killed(struck("struck", {kind: (1, bool(number % 2))}, target)), kind
        assert forked(lambda: go_on("struck")) == 0
        found[", ".join(kinds)] = facts(folder / "struck")
    else:
        for kind in kinds:
            for before in (False, True):
                name = f"{'before' if before else 'after'}-{kind.replace(' ', '-')}"
                middle = (events.count(kind) + 1) // 2
                assert is_killed(struck(name, {kind: (middle, before)}, target)), name
                assert forked(lambda name=name: go_on(name)) == 0, name  # type: ignore[misc]
                found[name] = facts(folder / name)
    stored = {"kinds": kinds, "events": sorted(set(events))}
    print(json.dumps({"whole": facts(folder / "whole"), "struck": found, **stored}))


def wait_for_end(pids: list[int], seconds: float = 60.0) -> list[int]:
    """Return which processes still run after some time."""
    end = time.monotonic() + seconds
    while (alive := [pid for pid in pids if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return alive


def _runs(pid: int) -> bool:
    """Say whether a process runs; one that has ended may wait long for a parent that collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def facts(folder: Path) -> dict[str, Any]:
    """What must be the same after a crash: contents, winner, health of the file, and no other files."""
    with RunStore.read(folder) as store:
        (integrity,) = store._db.execute("PRAGMA integrity_check").fetchone()
        return {
            "digest": store.digest(),
            "winner": store.entries("winner")[0].recipe.hash,
            "integrity": integrity,
            "failures": sorted(reason.reason for _, _, reason in store.failures()),
            "files": sorted(p.name for p in folder.iterdir()),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
