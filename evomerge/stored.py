"""Is this the run that was begun? Configs, models and tasks held against what a run has stored."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.config import RunConfig, resolve_location, resolve_suite
from evomerge.errors import ConfigError, ModelError, StoreError, nearest
from evomerge.merging.sources import model_files
from evomerge.merging.sources.opening import open_sources
from evomerge.running import forward
from evomerge.running.store import BASE, StoreReader, facts
from evomerge.running.store.file import FILE


def check_same(store: StoreReader, begun: facts.Values) -> None:
    """Refuse to go on with a stored run whose config, models, tasks or device are not these."""
    folder = store.folder
    refuse_older(store)
    if facts.IDENTITY.get(store) != begun[facts.IDENTITY]:
        raise StoreError(
            f"{folder}: holds a run of another config",
            got=", ".join(_differences(facts.CONFIG.get(store), begun[facts.CONFIG])) or "other settings",
            fix="choose another `out`, or go on with the stored run: evomerge resume "
            + shlex.quote(str(folder)),
        )
    if changed := _changed(store, begun):
        raise StoreError(
            f"{folder}: model files changed since the run began",
            got="; ".join(f"{name}: {what}" for name, what in changed.items()),
            fix="put the old files back, or start a new run in another folder",
        )
    checks = ((facts.SUITE_DIGEST, "the suite or its task files"), (facts.ARITHMETIC, "device or dtype"))
    for fact, what in checks:
        if fact.get(store) != begun[fact]:
            raise StoreError(
                f"{folder}: {what} changed since the run began, so scores would not be comparable",
                expected=str(fact.get(store)),
                got=str(begun[fact]),
                fix="restore what was there, or start a new run in another folder",
            )
    forward.check_same(store, forward.Forward(**begun[facts.FORWARD]))


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Name the settings in which two stored configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            if not place and key in ("budget", "out"):
                continue
            found += _differences(old.get(key), new.get(key), f"{place}{key}.")
        return found
    return [] if old == new else [f"{place.rstrip('.')} {old!r} there, {new!r} here"]


def refuse_older(store: StoreReader) -> None:
    """Refuse to go on with a run that was migrated from a version whose search can't be replayed."""
    folder = store.folder
    if (migrated := facts.MIGRATED.get(store)) is not None and not migrated["continues"]:
        raise StoreError(
            f"{folder}: begun by an older evomerge, whose search this version can't replay",
            expected=f"evomerge {store.versions().get('evomerge', 'of its time')} and its store, "
            f"{FILE}.version-{migrated['schema']}, to finish it",
            fix="`status`, `report` and `export` work here; to search on, start a new run with "
            f"warm_start: {{run: {folder}}}",
        )


def _changed(store: StoreReader, begun: facts.Values) -> dict[str, str]:
    """Return model -> which of its files changed, and how."""
    before, files = facts.FINGERPRINTS.require(store), facts.MODEL_FILES.get(store) or {}
    found = {}
    for name, print_ in begun[facts.FINGERPRINTS].items():
        differ = model_files.changes(files[name], begun[facts.MODEL_FILES][name]) if name in files else []
        if differ or before.get(name) != print_:
            found[name] = ", ".join(differ) or "config, headers, sizes or weights"
    return found


def full_hashes(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return model -> file -> hash of all its bytes."""
    sources = open_sources(config.locations, BASE, tokenizer=config.tokenizer)
    return {name: model_files.full_hashes(source) for name, source in sources.items()}


def check_hashes(store: StoreReader, hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse models of which some byte changed since hashes were last asked for, if they were."""
    before = facts.FULL_HASHES.get(store) or {}
    changed = {
        name: [file for file, found in files.items() if before.get(name, files).get(file) != found]
        for name, files in hashes.items()
    }
    if any(changed.values()):
        raise StoreError(
            f"{store.folder}: model files changed since every byte of them was hashed",
            got="; ".join(
                f"{name}: {', '.join(f'{file} (other contents)' for file in files)}"
                for name, files in changed.items()
                if files
            ),
            fix="put the old files back, or start a new run in another folder",
        )


def relocate(data: dict[str, Any], models: Mapping[str, str], suite: str | None) -> None:
    """Write into a stored config where models and suite lie now; raise ConfigError, ModelError.

    models: name -> place, relative to where the command is started.
    """
    places = {BASE: data["models"]["base"], **data["models"]["sources"]}
    for name, place in models.items():
        if name not in places:
            raise ConfigError(f"--model {name}={place}: no such model", fix=nearest(name, places))
        places[name] = resolve_location(place, Path.cwd())
    data["models"] = {"base": places.pop(BASE), "sources": places}
    if suite is not None:
        data["suite"] = resolve_suite(suite, Path.cwd())


def refuse_missing(config: RunConfig) -> None:
    """Raise ModelError where models are not where a stored run had them, saying how to name them anew."""
    missing = [name for name, place in config.locations.items() if not all(map(_is_there, place.split("+")))]
    if missing:
        options = " ".join(f"--model {name}=PATH" for name in missing)
        raise ModelError(
            "models of this run are not where they were",
            got="; ".join(f"{name}: {config.locations[name]}" for name in missing),
            fix=f"put them back, or say where they are: evomerge resume {shlex.quote(config.out)} {options}",
        )


def _is_there(place: str) -> bool:
    return not Path(place).is_absolute() or Path(place).exists()  # hub ids are not ours to judge
