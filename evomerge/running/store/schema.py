"""The schema of a run store: its tables and their version, checksums of rows, records, and packed columns.

The last column of every table, `crc`, is a checksum of the row. It begins with a number that is drawn for
each store, so that rows of another store are as wrong as damaged ones.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import struct
import zlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ID = 12
"""How many digits of its recipe's hash a candidate is called by, in logs and messages."""
BASE = "base"
"""The name the base model has in every recipe and table."""
SCHEMA_VERSION = 5
_COPIED = "copied from "
"""What the column `worker` of scores from another run begins with; the run's name follows."""
APPLICATION_ID = 0x65766F6D  # "evom"

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL,
    crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE recipe (hash TEXT PRIMARY KEY, data TEXT NOT NULL,
    crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entry (role TEXT, position INTEGER, name TEXT NOT NULL, recipe TEXT NOT NULL REFERENCES recipe,
    crc INTEGER NOT NULL, PRIMARY KEY (role, position)) WITHOUT ROWID;
CREATE TABLE ask (generation INTEGER, position INTEGER, genome BLOB NOT NULL,
    recipe TEXT NOT NULL REFERENCES recipe, at REAL NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (generation, position)) WITHOUT ROWID;
CREATE TABLE tell (generation INTEGER PRIMARY KEY, losses BLOB NOT NULL, seconds REAL NOT NULL,
    at REAL NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE guide (generation INTEGER PRIMARY KEY, correlation REAL, proposed INTEGER NOT NULL,
    blocks INTEGER NOT NULL, radius REAL NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE front (generation INTEGER PRIMARY KEY, hypervolume REAL NOT NULL, reference TEXT NOT NULL,
    recipes TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE score (recipe TEXT REFERENCES recipe, split TEXT, block INTEGER, task TEXT,
    position INTEGER NOT NULL, metric BLOB NOT NULL, smooth BLOB, margin BLOB, tokens BLOB, texts BLOB,
    crc INTEGER NOT NULL, PRIMARY KEY (recipe, split, block, task));
CREATE TABLE item (split TEXT, block INTEGER, task TEXT, questions BLOB NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (split, block, task));
CREATE TABLE failure (recipe TEXT REFERENCES recipe, split TEXT, kind TEXT NOT NULL, reason TEXT NOT NULL,
    at REAL NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (recipe, split)) WITHOUT ROWID;
CREATE TABLE timing (recipe TEXT REFERENCES recipe, split TEXT, block INTEGER, seconds REAL NOT NULL,
    merge_seconds REAL NOT NULL, forward_seconds REAL NOT NULL, worker TEXT NOT NULL, at REAL NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (recipe, split, block)) WITHOUT ROWID;
CREATE TABLE session (started REAL PRIMARY KEY, last REAL NOT NULL, versions TEXT NOT NULL,
    crc INTEGER NOT NULL) WITHOUT ROWID;
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

    @staticmethod
    def copied_from(run: str) -> str:
        """Return the worker of scores that were copied from another run."""
        return f"{_COPIED}{run}"

    @property
    def run(self) -> str | None:
        """The name of the run that the scores were copied from, None for those made here."""
        return self.worker.removeprefix(_COPIED) if self.worker.startswith(_COPIED) else None


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


def tables() -> list[str]:
    """Return the names of all tables; those that others refer to come first."""
    return re.findall(r"CREATE TABLE (\w+)", _SCHEMA)


def complete(names: Set[str]) -> bool:
    """Say whether these are all tables of a run store (versions under development may lack some)."""
    return set(tables()) <= names


def lay_out(db: sqlite3.Connection) -> None:
    """Make the tables of a run store in an empty database."""
    db.executescript(_SCHEMA)
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def checksum(row: Sequence[Any], start: int) -> int:
    """Return the checksum of a row: of its values in the order of the columns, as SQLite stores them.

    start: the number of the store (`facts.STORE_ID`).
    """
    return zlib.crc32(b"".join(map(_encoded, row)), start)


def _encoded(value: Any) -> bytes:
    if value is None:
        return b"0"
    if isinstance(value, int | float):  # SQLite keeps NaN as NULL, -0.0 as 0, and whole numbers by the column
        return b"0" if math.isnan(value) else b"n" + struct.pack("<d", value + 0.0)
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)
    return (b"t" if isinstance(value, str) else b"b") + len(data).to_bytes(8, "little") + data


def insert(
    db: sqlite3.Connection, table: str, row: Sequence[Any], start: int, *, instead: str = "ABORT"
) -> None:
    """Write a row with its checksum. instead: what to do where its key is there (ABORT, IGNORE, REPLACE)."""
    marks = ", ".join("?" * (len(row) + 1))
    db.execute(f"INSERT OR {instead} INTO {table} VALUES ({marks})", (*row, checksum(row, start)))


def as_json(value: Any) -> str:
    """Return a value as the store's JSON. Keys keep their order: that of the sources is the genome's."""
    return json.dumps(value, allow_nan=False)


def pack(values: NDArray[np.float64] | None) -> bytes | None:
    """Return per-item values as a column of the table `score`."""
    return None if values is None else zlib.compress(values.astype("<f8").tobytes(), 1)


def unpack(blob: bytes) -> NDArray[np.float64]:
    """Return the per-item values of a column of the table `score`."""
    return np.frombuffer(zlib.decompress(blob), dtype="<f8")


def pack_json(value: Any) -> bytes | None:
    """Return texts as a compressed column; None stays None."""
    return None if value is None else zlib.compress(json.dumps(value).encode(), 6)


def unpack_json(blob: bytes) -> Any:
    """Return the texts of a compressed column."""
    return json.loads(zlib.decompress(blob))
