"""Migrations: a run store of an older schema version, brought to this one's.

A new store is created and filled row by row from the old one; newer columns are NULL or have the value in
FILLS. It replaces the old file in one rename, and the old file is kept beside it. A store with damaged rows
is refused, because the new checksums would hide the damage.

To add a version: change the schema, raise SCHEMA_VERSION, and give new columns a value in FILLS where NULL
is wrong. If old runs can't be replayed in the same bits, raise REPLAYED_FROM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import StoreError
from evomerge.files import drafted_file
from evomerge.running.store import facts, schema
from evomerge.running.store.file import FILE, check_file, connect, damaged, disk, snapshot, take_lock
from evomerge.running.store.inspection import FILLS, MISSING, Inspection, expected, filled, inspect
from evomerge.running.store.queries import StoreReader
from evomerge.running.store.store import write_facts

__all__ = ["FILLS", "Migrated", "as_data", "migrate"]

FIRST = {"run", "recipe", "entry", "ask", "tell", "score", "failure", "timing", "session"}
"""The tables of all versions."""
REPLAYED_FROM = 3
"""The oldest version whose searches are replayed in the same bits: before it there were no item blocks, no
races and no surrogate, and some of its early runs lack them, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """The result of a migration: old version, place of the old file, whether the search can be resumed."""

    before: int
    backup: Path
    continues: bool


def as_data(done: Migrated | None) -> dict[str, Any]:
    """Return the result of a migration as plain data."""
    return {
        "from": done.before if done else None,
        "backup": str(done.backup) if done else None,
        "continues": done.continues if done else True,
    }


def migrate(folder: Path) -> Migrated | None:
    """Bring the store in a run folder to this version's schema; None where it has it already.

    Raises StoreError for a newer store, another program's, one that is damaged, or one that a process is
    working on. Those are not changed.
    """
    check_file(folder)
    lock = take_lock(folder)
    try:
        path = folder / FILE
        old = snapshot(path)
        if old is None:
            raise StoreError(f"{path}: another program is writing it", fix="close that program first")
        with contextlib.closing(old):
            before, state = _checked(folder, old)
            if before == schema.SCHEMA_VERSION:
                return None
            with contextlib.closing(connect(path)) as db, disk(folder):
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the file alone is all of it
            backup = path.with_name(f"{FILE}.version-{before}")
            with drafted_file(backup) as draft:
                shutil.copyfile(path, draft)
            with drafted_file(path) as draft, disk(folder):
                continues = _fill(draft, state, before)
    finally:
        os.close(lock)
    StoreReader.read(folder).close()
    return Migrated(before=before, backup=backup, continues=continues)


def _checked(folder: Path, db: sqlite3.Connection) -> tuple[int, Inspection]:
    """Return the schema version of a store and its rows; raise StoreError where some are damaged."""
    with disk(folder):
        (version,) = db.execute("PRAGMA user_version").fetchone()
    state = inspect(db)
    problems = state.problems()
    if version < schema.SCHEMA_VERSION:  # later tables are missing
        lacking = [f"table {name}: {MISSING}" for name in schema.tables() if name not in FIRST]
        problems = (problem for problem in problems if problem not in lacking)
    if (problem := next(problems, None)) is not None:
        raise StoreReader(folder, db).foreign_log() or damaged(folder, problem)
    return version, state


def _fill(draft: Path, old: Inspection, before: int) -> bool:
    """Write a store from the rows of an older one; say whether its search can go on."""
    fact = history(before, old)
    with contextlib.closing(sqlite3.connect(draft)) as db:
        schema.lay_out(db)
        with db:
            number = write_facts(db, {facts.MIGRATED: fact})
            for table, columns in expected().items():
                for row in old.tables[table].records():
                    if table == "run" and row["key"] in (facts.MIGRATED.key, facts.STORE_ID.key):
                        continue
                    schema.insert(db, table, filled(table, columns, row), number)
        db.execute("PRAGMA journal_mode=WAL")
    return bool(fact["continues"])


def history(before: int, old: Inspection) -> dict[str, Any]:
    """Return the fact `migrated` of a store made from one of an older version."""
    continues = before >= REPLAYED_FROM and old.tables["guide"].unreadable is None
    return {"schema": before, "continues": continues, "at": time.time()}
