"""The run store: what goes in comes out, events are checked on replay, damage is named."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ReplayError, StoreError
from evomerge.evaluation.scores import Failure, Scores
from evomerge.running.store import RunStore, facts
from evomerge.running.store.file import FILE
from evomerge.running.store.schema import SCHEMA_VERSION
from evomerge.search.ports import Named
from tests.running.fakes import TIMING, recipe, scores

GENOMES = np.array([[0.25, 0.5], [1.0, 0.0]])
CONFIG = {"seed": 3, "models": {"base": "base", "sources": {"a": "a"}}}
LOSSES = np.array([[-0.5], [0.125]])
KEYS = {"recipe", "generation", "split", "block", "task", "position", "crc"}
"""Columns that the page names as what a row is of, and the checksum of all tables."""
SHORT = {"timing"}
"""Tables whose columns the page sums up."""


def filled(folder: Path, order: tuple[int, ...] = (0, 1)) -> RunStore:
    store = RunStore.create(folder, {facts.CONFIG: CONFIG})
    store.begin_session({"cma": "4.5.0"})
    store.record_entry("base", 0, Named(name="base", recipe=recipe(9)))
    store.record_ask(0, GENOMES, [recipe(0), recipe(1)])
    for number in order:
        store.record_scores(recipe(number), scores(number), TIMING)
    store.record_failure(recipe(5), "search", Failure(kind="crash", reason="died"))
    store.record_tell(0, LOSSES, 0.01)
    return store


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    filled(tmp_path / "run").close()
    with RunStore.read(tmp_path / "run") as store:
        found = store.result(recipe(1).hash, "search")
        assert isinstance(found, Scores)
        assert found.same_as(scores(1))
        assert store.result(recipe(1).hash, "test") is None
        assert store.result(recipe(5).hash, "search") == Failure(kind="crash", reason="died")
        assert store.recipe(recipe(1).hash[:10]) == recipe(1)
        assert store.entries("base") == [Named(name="base", recipe=recipe(9))]
        (generation,) = store.generations()
        assert (generation.genomes == GENOMES).all()
        assert generation.losses is not None
        assert (generation.losses == LOSSES).all()
        assert store.timings("search") == {recipe(n).hash: TIMING for n in (0, 1)}
        assert facts.CONFIG.get(store) == CONFIG
        assert store.versions() == {"cma": "4.5.0"}


def test_the_digest_ignores_order_of_arrival_and_time(tmp_path: Path) -> None:
    with filled(tmp_path / "a") as first, filled(tmp_path / "b", order=(1, 0)) as second:
        assert first.digest() == second.digest()
        second.begin_session({"cma": "4.5.0", "blas": "openblas Haswell"})
        assert first.digest() == second.digest()
        second.record_scores(recipe(2), scores(2), TIMING)
        assert first.digest() != second.digest()


def test_a_replay_that_agrees_changes_nothing(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        before = store.digest()
        store.record_entry("base", 0, Named(name="base", recipe=recipe(9)))
        store.record_ask(0, GENOMES, [recipe(0), recipe(1)])
        store.record_tell(0, LOSSES, 99.0)
        assert store.digest() == before


def test_a_replay_that_differs_names_candidate_and_versions(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        other = GENOMES.copy()
        other[1, 0] = np.nextafter(1.0, 0.0)
        with pytest.raises(ReplayError, match=r"candidate 1 of generation 0\n.*cma 4\.5\.0"):
            store.record_ask(0, other, [recipe(0), recipe(1)])
        with pytest.raises(ReplayError, match="the losses of generation 0"):
            store.record_tell(0, LOSSES + 1e-16, 0.0)
        with pytest.raises(ReplayError, match="the size of generation 0"):
            store.record_ask(0, GENOMES[:1], [recipe(0)])


def test_a_replay_that_differs_names_both_kernels(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        store.begin_session({"cma": "4.5.0", "blas": "openblas Haswell"})
        store.begin_session({"cma": "4.5.0", "blas": "openblas SkylakeX"})
        with pytest.raises(ReplayError) as caught:
            store.record_ask(0, GENOMES[:1], [recipe(0)])
        assert "got: blas openblas Haswell before, openblas SkylakeX now\n" in str(caught.value)
        assert "OPENBLAS_CORETYPE" in str(caught.value)


def test_fronts_are_kept_and_checked(tmp_path: Path) -> None:
    reference = np.array([0.1, 1 / 3])
    with filled(tmp_path) as store:
        before = store.digest()
        assert store.fronts() == []
        store.record_front(0, 0.25, reference, [recipe(1), recipe(0)])
        store.record_front(0, 0.25, reference, [recipe(1), recipe(0)])
        (front,) = store.fronts()
        assert (front.generation, front.hypervolume) == (0, 0.25)
        assert front.reference == tuple(reference)
        assert front.recipes == (recipe(1).hash, recipe(0).hash)
        assert store.digest() != before
        for volume, recipes in ((0.5, [recipe(1), recipe(0)]), (0.25, [recipe(0)])):
            with pytest.raises(ReplayError, match="the front of generation 0"):
                store.record_front(0, volume, reference, recipes)


def test_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    with filled(tmp_path):
        with RunStore.read(tmp_path) as reader:
            assert reader.held()
            assert reader.has_ask(0)
        code = (
            "import sys; from pathlib import Path; from evomerge.running.store import RunStore\n"
            "try: RunStore.open(Path(sys.argv[1]))\nexcept Exception as e: print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert "another process is working on this run" in done.stdout
        assert "process " in done.stdout
    with RunStore.open(tmp_path) as again:
        assert again.has_ask(0)


def test_a_reader_is_not_disturbed_by_a_writer_who_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path).close()
    with RunStore.read(tmp_path) as reader:
        before = reader.digest()
        with RunStore.open(tmp_path) as writer:
            facts.LAYERS.set(writer, 1)
            assert reader.digest() == before
        assert reader.digest() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", FILE]

    read_bytes = Path.read_bytes

    def meanwhile(path: Path) -> bytes:
        content = read_bytes(path)
        monkeypatch.undo()
        with RunStore.open(tmp_path) as writer:
            facts.BLOCKS.set(writer, 2)
        return content

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    with RunStore.read(tmp_path) as reader:
        assert facts.BLOCKS.get(reader) == 2


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run here"):
        RunStore.read(tmp_path)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "flipped", "another"])
def test_a_damaged_store_is_named(tmp_path: Path, damage: str) -> None:
    filled(tmp_path).close()
    path = tmp_path / FILE
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 100)
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        path.write_bytes(whole[:4096] + bytes(b ^ 0xFF for b in whole[4096:8192]) + whole[8192:])
    else:
        path.write_bytes(b"")
    for method in (RunStore.read, RunStore.open):
        with pytest.raises(StoreError, match="damaged"):
            method(tmp_path)


def test_a_half_made_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}.new").write_bytes(b"torn")
    with filled(tmp_path) as store:
        assert store.has_ask(0)
    assert not list(tmp_path.glob(".run.sqlite.new*"))


def test_an_ambiguous_or_unknown_hash(tmp_path: Path) -> None:
    with filled(tmp_path) as store, pytest.raises(StoreError, match="no recipe has a hash"):
        store.recipe("zzzz")


def test_the_tables_are_those_that_are_described(tmp_path: Path) -> None:
    filled(tmp_path).close()
    page = (Path(__file__).parents[3] / "runs" / "README.md").read_text()
    assert f"(schema version {SCHEMA_VERSION})" in page
    _, _, tables_on = page.partition("## Tables of")
    described = dict(re.findall(r"^\| `(\w+)` \| (.*)$", tables_on.partition("## ")[0], flags=re.MULTILINE))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        assert described.keys() == set(tables)
        for table in tables:
            columns = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            named = set(re.findall(r"`(\w+)`", described[table]))
            assert table in SHORT or columns - KEYS <= named, table


def test_rows_left_from_an_earlier_end_are_forgotten(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        for position in range(3):
            store.record_entry("finalist", position, Named(name=str(position), recipe=recipe(position)))
        store.trim_entries("finalist", 2)
        store.trim_entries("finalist", 5)
        assert [named.name for named in store.entries("finalist")] == ["0", "1"]
        assert len(store.entries("base")) == 1


def test_the_suite_says_how_many_items_a_split_has(tmp_path: Path) -> None:
    """Before the base is scored; a dataset split by its name has an unknown number."""
    drawn = {"from": "train", "items": 30}
    splits = [
        {"search": drawn, "select": drawn, "test": "test"},
        {"search": 5, "select": 6, "test": 7},
        {"search": None, "select": None, "test": 9},
    ]
    suite = {"name": "s", "tasks": [{"task": f"t{n}", "splits": part} for n, part in enumerate(splits)]}
    with RunStore.create(tmp_path / "run", {facts.CONFIG: CONFIG, facts.SUITE: suite}) as store:
        assert store.split_items() == {"search": 35, "select": 36}


def test_a_search_that_began_without_the_rule_that_ends_it_early_goes_on_without(tmp_path: Path) -> None:
    with filled(tmp_path / "old") as older:
        assert not older.record_frugal(True)
        assert not older.record_frugal(True)
    with RunStore.create(tmp_path / "new", {facts.CONFIG: CONFIG}) as new:
        assert not new.record_frugal(False)
        assert new.record_frugal(True)
        new.record_ask(0, GENOMES, [recipe(0), recipe(1)])
        assert new.record_frugal(False)
