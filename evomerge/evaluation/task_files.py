"""Task files: which files of a folder of lm-eval tasks a suite's tasks use, found without lm-eval.

The files of a task are its YAML, what it includes, its data, its Python code with what that imports from
beside it, and every other file that a text in the YAML or in the code names. A file that no task of the
suite uses is no part of a run, so it may appear, change or go while the run lasts.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.files import expanded, open_regular
from evomerge.schema import PythonName, load_yaml

_NOT_DATA = ("__pycache__", ".ipynb_checkpoints")
_DATA_KEYS = ("dataset_path", "dataset_kwargs")
_PART = 2**20
_LONGEST_NAME = 1000
"""Characters of a text that can be the name of a file."""

Hashes = Mapping[str, str]
"""Name of a file, relative to the folder of tasks -> SHA-256 of its content."""


def used(folder: Path, tasks: Iterable[str]) -> dict[str, Path]:
    """Return the files that tasks of a folder use, by name.

    Args:
        folder: of lm-eval task YAMLs.
        tasks: names of tasks.

    Returns:
        Names relative to the folder, in order; a file outside that is named by its whole path keeps it.
    """
    wanted = set(tasks)
    finder = _Finder(folder)
    for path in sorted(folder.rglob("*.yaml")):
        try:
            data = load_yaml(path, task_file=True)
        except ConfigError:
            continue  # lm-eval's reader refuses it, with its reason
        if wanted & set(_declared(data)):
            finder.add(path)
    return dict(sorted(finder.files.items()))


def imported(code: Path, folder: Path) -> dict[str, Path]:
    """Return the files beside a Python file that it imports or names, by name relative to a folder."""
    finder = _Finder(folder)
    finder.add(code)
    return {name: path for name, path in finder.files.items() if path != Path(os.path.normpath(code))}


def all_below(folder: Path) -> dict[str, Path]:
    """Return all files below a folder: what made up the identity of runs before `used` was known."""
    below = sorted(_data_files(folder), key=lambda path: path.as_posix())
    return {path.relative_to(folder).as_posix(): path for path in below}


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of each file; raise ConfigError where one can't be read."""
    found = {}
    for name, path in files.items():
        try:
            with open_regular(path) as file:
                digest = hashlib.sha256()
                while part := file.read(_PART):
                    digest.update(part)
                found[name] = digest.hexdigest()
        except OSError as error:
            raise ConfigError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    return found


def changes(before: Hashes, now: Hashes) -> str:
    """Name the files that differ, "" where none does.

    >>> changes({"a": "1", "b": "1"}, {"a": "2", "c": "1"})
    'a (other contents), b (missing), c (new)'
    """
    parts = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            parts.append(f"{name} (missing)")
        elif name not in before:
            parts.append(f"{name} (new)")
        elif before[name] != now[name]:
            parts.append(f"{name} (other contents)")
    return ", ".join(parts)


def _declared(data: object) -> Iterator[str]:
    """Yield the names of tasks that a YAML declares, also those inside a group."""
    if isinstance(data, Mapping):
        yield from _names(data.get("task"))


def _names(task: object) -> Iterator[str]:
    if isinstance(task, str):
        yield task
    elif isinstance(task, list):
        for member in task:
            yield from _names(member)
    else:
        yield from _declared(task)


def _data_files(folder: Path) -> Iterator[Path]:
    below = (path for path in folder.rglob("*") if path.is_file())
    return (path for path in below if not set(_NOT_DATA) & set(path.parts))


class _Finder:
    """Collects files and follows what they name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lm_eval = _package("lm_eval")
        self.files: dict[str, Path] = {}

    def add(self, path: Path) -> None:
        """Collect a file and all that it names."""
        path = Path(os.path.normpath(path))
        name = os.path.relpath(path, self._folder) if not path.is_relative_to(self._folder) else ""
        name = Path(name).as_posix() if name else path.relative_to(self._folder).as_posix()
        self._take(name, path)

    def _take(self, name: str, path: Path) -> None:
        of_lm_eval = self._lm_eval is not None and path.resolve().is_relative_to(self._lm_eval)
        if name in self.files or of_lm_eval:  # whose version a run records
            return
        self.files[name] = path
        if path.suffix in (".yaml", ".yml"):
            try:
                data = load_yaml(path, task_file=True)
            except ConfigError:
                return
            for text, of_data in _texts(data):
                self._named(text, path.parent, data=of_data)
        elif path.suffix == ".py":
            self._code(path)

    def _named(self, text: str, folder: Path, *, data: bool) -> None:
        """Collect what a text names: a file, a folder with data, a pattern of files, or code."""
        if isinstance(text, PythonName):
            self._module(text.rpartition(".")[0], folder)
            return
        if not 0 < len(text) <= _LONGEST_NAME or "\n" in text or "\0" in text:
            return
        for name in dict.fromkeys((text, text.partition(":")[0], text.rpartition(" ")[2])):
            try:
                self._at(name, folder, data=data)
            except (OSError, ConfigError):  # no name of a file: too long, another user's home
                continue
        if "." in text:
            self._module(text.rpartition(".")[0], folder)  # `class: module.Class`

    def _at(self, name: str, folder: Path, *, data: bool) -> None:
        whole = expanded(name)
        path = folder / whole
        if path.is_file():
            self._place(whole, path)
        elif name and path.is_dir() and (data or "/" in name.strip("./")) and name not in (".", ".."):
            for file in sorted(_data_files(path)):
                self._place(whole, file)
        elif data and glob.has_magic(name) and "://" not in name:
            for match in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 (may be a whole path)
                if Path(match).is_file():
                    self._place(whole, Path(match))

    def _place(self, written: Path, path: Path) -> None:
        path = Path(os.path.normpath(path))
        if written.is_absolute() and not path.is_relative_to(self._folder):
            self._take(path.as_posix(), path)
        else:
            self.add(path)

    def _module(self, dotted: str, folder: Path) -> None:
        """Collect a Python module beside a file, or the package of that name."""
        place = folder.joinpath(*dotted.split(".")) if dotted and "/" not in dotted else None
        if place is None:
            return
        if place.with_suffix(".py").is_file():
            self.add(place.with_suffix(".py"))
        elif (place / "__init__.py").is_file():
            for file in sorted(place.rglob("*.py")):
                self.add(file)

    def _code(self, path: Path) -> None:
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._module(alias.name, path.parent)
            elif isinstance(node, ast.ImportFrom):
                self._module(node.module or "", path.parent)
                for alias in node.names:
                    self._module(f"{node.module}.{alias.name}" if node.module else alias.name, path.parent)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._named(node.value, path.parent, data=False)


def _texts(value: Any, of_data: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a YAML, and whether each stands where data are named."""
    if isinstance(value, str):
        yield value, of_data
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, of_data or key in _DATA_KEYS)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part, of_data)


def _package(name: str) -> Path | None:
    """Return the folder of a package without importing it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).resolve() if places else None
