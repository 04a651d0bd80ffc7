"""The run store: one SQLite file that holds everything a run ever learned.

Every ask, every per-item score, every tell and every failure is committed as it lands
(synchronous=FULL, one writer), so `kill -9` at any moment loses only what was under way. What is stored
is keyed by what it is (generation, recipe, split), never by when it arrived, so that worker timing
leaves no trace: two runs with the same seed hold the same contents, timestamps and durations aside
(`digest` compares just that). The tables are described in runs/README.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ReplayError, StoreError
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split, TaskScores, joined
from evomerge.files import sync
from evomerge.merging.recipe import Recipe
from evomerge.running.store.file import (
    FILE,
    check_file,
    connect,
    damaged,
    disk,
    held_by,
    holder,
    snapshot,
    take_lock,
)
from evomerge.search.ports import GuideState, Named

ID = 12
"""How many digits of its recipe's hash a candidate is called by, in logs and messages."""
BASE = "base"
"""The name the base model has in every recipe and table."""
SCHEMA_VERSION = 3
_APPLICATION_ID = 0x65766F6D  # "evom"

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE recipe (hash TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entry (role TEXT, position INTEGER, name TEXT NOT NULL, recipe TEXT NOT NULL REFERENCES recipe,
    PRIMARY KEY (role, position)) WITHOUT ROWID;
CREATE TABLE ask (generation INTEGER, position INTEGER, genome BLOB NOT NULL,
    recipe TEXT NOT NULL REFERENCES recipe, at REAL NOT NULL,
    PRIMARY KEY (generation, position)) WITHOUT ROWID;
CREATE TABLE tell (generation INTEGER PRIMARY KEY, losses BLOB NOT NULL, seconds REAL NOT NULL,
    at REAL NOT NULL);
CREATE TABLE guide (generation INTEGER PRIMARY KEY, correlation REAL, proposed INTEGER NOT NULL,
    blocks INTEGER NOT NULL, radius REAL NOT NULL);
CREATE TABLE front (generation INTEGER PRIMARY KEY, hypervolume REAL NOT NULL, reference TEXT NOT NULL,
    recipes TEXT NOT NULL);
CREATE TABLE score (recipe TEXT REFERENCES recipe, split TEXT, block INTEGER, task TEXT,
    position INTEGER NOT NULL, metric BLOB NOT NULL, smooth BLOB, margin BLOB,
    PRIMARY KEY (recipe, split, block, task));
CREATE TABLE failure (recipe TEXT REFERENCES recipe, split TEXT, kind TEXT NOT NULL, reason TEXT NOT NULL,
    at REAL NOT NULL, PRIMARY KEY (recipe, split)) WITHOUT ROWID;
CREATE TABLE timing (recipe TEXT REFERENCES recipe, split TEXT, block INTEGER, seconds REAL NOT NULL,
    merge_seconds REAL NOT NULL, forward_seconds REAL NOT NULL, worker TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (recipe, split, block)) WITHOUT ROWID;
CREATE TABLE session (started REAL PRIMARY KEY, last REAL NOT NULL, versions TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one candidate went, in seconds of wall clock on its worker.

    total: everything, from the recipe's arrival to the scores. merge: putting the weights into the live
    model. forward: inside the model's forward passes and generation.
    """

    total: float
    merge: float
    forward: float
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One stored generation: recipe hashes in ask order, losses (n, objectives) once told, driver seconds."""

    number: int
    recipes: tuple[str, ...]
    genomes: NDArray[np.float64]
    losses: NDArray[np.float64] | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFront:
    """The recipes (hashes) nothing dominated after a generation, and what they cover up to `reference`."""

    generation: int
    hypervolume: float
    reference: tuple[float, ...]
    recipes: tuple[str, ...]


class RunStore:
    """The store of one run. Use `create`, `open` or `read` rather than the constructor."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        self.folder = folder
        self._db = connection
        self._lock = lock
        self._session = 0.0
        self._blocks: int | None = None
        self._listener: Callable[..., None] | None = None

    # -- opening and closing ------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, Any]) -> RunStore:
        """Start a new run in `folder` (made if missing). `facts` is written before anything else."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        if cls.exists(folder):
            os.close(lock)
            raise StoreError(f"{folder}: another process just started a run here", fix="start again")
        draft = folder / f".{FILE}.new"
        for stale in folder.glob(f".{FILE}.new*"):
            stale.unlink()
        try:
            # With no log beside it: what a full disk keeps from being copied out of one would stay behind.
            with disk(folder), contextlib.closing(sqlite3.connect(draft)) as db:
                lay_out(db)
                rows = [(k, _json(v)) for k, v in sorted(facts.items())]
                with db:
                    db.executemany("INSERT INTO run VALUES (?, ?)", rows)
            draft.rename(folder / FILE)  # finish, then rename: a run file is always a complete one
            sync([folder, folder.parent])
        except BaseException:
            for stale in folder.glob(f".{FILE}.new*"):
                stale.unlink()
            os.close(lock)
            raise
        return cls._opened(folder, lock)

    @classmethod
    def open(cls, folder: Path) -> RunStore:
        """Open an existing run for writing; refused while another process holds it."""
        check_file(folder)
        return cls._opened(folder, take_lock(folder))

    @classmethod
    def read(cls, folder: Path) -> RunStore:
        """Open an existing run for reading, also while it is running.

        What nobody works on is read into memory: that leaves none of SQLite's own files behind, and a
        writer who starts meanwhile can't change what is read.
        """
        check_file(folder)
        copy = None if holder(folder) is not None else snapshot(folder / FILE)
        store = cls(folder, copy or connect(folder / FILE, readonly=True), None)
        store._check_contents()
        return store

    @classmethod
    def _opened(cls, folder: Path, lock: int) -> RunStore:
        store = cls(folder, connect(folder / FILE), lock)
        try:
            store._check_contents()
        except BaseException:
            store.close()
            raise
        return store

    def held(self) -> bool:
        """Say whether a process is working on the run right now."""
        return holder(self.folder) is not None

    @staticmethod
    def refuse_held(folder: Path) -> None:
        """Raise StoreError where a process is working on the run in a folder, naming it."""
        if (name := holder(folder)) is not None:
            raise held_by(name, folder)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Say whether the folder holds a run."""
        return (folder / FILE).exists()

    def close(self) -> None:
        """Close the file and let go of the run."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)  # the file stays: removing it would let two later holders lock two files
            self._lock = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_contents(self) -> None:
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (health,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise damaged(self.folder, str(error)) from None
        if application != _APPLICATION_ID:
            raise damaged(self.folder, "not a run store")
        if health != "ok":
            raise damaged(self.folder, str(health))
        names = {name for (name,) in self._db.execute("SELECT name FROM sqlite_schema")}
        if version != SCHEMA_VERSION or not complete(names):
            newer = version > SCHEMA_VERSION
            raise StoreError(
                f"{self.folder / FILE}: written by {'a newer' if newer else 'an older'} version of evomerge",
                expected=f"schema version {SCHEMA_VERSION}",
                got=str(version),
                fix="update evomerge"
                if newer
                else f"bring it up to date, a copy is kept: evomerge migrate {self.folder}",
            )

    def report_to(self, listener: Callable[..., None]) -> None:
        """Have somebody told of every event: listener(event, **facts), after it is committed."""
        self._listener = listener

    def note(self, event: str, /, **facts: Any) -> None:
        """Tell the listener (a run's log) of an event; facts are what JSON can say."""
        if self._listener is not None:
            self._listener(event, **facts)

    # -- facts ------------------------------------------------------------------------------------

    def fact(self, key: str) -> Any:
        """Return a stored fact of the run, or None."""
        row = self._db.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, key: str, value: Any) -> None:
        """Store or replace a fact of the run."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, _json(value)))
        if key.startswith("gradient "):
            self.note("gradient", id=key.split()[1][:ID])

    def gradient_items(self) -> int:
        """Return what the gradients of this run cost, in items of one forward pass."""
        query = "SELECT SUM(json_extract(value, '$.items')) FROM run WHERE key GLOB 'gradient *'"
        return self._db.execute(query).fetchone()[0] or 0

    def blocks(self, split: Split) -> int:
        """Return how many item blocks a split has in this run (fact `blocks`, for `search`)."""
        if self._blocks is None:
            self._blocks = self.fact("blocks") or 1
        return self._blocks if split == "search" else 1

    def begin_session(self, versions: Mapping[str, str], *, started: float | None = None) -> None:
        """Note that a process works on the run, with which library versions, since when (default: now)."""
        self._session = time.time() if started is None else started
        with self._writing() as db:
            row = (self._session, time.time(), json.dumps(dict(versions), sort_keys=True))
            db.execute("INSERT INTO session VALUES (?, ?, ?)", row)

    def hours(self) -> float:
        """Return the hours worked on the run so far, all sessions together."""
        (seconds,) = self._db.execute("SELECT COALESCE(SUM(last - started), 0) FROM session").fetchone()
        return cast(float, seconds) / 3600

    def versions(self) -> dict[str, str]:
        """Return the library versions of the first session."""
        return next(iter(self.sessions()), {})

    def sessions(self) -> list[dict[str, str]]:
        """Return the library versions of every session, in order."""
        rows = self._db.execute("SELECT versions FROM session ORDER BY started")
        return [json.loads(row[0]) for row in rows]

    # -- what the search decides ------------------------------------------------------------------

    def has_ask(self, generation: int) -> bool:
        """Say whether the generation's genomes are stored."""
        return (
            self._db.execute("SELECT 1 FROM ask WHERE generation = ?", (generation,)).fetchone() is not None
        )

    def record_ask(self, generation: int, genomes: NDArray[np.float64], recipes: Sequence[Recipe]) -> None:
        """Store a generation, shape (n, dimension), or check it bit for bit against the stored one."""
        rows = [(u.astype("<f8").tobytes(), r.hash) for u, r in zip(genomes, recipes, strict=True)]
        query = "SELECT genome, recipe FROM ask WHERE generation = ? ORDER BY position"
        stored = self._db.execute(query, (generation,)).fetchall()
        if stored:
            for position, (mine, theirs) in enumerate(zip(rows, stored, strict=False)):
                if mine != theirs:
                    raise self._diverged(f"candidate {position} of generation {generation}")
            if len(rows) != len(stored):
                raise self._diverged(f"the size of generation {generation}")
            return
        now = time.time()
        with self._writing() as db:
            self._put_recipes(db, recipes)
            db.executemany(
                "INSERT INTO ask VALUES (?, ?, ?, ?, ?)",
                [(generation, position, *row, now) for position, row in enumerate(rows)],
            )
        self.note("asked", generation=generation, ids=[recipe.hash[:ID] for recipe in recipes])

    def record_tell(self, generation: int, losses: NDArray[np.float64], seconds: float) -> None:
        """Store the losses of a generation, shape (n, objectives), or check them bit for bit.

        seconds: the driver's own time for the generation, kept from the first session.
        """
        blob = losses.astype("<f8").tobytes()
        row = self._db.execute("SELECT losses FROM tell WHERE generation = ?", (generation,)).fetchone()
        if row is not None:
            if row[0] != blob:
                raise self._diverged(f"the losses of generation {generation}")
            return
        with self._writing() as db:
            db.execute("INSERT INTO tell VALUES (?, ?, ?, ?)", (generation, blob, seconds, time.time()))

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None:
        """Store the Pareto front after a generation, or check it against the stored one.

        reference: (objectives,) the corner up to which the hypervolume counts.
        """
        row = (hypervolume, _json(reference.tolist()), _json([recipe.hash for recipe in recipes]))
        query = "SELECT hypervolume, reference, recipes FROM front WHERE generation = ?"
        stored = self._db.execute(query, (generation,)).fetchone()
        if stored is not None:
            if stored != row:
                raise self._diverged(f"the front of generation {generation}")
            return
        with self._writing() as db:
            db.execute("INSERT INTO front VALUES (?, ?, ?, ?)", (generation, *row))

    def record_guide(self, generation: int, state: GuideState) -> None:
        """Store what the surrogate did in a generation."""
        with self._writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO guide VALUES (?, ?, ?, ?, ?)",
                (generation, state.correlation, state.proposed, state.blocks, state.radius),
            )

    def guide(self) -> list[GuideState]:
        """Return what the surrogate did, generation by generation; nothing where there is none."""
        query = "SELECT correlation, proposed, blocks, radius FROM guide ORDER BY generation"
        return [
            GuideState(correlation=c, proposed=p, blocks=b, radius=r)
            for c, p, b, r in self._db.execute(query)
        ]

    def record_entry(self, role: str, position: int, entry: Named) -> None:
        """Store a named row: role base, parent, baseline, start, descent, finalist or winner."""
        query = "SELECT name, recipe FROM entry WHERE role = ? AND position = ?"
        if self._db.execute(query, (role, position)).fetchone() == (entry.name, entry.recipe.hash):
            return
        with self._writing() as db:
            self._put_recipes(db, [entry.recipe])
            db.execute(
                "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)",
                (role, position, entry.name, entry.recipe.hash),
            )
        self.note("entry", role=role, position=position, name=entry.name, id=entry.recipe.hash[:ID])

    def trim_entries(self, role: str, count: int) -> None:
        """Forget the rows of a role from position `count` on: an earlier end of the run had more of them."""
        query = "SELECT count(*) FROM entry WHERE role = ? AND position >= ?"
        if self._db.execute(query, (role, count)).fetchone()[0]:
            with self._writing() as db:
                db.execute("DELETE FROM entry WHERE role = ? AND position >= ?", (role, count))

    def record_scores(self, recipe: Recipe, scores: Scores | Sequence[Scores], timing: Timing) -> None:
        """Store per-item scores of a recipe, each on one block of one split, in one transaction.

        timing: of them together; it is filed under the first block.
        """
        parts = [scores] if isinstance(scores, Scores) else scores
        with self._writing() as db:
            self._put_recipes(db, [recipe])
            for part in parts:
                (block,) = part.blocks
                for position, task in enumerate(part):
                    vectors = (_pack(task.metric), _pack(task.smooth), _pack(task.margin))
                    row = (recipe.hash, part.split, block, task.task, position, *vectors)
                    db.execute("INSERT INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.execute(
                "INSERT OR REPLACE INTO timing VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    recipe.hash,
                    parts[0].split,
                    parts[0].blocks[0],
                    timing.total,
                    timing.merge,
                    timing.forward,
                    timing.worker,
                    time.time(),
                ),
            )
        together = joined(parts)
        self.note(
            "scored",
            id=recipe.hash[:ID],
            split=together.split,
            blocks=together.blocks,
            scores={task.task: round(task.mean, 6) for task in together},
            items=together.items,
            seconds=round(timing.total, 3),
            worker=timing.worker,
        )

    def drop_scores(
        self, split: Split, recipes: Mapping[int, Sequence[str] | None], *, facts: Mapping[str, Any]
    ) -> None:
        """Forget scores that must be made again, and store the facts that say why, in one transaction.

        recipes: block -> whose (hashes); None means everybody's.
        """
        query = "DELETE FROM score WHERE split = ? AND block = ?"
        with self._writing() as db:
            for block, hashes in recipes.items():
                if hashes is None:
                    db.execute(query, (split, block))
                else:
                    db.executemany(query + " AND recipe = ?", [(split, block, hash_) for hash_ in hashes])
            for key, value in facts.items():
                db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, _json(value)))

    def record_failure(self, recipe: Recipe, split: Split, failure: Failure) -> None:
        """Store that a recipe could not be scored on (some block of) a split, and why."""
        with self._writing() as db:
            self._put_recipes(db, [recipe])
            row = (recipe.hash, split, failure.kind, failure.reason, time.time())
            db.execute("INSERT INTO failure VALUES (?, ?, ?, ?, ?)", row)
        self.note("failed", id=recipe.hash[:ID], split=split, kind=failure.kind, reason=failure.reason)

    def forget_failures(self, count: int = 0) -> list[Failure]:
        """Forget what failed since the last success, and all the search made of it; return what it was.

        count: the least number of failures to forget, the latest ones.

        Gone with the failures are the tells of the first generation that holds one of them and of all later
        ones, and the later asks, which rest on those. Scores are kept.
        """
        (since,) = self._db.execute("SELECT COALESCE(MAX(at), 0) FROM timing").fetchone()
        latest = self._db.execute("SELECT at FROM failure ORDER BY at DESC LIMIT ?", (count,)).fetchall()
        since = min([since, *(at for (at,) in latest)])
        query = "SELECT recipe, split, kind, reason FROM failure WHERE at >= ? ORDER BY at"
        rows = self._db.execute(query, (since,)).fetchall()
        failed = [(recipe, split, Failure(kind=kind, reason=why)) for recipe, split, kind, why in rows]
        first = [
            number
            for recipe, split, _ in failed
            for (number,) in self._db.execute("SELECT MIN(generation) FROM ask WHERE recipe = ?", (recipe,))
            if split == "search" and number is not None
        ]
        with self._writing() as db:
            db.execute("DELETE FROM failure WHERE at >= ?", (since,))
            if first:
                for table in ("tell", "front", "guide"):
                    db.execute(f"DELETE FROM {table} WHERE generation >= ?", (min(first),))
                db.execute("DELETE FROM ask WHERE generation > ?", (min(first),))
                db.execute("DELETE FROM run WHERE key = 'spent'")
            used = " UNION ".join(
                f"SELECT recipe FROM {t}" for t in ("entry", "ask", "score", "timing", "failure")
            )
            db.execute(f"DELETE FROM recipe WHERE hash NOT IN ({used})")
        return [failure for _, _, failure in failed]

    def record_spent(self, generation: int, items: int) -> None:
        """Store what the search had scored, in items, by the end of a generation; replays change nothing."""
        row = [generation, items]
        if (self.fact("spent") or [-1, 0]) < row:
            self.set_fact("spent", row)

    # -- reading ----------------------------------------------------------------------------------

    def result(self, recipe: str, split: Split, block: int | None = None) -> Scores | Failure | None:
        """Return what is stored about a recipe (by hash) on a block of a split, or None.

        block: None means the whole split; then there is an answer once all its blocks are scored, or one
        has failed.
        """
        wanted = range(self.blocks(split)) if block is None else (block,)
        parts = [self._part(recipe, split, number) for number in wanted]
        scored = [part for part in parts if part is not None]
        if len(scored) == len(parts):
            return joined(scored)
        query = "SELECT kind, reason FROM failure WHERE recipe = ? AND split = ?"
        row = self._db.execute(query, (recipe, split)).fetchone()
        return None if row is None else Failure(kind=row[0], reason=row[1])

    def _part(self, recipe: str, split: Split, block: int) -> Scores | None:
        query = (
            "SELECT task, metric, smooth, margin FROM score "
            "WHERE recipe = ? AND split = ? AND block = ? ORDER BY position"
        )
        rows = self._db.execute(query, (recipe, split, block)).fetchall()
        tasks = tuple(
            TaskScores(task=task, metric=_unpack(metric), smooth=_perhaps(smooth), margin=_perhaps(margin))
            for task, metric, smooth, margin in rows
        )
        return Scores(split=split, tasks=tasks, blocks=(block,)) if tasks else None

    def scored_blocks(self, split: Split) -> dict[str, tuple[int, ...]]:
        """Return the blocks of a split on which each recipe (by hash) is scored, in order."""
        query = "SELECT DISTINCT recipe, block FROM score WHERE split = ? ORDER BY recipe, block"
        found: dict[str, list[int]] = {}
        for recipe, block in self._db.execute(query, (split,)):
            found.setdefault(recipe, []).append(block)
        return {recipe: tuple(blocks) for recipe, blocks in found.items()}

    def recipe(self, start: str) -> Recipe:
        """Return the recipe whose hash begins with `start`, or raise StoreError.

        Its models are where the stored config says.
        """
        query = "SELECT data FROM recipe WHERE substr(hash, 1, ?) = ? LIMIT 2"
        rows = self._db.execute(query, (len(start), start)).fetchall()
        if len(rows) != 1:
            count = "more than one" if rows else "no"
            raise StoreError(f"{self.folder}: {count} recipe has a hash starting with {start!r}")
        models = self.fact("config")["models"]
        return Recipe.from_data(
            {**json.loads(rows[0][0]), "models": {BASE: models["base"], **models["sources"]}}
        )

    def entries(self, role: str) -> list[Named]:
        """Return the named rows of a role, in order."""
        query = "SELECT name, recipe FROM entry WHERE role = ? ORDER BY position"
        rows = self._db.execute(query, (role,)).fetchall()
        return [Named(name=name, recipe=self.recipe(hash_)) for name, hash_ in rows]

    def generations(self) -> list[Generation]:
        """Return all generations in order; the last may not have been told."""
        asks: dict[int, list[tuple[bytes, str]]] = {}
        for number, genome, recipe in self._db.execute(
            "SELECT generation, genome, recipe FROM ask ORDER BY generation, position"
        ):
            asks.setdefault(number, []).append((genome, recipe))
        tells = {n: (b, s) for n, b, s in self._db.execute("SELECT generation, losses, seconds FROM tell")}
        return [
            Generation(
                number=number,
                recipes=tuple(recipe for _, recipe in rows),
                genomes=np.stack([np.frombuffer(genome, dtype="<f8") for genome, _ in rows]),
                losses=_losses(tells, number, len(rows)),
                seconds=tells[number][1] if number in tells else 0.0,
            )
            for number, rows in asks.items()
        ]

    def fronts(self) -> list[StoredFront]:
        """Return the Pareto front after each generation, in order; empty for runs with one objective."""
        query = "SELECT generation, hypervolume, reference, recipes FROM front ORDER BY generation"
        return [
            StoredFront(
                generation=number,
                hypervolume=volume,
                reference=tuple(json.loads(reference)),
                recipes=tuple(json.loads(recipes)),
            )
            for number, volume, reference, recipes in self._db.execute(query)
        ]

    def failures(self) -> list[tuple[str, Split, Failure]]:
        """Return (recipe hash, split, failure) of everything that failed, oldest first."""
        query = "SELECT recipe, split, kind, reason FROM failure ORDER BY at"
        return [(r, s, Failure(kind=k, reason=why)) for r, s, k, why in self._db.execute(query)]

    def timings(self, split: Split) -> dict[str, Timing]:
        """Return the timings of everything scored on a split, by recipe hash; blocks are added up.

        worker: the one that scored the last of its blocks.
        """
        query = (
            "SELECT recipe, TOTAL(seconds), TOTAL(merge_seconds), TOTAL(forward_seconds), worker, MAX(at) "
            "FROM timing WHERE split = ? GROUP BY recipe"
        )
        rows = [row[:5] for row in self._db.execute(query, (split,))]
        return {r: Timing(total=t, merge=m, forward=f, worker=w) for r, t, m, f, w in rows}

    def split_items(self) -> dict[Split, int]:
        """Return the number of items of each split, where the base is scored on it or the suite says it."""
        tasks = (self.fact("suite") or {}).get("tasks", [])
        found: dict[Split, int] = {}
        base = self._db.execute("SELECT recipe FROM entry WHERE role = 'base'").fetchone()
        for split in SPLITS:
            counts = [task["splits"][split] for task in tasks if task["splits"][split] is not None]
            if base is not None and isinstance(scores := self.result(base[0], split), Scores):
                found[split] = scores.items
            elif counts and all(isinstance(count, int) for count in counts):
                found[split] = sum(counts)
        return found

    def untimed(self, roles: Sequence[str], split: Split) -> int:
        """Return how many recipes of some roles (as in `record_entry`) are not scored on a split."""
        query = (
            f"SELECT COUNT(DISTINCT recipe) FROM entry WHERE role IN ({', '.join('?' * len(roles))}) "
            "AND recipe NOT IN (SELECT recipe FROM timing WHERE split = ?)"
        )
        (count,) = self._db.execute(query, (*roles, split)).fetchone()
        return cast(int, count)

    def longest_of_last_generation(self) -> float | None:
        """Return the seconds on `search` of the candidate of the last told generation that took longest."""
        query = (
            "SELECT TOTAL(seconds) AS total FROM ask JOIN timing ON timing.recipe = ask.recipe "
            "AND split = 'search' WHERE generation = (SELECT MAX(generation) FROM tell) "
            "GROUP BY position ORDER BY total DESC LIMIT 1"
        )
        row = self._db.execute(query).fetchone()
        return None if row is None else cast(float, row[0])

    def digest(self) -> str:
        """Return a hash of the contents: equal for equal runs, wherever and whenever they ran.

        Left out are timestamps, durations, what the clock had to say (facts `clock` and `stop`), how forward
        passes are computed (fact `forward`), facts about the store itself, and the config as written (its
        places, budget and workers); what of it changes results is in the fact `identity`.
        """
        found = hashlib.sha256()
        aside = "'config', 'clock', 'stop', 'forward', 'full_hashes', 'migrated'"
        for query in (
            f"SELECT key, value FROM run WHERE key NOT IN ({aside}) ORDER BY key",
            "SELECT hash, data FROM recipe ORDER BY hash",
            "SELECT role, position, name, recipe FROM entry ORDER BY role, position",
            "SELECT generation, position, genome, recipe FROM ask ORDER BY generation, position",
            "SELECT generation, losses FROM tell ORDER BY generation",
            "SELECT generation, hypervolume, reference, recipes FROM front ORDER BY generation",
            "SELECT generation, correlation, proposed, blocks, radius FROM guide ORDER BY generation",
            "SELECT recipe, split, kind, reason FROM failure ORDER BY recipe, split",
        ):
            for row in self._db.execute(query):
                found.update(repr(row).encode())
        query = (
            "SELECT recipe, split, block, task, position, metric, smooth, margin FROM score "
            "ORDER BY recipe, split, block, task"
        )
        for *key, metric, smooth, margin in self._db.execute(query):
            found.update(repr(key).encode())
            for vector in (metric, smooth, margin):
                found.update(b"" if vector is None else _unpack(vector).tobytes())
        return found.hexdigest()

    # -- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One committed event; the session's clock moves with it."""
        with disk(self.folder), self._db as db:
            yield db
            db.execute("UPDATE session SET last = ? WHERE started = ?", (time.time(), self._session))

    def _put_recipes(self, db: sqlite3.Connection, recipes: Sequence[Recipe]) -> None:
        # Without locations: models may be moved, and the config says where they are now.
        rows = [(r.hash, json.dumps(r.to_data() | {"models": None}, sort_keys=True)) for r in recipes]
        db.executemany("INSERT OR IGNORE INTO recipe VALUES (?, ?)", rows)

    def _diverged(self, what: str) -> ReplayError:
        recorded = ", ".join(f"{name} {version}" for name, version in self.versions().items())
        sessions = self.sessions() or [{}]
        differ = dict.fromkeys(each for before in sessions for each in differences(before, sessions[-1]))
        return ReplayError(
            f"{self.folder}: replaying the stored search gives another result at {what}",
            expected=f"the library versions that wrote it: {recorded}",
            got="; ".join(differ) or None,
            fix="install those versions, have OpenBLAS use the same kernel (OPENBLAS_CORETYPE), "
            "or start a new run in another folder",
        )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Name what two sessions both say of their environments, but not alike."""
    both = [name for name in before if name in now and before[name] != now[name]]
    return [f"{name} {before[name]} before, {now[name]} now" for name in both]


def _losses(tells: Mapping[int, tuple[bytes, float]], number: int, count: int) -> NDArray[np.float64] | None:
    return np.frombuffer(tells[number][0], dtype="<f8").reshape(count, -1) if number in tells else None


def complete(tables: Set[str]) -> bool:
    """Say whether these are all tables of a run store (versions under development may lack some)."""
    return set(re.findall(r"CREATE TABLE (\w+)", _SCHEMA)) <= tables


def lay_out(db: sqlite3.Connection) -> None:
    """Make the tables of a run store in an empty database."""
    db.executescript(_SCHEMA)
    db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)  # keys keep their order: that of the sources is the genome's


def _pack(values: NDArray[np.float64] | None) -> bytes | None:
    return None if values is None else zlib.compress(values.astype("<f8").tobytes(), 1)


def _unpack(blob: bytes) -> NDArray[np.float64]:
    return np.frombuffer(zlib.decompress(blob), dtype="<f8")


def _perhaps(blob: bytes | None) -> NDArray[np.float64] | None:
    return None if blob is None else _unpack(blob)
