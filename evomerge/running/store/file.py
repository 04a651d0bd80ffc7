"""The file of a run store: how it is opened for writing and reading, and held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import DiskError, StoreError
from evomerge.files import NO_LOCKS, check_regular
from evomerge.running.store import facts, schema

FILE = "run.sqlite"
LARGEST = 100
"""How many times larger than what is left of it a truncated store may have been."""
BUSY = 30.0
"""Seconds to wait for another program that has the file locked."""


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors about a full disk, a locked or a damaged file into DiskError and StoreError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise DiskError(
                f"{folder / FILE}: could not be written: {error}",
                fix=f"free some room, then: evomerge resume {folder}",
            ) from None
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise DiskError(
                f"{folder / FILE}: could not be written: {error}", fix="make file and folder writable"
            ) from None
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(
                f"{folder / FILE}: another program has locked it for {BUSY:.0f} seconds",
                fix=f"close the program that has it open, then: evomerge resume {folder}",
            ) from None
        raise damaged(folder, str(error)) from None
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # a mistake of ours
        raise damaged(folder, str(error)) from None


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """Open a store that is there; raise DiskError or StoreError."""
    mode = "ro" if readonly else "rw"
    _check_kind(path)
    with disk(path.parent):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY)
        if not readonly:
            db.execute("PRAGMA journal_mode=WAL")  # `status` can read while the run writes
            db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
    return db


def snapshot(path: Path) -> sqlite3.Connection | None:
    """Return a copy in memory of a store with its write-ahead log; None where a program writes it meanwhile.

    Neither file is touched. If size and time of both are the same after reading as before, what was read is
    complete.

    Raises:
        StoreError: SQLite can't read the store, or the log beside it is another store's.
    """
    _check_kind(path)
    log = path.with_name(f"{path.name}-wal")
    before = _state(path), _state(log)
    content = bytearray(path.read_bytes())
    logged = log.read_bytes() if before[1] is not None else b""
    if (_state(path), _state(log)) != before:
        return None
    content.extend(bytes(max(0, _size(content) - len(content))))  # SQLite reads nothing of a shorter file
    try:
        if not logged:
            return _in_memory(content)
        db = _with_log(content, logged)
    except sqlite3.DatabaseError as error:
        raise damaged(path.parent, str(error)) from None
    ids = _store_id(_in_memory(content)), _store_id(db)
    if ids[0] is not None and ids[0] != ids[1]:
        db.close()
        raise foreign_log(path)
    return db


def without_log(path: Path) -> sqlite3.Connection | None:
    """Return a copy in memory of a store as it is without the log beside it; None where there is no log."""
    log = path.with_name(f"{path.name}-wal")
    return _in_memory(bytearray(path.read_bytes())) if log.exists() and log.stat().st_size else None


def foreign_log(path: Path) -> StoreError:
    """Return the error for a write-ahead log that is not that of the store."""
    return StoreError(
        f"{path}-wal: belongs to another store than the {path.name} beside it",
        fix="move it elsewhere, and back to its own store if it has one",
    )


def rescued(path: Path) -> sqlite3.Connection | None:
    """Return a copy in memory of a store whose first page is made anew; None where SQLite can't read it.

    The first page holds the header and the list of tables, which are the same in all stores of a version:
    only the number of pages differs.
    """
    head = _first_page()
    content = bytearray(path.read_bytes())
    content[: len(head)] = head
    content.extend(bytes(-len(content) % len(head)))
    content[28:32] = (len(content) // len(head)).to_bytes(4, "big")
    log = path.with_name(f"{path.name}-wal")
    try:
        return _with_log(content, log.read_bytes()) if log.exists() else _in_memory(content)
    except sqlite3.DatabaseError:
        return None


def _first_page() -> bytes:
    with tempfile.TemporaryDirectory(prefix="evomerge-store") as folder:
        with contextlib.closing(sqlite3.connect(Path(folder) / FILE)) as db:
            schema.lay_out(db)
            db.execute("PRAGMA journal_mode=WAL")
            (size,) = db.execute("PRAGMA page_size").fetchone()
        return (Path(folder) / FILE).read_bytes()[:size]


def _check_kind(path: Path) -> None:
    """Raise StoreError where a store is no regular file: a FIFO would block."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise damaged(path.parent, error.strerror or str(error)) from None


def content_state(path: Path) -> object:
    """Return what changes when a store or its log is written: equal states mean equal contents."""
    log = _state(path.with_name(f"{path.name}-wal"))
    return _state(path), log if log is not None and log[1] else None


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _size(content: bytearray) -> int:
    """Return the size that a store's header states, in bytes; 0 where that can't be."""
    page, pages = int.from_bytes(content[16:18], "big"), int.from_bytes(content[28:32], "big")
    size = page * pages
    return size if size <= LARGEST * len(content) else 0


def _in_memory(content: bytearray) -> sqlite3.Connection:
    content = content[:]
    content[18:20] = b"\1\1"  # a database in memory has no write-ahead log
    db = sqlite3.connect(":memory:")
    db.deserialize(content)
    db.execute("PRAGMA query_only=ON")
    return db


def _with_log(content: bytearray, log: bytes) -> sqlite3.Connection:
    """Return a copy in memory of a store into which its write-ahead log was copied."""
    db = sqlite3.connect(":memory:")
    with tempfile.TemporaryDirectory(prefix="evomerge-store") as folder:
        path = Path(folder) / FILE
        path.write_bytes(content)
        path.with_name(f"{FILE}-wal").write_bytes(log)
        with contextlib.closing(sqlite3.connect(path)) as on_disk:
            on_disk.execute("PRAGMA synchronous=OFF")
            on_disk.backup(db)
    db.execute("PRAGMA query_only=ON")
    return db


def _store_id(db: sqlite3.Connection) -> object:
    """Return the number of a store, None where it has none or can't be read."""
    try:
        row = db.execute("SELECT value FROM run WHERE key = ?", (facts.STORE_ID.key,)).fetchone()
    except sqlite3.DatabaseError:
        return None
    return row and row[0]


def check_file(folder: Path) -> None:
    """Raise StoreError where a folder holds no run, or a file that is none of ours; nothing is opened."""
    path = folder / FILE
    if not path.exists():
        raise StoreError(f"{folder}: no run here", expected=f"a folder with a {FILE}", fix="check the path")
    if not path.is_file():
        raise StoreError(f"{path}: not a file", fix="check the path")
    with path.open("rb") as file:
        header = file.read(100)
    if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
        raise damaged(
            folder, "not an SQLite database" if header else "the file is empty", hopeless=not header
        )
    application, version = (int.from_bytes(header[at : at + 4], "big") for at in (68, 60))
    if application != schema.APPLICATION_ID:
        raise StoreError(
            f"{path}: not a run store",
            expected="an SQLite database that evomerge wrote",
            got="one of another program",
            fix="check the path",
        )
    if version > schema.SCHEMA_VERSION:
        raise StoreError(
            f"{path}: written by a newer version of evomerge",
            expected=f"schema version {schema.SCHEMA_VERSION} or older",
            got=str(version),
            fix="update evomerge",
        )
    journal = path.with_name(f"{FILE}-journal")
    if journal.exists():  # a run store has a write-ahead log instead
        raise StoreError(
            f"{journal}: belongs to another database, and SQLite would copy it into the run store",
            fix="move it elsewhere",
        )


def damaged(folder: Path, reason: str, *, hopeless: bool = False) -> StoreError:
    """Return the error for a store that can't be read. hopeless: not even in part."""
    run = shlex.quote(str(folder))
    return StoreError(
        f"{folder / FILE}: the run store is damaged ({reason})",
        fix="restore the file from a backup, or start a new run in another folder"
        if hopeless
        else f"see what is whole, and save it: evomerge doctor {run}",
    )


def take_lock(folder: Path) -> int:
    """Hold the run for this process; the lock dies with it, however it dies.

    Raises StoreError where another process holds it, DiskError where it can't be held here.
    """
    handle = None
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        for patience in range(5):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience == 4:
                    raise held_by(_name_in(handle), folder) from None
                time.sleep(0.05)  # another process may only be checking whether it is held
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException as error:
        if handle is not None:
            os.close(handle)
        if isinstance(error, OSError):
            raise _not_held(folder, error) from None
        raise
    return handle


def _not_held(folder: Path, error: OSError) -> DiskError:
    if error.errno in NO_LOCKS:
        return DiskError(
            f"{folder}: this file system has no locks, so that two processes could write one run",
            expected="a file system with flock, such as a local disk",
            got=error.strerror or str(error),
            fix="copy the run folder to a local disk and go on there, or choose another `out`; "
            "reading a run works here",
        )
    return DiskError(f"{folder}: could not be written", got=error.strerror or str(error))


def holder(folder: Path) -> str | None:
    """Return the process that works on a run now ("process 7 on host"), or None."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name_in(handle)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(handle)
    return None


def _name_in(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace").strip()


def held_by(holder: str, folder: Path) -> StoreError:
    """Return the error for a run that another process works on."""
    return StoreError(
        f"{folder}: another process is working on this run",
        got=holder or "a process that just started",
        fix=f"wait for it or stop it; watch it with: evomerge status {folder}",
    )
