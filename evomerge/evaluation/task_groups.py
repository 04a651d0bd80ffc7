"""Task groups: the tasks that a group or a tag of lm-eval stands for, found without lm-eval.

A suite's entry can name a group, a tag, or a task. Groups hold tasks, tags and other groups; a tag is every
task whose YAML has it. Each member becomes an entry of its own, with the keys of the suite's entry.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.schema import load_yaml

_OF_GROUPS = ("group", "task", "tag", "include", "metadata", "aggregate_metric_list", "weight_by_size")
"""Keys of a group or its members that say nothing about the tasks; and all that end in `alias`."""

Groups = Mapping[str, tuple[str, ...]]
"""Name of a group or tag in a suite -> its tasks."""


def expanded(
    entries: Sequence[Any], folder: Path | None, where: str, *, keys: Collection[str]
) -> tuple[list[Any], Groups]:
    """Return a suite's entries with a group or tag replaced by its tasks, and which groups there were.

    Args:
        entries: as written; what is no entry with a name stays as it is.
        folder: of the suite's own task YAMLs.
        where: the suite's file, for messages.
        keys: of an entry, that a group may set for its tasks, too.

    Raises:
        ConfigError: a group is empty, holds itself, a task that does not exist, or one that stands twice.
    """
    libraries = _Libraries(folder, where, keys)
    rows: list[Any] = []
    groups: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        name = entry.get("task") if isinstance(entry, Mapping) else None
        plain = not isinstance(name, str) or entry.get("of") or entry.get("data")
        members = None if plain else libraries.members(str(name))
        if members is None:
            rows.append(entry)
            continue
        groups[str(name)] = tuple(member.task for member in members)
        rows += [{**member.keys, **entry, "task": member.task} for member in members]
    names = [row.get("task") for row in rows if isinstance(row, Mapping)]
    for group, tasks in groups.items():
        if twice := next((task for task in tasks if names.count(task) > 1), None):
            raise ConfigError(
                f"{where}: the task {twice!r} of the group {group!r} is listed twice",
                fix="list the tasks of one group separately, without it",
            )
    return rows, groups


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A task of a group. keys: of the suite's entry, that the group sets."""

    task: str
    keys: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a name means in a folder. config: of a group. tasks: with the tag."""

    is_task: bool = False
    path: Path | None = None
    config: Mapping[str, Any] | None = None
    tasks: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        return self.is_task or self.config is not None or bool(self.tasks)


@dataclass
class _Libraries:
    """The suite's own folder, and lm-eval's for all other names."""

    folder: Path | None
    where: str
    keys: Collection[str]
    _own: _Library | None = field(init=False)

    def __post_init__(self) -> None:
        self._own = None if self.folder is None else _Library(self.folder)

    def members(self, name: str) -> list[_Member] | None:
        """Return the tasks of a group or tag; None where the name is a task, or unknown."""
        found = self._find(name)
        return None if found.is_task or not found.known else list(self._members(name, found, {}, (name,)))

    def _find(self, name: str) -> _Found:
        own = self._own.find(name) if self._own is not None else _Found()
        return own if own.known else _builtin().find(name)

    def _members(
        self, name: str, found: _Found, keys: Mapping[str, Any], path: tuple[str, ...]
    ) -> Iterator[_Member]:
        if found.config is None:  # a tag
            yield from (_Member(task=task, keys=keys) for task in found.tasks)
            return
        keys = {**self._keys(name, found.config), **keys}
        listed = found.config.get("task")
        listed = [listed] if isinstance(listed, str | Mapping) else listed
        if not isinstance(listed, list) or not listed:
            raise self._wrong(name, found, "has no tasks", "task: a list of tasks, tags and groups")
        for member in listed:
            yield from self._member(name, found, member, keys, path)

    def _member(
        self, name: str, found: _Found, member: object, keys: Mapping[str, Any], path: tuple[str, ...]
    ) -> Iterator[_Member]:
        inner = member.get("group", member.get("task")) if isinstance(member, Mapping) else member
        if not isinstance(inner, str) or not inner:
            raise self._wrong(
                name, found, f"has the member {str(member)[:80]!r}", "the name of a task or group"
            )
        if isinstance(member, Mapping):
            keys = {**keys, **self._keys(name, member)}
        if inner in path:
            raise self._wrong(
                name, found, f"holds the group {inner!r}, which holds it", "groups without circles"
            )
        meant = self._find(inner)
        if isinstance(member, Mapping) and "group" in member and not meant.known:
            meant = _Found(path=found.path, config=member)  # a group that is written out in place
        if meant.is_task:
            yield _Member(task=inner, keys=keys)
        elif meant.known:
            yield from self._members(inner, meant, keys, (*path, inner))
        else:
            raise self._wrong(name, found, f"holds {inner!r}, which is no task, tag or group", None)

    def _keys(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the suite's entry among those of a group or member; refuse all others."""
        own = {key: value for key, value in config.items() if key not in _OF_GROUPS and "alias" not in key}
        if unknown := sorted(str(key) for key in own if key not in self.keys):
            raise ConfigError(
                f"{self.where}: the group {name!r} changes its tasks by {unknown[0]!r}",
                fix="list its tasks separately, in task YAMLs of your own that have this key",
            )
        return own

    def _wrong(self, name: str, found: _Found, what: str, expected: str | None) -> ConfigError:
        return ConfigError(
            f"{self.where}: the group {name!r} {what}",
            expected=expected,
            got=None if found.path is None else str(found.path),
            fix="mend the group, or list its tasks separately",
        )


class _Library:
    """A folder of task YAMLs. Only files that hold a name are read as YAML: lm-eval has 14,000."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(path for path in folder.rglob("*yaml") if path.is_file())

    @functools.cached_property
    def _contents(self) -> dict[Path, bytes]:
        contents = {}
        for path in self._paths:
            try:
                contents[path] = path.read_bytes()
            except OSError:  # lm-eval's reader says why
                continue
        return contents

    @functools.cached_property
    def _declaring(self) -> dict[str, list[Path]]:
        """Name after `task:` or `group:` -> the files that have it."""
        says = re.compile(rb"^['\"]?(?:task|group)['\"]?:[ \t]*['\"]?([^'\"\s#]+)", re.MULTILINE)
        return _by_name(self._contents, says.findall)

    @functools.cached_property
    def _including(self) -> dict[str, list[Path]]:
        """Name of a file -> the files that may include it."""
        file = re.compile(rb"[^\s'\"/\[\],]+yaml\b")
        return _by_name(
            self._contents, lambda content: file.findall(content) if b"include" in content else []
        )

    def find(self, name: str) -> _Found:
        """Return what a name means: a task before a group before a tag."""
        for paths in (
            [path for path in self._paths if path.name == f"{name}.yaml"],
            self._declaring.get(name),
        ):
            group = None
            for path in paths or ():
                config = _config(path)
                if _task(config) == name:
                    return _Found(is_task=True)
                if _task(config) is None and config.get("group") == name and group is None:
                    group = _Found(path=path, config=config)
            if group is not None:
                return group
        configs = [_config(path) for path in self._holding(name)]
        tasks = {task for config in configs if name in _tags(config) and (task := _task(config)) is not None}
        return _Found(tasks=tuple(sorted(tasks)))

    def _holding(self, name: str) -> list[Path]:
        """Return the YAMLs that may have a name as a tag, also in a file that they include."""
        word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
        new = {path for path, text in self._contents.items() if b"tag" in text and word.search(text)}
        holding = set(new)
        while new:
            new = {holder for path in new for holder in self._including.get(path.name, ())} - holding
            holding |= new
        return sorted(path for path in holding if path.suffix == ".yaml")


def _by_name(contents: Mapping[Path, bytes], names: Callable[[bytes], list[bytes]]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path, content in contents.items():
        for name in names(content):
            found.setdefault(name.decode(errors="replace"), []).append(path)
    return found


def _tags(config: Mapping[str, Any]) -> list[Any]:
    tags = config.get("tag")
    return [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []


def _task(config: Mapping[str, Any]) -> str | None:
    """Return the name of the task that a YAML declares, None where it declares a group or nothing."""
    task = config.get("task")
    return task if isinstance(task, str) and ("class" in config or "group" not in config) else None


@functools.cache
def _builtin() -> _Library:
    spec = importlib.util.find_spec("lm_eval")
    places = spec.submodule_search_locations if spec is not None else None
    assert places, "lm_eval is not installed"
    return _Library(Path(next(iter(places))) / "tasks")


def _config(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a task YAML with what it includes; empty where it can't be read, which lm-eval's reader says."""
    try:
        config = load_yaml(path, task_file=True)
    except ConfigError:
        return {}
    included = config.pop("include", None)
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str) and (place := path.parent / name) not in seen:
            merged |= _config(place, (*seen, path))
    return merged | config
