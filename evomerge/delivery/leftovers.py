"""What can be deleted in a folder of runs: drafts of killed processes, runs without scores, and more by name.

A run that a process works on is never touched, and of a run folder only files that evomerge writes are
deleted: what else lies in it stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.run_list import DEPTH, find_runs, size_of
from evomerge.errors import ConfigError, UserError
from evomerge.evaluation.scores import SPLITS
from evomerge.files import abandoned
from evomerge.running.log import JSON_LINES, TEXT
from evomerge.running.store import StoreReader
from evomerge.running.store.file import FILE, take_lock

Kind = Literal["draft", "empty run", "model", "run"]
OWN = (".lock", f"{FILE}-wal", f"{FILE}-shm", JSON_LINES, TEXT, "report.html", "tracking.json")
"""The files of a run folder besides the store, which goes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that can be deleted. kind: what it is. size: in bytes."""

    kind: Kind
    path: Path
    size: int

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"kind": self.kind, "path": str(self.path), "size": self.size}


def find(place: Path, *, models: bool = False, runs: Sequence[Path] = ()) -> list[Leftover]:
    """Return what can be deleted.

    Args:
        place: a folder with runs, or a run folder.
        models: whether models that were exported into run folders count.
        runs: runs that count although they have scores.

    Raises:
        ConfigError: there is no such folder or run.
        StoreError: a process works on a named run.
    """
    for run in runs:
        if not StoreReader.exists(run) or run.is_symlink():
            raise ConfigError(f"--runs {run}: no run here", expected="a run folder", fix="check the path")
        StoreReader.refuse_held(run)
    named = [run.absolute() for run in runs]
    folders = [folder for folder, _ in find_runs([place], none=True)]
    found = [_leftover("draft", path) for path in _drafts(place)]
    for folder in dict.fromkeys([*folders, *named]):
        if folder in named:
            found.append(_leftover("run", folder, *own_files(folder)))
        elif _is_empty(folder):
            found.append(_leftover("empty run", folder, *own_files(folder)))
        elif models:
            found += [_leftover("model", path) for path in _models(folder)]
    return found


def _leftover(kind: Kind, path: Path, *parts: Path) -> Leftover:
    return Leftover(kind=kind, path=path, size=sum(map(size_of, parts or (path,))))


def _drafts(place: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(place):
        here = Path(path)
        try:
            drafts = list(abandoned(here))
        except OSError:  # not ours to read
            continue
        yield from drafts
        deep = len(here.relative_to(place).parts) > DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if f[0] != ".")


def _is_empty(folder: Path) -> bool:
    """Say whether nothing was scored in a run that no process works on; False where that can't be read."""
    try:
        with StoreReader.read(folder) as store:
            return not store.held() and _has_no_results(store)
    except (UserError, OSError):
        return False


def _has_no_results(store: StoreReader) -> bool:
    scored = any(store.scored_blocks(split) for split in SPLITS)
    return not (scored or store.gradient_items() or store.failures())


def _models(folder: Path) -> list[Path]:
    """Return the models that were exported into a run folder: they have weights and a recipe."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir()
        and not path.is_symlink()
        and (path / "recipe.yaml").is_file()
        and any(path.glob("*.safetensors"))
    ]


def own_files(folder: Path) -> list[Path]:
    """Return what of a run folder evomerge wrote, models included, the store last."""
    kept = [folder / name for name in OWN] + sorted(folder.glob(f"{FILE}.version-*"))
    return [*_models(folder), *(path for path in (*kept, folder / FILE) if path.is_file())]


def delete(found: Sequence[Leftover]) -> None:
    """Delete what was found; raise StoreError where a process began to work on a run meanwhile."""
    for leftover in found:
        if leftover.kind in ("draft", "model"):
            shutil.rmtree(leftover.path)
            continue
        lock = take_lock(leftover.path)
        try:
            if leftover.kind == "empty run" and StoreReader.exists(leftover.path):
                with StoreReader.read(leftover.path) as store:
                    if not _has_no_results(store):
                        continue  # scored something since
            for path in own_files(leftover.path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(leftover.path.iterdir()):
                leftover.path.rmdir()
        finally:
            os.close(lock)


def as_data(place: Path, found: Sequence[Leftover], *, deleted: bool) -> dict[str, Any]:
    """Return what was found as plain data."""
    return {
        "folder": str(place),
        "deleted": deleted,
        "size": sum(leftover.size for leftover in found),
        "found": [leftover.as_data() for leftover in found],
    }


def text(data: dict[str, Any]) -> RenderableType:
    """Return the data of `as_data` as a table for a rich console."""
    if not data["found"]:
        return Text(f"{data['folder']}: nothing to delete")
    table = style.table(style.words("what"), style.words("path"), style.numbers("size"))
    for leftover in data["found"]:
        table.add_row(leftover["kind"], Text(leftover["path"]), style.size(leftover["size"]))
    total = style.size(data["size"])
    end = f"deleted, {total} freed" if data["deleted"] else f"nothing deleted yet; --yes deletes {total}"
    return Group(table, Text(end))
