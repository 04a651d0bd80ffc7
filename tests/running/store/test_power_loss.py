"""Power lost at any moment: the store opens, sound, with every event that was committed before.

What SQLite promises in WAL mode with synchronous=FULL, and what is played here on copies of the files:

- An event is in the log (`-wal`) and synced when it is committed. What was being appended when the power went
  may be missing, cut anywhere, or garbage; the log may not be there at all if nothing in it was committed.
- A log that was copied into the store is overwritten from its start: beyond what is new lies what is old.
- While it is copied, the store's pages may be any mixture of old and new, torn ones too; the log is whole.
- The index of the log (`-shm`) is never needed.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Failure
from evomerge.running.store import RunStore, facts
from evomerge.running.store.file import FILE
from evomerge.search.ports import Named
from tests.conftest import write_suite
from tests.running import quick
from tests.running.fakes import TIMING, recipe, scores

WAL = f"{FILE}-wal"
HEADER, FRAME = 32, 24
SECTOR = 512


def events(store: RunStore, first: int) -> Iterator[None]:
    """Store one event of most kinds after the other."""
    store.begin_session({"cma": "4.5.0"})
    yield
    store.record_entry("baseline", first, Named(name="b", recipe=recipe(first)))
    yield
    store.record_ask(first, np.array([[0.25, 0.5]]), [recipe(first + 1)])
    yield
    store.record_scores(recipe(first), scores(first), TIMING)
    yield
    store.record_failure(recipe(first + 2), "search", Failure(kind="crash", reason="died"))
    yield
    store.record_tell(first, np.array([[0.125]]), 0.5)
    yield
    store.record_gradient(str(first), "loss", {"items": 3})
    yield


def contents(db: sqlite3.Connection) -> str:
    return "\n".join(db.iterdump())


def after_power_loss(folder: Path, store: bytes, log: bytes) -> str:
    """Open what the disk holds and return its contents, after checking that they are sound."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / FILE).write_bytes(store)
    if log:
        (folder / WAL).write_bytes(log)
    with RunStore.open(folder) as found:
        assert found._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return contents(found._db)


def frames(log: bytes) -> list[tuple[int, int, bool]]:
    """Return (start, end, whether it ends an event) of the log's pages that belong together."""
    size = struct.unpack(">I", log[8:12])[0]
    found = []
    for start in range(HEADER, len(log) - FRAME - size + 1, FRAME + size):
        if log[start + 8 : start + 16] != log[16:24]:
            break  # of the time before the log was last begun anew
        found.append((start, start + FRAME + size, log[start + 4 : start + 8] != bytes(4)))
    return found


def cuts(log: bytes) -> Iterator[tuple[int, int]]:
    """Return places to cut a log at, and how many events are whole before each."""
    whole = 0
    yield from ((place, 0) for place in (0, 7, HEADER))
    for start, end, last in frames(log):
        yield from ((start + part, whole) for part in (FRAME // 2, FRAME, FRAME + 2000))
        whole += last
        yield end, whole


@pytest.fixture
def story(tmp_path: Path) -> tuple[RunStore, Callable[[int], list[str]]]:
    """A store in the hands of its writer, and what makes it go on: contents before and after each event."""
    RunStore.create(tmp_path / "run", {facts.CONFIG: {"seed": 0}}).close()
    store = RunStore.open(tmp_path / "run")
    store._db.execute("PRAGMA wal_autocheckpoint=0")

    def go_on(first: int) -> list[str]:
        return [contents(store._db), *(contents(store._db) for _ in events(store, first))]

    return store, go_on


def files(store: RunStore) -> tuple[bytes, bytes]:
    log = store.folder / WAL
    return (store.folder / FILE).read_bytes(), log.read_bytes() if log.exists() else b""


@pytest.mark.end_to_end
def test_a_log_cut_anywhere_holds_every_event_before(
    story: tuple[RunStore, Callable[[int], list[str]]], tmp_path: Path
) -> None:
    store, go_on = story
    before, _ = files(store)
    told = go_on(10)
    now, log = files(store)
    assert now == before  # nothing was copied into the store yet
    places = list(cuts(log))
    assert places[-1] == (len(log), len(told) - 1)
    draw = random.Random(0)
    for place, whole in places:
        assert after_power_loss(tmp_path / "cut", now, log[:place]) == told[whole], place
        garbage = draw.randbytes(len(log) - place)
        assert after_power_loss(tmp_path / "torn", now, log[:place] + garbage) == told[whole], place
        zeros = bytes(len(log) - place)
        assert after_power_loss(tmp_path / "torn", now, log[:place] + zeros) == told[whole], place
    store.close()


def test_a_log_begun_anew_over_an_old_one(
    story: tuple[RunStore, Callable[[int], list[str]]], tmp_path: Path
) -> None:
    store, go_on = story
    go_on(10)
    go_on(20)
    assert store._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
    _, old = files(store)
    told = go_on(30)
    now, log = files(store)
    assert len(log) == len(old)
    assert len(frames(log)) < len(frames(old))
    for place, whole in cuts(log):
        assert after_power_loss(tmp_path / "cut", now, log[:place] + old[place:]) == told[whole], place
    store.close()


def test_a_store_whose_log_was_being_copied_into_it(
    story: tuple[RunStore, Callable[[int], list[str]]], tmp_path: Path
) -> None:
    store, go_on = story
    before, _ = files(store)
    told = [go_on(first) for first in (10, 20, 30)][-1]
    _, log = files(store)
    assert store._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
    after, same = files(store)
    assert same == log
    assert after != before
    draw = random.Random(0)
    padded = before + bytes(len(after) - len(before))
    for trial in range(30):
        share = draw.random()
        mixed = b"".join(
            (after if draw.random() < share else padded)[start : start + SECTOR]
            for start in range(0, len(after), SECTOR)
        )
        assert after_power_loss(tmp_path / "mixed", mixed, log) == told[-1], trial
    store.close()


@pytest.mark.end_to_end
def test_a_run_resumed_after_power_loss_ends_in_the_same_bits(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    path = config(budget={"generations": 2}, optimizer={"population": 7})
    write_suite(tmp_path, generate=False)
    copies: dict[str, tuple[bytes, bytes]] = {}

    class Copies(Silent):
        def phase(self, name: str, jobs: int, known: int) -> None:
            run = tmp_path / "run"
            copies[name] = ((run / FILE).read_bytes(), (run / WAL).read_bytes())

    compose.start(RunConfig.load(path), Copies())
    with RunStore.read(tmp_path / "run") as store:
        digest = store.digest()
    draw = random.Random(0)
    for phase in ("baselines", "generation 0", "generation 1", "selection"):
        content, log = copies[phase]
        place, whole = draw.choice(list(cuts(log))[3:])
        folder = tmp_path / phase
        after_power_loss(folder, content, log[:place] + draw.randbytes(1000))
        compose.resume(folder, Silent())
        with RunStore.read(folder) as store:
            assert store.digest() == digest, (phase, place, whole)
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "log.jsonl", "log.txt", FILE]
