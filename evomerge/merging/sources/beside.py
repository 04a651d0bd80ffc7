"""The files beside a model's weights: where they lie, and which of them a merge takes over.

Everything is taken over that is no weight file, no state of a training, no cache, and nothing that the merge
writes itself. So processors, code of `auto_map`, licences and parts of other libraries stay with the model.
Code is copied and never run.

An adapter folder may have a tokenizer or chat template of its own, which then count instead of the model's.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.file_kinds import LARGEST, LEFT_OUT, TOKENIZER, WRITTEN, is_tokenizers, matches
from evomerge.merging.sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """files: place in the folder -> the file to copy. left_out: names with the reason, for the user."""

    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Their size in bytes."""
        return sum(path.stat().st_size for path in self.files.values())


def unwrapped(source: Source) -> Source:
    """Return the model in an alignment or untying, with its own tokens and rows."""
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    return source


def folders_of(source: Source) -> tuple[Path, ...]:
    """Return the folders of a model's files beside the weights: an adapter's own, then the model's."""
    source = unwrapped(source)
    if isinstance(source, AdaptedCheckpoint):
        return source.adapter, source.folder
    return (source.folder,)


def tokenizer_folder(source: Source) -> Path:
    """Return the folder with a model's tokenizer: the adapter's, if it holds tokens, else the model's."""
    folders = folders_of(source)
    return next((folder for folder in folders if _holds_tokens(folder)), folders[-1])


def beside(source: Source) -> Beside:
    """Return the files that a merge takes over from the model that gives config and tokenizer."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for folder in reversed(folders_of(source)):
        if folder == tokenizer_folder(source):
            files = {name: path for name, path in files.items() if not is_tokenizers(name)}
        found = beside_in(folder)
        files |= found.files
        left_out += found.left_out
    return Beside(files=files, left_out=tuple(left_out))


def beside_in(folder: Path) -> Beside:
    """Return the files beside the weights in one folder."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for path in _listed(folder):
        name = path.relative_to(folder).as_posix()
        if matches(path.name, WRITTEN) and path.parent == folder:
            continue
        if (reason := _reason(path, folder)) is None:
            files[name] = path
        else:
            left_out.append(f"{name}{'/' if path.is_dir() else ''} ({reason})")
    return Beside(files=files, left_out=tuple(left_out))


def tokenizer_files(source: Source) -> Beside:
    """Return the files of a model's tokenizer and chat templates."""
    files = {name: path for name, path in beside(source).files.items() if is_tokenizers(name)}
    return Beside(files=files, left_out=())


def _listed(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and in place of folders that are left out themselves."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        yield folder  # which is then named as left out
        return
    for path in paths:
        if path.is_dir() and not path.is_symlink() and not matches(path.name, (*WRITTEN, *LEFT_OUT)):
            yield from _listed(path)
        else:
            yield path


def _reason(path: Path, folder: Path) -> str | None:
    """Return why a file is left out; None if it is taken over."""
    if matches(path.name, LEFT_OUT):
        return "weights, training or cache"
    try:
        found = path.stat()
    except OSError:
        return "can't be read"
    if (
        path.is_symlink()
        and not _inside(path, folder)
        and not (path.parent == folder and is_tokenizers(path.name))
    ):
        return "a link out of the folder"
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_size > LARGEST and not is_tokenizers(path.name):
        return f"larger than {LARGEST // 10**6} MB"
    return None


def _inside(link: Path, folder: Path) -> bool:
    """Say whether a link leads to a file of its folder, or of its repository in the cache of the hub."""
    target, home = link.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs))


def _holds_tokens(folder: Path) -> bool:
    return any(matches(path.name, TOKENIZER) for path in folder.iterdir())
