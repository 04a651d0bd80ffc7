"""Reading a run store: everything that can be asked of it, while the run goes on or after it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import StoreError
from evomerge.evaluation.scores import SPLITS, Failure, Question, Scores, Split, TaskScores, joined
from evomerge.merging.recipe import Recipe
from evomerge.running.store import facts, schema
from evomerge.running.store.file import (
    FILE,
    check_file,
    connect,
    content_state,
    damaged,
    disk,
    foreign_log,
    held_by,
    holder,
    rescued,
    snapshot,
    without_log,
)
from evomerge.running.store.inspection import Inspection, inspect
from evomerge.running.store.schema import (
    BASE,
    Generation,
    StoredFront,
    Timing,
    unpack,
    unpack_json,
)
from evomerge.search.ports import GuideState, Named

_whole: dict[Path, object] = {}
"""File -> the state in which this process found it whole."""


class StoreReader:
    """The store of one run, for reading; works while another process writes it.

    Use `read` rather than the constructor.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._db = connection
        self._blocks: int | None = None

    # -- opening and closing ------------------------------------------------------------------------

    @staticmethod
    def read(folder: Path) -> StoreReader:
        """Open an existing run for reading, also while it is running.

        A store that no process has open is read into memory: that leaves none of SQLite's own files behind,
        and a writer that starts meanwhile can't change what is read.

        Raises:
            StoreError: no run, damage, another program's file, or another schema version.
        """
        return StoreReader.unchecked(folder)._checked()

    @staticmethod
    def unchecked(folder: Path) -> StoreReader:
        """Open a run for reading, damaged or of an older version as it may be."""
        check_file(folder)
        copy = None if holder(folder) is not None else snapshot(folder / FILE)
        db = copy
        if db is None:
            db = connect(folder / FILE, readonly=True)
            db.execute("BEGIN")  # all that is read is of one moment, while a process writes on
        return StoreReader(folder, db)

    @staticmethod
    def rescued(folder: Path) -> StoreReader | None:
        """Open a store whose first page is damaged, as a copy with a new one; None where that is no help."""
        path = folder / FILE
        if not path.is_file() or (copy := rescued(path)) is None:
            return None
        return StoreReader(folder, copy)

    def version(self) -> int:
        """Return the schema version of the store."""
        return int(self._row("PRAGMA user_version")[0])

    def inspection(self) -> Inspection:
        """Inspect all that is stored, contents too."""
        return inspect(self._db, contents=True)

    def held(self) -> bool:
        """Say whether a process is working on the run right now."""
        return holder(self.folder) is not None

    @staticmethod
    def refuse_held(folder: Path) -> None:
        """Raise StoreError where a process is working on the run in a folder, naming it."""
        if (name := holder(folder)) is not None:
            raise held_by(name, folder)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Say whether the folder holds a run."""
        return (folder / FILE).exists()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self) -> Self:
        """Check version and contents; close the store where they are wrong."""
        try:
            version = self.version()
            if version != schema.SCHEMA_VERSION:
                raise StoreError(
                    f"{self.folder / FILE}: written by an older version of evomerge",
                    expected=f"schema version {schema.SCHEMA_VERSION}",
                    got=str(version),
                    fix=f"bring it up to date, a copy is kept: evomerge migrate {self.folder}",
                )
            path = (self.folder / FILE).absolute()
            state = content_state(path)
            if _whole.get(path) != state:  # a command opens a store several times
                problem = next(inspect(self._db).problems(), None)
                if problem is not None:
                    raise self.foreign_log() or damaged(self.folder, problem)
                _whole[path] = state
        except BaseException:
            self.close()
            raise
        return self

    def foreign_log(self) -> StoreError | None:
        """Return the error for a store that is whole without the log beside it, None where it is not so."""
        path = self.folder / FILE
        live = bool(self._row("PRAGMA database_list")[2])  # in its writer's hands, and then so is the log
        if live or (alone := without_log(path)) is None:
            return None
        with contextlib.closing(alone):
            return None if any(inspect(alone).problems()) else foreign_log(path)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with disk(self.folder):
            return self._db.execute(query, values).fetchall()

    def _row(self, query: str, values: Sequence[Any] = ()) -> Any:
        return next(iter(self._rows(query, values)), None)

    # -- facts ------------------------------------------------------------------------------------

    def read_value(self, key: str) -> Any:
        """Return the JSON value under a key of the table `run`, or None; `facts` declares the keys."""
        row = self._row("SELECT value FROM run WHERE key = ?", (key,))
        return None if row is None else json.loads(row[0])

    def gradient_items(self) -> int:
        """Return what the gradients of this run cost, in items of one forward pass."""
        query = "SELECT SUM(json_extract(value, '$.items')) FROM run WHERE key GLOB ?"
        return self._row(query, (facts.GRADIENT.pattern,))[0] or 0

    def gradient_failures(self) -> list[tuple[int, str]]:
        """Return for each gradient that failed how many did not, and why it failed."""
        query = (
            "SELECT json_extract(value, '$.reason'), SUM(json_extract(value, '$.reason') IS NULL) OVER () "
            "FROM run WHERE key GLOB ?"
        )
        rows = self._db.execute(query, (facts.GRADIENT.pattern,)).fetchall()
        return [(int(followed), str(reason)) for reason, followed in rows if reason is not None]

    def blocks(self, split: Split) -> int:
        """Return how many item blocks a split has in this run (fact `blocks`, for `search`)."""
        if self._blocks is None:
            self._blocks = facts.BLOCKS.get(self) or 1
        return self._blocks if split == "search" else 1

    # -- sessions -------------------------------------------------------------------------------

    def hours(self) -> float:
        """Return the hours worked on the run so far, all sessions together."""
        (seconds,) = self._row("SELECT COALESCE(SUM(last - started), 0) FROM session")
        return cast(float, seconds) / 3600

    def versions(self) -> dict[str, str]:
        """Return the library versions of the first session."""
        return next(iter(self.sessions()), {})

    def sessions(self) -> list[dict[str, str]]:
        """Return the library versions of every session, in order."""
        rows = self._rows("SELECT versions FROM session ORDER BY started")
        return [json.loads(row[0]) for row in rows]

    # -- the search -----------------------------------------------------------------------------

    def has_ask(self, generation: int) -> bool:
        """Say whether the generation's genomes are stored."""
        return self._row("SELECT 1 FROM ask WHERE generation = ?", (generation,)) is not None

    def arrivals(self) -> list[str]:
        """Return the recipes (hashes) of all candidates asked, in order; asynchronous: in that of arrival."""
        return [hash_ for (hash_,) in self._rows("SELECT recipe FROM ask ORDER BY generation, position")]

    def proposed(self) -> int:
        """Return how many candidates an asynchronous search has proposed, 0 for others."""
        return facts.PROPOSED.get(self) or 0

    def generations(self) -> list[Generation]:
        """Return all generations in order; the last may not have been told."""
        asks: dict[int, list[tuple[bytes, str]]] = {}
        for number, genome, recipe in self._rows(
            "SELECT generation, genome, recipe FROM ask ORDER BY generation, position"
        ):
            asks.setdefault(number, []).append((genome, recipe))
        tells = {n: (b, s) for n, b, s in self._rows("SELECT generation, losses, seconds FROM tell")}
        return [
            Generation(
                number=number,
                recipes=tuple(recipe for _, recipe in rows),
                genomes=np.stack([np.frombuffer(genome, dtype="<f8") for genome, _ in rows]),
                losses=_losses(tells, number, len(rows)),
                seconds=tells[number][1] if number in tells else 0.0,
            )
            for number, rows in asks.items()
        ]

    def fronts(self) -> list[StoredFront]:
        """Return the Pareto front after each generation, in order; empty for runs with one objective."""
        query = "SELECT generation, hypervolume, reference, recipes FROM front ORDER BY generation"
        return [
            StoredFront(
                generation=number,
                hypervolume=volume,
                reference=tuple(json.loads(reference)),
                recipes=tuple(json.loads(recipes)),
            )
            for number, volume, reference, recipes in self._rows(query)
        ]

    def guide(self) -> list[GuideState]:
        """Return what the surrogate did, generation by generation; nothing where there is none."""
        query = "SELECT correlation, proposed, blocks, radius FROM guide ORDER BY generation"
        return [GuideState(correlation=c, proposed=p, blocks=b, radius=r) for c, p, b, r in self._rows(query)]

    def recipe(self, start: str) -> Recipe:
        """Return the recipe whose hash begins with `start`, or raise StoreError.

        Its models are where the stored config says.
        """
        query = "SELECT data FROM recipe WHERE substr(hash, 1, ?) = ? LIMIT 2"
        rows = self._rows(query, (len(start), start))
        if len(rows) != 1:
            count = "more than one" if rows else "no"
            raise StoreError(f"{self.folder}: {count} recipe has a hash starting with {start!r}")
        models = facts.CONFIG.require(self)["models"]
        return Recipe.from_data(
            {**json.loads(rows[0][0]), "models": {BASE: models["base"], **models["sources"]}}
        )

    def entries(self, role: str) -> list[Named]:
        """Return the named rows of a role, in order."""
        query = "SELECT name, recipe FROM entry WHERE role = ? ORDER BY position"
        rows = self._rows(query, (role,))
        return [Named(name=name, recipe=self.recipe(hash_)) for name, hash_ in rows]

    # -- scores ---------------------------------------------------------------------------------

    def result(self, recipe: str, split: Split, block: int | None = None) -> Scores | Failure | None:
        """Return what is stored about a recipe (by hash) on a block of a split, or None.

        block: None means the whole split; then there is an answer once all its blocks are scored, or one
        has failed.
        """
        numbers = range(self.blocks(split)) if block is None else (block,)
        parts = [self._part(recipe, split, number) for number in numbers]
        scored = [part for part in parts if part is not None]
        if len(scored) == len(parts):
            return joined(scored)
        query = "SELECT kind, reason FROM failure WHERE recipe = ? AND split = ?"
        row = self._row(query, (recipe, split))
        return None if row is None else Failure(kind=row[0], reason=row[1])

    def _part(self, recipe: str, split: Split, block: int) -> Scores | None:
        query = (
            "SELECT task, metric, smooth, margin, tokens, texts FROM score "
            "WHERE recipe = ? AND split = ? AND block = ? ORDER BY position"
        )
        rows = self._rows(query, (recipe, split, block))
        tasks = tuple(
            TaskScores(
                task=task,
                metric=unpack(metric),
                smooth=_unpack_column(smooth),
                margin=_unpack_column(margin),
                tokens=_unpack_column(tokens),
                texts=None if texts is None else tuple(map(tuple, unpack_json(texts))),
            )
            for task, metric, smooth, margin, tokens, texts in rows
        )
        return Scores(split=split, tasks=tasks, blocks=(block,)) if tasks else None

    def questions(self, split: Split, block: int) -> dict[str, list[Question]]:
        """Return the stored questions of an item block by task, in item order."""
        query = "SELECT task, questions FROM item WHERE split = ? AND block = ?"
        rows = self._rows(query, (split, block))
        return {task: [Question(*fields) for fields in unpack_json(blob)] for task, blob in rows}

    def scored_blocks(self, split: Split) -> dict[str, tuple[int, ...]]:
        """Return the blocks of a split on which each recipe (by hash) is scored, in order."""
        query = "SELECT DISTINCT recipe, block FROM score WHERE split = ? ORDER BY recipe, block"
        blocks_by_recipe: dict[str, list[int]] = {}
        for recipe, block in self._rows(query, (split,)):
            blocks_by_recipe.setdefault(recipe, []).append(block)
        return {recipe: tuple(blocks) for recipe, blocks in blocks_by_recipe.items()}

    def failures(self) -> list[tuple[str, Split, Failure]]:
        """Return (recipe hash, split, failure) of everything that failed, oldest first."""
        query = "SELECT recipe, split, kind, reason FROM failure ORDER BY at"
        return [(r, s, Failure(kind=k, reason=why)) for r, s, k, why in self._rows(query)]

    def timings(self, split: Split) -> dict[str, Timing]:
        """Return the timings of everything scored on a split, by recipe hash; blocks are added up.

        worker: the one that scored the last of its blocks.
        """
        query = (
            "SELECT recipe, TOTAL(seconds), TOTAL(merge_seconds), TOTAL(forward_seconds), worker, MAX(at) "
            "FROM timing WHERE split = ? GROUP BY recipe"
        )
        rows = [row[:5] for row in self._rows(query, (split,))]
        return {r: Timing(total=t, merge=m, forward=f, worker=w) for r, t, m, f, w in rows}

    def split_items(self) -> dict[Split, int]:
        """Return the number of items of each split, where the base is scored on it or the suite says it."""
        tasks = (facts.SUITE.get(self) or {}).get("tasks", [])
        items: dict[Split, int] = {}
        base = self._row("SELECT recipe FROM entry WHERE role = 'base'")
        for split in SPLITS:
            parts = [task["splits"][split] for task in tasks if task["splits"][split] is not None]
            counts = [part["items"] if isinstance(part, dict) else part for part in parts]
            if base is not None and isinstance(scores := self.result(base[0], split), Scores):
                items[split] = scores.items
            elif counts and all(isinstance(count, int) for count in counts):
                items[split] = sum(counts)
        return items

    def untimed(self, roles: Sequence[str], split: Split) -> list[str]:
        """Return the recipes (hashes) of some roles, as in `record_entry`, that are not scored on a split."""
        query = (
            f"SELECT DISTINCT recipe FROM entry WHERE role IN ({', '.join('?' * len(roles))}) "
            "AND recipe NOT IN (SELECT recipe FROM timing WHERE split = ?) ORDER BY recipe"
        )
        return [recipe for (recipe,) in self._rows(query, (*roles, split))]

    def longest_of_last_generation(self) -> float | None:
        """Return the seconds on `search` of the candidate of the last told generation that took longest."""
        query = (
            "SELECT TOTAL(seconds) AS total FROM ask JOIN timing ON timing.recipe = ask.recipe "
            "AND split = 'search' WHERE generation = (SELECT MAX(generation) FROM tell) "
            "GROUP BY position ORDER BY total DESC LIMIT 1"
        )
        row = self._row(query)
        return None if row is None else cast(float, row[0])

    def digest(self) -> str:
        """Return a hash of the contents: equal for equal runs, wherever and whenever they ran.

        Left out are timestamps, durations, and the facts declared with `in_digest=False`: the clock, how
        forward passes are computed, the store's own history, and the config as written (its places, budget
        and workers). The settings that change results count through the fact `identity`.
        """
        digest = hashlib.sha256()
        aside = facts.outside_digest()
        query = f"SELECT key, value FROM run WHERE key NOT IN ({', '.join('?' * len(aside))}) ORDER BY key"
        for row in self._rows(query, aside):
            digest.update(repr(row).encode())
        for query in (
            "SELECT hash, data FROM recipe ORDER BY hash",
            "SELECT role, position, name, recipe FROM entry ORDER BY role, position",
            "SELECT generation, position, genome, recipe FROM ask ORDER BY generation, position",
            "SELECT generation, losses FROM tell ORDER BY generation",
            "SELECT generation, hypervolume, reference, recipes FROM front ORDER BY generation",
            "SELECT generation, correlation, proposed, blocks, radius FROM guide ORDER BY generation",
            "SELECT recipe, split, kind, reason FROM failure ORDER BY recipe, split",
        ):
            for row in self._rows(query):
                digest.update(repr(row).encode())
        query = (
            "SELECT recipe, split, block, task, position, metric, smooth, margin, tokens, texts FROM score "
            "ORDER BY recipe, split, block, task"
        )
        for *key, metric, smooth, margin, tokens, texts in self._rows(query):
            digest.update(repr(key).encode())
            for vector in (metric, smooth, margin, tokens):
                digest.update(b"" if vector is None else unpack(vector).tobytes())
            digest.update(b"" if texts is None else zlib.decompress(texts))
        return digest.hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the versions and kernels in which two sessions differ, of those that both recorded."""
    both = [name for name in before if name in now and before[name] != now[name]]
    return [f"{name} {before[name]} before, {now[name]} now" for name in both]


def _losses(tells: Mapping[int, tuple[bytes, float]], number: int, count: int) -> NDArray[np.float64] | None:
    return np.frombuffer(tells[number][0], dtype="<f8").reshape(count, -1) if number in tells else None


def _unpack_column(blob: bytes | None) -> NDArray[np.float64] | None:
    return None if blob is None else unpack(blob)
