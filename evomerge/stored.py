"""A stored run: its folder opened once, with the config and suite it was begun with; what changed since.

A run goes on only with the config, models, tasks and device it was begun with. Models and the suite's file
may move: `StoredRun.config` takes their new places, and their contents are compared with the stored hashes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.config import PERMISSIONS, RunConfig, resolve_location, resolve_suite
from evomerge.errors import ConfigError, ModelError, StoreError, nearest
from evomerge.evaluation.suite import Suite
from evomerge.merging.sources.opening import open_sources
from evomerge.running import forward
from evomerge.running.budget import replaced
from evomerge.running.inputs import RunInputs, changed_models, facts_of, refuse_changed_suite
from evomerge.running.store import BASE, StoreReader, facts
from evomerge.running.store.file import FILE
from evomerge.schema import parse

OLDEST = "mean"
"""Kind of the objective of runs that were begun before there was a choice."""


class StoredRun:
    """A run folder with its store open, and the config and suite stored there.

    Use `read` for a run that is only looked at; a store that is open for writing can be passed instead.
    """

    def __init__(self, store: StoreReader) -> None:
        self.store = store

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Open a run for reading, also while a process works on it; raise StoreError where there is none."""
        return cls(StoreReader.read(folder))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.store.folder

    @functools.cached_property
    def suite(self) -> Suite:
        """The suite the run was begun with, from the store alone."""
        return Suite.from_store(facts.SUITE.require(self.store), f"{self.folder}: stored suite")

    def config(
        self, *, models: Mapping[str, str] | None = None, suite: str | None = None, **budget: Any
    ) -> RunConfig:
        """Return the config the run was begun with, without permissions; `out` is the folder it lies in now.

        models: name -> new place of models that were moved. suite: new place of its file. budget: single
        limits that replace the stored ones, as in `running.budget.replaced`.
        """
        data = facts.CONFIG.require(self.store)
        data = {key: value for key, value in data.items() if key not in PERMISSIONS}
        data["out"] = str(self.folder.absolute())
        data["objective"] = {"kind": OLDEST, **(data.get("objective") or {})}
        if isinstance(data.get("surrogate"), Mapping):
            data["surrogate"] = {"front": False, **data["surrogate"]}
        data["warm_start"] = {"gradients": "off", **(data.get("warm_start") or {})}
        _relocate(data, models or {}, suite)
        data["budget"] = replaced(data["budget"], budget, time.time())
        return parse(RunConfig, data, f"{self.folder}: stored config")

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> StoredRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- is this the run that was begun? ------------------------------------------------------------

    def check_same(self, begun: facts.Values, suite: Suite) -> None:
        """Refuse to continue the run where its config, models, tasks, lm-eval or device differ from this."""
        self.refuse_older()
        self._refuse_other_lm_eval()
        if facts.IDENTITY.get(self.store) != begun[facts.IDENTITY]:
            raise StoreError(
                f"{self.folder}: holds a run of another config",
                got=", ".join(_differences(facts.CONFIG.get(self.store), begun[facts.CONFIG]))
                or "other settings",
                fix="choose another `out`, or go on with the stored run: evomerge resume "
                + shlex.quote(str(self.folder)),
            )
        self.refuse_changed(begun)
        self.refuse_other_tasks(suite)
        if (before := facts.ARITHMETIC.get(self.store)) != begun[facts.ARITHMETIC]:
            raise StoreError(
                f"{self.folder}: device or dtype changed since the run began, "
                "so scores would not be comparable",
                expected=str(before),
                got=str(begun[facts.ARITHMETIC]),
                fix="restore what was there, or start a new run in another folder",
            )
        forward.check_same(self.store, forward.Forward(**begun[facts.FORWARD]))
        self._refuse_other_judges(begun.get(facts.JUDGES) or {})

    def _refuse_other_judges(self, judges: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse judges other than those of the run; raise StoreError."""
        before = facts.JUDGES.get(self.store) or {}
        for name in before:
            if name in judges and judges[name] != before[name]:
                raise StoreError(
                    f"{self.folder}: task {name!r} has another judge than the run began with",
                    expected=str(before[name]),
                    got=str(judges[name]),
                    fix="serve the model that the run began with, or start a new run in another folder",
                )

    def check_models(self) -> None:
        """Refuse models whose files are not those the run scored.

        Headers and samples of the weight files are compared, and all of config and tokenizer.

        Raises:
            ModelError: A model is not at its stored place.
            StoreError: Files changed; it names them.
        """
        config = self.config()
        _refuse_missing(config)
        sources = open_sources(
            config.locations, BASE, tokenizer=config.tokenizer, experts=config.models.experts
        )
        self.refuse_changed(
            {
                facts.FINGERPRINTS: {name: source.fingerprint for name, source in sources.items()},
                facts.MODEL_FILES: facts_of(sources, config.models.measured),
            }
        )

    def refuse_other_tasks(self, suite: Suite) -> None:
        """Refuse a suite with other tasks or task files than the run's; raise StoreError."""
        before = RunInputs(
            fingerprints={},
            files={},
            suite=facts.SUITE_DIGEST.require(self.store),
            task_files=facts.TASK_FILES.get(self.store) or {},
        )
        refuse_changed_suite(suite, before, where=f"{self.folder}: ", error=StoreError)

    def refuse_changed(self, present: facts.Values) -> None:
        """Refuse models that are not those of the run, by the facts FINGERPRINTS and MODEL_FILES."""
        before = RunInputs(
            fingerprints=facts.FINGERPRINTS.require(self.store),
            files=facts.MODEL_FILES.get(self.store) or {},
        )
        now = RunInputs(fingerprints=present[facts.FINGERPRINTS], files=present[facts.MODEL_FILES])
        if changed := changed_models(before, now):
            raise StoreError(
                f"{self.folder}: model files changed since the run began",
                got=changed,
                fix="put the old files back, or start a new run in another folder",
            )

    def refuse_older(self) -> None:
        """Refuse to go on with a run migrated from a version whose search can't be replayed."""
        self._refuse_migrated()
        objective = facts.CONFIG.require(self.store).get("objective") or {}
        limits = any(limit is not None for limit in objective.get("constraints", {}).values())
        if "kind" not in objective and limits and not objective.get("several"):
            raise StoreError(
                f"{self.folder}: begun by an older evomerge, which ranked candidates by their constraints",
                expected="a run whose constraints have a price",
                fix="`status`, `report` and `export` work here; to search on, start a new run with "
                f"warm_start: {{run: {self.folder}}}",
            )

    def _refuse_migrated(self) -> None:
        if (migrated := facts.MIGRATED.get(self.store)) is not None and not migrated["continues"]:
            raise StoreError(
                f"{self.folder}: begun by an older evomerge, whose search this version can't replay",
                expected=f"evomerge {self.store.versions().get('evomerge', 'of its time')} and its store, "
                f"{FILE}.version-{migrated['schema']}, to finish it",
                fix="`status`, `report` and `export` work here; to search on, start a new run with "
                f"warm_start: {{run: {self.folder}}}",
            )

    def _refuse_other_lm_eval(self) -> None:
        """Refuse to score with another version of lm-eval: its prompts and metrics may differ."""
        now = importlib.metadata.version("lm_eval")
        if (before := self.store.versions().get("lm_eval", now)) != now:
            raise StoreError(
                f"{self.folder}: lm-eval changed since the run began, so scores would not be comparable",
                expected=before,
                got=now,
                fix=f"pip install lm_eval=={before}, or start a new run in another folder",
            )

    def check_hashes(self, hashes: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse models that changed in any byte since the run stored hashes of them, if it did."""
        before = facts.FULL_HASHES.get(self.store) or {}
        changed = {
            name: [file for file, hash_ in files.items() if before.get(name, files).get(file) != hash_]
            for name, files in hashes.items()
        }
        if any(changed.values()):
            raise StoreError(
                f"{self.folder}: model files changed since every byte of them was hashed",
                got="; ".join(
                    f"{name}: {', '.join(f'{file} (other contents)' for file in files)}"
                    for name, files in changed.items()
                    if files
                ),
                fix="put the old files back, or start a new run in another folder",
            )


def config_to_resume(
    folder: Path, *, models: Mapping[str, str] | None = None, suite: str | None = None, **budget: Any
) -> RunConfig:
    """Return the config to go on with, as in `StoredRun.config`.

    Raises StoreError where a process works on the run or its search can't be replayed, and ModelError where
    models are not at their stored places.
    """
    StoreReader.refuse_held(folder)
    with StoredRun.read(folder) as run:
        run.refuse_older()
        config = run.config(models=models, suite=suite, **budget)
    _refuse_missing(config)
    return config


def environment_note(folder: Path) -> str | None:
    """Say what of libraries, processor and kernels changed since a run was begun, None if nothing."""
    if not StoreReader.exists(folder):
        return None
    with StoreReader.read(folder) as store:
        changes = forward.changes(store.versions(), forward.versions())
    return None if changes is None else forward.warning(changes)


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Name the settings in which two stored configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        settings: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            if not place and key in ("budget", "out"):
                continue
            settings += _differences(old.get(key), new.get(key), f"{place}{key}.")
        return settings
    return [] if old == new else [f"{place.rstrip('.')} {old!r} there, {new!r} here"]


def _relocate(data: dict[str, Any], models: Mapping[str, str], suite: str | None) -> None:
    """Write the present places of models and suite into a stored config; raise ConfigError.

    models: name -> place, relative to the working directory.
    """
    places = {BASE: data["models"]["base"], **data["models"]["sources"]}
    for name, place in models.items():
        if name not in places:
            raise ConfigError(f"--model {name}={place}: no such model", fix=nearest(name, places))
        places[name] = resolve_location(place, Path.cwd())
    data["models"] = {**data["models"], "base": places.pop(BASE), "sources": places}
    if suite is not None:
        data["suite"] = resolve_suite(suite, Path.cwd())


def _refuse_missing(config: RunConfig) -> None:
    """Raise ModelError where models are not at their stored places, with the command that names new ones."""
    missing = [name for name, place in config.locations.items() if not all(map(_is_there, place.split("+")))]
    if missing:
        options = " ".join(f"--model {name}=PATH" for name in missing)
        raise ModelError(
            "models of this run are not where they were",
            got="; ".join(f"{name}: {config.locations[name]}" for name in missing),
            fix=f"put them back, or give their paths: evomerge resume {shlex.quote(config.out)} {options}",
        )


def _is_there(place: str) -> bool:
    return not Path(place).is_absolute() or Path(place).exists()  # a hub id
