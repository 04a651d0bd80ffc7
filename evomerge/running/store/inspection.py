"""What of a run store is whole: each row by its checksum and contents, and the rows of all tables together.

SQLite's own check sees damaged pages, not damaged contents. Every reader inspects a store when it opens it,
so that nothing is computed from values that were not written. `Inspection.tables` also has the whole rows of
damaged tables, for `salvage`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from evomerge.running.store import facts, schema

Row = tuple[Any, ...]

JSON = {("run", "value"), ("recipe", "data"), ("front", "reference"), ("front", "recipes")}
JSON |= {("session", "versions")}
VECTORS = {("ask", "genome"), ("tell", "losses")}
PACKED = {("score", name) for name in ("metric", "smooth", "margin", "tokens")}
PACKED_JSON = {("score", "texts"), ("item", "questions")}
TYPES: dict[str, tuple[type, ...]] = {"TEXT": (str,), "INTEGER": (int,), "REAL": (float,), "BLOB": (bytes,)}
FILLS: dict[tuple[str, str], Any] = {("score", "block"): 0, ("timing", "block"): 0}
"""(table, column) -> value of a newer column in older runs, where NULL would be wrong."""
MISSING = "missing"
"""What is said of a table that is not there."""
WIDEST_GAP = 1_000_000
"""How many row numbers are tried one by one between the rows that can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: its name, SQL type, whether it may be NULL and is part of the key."""

    name: str
    type: str
    optional: bool
    key: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """One table: its whole rows (without `crc`), the damaged ones in words, and what could not be read."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    damaged: tuple[str, ...]
    unreadable: str | None

    @property
    def whole(self) -> bool:
        """Say whether every row is whole."""
        return not self.damaged and self.unreadable is None

    def records(self) -> Iterator[dict[str, Any]]:
        """Return the whole rows by column."""
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A whole store: its tables, what SQLite says of the file, and how rows contradict each other."""

    tables: Mapping[str, TableState]
    file: tuple[str, ...]
    contradictions: tuple[str, ...]

    @property
    def readable(self) -> bool:
        """Say whether any row could be read."""
        return any(state.rows or state.damaged for state in self.tables.values())

    def problems(self) -> Iterator[str]:
        """Say all that is wrong, in one line each."""
        for state in self.tables.values():
            if state.unreadable is not None:
                yield f"table {state.name}: {state.unreadable}"
            if state.damaged:
                more = f", and {len(state.damaged) - 1} more" if len(state.damaged) > 1 else ""
                yield f"table {state.name}: {state.damaged[0]}{more}"
        yield from self.contradictions
        yield from self.file


def inspect(db: sqlite3.Connection, *, contents: bool = False) -> Inspection:
    """Inspect a store of this schema version, or an older one, in one transaction.

    contents: also parse what every row holds. Always done where rows have no checksums, in older stores.
    """
    factory, db.text_factory = db.text_factory, lambda raw: raw.decode("utf-8", "surrogateescape")
    mine = not db.in_transaction
    try:
        with contextlib.suppress(sqlite3.DatabaseError):
            if mine:
                db.execute("BEGIN")
        file = _file(db)
        tables = {name: _table(db, name, columns, contents) for name, columns in expected().items()}
        sound = not file and all(state.whole for state in tables.values())
        contradictions = _contradictions(db) if sound else ()
    finally:
        db.text_factory = factory
        if mine and db.in_transaction:
            db.execute("ROLLBACK")
    return Inspection(tables=tables, file=file, contradictions=contradictions)


def expected() -> dict[str, tuple[Column, ...]]:
    """Return the columns of every table of this schema version."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        schema.lay_out(db)
        return {name: _columns(db, name) for name in schema.tables()}


def filled(table: str, columns: Sequence[Column], record: Mapping[str, Any]) -> list[Any]:
    """Return a row of this schema version, without `crc`, from a record of any version."""
    return [record.get(column.name, FILLS.get((table, column.name))) for column in columns[:-1]]


def _columns(db: sqlite3.Connection, table: str) -> tuple[Column, ...]:
    return tuple(
        Column(name=name, type=kind, optional=not required and not key, key=bool(key))
        for _, name, kind, required, _, key in db.execute(f"PRAGMA table_info({table})")
    )


def store_id(db: sqlite3.Connection) -> int:
    """Return the number with which the checksums of a store begin, 0 where it can't be read."""
    with contextlib.suppress(sqlite3.DatabaseError, ValueError, TypeError):
        (value,) = db.execute("SELECT value FROM run WHERE key = ?", (facts.STORE_ID.key,)).fetchone()
        return int(value) & 0xFFFFFFFF
    return 0


def _file(db: sqlite3.Connection) -> tuple[str, ...]:
    try:
        found = tuple(str(line) for (line,) in db.execute("PRAGMA integrity_check(10)"))
    except sqlite3.DatabaseError as error:
        return (str(error),)
    return () if found == ("ok",) else tuple(" ".join(line.split()) for line in found)


# -- rows -------------------------------------------------------------------------------------------------


def _table(db: sqlite3.Connection, name: str, columns: Sequence[Column], contents: bool) -> TableState:
    try:
        there = _columns(db, name)
    except sqlite3.DatabaseError as error:
        return _lost(name, str(error))
    if not there:
        return _lost(name, MISSING)
    checked = any(column.name == "crc" for column in there)
    if _is_present(db) and [column.name for column in there] != [column.name for column in columns]:
        return _lost(name, "has other columns")
    found, unreadable = _read(db, name, there)
    start = store_id(db)
    whole, damaged = [], []
    for row in found:
        values = row[:-1] if checked else row
        wrong = None
        if checked and row[-1] != schema.checksum(values, start if _started(name, row) else 0):
            wrong = "not what was written"
        elif contents or not checked:
            wrong = _wrong(name, there, values)
        if wrong is None:
            whole.append(values)
        else:
            damaged.append(f"{_named(there, row)}: {wrong}")
    return TableState(
        name=name,
        columns=tuple(column.name for column in there if column.name != "crc"),
        rows=tuple(whole),
        damaged=tuple(damaged),
        unreadable=unreadable,
    )


def _is_present(db: sqlite3.Connection) -> bool:
    with contextlib.suppress(sqlite3.DatabaseError):
        return bool(db.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA_VERSION,))
    return True


def _lost(name: str, why: str) -> TableState:
    return TableState(name=name, columns=(), rows=(), damaged=(), unreadable=why)


def _started(table: str, row: Row) -> bool:
    """Say whether a row's checksum begins with the store's number: all but that number's own."""
    return table != "run" or row[0] != facts.STORE_ID.key


def _named(columns: Sequence[Column], row: Row) -> str:
    """Name a row by its key, as far as that can be printed."""
    parts = zip(columns, row, strict=True)
    return ", ".join(f"{column.name} {ascii(value)[:40]}" for column, value in parts if column.key)


def _read(db: sqlite3.Connection, name: str, columns: Sequence[Column]) -> tuple[list[Row], str | None]:
    """Return all rows of a table that SQLite can read, and why there may be more.

    From the start, then from the end, then one by one between them where rows are numbered.
    """
    numbered = "WITHOUT ROWID" not in _sql(db, name)
    order = "rowid" if numbered else ", ".join(f"{c.name} DESC" for c in columns if c.key)
    names = ", ".join(column.name for column in columns)
    first, error = _until_error(db, f"SELECT {'rowid' if numbered else 0}, {names} FROM {name}")
    if error is None:
        return [row[1:] for row in first], None
    backwards = f"SELECT {'rowid' if numbered else 0}, {names} FROM {name} ORDER BY {order}"
    last, _ = _until_error(db, backwards + (" DESC" if numbered else ""))
    rows = {row[1:]: None for row in (*first, *last)}
    if numbered and last:
        since = first[-1][0] if first else 0
        for number in range(since + 1, min(last[-1][0], since + WIDEST_GAP)):
            single, _ = _until_error(db, f"SELECT {names} FROM {name} WHERE rowid = {number}")
            rows |= dict.fromkeys(single)
    return list(rows), error


def _sql(db: sqlite3.Connection, table: str) -> str:
    with contextlib.suppress(sqlite3.DatabaseError):
        row = db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        return str(row[0]) if row else ""
    return ""


def _until_error(db: sqlite3.Connection, query: str) -> tuple[list[Row], str | None]:
    rows: list[Row] = []
    try:
        for row in db.execute(query):
            rows.append(row)
    except sqlite3.DatabaseError as error:
        return rows, str(error)
    return rows, None


def _wrong(table: str, columns: Sequence[Column], values: Row) -> str | None:
    """Say what is wrong with the contents of a row, None if nothing."""
    for column, value in zip(columns, values, strict=False):
        if value is None and column.optional:
            continue
        if not isinstance(value, TYPES[column.type]):
            return f"{column.name} is {'missing' if value is None else type(value).__name__}"
        if isinstance(value, str) and not _is_text(value):
            return f"{column.name} is not UTF-8"
        check = _check_of(table, column.name)
        if check is not None and not _passes(check, value):
            return f"{column.name} can't be parsed"
    if table == "run" and not _is_fact(values):
        return "another type than declared"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_of(table: str, column: str) -> Callable[[Any], Any] | None:
    if (table, column) in JSON:
        return json.loads
    if (table, column) in VECTORS:
        return _check_vector
    if (table, column) in PACKED_JSON:
        return schema.unpack_json
    return _check_packed if (table, column) in PACKED else None


def _passes(check: Callable[[Any], Any], value: Any) -> bool:
    try:
        check(value)
    except (ValueError, RecursionError, zlib.error):
        return False
    return True


def _check_vector(blob: bytes) -> None:
    if not blob or len(blob) % 8:
        raise ValueError


def _check_packed(blob: bytes) -> None:
    if not schema.unpack(blob).size:
        raise ValueError


def _is_fact(values: Row) -> bool:
    """Say whether a fact has the type it is declared with; keys of other versions are left alone."""
    key, value = values[0], json.loads(values[1])
    declared = next((fact for fact in facts.FACTS if fact.key.split()[0] == key.split(" ")[0]), None)
    return declared is None or value is None or isinstance(value, get_origin(declared.type) or declared.type)


# -- rows of all tables together --------------------------------------------------------------------------

_CONTRADICTIONS = {
    "asks: positions are missing": "SELECT generation FROM ask GROUP BY generation "
    "HAVING MIN(position) != 0 OR COUNT(*) != MAX(position) + 1",
    "asks: genomes of several lengths": "SELECT 1 FROM ask GROUP BY NULL "
    "HAVING COUNT(DISTINCT length(genome)) > 1 OR MIN(length(genome)) = 0 OR MIN(length(genome)) % 8 != 0",
    "tells: without their asks": "SELECT 1 FROM tell WHERE generation NOT IN (SELECT generation FROM ask)",
    "tells: another number of losses than candidates": "SELECT 1 FROM tell JOIN (SELECT generation, "
    "COUNT(*) AS n FROM ask GROUP BY generation) USING (generation) "
    "WHERE length(losses) = 0 OR length(losses) % (8 * n) != 0",
    "scores: tasks are missing": "SELECT 1 FROM score GROUP BY recipe, split, block "
    "HAVING MIN(position) != 0 OR COUNT(*) != MAX(position) + 1",
    "scores: some recipes have fewer tasks than others": "SELECT 1 FROM (SELECT split, block, COUNT(*) AS n "
    "FROM score GROUP BY recipe, split, block) GROUP BY split, block HAVING MIN(n) != MAX(n)",
    "scores: the recipes of an item block have several tasks at one position": "SELECT 1 FROM score "
    "GROUP BY split, block, position HAVING COUNT(DISTINCT task) > 1",
}
"""What must not be, and the query that finds it."""


def _contradictions(db: sqlite3.Connection) -> tuple[str, ...]:
    """Say how rows contradict each other: each was written whole, but some are gone or of another time."""
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    found = [
        f"table {table}: {len(list(rows))} rows name recipes that are missing"
        for table in schema.tables()
        if table in there and (rows := db.execute(f"PRAGMA foreign_key_check({table})").fetchall())
    ]
    found += [words for words, query in _CONTRADICTIONS.items() if db.execute(query).fetchone() is not None]
    return tuple(found)
