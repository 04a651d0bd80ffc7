"""A new store from what is whole in a damaged one, such that the run goes on in it and ends in the same bits.

The search is always replayed from its generation 0, so nothing but scores is worth saving at any price: what
is missing is asked, scored and told again. Kept are rows that are whole, as far as they belong together:

- scores of a recipe on an item block, if all tasks are there;
- asks, tells, fronts and the surrogate's states, if all asks are there, because the size of a generation is
  not known otherwise;
- named rows, but not finalists and winner: the search ends anew;
- facts; those that a run is begun with and that were lost come from its config.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.files import drafted_folder
from evomerge.running.store import facts, schema
from evomerge.running.store.file import FILE, disk
from evomerge.running.store.inspection import Inspection, expected, filled
from evomerge.running.store.queries import StoreReader
from evomerge.running.store.store import write_facts

Record = Mapping[str, Any]
ENDED = {facts.STOPPED.key, facts.STORE_ID.key}
"""Facts of a run's end, and of the old store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """The new store: its folder, and how many rows of each table were kept of those that were whole."""

    folder: Path
    kept: Mapping[str, int]
    whole: Mapping[str, int]


def lost(old: Inspection, begun: Iterable[facts.Fact[Any]]) -> list[str]:
    """Return which of some facts are lost, by key."""
    there = {record["key"] for record in old.tables["run"].records()}
    return [fact.key for fact in begun if fact.key not in there]


def salvage(old: Inspection, out: Path, begun: facts.Values, tasks: Mapping[str, list[str]]) -> Salvaged:
    """Write a new store into the folder `out`, which must not exist or be empty.

    begun: values of facts that were lost. tasks: split -> names of its tasks, from the suite.

    Raises:
        DiskError: The folder can't be written.
    """
    records: dict[str, list[Record]] = {name: list(state.records()) for name, state in old.tables.items()}
    kept = _kept(old, records, tasks)
    with drafted_folder(out) as draft, disk(out):
        with contextlib.closing(sqlite3.connect(draft / FILE)) as db:
            schema.lay_out(db)
            with db:
                number = write_facts(db, begun)
                for table, columns in expected().items():
                    for record in kept[table]:
                        schema.insert(db, table, filled(table, columns, record), number, instead="IGNORE")
            db.execute("PRAGMA journal_mode=WAL")
        StoreReader.read(draft).close()
    return Salvaged(
        folder=out,
        kept={name: len(rows) for name, rows in kept.items()},
        whole={name: len(rows) for name, rows in records.items()},
    )


def _kept(
    old: Inspection, records: Mapping[str, list[Record]], tasks: Mapping[str, list[str]]
) -> dict[str, list[Record]]:
    recipes = {record["hash"] for record in records["recipe"]}
    kept = {
        table: [row for row in rows if row.get("recipe") is None or row["recipe"] in recipes]
        for table, rows in records.items()
    }
    kept["run"] = [row for row in kept["run"] if row["key"] not in ENDED]
    kept["entry"] = [row for row in kept["entry"] if row["role"] not in ("finalist", "winner")]
    if not old.tables["ask"].whole or len(kept["ask"]) < len(records["ask"]) or old.contradictions:
        for table in ("ask", "tell", "front", "guide"):
            kept[table] = []
    if _lost_batch_sizes(old):
        kept["score"] = []  # it is lost which of them were scored alike
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for row in kept["score"]:
        groups.setdefault((row["recipe"], row["split"], row.get("block", 0)), []).append(row)
    whole = {
        key: rows
        for key, rows in groups.items()
        if [row["task"] for row in sorted(rows, key=lambda row: row["position"])] == tasks.get(key[1])
    }
    kept["score"] = [row for rows in whole.values() for row in rows]
    kept["timing"] = [
        row for row in kept["timing"] if (row["recipe"], row["split"], row.get("block", 0)) in whole
    ]
    return kept


def _lost_batch_sizes(old: Inspection) -> bool:
    return any(facts.BATCH_SIZES.key in words for words in old.tables["run"].damaged)
