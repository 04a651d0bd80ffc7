"""What is whole in a run folder, and a new run from that."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from evomerge.config import RunConfig
from evomerge.delivery.style import numbers, table, words
from evomerge.errors import StoreError, UserError
from evomerge.evaluation.scores import SPLITS
from evomerge.evaluation.suite import Suite
from evomerge.prepare import prepare, run_facts
from evomerge.running.store import StoreReader, facts, migrations
from evomerge.running.store.file import FILE
from evomerge.running.store.inspection import MISSING, Inspection
from evomerge.running.store.salvage import Salvaged, lost, salvage
from evomerge.running.store.schema import SCHEMA_VERSION
from evomerge.schema import parse
from evomerge.stored import StoredRun

BEGUN = (
    facts.CONFIG,
    facts.IDENTITY,
    facts.SUITE,
    facts.SUITE_DIGEST,
    facts.FINGERPRINTS,
    facts.MODEL_FILES,
    facts.BLOCKS,
    facts.LAYERS,
    facts.OPTIMIZER,
    facts.FORWARD,
    facts.ARITHMETIC,
)
"""The facts that every run is begun with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A run folder, the inspection of its store, and all that is wrong in it, in one line each."""

    folder: Path
    version: int
    inspection: Inspection
    problems: tuple[str, ...]

    def refuse(self) -> None:
        """Raise StoreError where something is wrong."""
        if self.problems:
            more = f", and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            run = shlex.quote(str(self.folder))
            raise StoreError(
                f"{self.folder / FILE}: the run store is damaged",
                got=self.problems[0] + more,
                fix=f"make a new run of what is whole: evomerge doctor {run} --salvage NEW_FOLDER; "
                "then: evomerge resume NEW_FOLDER",
            )


def examine(folder: Path) -> Diagnosis:
    """Inspect a run folder, also while a process works on it.

    Raises:
        StoreError: There is no store, or one of which nothing can be read.
    """
    try:
        with StoreReader.unchecked(folder) as store:
            diagnosis = _diagnosis(store)
            if diagnosis.problems and (foreign := store.foreign_log()) is not None:
                raise foreign
        if diagnosis.inspection.readable:
            return diagnosis
        refused = StoreError(f"{folder / FILE}: the run store is damaged", got=diagnosis.problems[0])
    except StoreError as error:
        refused = error
    torn = "is damaged" in refused.what or "not a run store" in refused.what  # as a torn header looks, too
    if torn and (copy := StoreReader.rescued(folder)) is not None:
        with copy as store:
            diagnosis = _diagnosis(store, "the first page was damaged: the header and the list of tables")
        if diagnosis.inspection.readable and not lost(diagnosis.inspection, [facts.STORE_ID]):
            return diagnosis
    raise StoreError(
        refused.what,
        expected=refused.expected,
        got=refused.got,
        fix="nothing in it can be read: restore the file from a backup, or start a new run in another folder"
        if "is damaged" in refused.what
        else refused.fix,
    )


def _diagnosis(store: StoreReader, *more: str) -> Diagnosis:
    version, inspection = store.version(), store.inspection()
    problems = [*more, *inspection.problems()]
    if version < SCHEMA_VERSION:
        problems = [problem for problem in problems if not problem.endswith(f": {MISSING}")]
    elif not problems:
        problems += _meaning(StoredRun(store))
    return Diagnosis(folder=store.folder, version=version, inspection=inspection, problems=tuple(problems))


def _meaning(run: StoredRun) -> list[str]:
    """Say which facts are missing, or hold what is no config and no suite."""
    migrated = facts.MIGRATED.get(run.store)
    if migrated is not None and not migrated["continues"]:
        return []
    missing = [f"fact {fact.key}: missing" for fact in BEGUN if fact.get(run.store) is None]
    if missing:
        return missing
    problems = []
    for name, read in (("config", run.config), ("suite", lambda: run.suite)):
        try:
            read()
        except UserError as error:
            problems.append(f"fact {name}: {error.what}")
    return problems


def save(diagnosis: Diagnosis, out: Path, config: Path | None) -> Salvaged:
    """Write a new run of what is whole into a folder.

    config: the run's config file, needed where the stored config is lost.

    Raises:
        StoreError: A process works on the run, or its config is lost.
    """
    StoreReader.refuse_held(diagnosis.folder)
    inspection = diagnosis.inspection
    stored = {row["key"]: row["value"] for row in inspection.tables["run"].records()}
    missing = lost(inspection, BEGUN)
    begun: facts.Values = {}
    if missing:
        begun = _begun_anew(diagnosis.folder, stored, out, config)
        begun = {fact: value for fact, value in begun.items() if fact.key not in stored}
    if diagnosis.version < SCHEMA_VERSION and facts.MIGRATED.key not in stored:
        begun = {**begun, facts.MIGRATED: migrations.history(diagnosis.version, inspection)}
    suite = begun.get(facts.SUITE) or json.loads(stored[facts.SUITE.key])
    parsed = Suite.from_store(suite, f"{diagnosis.folder}: stored suite")
    tasks: dict[str, list[str]] = {
        split: [task.task for task in parsed.tasks if getattr(task.splits, split) is not None]
        for split in SPLITS
    }
    return salvage(inspection, out, begun, tasks)


def _begun_anew(folder: Path, stored: dict[str, str], out: Path, config: Path | None) -> facts.Values:
    """Return the facts a run is begun with, from its stored config or the file of it."""
    if facts.CONFIG.key in stored:
        data = json.loads(stored[facts.CONFIG.key]) | {"out": str(out.absolute())}
        return run_facts(prepare(parse(RunConfig, data, f"{folder}: stored config")))
    if config is None:
        raise StoreError(
            f"{folder}: the stored config is lost",
            fix="name the config file that the run was started with: --config CONFIG",
        )
    begun = run_facts(prepare(RunConfig.load(config, out=str(out))))
    identity = stored.get(facts.IDENTITY.key)
    if identity is not None and json.loads(identity) != begun[facts.IDENTITY]:
        raise StoreError(f"{config}: not the config of the run in {folder}", fix="name that one")
    return begun


def text(diagnosis: Diagnosis) -> Table:
    """Return the tables of a store with their whole and damaged rows."""
    shown = table(
        words("table"),
        numbers("rows whole"),
        numbers("rows damaged"),
        words("problem"),
        title=f"{diagnosis.folder / FILE}, schema version {diagnosis.version}",
    )
    for name, state in diagnosis.inspection.tables.items():
        note = state.unreadable or next(iter(state.damaged), "")
        shown.add_row(name, str(len(state.rows)), str(len(state.damaged)), note)
    return shown


def saved_text(saved: Salvaged) -> str:
    """Return what was kept, and the command that goes on."""
    rows = ", ".join(f"{name} {count} of {saved.whole[name]}" for name, count in saved.kept.items() if count)
    return f"rows saved: {rows}\ngo on with: evomerge resume {shlex.quote(str(saved.folder))}"


def as_data(diagnosis: Diagnosis, saved: Salvaged | None = None) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "run": str(diagnosis.folder),
        "schema": diagnosis.version,
        "whole": not diagnosis.problems,
        "problems": list(diagnosis.problems),
        "tables": {
            name: {"whole": len(state.rows), "damaged": len(state.damaged), "unreadable": state.unreadable}
            for name, state in diagnosis.inspection.tables.items()
        },
        "salvaged": None if saved is None else {"folder": str(saved.folder), "rows": dict(saved.kept)},
    }
