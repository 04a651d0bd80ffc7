"""What all conversions share: the options, what has been converted so far, and names and places of models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evomerge.delivery.config_file import placed
from evomerge.delivery.new_run import OwnTask, entry
from evomerge.errors import ConfigError, nearest
from evomerge.files import expanded
from evomerge.merging import methods
from evomerge.merging.mergekit import reader
from evomerge.merging.methods import Method
from evomerge.merging.sources.hub import is_local, split_id
from evomerge.running.store import BASE
from evomerge.schema import load_json, load_yaml, preset_folder

SEARCH, SELECT, TEST = 100, 100, 200
"""Items of a task whose file does not say how many."""
RANGES = {
    "weight": (0.0, 1.5),
    "density": (0.1, 1.0),
    "t": (0.0, 1.0),
    "epsilon": (0.01, 0.3),
    "gamma": (0.0, 0.1),
    "lambda": (0.5, 1.5),
    "select_topk": (0.1, 1.0),
    "scale": (0.5, 1.5),
}
"""What a parameter is searched in; none of the other projects' files says it."""
LINE = "task_arithmetic"
"""What averages of the base and other models become, and the range of its weights then."""
SHARES = (0.0, 1.0)
NEGATIVE = -0.5
"""The lowest weight, where weights may be negative."""
SUITES = ("math", "code", "medical", "general", "instruct", "japanese-math")
"""Packaged suites that say from which splits of a public data set one may search and select."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What the command line says beside the file; None and () are not given.

    out: the config to write. method: of mergenetic's merger. tasks_dir: of lm-eval task files.
    """

    out: Path
    run_folder: str | None = None
    evaluations: int | None = None
    base: str | None = None
    method: str | None = None
    tasks_dir: Path | None = None
    suite: str | None = None
    data: Sequence[OwnTask] = ()


@dataclass(slots=True, kw_only=True)
class Draft:
    """A run config in the making.

    kind: what the file is. root: its folder, where relative places of models may start. notes: what changed,
    for people.
    """

    kind: str
    root: Path
    options: ConvertOptions
    document: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add what changed, once."""
        if text not in self.notes:
            self.notes.append(text)

    def models(self, base: str, sources: Mapping[str, str]) -> None:
        """Enter the models."""
        if not sources:
            raise ConfigError(
                f"{self.kind}: no models to merge", expected="one model or more beside the base"
            )
        places = {name: placed(place, self.options.out) for name, place in sources.items()}
        self.document["models"] = {"base": placed(base, self.options.out), "sources": places}

    def suite(self, suite: str | dict[str, Any]) -> None:
        """Enter the suite that options or the file name, the options first."""
        options, sources = self.options, self.document["models"]["sources"]
        if options.data:
            rows = [entry(task, sources, options.out) for task in options.data]
            suite = {"name": options.out.stem, "tasks": rows}
        elif options.suite is not None:
            suite = options.suite
        self.document["suite"] = suite

    @property
    def has_suite(self) -> bool:
        """Whether the options say what to score on."""
        return self.options.suite is not None or bool(self.options.data)


def without_unknown(
    data: Mapping[str, Any], known: Iterable[str], where: str, draft: Draft, tool: str
) -> dict[str, Any]:
    """Return a mapping without keys that have no meaning, and note them. where: its place, or ""."""
    known = list(known)
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            draft.note(f"`{where}{key}` is no key of {tool} and is left out{hint}")
    return {str(key): value for key, value in data.items() if key in known}


def location(value: object, where: str, draft: Draft) -> str:
    """Return a model's location, written as text or as mergekit's mapping.

    A local place starts at the file's folder if it exists there, else at the current folder.
    """
    if isinstance(value, str) and value.strip():
        return reader.resolved(value, draft.root)
    if isinstance(value, Mapping) and (model := value.get("model", value.get("path"))) is not None:
        if value.get("override_architecture"):
            draft.note(
                f"{where}: `override_architecture` is left out; the architecture is read from the model"
            )
        place = location(model, where, draft)
        if value.get("revision"):
            place = f"{place}@{value['revision']}"
        return f"{place}+{location(value['lora'], where, draft)}" if value.get("lora") else place
    raise ConfigError(where, expected="a folder or a hub id", got=repr(value)[:80])


def named(locations: Iterable[str]) -> dict[str, str]:
    """Return name -> location, each location once; a name is the location's last part.

    >>> named(["org/a", "other/a@v1", "org/a"])
    {'a': 'org/a', 'a-2': 'other/a@v1'}
    """
    names: dict[str, str] = {}
    for place in dict.fromkeys(locations):
        last = place.rpartition("+")[2]
        found = split_id(last)
        stem = re.sub(r"[^\w.-]+", "-", Path(found[0] if found else last).name).strip("-") or "model"
        name, number = stem, 2
        while name in names or name in (BASE, "union"):
            name, number = f"{stem}-{number}", number + 1
        names[name] = place
    return names


def layers_of(place: str) -> int | None:
    """Return the number of a model's layers, if its config is on this machine."""
    import huggingface_hub

    path: Any = expanded(place.partition("+")[0]) / "config.json"
    found = split_id(place.partition("+")[0])
    if not is_local(place.partition("+")[0]) and found is not None:
        path = huggingface_hub.try_to_load_from_cache(found[0], "config.json", revision=found[1])
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    layers = load_json(Path(path)).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def method_of(name: str, draft: Draft) -> Method:
    """Return one of our methods by mergekit's name, which is the same."""
    if name not in methods.names():
        raise ConfigError(
            f"{draft.kind}: there is no merge method {name!r} here", fix=nearest(name, methods.names())
        )
    return methods.get(name)


def apart(places: Sequence[str], base: str, method: Method, draft: Draft) -> tuple[Method, list[str]]:
    """Return method and locations of the sources, none of which is the base.

    Methods that average whole models, the base among them, become task arithmetic: shares of models are
    weights of task vectors from one of them.
    """
    places = list(dict.fromkeys(places))
    others = [place for place in places if place != base]
    if len(others) == len(places) or not others:
        return method, others
    if method.needs_base:
        draft.note("the base is no source any more: its own task vector is zero")
        return method, others
    draft.note(
        f"{method.name} over the base and others becomes {LINE} from {base}: a weight is a source's share, "
        "on a straight line, not an arc; a base that is none of them keeps the method: --base MODEL"
    )
    return methods.get(LINE), others


def genes(
    method: Method,
    names: Iterable[str],
    *,
    negative: bool = False,
    shares: bool = False,
    values: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Return ranges of a method's parameters.

    Args:
        names: of parameters that vary, where the method has them.
        negative: whether weights may be negative. shares: whether they are those of `apart`.
        values: parameter -> values that its range must hold.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        declared = method.parameters.get(name)
        if declared is None or name not in RANGES:
            continue
        low, high = SHARES if shares and name == "weight" else RANGES[name]
        low = NEGATIVE if name == "weight" and negative else low
        inside = [declared.low, declared.high]
        low, high = min([low, *values.get(name, ())]), max([high, *values.get(name, ())])
        low, high = max(low, inside[0]), min(high, inside[1])
        found[name] = {"low": float(low), "high": float(high)}
    return found


def filters(given: Sequence[str]) -> dict[str, list[str]]:
    """Return a search space's groups of modules, from mergekit's filters; the last one is the rest.

    >>> filters(["self_attn", "mlp"])
    {'self_attn': ['self_attn'], 'mlp': ['mlp'], 'rest': []}
    """
    groups = {part: [part] for part in dict.fromkeys(given) if part != "*"}
    return {**groups, "rest" if "rest" not in groups else "other": []}


def published_splits(task: str) -> dict[str, Any] | None:
    """Return the splits that a packaged suite has for a task of lm-eval; None where none searches on it."""
    for suite in SUITES:
        for row in load_yaml(preset_folder("benchmarks/suites") / f"{suite}.yaml")["tasks"]:
            splits = row.get("splits")
            if row.get("of", row.get("task")) == task and isinstance(splits, dict) and "search" in splits:
                return dict(splits)
    return None


def splits(task: str, limit: int | None, *, own: bool) -> dict[str, Any]:
    """Return the splits of a task. limit: items of `search`, if known. own: whether it may be the user's."""
    found = None if own else published_splits(task)
    if found is None or not all(isinstance(found[name], dict) for name in ("search", "select")):
        return {"search": limit or SEARCH, "select": limit or SELECT, "test": max(limit or 0, TEST)}
    if limit is not None:
        found["search"] = {**found["search"], "items": limit}
    return found


def tasks_dir(given: object, draft: Draft) -> str | None:
    """Return the folder of the suite's own task files, relative to the config."""
    if draft.options.tasks_dir is not None:
        return placed(str(draft.options.tasks_dir), draft.options.out)
    if not isinstance(given, str) or not given:
        return None
    if expanded(given).is_dir():
        return placed(given, draft.options.out)
    draft.note(f"the folder of task files, {given}, is not here; name it: --tasks-dir FOLDER")
    return None
