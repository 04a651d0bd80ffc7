"""Migrations: a run store of an older schema version, brought to this one's.

A new store is created and filled from the old one column by column; newer columns are NULL or have the value
in FILLS. It replaces the old file in one rename, and the old file is kept beside it.

To add a version: change the schema, raise SCHEMA_VERSION, and give new columns a value in FILLS where NULL
is wrong. If old runs can't be replayed in the same bits, raise REPLAYED_FROM.
"""

from __future__ import annotations

import contextlib
import json
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
from evomerge.running.store.file import FILE, check_file, connect, damaged, disk, take_lock
from evomerge.running.store.queries import StoreReader

FILLS: dict[tuple[str, str], Any] = {("score", "block"): 0, ("timing", "block"): 0}
"""(table, column) -> value of a newer column in older runs, where NULL would be wrong."""
REPLAYED_FROM = 3
"""The oldest version whose searches are replayed in the same bits: before it there were no item blocks, no
races and no surrogate, and some of its early runs lack them, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """The result of a migration: old version, place of the old file, whether the search can be resumed."""

    before: int
    backup: Path
    continues: bool


def migrate(folder: Path) -> Migrated | None:
    """Bring the store in a run folder to this version's schema; None where it has it already.

    Raises StoreError for a newer store, one that is damaged, or one that a process is working on.
    """
    check_file(folder)
    lock = take_lock(folder)
    try:
        path = folder / FILE
        before, complete = _version(path)
        if before == schema.SCHEMA_VERSION and complete:
            return None
        backup = path.with_name(f"{FILE}.version-{before}")
        with drafted_file(backup) as draft:
            shutil.copyfile(path, draft)
        with drafted_file(path) as draft, disk(folder):
            continues = _fill(draft, backup, before)
    finally:
        os.close(lock)
    StoreReader.read(folder).close()
    return Migrated(before=before, backup=backup, continues=continues)


def _version(path: Path) -> tuple[int, bool]:
    """Return the schema version of a store, and whether it has all tables of this one.

    Its write-ahead log is copied into the file first.
    """
    try:
        with contextlib.closing(connect(path)) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
            (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        raise damaged(path.parent, str(error)) from None
    if health != "ok" or not {"run", "recipe", "ask", "score"} <= tables:
        raise damaged(path.parent, "not a run store" if health == "ok" else str(health))
    if version > schema.SCHEMA_VERSION:
        raise StoreError(
            f"{path}: written by a newer version of evomerge",
            expected=f"schema version {schema.SCHEMA_VERSION} or older",
            got=str(version),
            fix="update evomerge",
        )
    return version, schema.complete(tables)


def _fill(draft: Path, old: Path, before: int) -> bool:
    """Write a store from an older one; say whether its search can go on."""
    with contextlib.closing(sqlite3.connect(draft)) as db:
        schema.lay_out(db)
        db.execute("ATTACH ? AS old", (str(old.absolute()),))
        there = {name for (name,) in db.execute("SELECT name FROM old.sqlite_schema WHERE type = 'table'")}
        with db:
            for (table,) in db.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'").fetchall():
                if table in there:
                    _copy(db, table)
            continues = before >= REPLAYED_FROM and "guide" in there
            fact = {"schema": before, "continues": continues, "at": time.time()}
            db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (facts.MIGRATED.key, json.dumps(fact)))
        db.execute("DETACH old")
    return continues


def _copy(db: sqlite3.Connection, table: str) -> None:
    """Copy the columns that both tables have, and fill the others."""
    shared = [column for column in _columns(db, "main", table) if column in _columns(db, "old", table)]
    filled = {column: v for (name, column), v in FILLS.items() if name == table and column not in shared}
    names = ", ".join((*shared, *filled))
    values = ", ".join((*shared, *("?" for _ in filled)))
    db.execute(f"INSERT INTO main.{table} ({names}) SELECT {values} FROM old.{table}", tuple(filled.values()))


def _columns(db: sqlite3.Connection, place: str, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA {place}.table_info({table})")]
