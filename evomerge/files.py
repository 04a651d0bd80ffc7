"""Files: drafts that a crash leaves no trace of, and reading of regular files only.

Drafts are written in a temporary folder. It is named after what is written and this machine, and its process
holds a lock in it, which dies with the process. The next process that writes the same file removes the
folders whose lock is free. Locks, unlike process numbers, are never used again by another process of a
restarted container.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from evomerge.errors import ConfigError, DiskError, UserError

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> None:
    """Raise OSError unless a path is a regular file: reading a FIFO or a device may never end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{KINDS.get(kind, 'not')} instead of a regular file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, or raise OSError."""
    check_regular(path)
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, or raise OSError."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return content


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder, or raise ConfigError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: there is no such user", expected="~ or the name of a user", fix="write the whole path"
        ) from None


NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""The errors of file systems that have no locks."""
_HELD = "held"
"""The file in a temporary folder that its process has locked."""
_locks: list[int] = []
"""The locks of folders that this process keeps to its end."""


@contextmanager
def drafted_file(out: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `out` on success and disappears on failure.

    What else is written beside the temporary file, such as a database's journal, disappears too. Raises
    DiskError if it can't be written.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with passing_folder(out.parent, out.name) as folder:
            draft = folder / out.name
            yield draft
            sync([draft])
            draft.replace(out)
            sync([out.parent])
    except Exception as error:
        raise _as_disk_error(error, out) from None


@contextmanager
def drafted_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` on success and disappears on failure.

    Raises DiskError if it can't be written, or if `out` exists and is not an empty folder.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with passing_folder(out.parent, out.name) as folder:
            draft = folder / out.name
            draft.mkdir()
            yield draft
            sync([*draft.iterdir(), draft])
            draft.rename(out)  # replaces an empty folder, fails on any other
            sync([out.parent])
    except Exception as error:
        raise _as_disk_error(error, out) from None


@contextmanager
def passing_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder that is deleted afterwards. Raises OSError."""
    folder, lock = _begun(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def own_folder(parent: Path, name: str) -> Path:
    """Make a temporary folder that belongs to this process to its end."""
    folder, lock = _begun(parent, name)
    _locks.append(lock)
    return folder


def _begun(parent: Path, name: str) -> tuple[Path, int]:
    """Make a temporary folder; return it with its lock. Those of processes that were killed are removed."""
    remove_abandoned(parent, name)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_mark(name), dir=parent))
        try:
            lock = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(lock)
                raise
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


def remove_abandoned(parent: Path, name: str | None = None) -> None:
    """Remove drafts of `name` (None: all drafts) that killed processes of this machine left in a folder."""
    for stale in abandoned(parent, name):
        shutil.rmtree(stale, ignore_errors=True)


def abandoned(parent: Path, name: str | None = None) -> Iterator[Path]:
    """Yield the drafts that killed processes of this machine left in a folder, each locked until the next."""
    drafted = ".+" if name is None else re.escape(name)
    pattern = re.compile(rf"\.{drafted}\.partial-{re.escape(socket.gethostname())}-\w+")
    for stale in parent.iterdir():
        if not pattern.fullmatch(stale.name) or stale.is_symlink() or not stale.is_dir():
            continue
        try:
            lock = os.open(stale / _HELD, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue  # another user's, or just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)  # its process lives, or that can't be known
            continue
        try:
            yield stale
        finally:
            os.close(lock)


def _as_disk_error(error: Exception, out: Path) -> Exception:
    """Return DiskError for an operating system error, also one that safetensors (Rust) wraps."""
    if isinstance(error, OSError):
        return DiskError(f"{out}: can't be written", got=error.strerror or str(error))
    if "(os error " in str(error) and not isinstance(error, UserError):
        return DiskError(f"{out}: can't be written", got=str(error).splitlines()[0])
    return error


def _mark(name: str) -> str:
    return f".{name}.partial-{socket.gethostname()}-"


def sync(paths: Iterable[Path]) -> None:
    """Make files and folders durable before a rename publishes them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary_parent() -> Path:
    """Return the folder of temporary files (TMPDIR); it is made again where something swept it away."""
    folder = Path(tempfile.gettempdir())
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
