"""The folder of the fork server's socket: named after its process, so that the next run can remove it.

`multiprocessing` removes its own at an orderly end only.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import util
from pathlib import Path

from evomerge.files import own_folder, temporary_parent

_LONGEST = 60
"""Characters of the folder: the socket's whole path must stay below 108."""


@contextmanager
def swept() -> Iterator[None]:
    """Let `multiprocessing` create its files in a folder of this process, inside this context."""
    before, tempfile.tempdir = tempfile.tempdir, _folder()
    try:
        yield
        # Before multiprocessing removes it, at -100, which fails loudly where something swept it away.
        util.Finalize(None, _made_again, (Path(util.get_temp_dir()),), exitpriority=-99)
    finally:
        tempfile.tempdir = before


def _made_again(folder: Path) -> None:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)


def place() -> str:
    """Return the folder where the fork server's socket is."""
    return _folder() or tempfile.gettempdir()


@functools.cache
def _folder() -> str | None:
    """Return the folder of this process, or None for the usual place where its path would be too long."""
    folder = own_folder(temporary_parent(), "evomerge")
    if len(str(folder)) > _LONGEST:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    # After multiprocessing has removed what it made in there, at -100.
    util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-101)
    return str(folder)
