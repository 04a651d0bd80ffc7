"""The run store: one SQLite file that holds everything a run ever learned.

Every ask, every per-item score, every tell and every failure is committed as it lands
(synchronous=FULL, one writer), so `kill -9` at any moment loses only what was under way. What is stored
is keyed by what it is (generation, recipe, split), never by when it arrived, so that worker timing
leaves no trace: two runs with the same seed hold the same contents, timestamps and durations aside
(`digest` compares just that). The tables are described in runs/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ReplayError, StoreError
from evomerge.evaluation.scores import Failure, Question, Scores, Split, joined
from evomerge.files import sync
from evomerge.merging.recipe import Recipe
from evomerge.running.store import facts
from evomerge.running.store.file import FILE, check_file, connect, disk, snapshot, take_lock
from evomerge.running.store.inspection import store_id
from evomerge.running.store.queries import StoreReader, differences
from evomerge.running.store.schema import ID, Timing, as_json, insert, lay_out, pack, pack_json
from evomerge.search.ports import GuideState, Named


class StoreObserver(Protocol):
    """Receives what a store commits (`running.observers.Observer` does)."""

    def recorded(self, event: str, values: Mapping[str, Any]) -> None:
        """An event was committed; values: plain JSON data."""
        ...


def write_facts(db: sqlite3.Connection, values: facts.Values) -> int:
    """Write the facts of a new store, and the number it draws; return that number."""
    number = secrets.randbits(32)
    insert(db, "run", (facts.STORE_ID.key, as_json(number)), 0)
    for key, value in sorted((fact.key, value) for fact, value in values.items()):
        insert(db, "run", (key, as_json(value)), number)
    return number


class RunStore(StoreReader):
    """The store of one run, for writing. Use `create` or `open` rather than the constructor."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: int) -> None:
        super().__init__(folder, connection)
        self._lock: int | None = lock
        self._store_id = store_id(connection)
        self._session = 0.0
        self._offset, self._latest = time.time() - time.monotonic(), 0.0
        self._versions: str | None = None
        self._observer: StoreObserver | None = None

    # -- opening and closing ------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, values: facts.Values) -> RunStore:
        """Start a new run in `folder` (made if missing). The facts are written before anything else."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        if cls.exists(folder):
            os.close(lock)
            raise StoreError(f"{folder}: another process just started a run here", fix="start again")
        draft = folder / f".{FILE}.new"
        for stale in folder.glob(f".{FILE}.new*"):
            stale.unlink()
        try:
            with disk(folder), contextlib.closing(sqlite3.connect(draft)) as db:
                lay_out(db)
                with db:
                    write_facts(db, values)
                # Last, when there is nothing to log: what a full disk keeps from being copied out of a log
                # would stay behind.
                db.execute("PRAGMA journal_mode=WAL")
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
    def _opened(cls, folder: Path, lock: int) -> RunStore:
        """Open a store that this process holds. It is checked as a copy: SQLite writes what it opens."""
        try:
            if (copy := snapshot(folder / FILE)) is None:
                raise StoreError(
                    f"{folder / FILE}: another program is writing it", fix="close that program, then go on"
                )
            StoreReader(folder, copy)._checked().close()
            return cls(folder, connect(folder / FILE), lock)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Close the file and let go of the run."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)  # the file stays: removing it would let two later holders lock two files
            self._lock = None

    def report_to(self, observer: StoreObserver) -> None:
        """Report every event to an observer, after it is committed."""
        self._observer = observer

    def _report(self, event: str, /, **values: Any) -> None:
        if self._observer is not None:
            self._observer.recorded(event, values)

    # -- facts and sessions -----------------------------------------------------------------------

    def write_value(self, key: str, value: Any) -> None:
        """Store or replace the JSON value under a key of the table `run`; `facts` declares the keys."""
        with self._writing() as db:
            self._put(db, "run", (key, as_json(value)), instead="REPLACE")

    def begin_session(self, versions: Mapping[str, str], *, started: float | None = None) -> None:
        """Note that a process works on the run, with which library versions, since when (default: now)."""
        self._session = time.time() if started is None else started
        for table in ("tell", "timing", "failure"):
            (latest,) = self._db.execute(f"SELECT MAX(at) FROM {table}").fetchone()
            self._latest = max(self._latest, latest or 0.0)
        with self._writing() as db:
            self._versions = json.dumps(dict(versions), sort_keys=True)
            self._put(db, "session", (self._session, self._now(), self._versions))

    # -- what the search decides ------------------------------------------------------------------

    def record_ask(self, generation: int, genomes: NDArray[np.float64], recipes: Sequence[Recipe]) -> None:
        """Store a generation, shape (n, dimension), or check it bit for bit against the stored one."""
        rows = [(u.astype("<f8").tobytes(), r.hash) for u, r in zip(genomes, recipes, strict=True)]
        query = "SELECT genome, recipe FROM ask WHERE generation = ? ORDER BY position"
        stored = self._rows(query, (generation,))
        if stored:
            for position, (mine, theirs) in enumerate(zip(rows, stored, strict=False)):
                if mine != theirs:
                    raise self._diverged(f"candidate {position} of generation {generation}")
            if len(rows) != len(stored):
                raise self._diverged(f"the size of generation {generation}")
            return
        now = self._moment()
        with self._writing() as db:
            self._put_recipes(db, recipes)
            for position, row in enumerate(rows):
                self._put(db, "ask", (generation, position, *row, now))
        self._report("asked", generation=generation, ids=[recipe.hash[:ID] for recipe in recipes])

    def record_arrival(
        self, generation: int, position: int, genome: NDArray[np.float64], recipe: Recipe
    ) -> None:
        """Store the next candidate of an asynchronous search that is scored, or check it bit for bit."""
        row = (genome.astype("<f8").tobytes(), recipe.hash)
        query = "SELECT genome, recipe FROM ask WHERE generation = ? AND position = ?"
        stored = self._row(query, (generation, position))
        if stored is not None:
            if stored != row:
                raise self._diverged(f"candidate {position} of generation {generation}")
            return
        with self._writing() as db:
            self._put_recipes(db, [recipe])
            self._put(db, "ask", (generation, position, *row, self._moment()))
        self._report("arrived", generation=generation, position=position, id=recipe.hash[:ID])

    def record_pending(self, arrived: int, count: int) -> list[tuple[int, int]]:
        """Store how many candidates are pending from an arrival on, where it changes; return all changes."""
        changes = facts.PENDING.get(self) or []
        if not changes or changes[-1][1] != count:
            changes = [*(change for change in changes if change[0] < arrived), [arrived, count]]
            facts.PENDING.set(self, changes)
        return [(first, number) for first, number in changes]

    def record_proposed(self, count: int) -> None:
        """Store how many candidates an asynchronous search has proposed; replays change nothing."""
        if self.proposed() < count:
            facts.PROPOSED.set(self, count)

    def record_tell(self, generation: int, losses: NDArray[np.float64], seconds: float) -> None:
        """Store the losses of a generation, shape (n, objectives), or check them bit for bit.

        seconds: the driver's own time for the generation, kept from the first session.
        """
        blob = losses.astype("<f8").tobytes()
        row = self._row("SELECT losses FROM tell WHERE generation = ?", (generation,))
        if row is not None:
            if row[0] != blob:
                raise self._diverged(f"the losses of generation {generation}")
            return
        with self._writing() as db:
            self._put(db, "tell", (generation, blob, seconds, self._moment()))

    def record_front(
        self, generation: int, hypervolume: float, reference: NDArray[np.float64], recipes: Sequence[Recipe]
    ) -> None:
        """Store the Pareto front after a generation, or check it against the stored one.

        reference: (objectives,) the corner up to which the hypervolume counts.
        """
        row = (hypervolume, as_json(reference.tolist()), as_json([recipe.hash for recipe in recipes]))
        query = "SELECT hypervolume, reference, recipes FROM front WHERE generation = ?"
        stored = self._row(query, (generation,))
        if stored is not None:
            if stored != row:
                raise self._diverged(f"the front of generation {generation}")
            return
        with self._writing() as db:
            self._put(db, "front", (generation, *row))

    def record_guide(self, generation: int, state: GuideState) -> None:
        """Store what the surrogate did in a generation."""
        with self._writing() as db:
            row = (generation, state.correlation, state.proposed, state.blocks, state.radius)
            self._put(db, "guide", row, instead="REPLACE")

    def record_entry(self, role: str, position: int, entry: Named) -> None:
        """Store a named row: role base, parent, baseline, start, descent, front, finalist or winner."""
        query = "SELECT name, recipe FROM entry WHERE role = ? AND position = ?"
        if self._row(query, (role, position)) == (entry.name, entry.recipe.hash):
            return
        with self._writing() as db:
            self._put_recipes(db, [entry.recipe])
            self._put(db, "entry", (role, position, entry.name, entry.recipe.hash), instead="REPLACE")
        self._report("entry", role=role, position=position, name=entry.name, id=entry.recipe.hash[:ID])

    def trim_entries(self, role: str, count: int) -> None:
        """Forget the rows of a role from position `count` on: an earlier end of the run had more of them."""
        query = "SELECT count(*) FROM entry WHERE role = ? AND position >= ?"
        if self._row(query, (role, count))[0]:
            with self._writing() as db:
                db.execute("DELETE FROM entry WHERE role = ? AND position >= ?", (role, count))

    def record_chosen_on(self, blocks: Sequence[int]) -> None:
        """Store the item blocks of `search` that the finalists were chosen on."""
        facts.CHOSEN_ON.set(self, sorted(blocks))

    def record_descent(self, steps: int, share: float) -> tuple[int, float]:
        """Store the number of gradient steps and their share of the items; return what the run began with."""
        if (before := facts.DESCENT.get(self)) is None:
            before = {"steps": steps, "share": share}
            facts.DESCENT.set(self, before)
        return int(before["steps"]), float(before["share"])

    def record_frugal(self, worthwhile: bool) -> bool:
        """Store that the search stops where generations add nothing to gradients; return whether it does.

        It does not where it began, by an older version or with a smaller budget, without that rule.
        worthwhile: whether the budget is large enough for the rule.
        """
        if worthwhile and facts.FRUGAL.get(self) is None and not self.has_ask(0):
            facts.FRUGAL.set(self, True)
        return bool(facts.FRUGAL.get(self))

    def record_spent(self, generation: int, items: int) -> None:
        """Store what the search had scored, in items, by the end of a generation; replays change nothing."""
        row = [generation, items]
        if (facts.SPENT.get(self) or [-1, 0]) < row:
            facts.SPENT.set(self, row)

    def record_gradient(self, recipe: str, loss: str, value: dict[str, Any]) -> None:
        """Store a gradient of a recipe (by hash), or why there is none; `value` as in `facts.GRADIENT`."""
        facts.GRADIENT.of(recipe, loss).set(self, value)
        self._report("gradient", id=recipe[:ID])

    # -- scores and failures ----------------------------------------------------------------------

    def record_scores(
        self,
        recipe: Recipe,
        scores: Scores | Sequence[Scores],
        timing: Timing,
        *,
        weights: str | None = None,
        questions: Mapping[int, Mapping[str, Sequence[Question]]] | None = None,
    ) -> None:
        """Store per-item scores of a recipe, each on one block of one split, in one transaction.

        timing: of them together; it is filed under the first block. weights: digest of the weights that were
        scored, which becomes a fact. questions: block -> task -> what was asked.
        """
        parts = [scores] if isinstance(scores, Scores) else scores
        with self._writing() as db:
            self._put_recipes(db, [recipe])
            for part in parts:
                (block,) = part.blocks
                for position, task in enumerate(part):
                    vectors = (pack(task.metric), pack(task.smooth), pack(task.margin), pack(task.tokens))
                    row = (recipe.hash, part.split, block, task.task, position, *vectors)
                    self._put(db, "score", (*row, pack_json(task.texts)))
            for block, tasks in (questions or {}).items():
                for name, asked in tasks.items():
                    self._put(db, "item", (parts[0].split, block, name, pack_json(asked)), instead="IGNORE")
            if weights is not None:
                self._put(db, "run", (facts.WEIGHTS.of(recipe.hash).key, as_json(weights)), instead="REPLACE")
            what = (recipe.hash, parts[0].split, parts[0].blocks[0])
            seconds = (timing.total, timing.merge, timing.forward)
            self._put(db, "timing", (*what, *seconds, timing.worker, self._moment()), instead="REPLACE")
        together = joined(parts)
        self._report(
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
        self, split: Split, recipes: Mapping[int, Sequence[str] | None], *, because: facts.Values
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
            for fact, value in because.items():
                self._put(db, "run", (fact.key, as_json(value)), instead="REPLACE")

    def record_failure(self, recipe: Recipe, split: Split, failure: Failure) -> None:
        """Store that a recipe could not be scored on (some block of) a split, and why."""
        with self._writing() as db:
            self._put_recipes(db, [recipe])
            row = (recipe.hash, split, failure.kind, failure.reason, self._moment())
            self._put(db, "failure", row)
        self._report("failed", id=recipe.hash[:ID], split=split, kind=failure.kind, reason=failure.reason)

    def forget_failures(self, count: int = 0) -> list[Failure]:
        """Forget what failed since the last success, and all the search made of it; return what it was.

        count: the least number of failures to forget, the latest ones.

        Gone with the failures are the tells of the first generation that holds one of them and of all later
        ones, and the later asks, which rest on those. Scores are kept.
        """
        (since,) = self._row("SELECT COALESCE(MAX(at), 0) FROM timing")
        latest = self._rows("SELECT at FROM failure ORDER BY at DESC LIMIT ?", (count,))
        since = min([since, *(at for (at,) in latest)])
        query = "SELECT recipe, split, kind, reason FROM failure WHERE at >= ? ORDER BY at"
        rows = self._rows(query, (since,))
        failed = [(recipe, split, Failure(kind=kind, reason=why)) for recipe, split, kind, why in rows]
        first = [
            number
            for recipe, split, _ in failed
            for (number,) in self._rows("SELECT MIN(generation) FROM ask WHERE recipe = ?", (recipe,))
            if split == "search" and number is not None
        ]
        with self._writing() as db:
            db.execute("DELETE FROM failure WHERE at >= ?", (since,))
            if first:
                if facts.PENDING.get(self):  # later arrivals of the generation rest on the failure, too
                    db.execute(
                        "DELETE FROM ask WHERE generation = ? AND position > (SELECT MIN(position) FROM ask "
                        "WHERE generation = ? AND recipe IN (SELECT value FROM json_each(?)))",
                        (min(first), min(first), json.dumps([recipe for recipe, _, _ in failed])),
                    )
                    db.execute("DELETE FROM run WHERE key = ?", (facts.PROPOSED.key,))
                for table in ("tell", "front", "guide"):
                    db.execute(f"DELETE FROM {table} WHERE generation >= ?", (min(first),))
                db.execute("DELETE FROM ask WHERE generation > ?", (min(first),))
                db.execute("DELETE FROM run WHERE key = ?", (facts.SPENT.key,))
            used = " UNION ".join(
                f"SELECT recipe FROM {t}" for t in ("entry", "ask", "score", "timing", "failure")
            )
            db.execute(f"DELETE FROM recipe WHERE hash NOT IN ({used})")
        return [failure for _, _, failure in failed]

    # -- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One committed event; the session's clock moves with it."""
        with disk(self.folder), self._db as db:
            yield db
            if self._versions is not None:
                self._put(db, "session", (self._session, self._now(), self._versions), instead="REPLACE")

    def _now(self) -> float:
        """Return the time in epoch seconds; it goes on evenly where the wall clock is set."""
        return self._offset + time.monotonic()

    def _moment(self) -> float:
        """Return the time of an event, later than that of any event before it, in any session."""
        self._latest = max(self._now(), self._latest + 1e-6)
        return self._latest

    def _put(self, db: sqlite3.Connection, table: str, row: Sequence[Any], *, instead: str = "ABORT") -> None:
        insert(db, table, row, self._store_id, instead=instead)

    def _put_recipes(self, db: sqlite3.Connection, recipes: Sequence[Recipe]) -> None:
        # Without locations: models may be moved, and the config says where they are now.
        for recipe in recipes:
            data = json.dumps(recipe.to_data() | {"models": None}, sort_keys=True)
            self._put(db, "recipe", (recipe.hash, data), instead="IGNORE")

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
