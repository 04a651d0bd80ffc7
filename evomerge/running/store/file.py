"""The file of a run store: how it is opened for writing and reading, and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import DiskError, StoreError
from evomerge.files import check_regular

FILE = "run.sqlite"
BUSY = 30.0
"""Seconds to wait for another program that has the file locked."""


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors about a full or locked disk into DiskError and StoreError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise DiskError(
                f"{folder / FILE}: could not be written: {error}",
                fix=f"free some room, then: evomerge resume {folder}",
            ) from None
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(
                f"{folder / FILE}: another program has locked it for {BUSY:.0f} seconds",
                fix=f"close the program that has it open, then: evomerge resume {folder}",
            ) from None
        raise


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """Open a store, made if it is not there; raise DiskError or StoreError."""
    mode = "ro" if readonly else "rwc"
    _check_kind(path)
    try:
        with disk(path.parent):
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY)
            if not readonly:
                db.execute("PRAGMA journal_mode=WAL")  # `status` can read while the run writes
                db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
    except sqlite3.DatabaseError as error:
        raise damaged(path.parent, str(error)) from None
    return db


def snapshot(path: Path) -> sqlite3.Connection | None:
    """Return a copy in memory of a store that no process has open; None where one may have it open.

    A writer keeps its log in a file beside the store until it closes. So if that file was never there, and
    the store's size and time are the same after reading as before, what was read is complete.
    """
    _check_kind(path)
    journal = path.with_name(f"{path.name}-wal")
    before = path.stat()
    content = bytearray(path.read_bytes())
    after = path.stat()
    if journal.exists() or _state(before) != _state(after):
        return None
    content[18:20] = b"\1\1"  # a database in memory has no write-ahead log
    db = sqlite3.connect(":memory:")
    try:
        db.deserialize(content)
        db.execute("PRAGMA query_only=ON")
    except sqlite3.DatabaseError as error:
        raise damaged(path.parent, str(error)) from None
    return db


def _check_kind(path: Path) -> None:
    """Raise StoreError where a store is no regular file: a FIFO would block."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise damaged(path.parent, error.strerror or str(error)) from None


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_file(folder: Path) -> None:
    """Raise StoreError where a folder holds no run."""
    if not (folder / FILE).exists():
        raise StoreError(f"{folder}: no run here", expected=f"a folder with a {FILE}", fix="check the path")


def damaged(folder: Path, reason: str) -> StoreError:
    """Return the error for a store that can't be read."""
    return StoreError(
        f"{folder / FILE}: the run store is damaged ({reason})",
        fix="restore the file from a backup, or start a new run in another folder",
    )


def take_lock(folder: Path) -> int:
    """Hold the run for this process; the lock dies with it, however it dies."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
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
    except OSError as error:
        os.close(handle)
        raise DiskError(f"{folder}: could not be written", got=error.strerror or str(error)) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def holder(folder: Path) -> str | None:
    """Return the process that works on a run now ("process 7 on host"), or None."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name_in(handle)
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
