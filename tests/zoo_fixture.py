"""Train the tests' zoo once and hand out its path: for the fixture in conftest.py."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import evomerge.zoo
from evomerge.zoo.build import CARD_NAME, build_zoo


def _source_key() -> str:
    """Hash what decides a tiny zoo's behaviour: the room's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(evomerge.zoo.__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system releases it when its process ends, however it ends."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def tiny_zoo(cache_dir: Path) -> Path:
    """Return the folder of a tiny zoo (seed 0) under `cache_dir`, training it if it is missing (about 40 s).

    Safe to call from several test processes at once: one trains, the others wait. A half-built zoo left by a
    killed process is removed and trained again. Treat the folder as read-only.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"tiny-{_source_key()}"
    with _locked(cache_dir / f"{folder.name}.lock"):
        if not (folder / CARD_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)
            build_zoo(folder, seed=0, size="tiny", jobs=2)
    return folder
