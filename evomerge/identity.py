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
from evomerge.running.store import BASE, RunStore, migrations
from evomerge.running.store.file import FILE

FILES, HASHES = "model_files", "full_hashes"
"""The facts about the models' files: what can be known at once, and of every byte where it was asked for."""


def check_same(store: RunStore, facts: dict[str, Any]) -> None:
    """Refuse to go on with a stored run whose config, models, tasks or device are not these."""
    folder = store.folder
    refuse_older(store)
    if store.fact("identity") != facts["identity"]:
        raise StoreError(
            f"{folder}: holds a run of another config",
            got=", ".join(_differences(store.fact("config"), facts["config"])) or "other settings",
            fix="choose another `out`, or go on with the stored run: evomerge resume "
            + shlex.quote(str(folder)),
        )
    if changed := _changed(store, facts):
        raise StoreError(
            f"{folder}: model files changed since the run began",
            got="; ".join(f"{name}: {what}" for name, what in changed.items()),
            fix="put the old files back, or start a new run in another folder",
        )
    for key, what in (("suite_digest", "the suite or its task files"), ("arithmetic", "device or dtype")):
        if store.fact(key) != facts[key]:
            raise StoreError(
                f"{folder}: {what} changed since the run began, so scores would not be comparable",
                expected=str(store.fact(key)),
                got=str(facts[key]),
                fix="restore what was there, or start a new run in another folder",
            )
    forward.check_same(store, forward.Forward(**facts[forward.FACT]))


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


def refuse_older(store: RunStore) -> None:
    """Refuse to go on with a run that was migrated from a version whose search can't be replayed."""
    folder = store.folder
    if (migrated := store.fact(migrations.FACT)) is not None and not migrated["continues"]:
        raise StoreError(
            f"{folder}: begun by an older evomerge, whose search this version can't replay",
            expected=f"evomerge {store.versions().get('evomerge', 'of its time')} and its store, "
            f"{FILE}.version-{migrated['schema']}, to finish it",
            fix="`status`, `report` and `export` work here; to search on, start a new run with "
            f"warm_start: {{run: {folder}}}",
        )


def _changed(store: RunStore, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return model -> which of its files changed, and how."""
    before, files = store.fact("fingerprints"), store.fact(FILES) or {}
    found = {}
    for name, print_ in facts["fingerprints"].items():
        differ = model_files.changes(files[name], facts[FILES][name]) if name in files else []
        if differ or before.get(name) != print_:
            found[name] = ", ".join(differ) or "config, headers, sizes or weights"
    return found


def full_hashes(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return model -> file -> hash of all its bytes."""
    sources = open_sources(config.locations, BASE, tokenizer=config.tokenizer)
    return {name: model_files.full_hashes(source) for name, source in sources.items()}


def check_hashes(store: RunStore, hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse models of which some byte changed since hashes were last asked for, if they were."""
    before = store.fact(HASHES) or {}
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
