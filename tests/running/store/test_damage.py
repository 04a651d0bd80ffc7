"""Damage of any kind is found before a value is used, and what is whole goes on in a new run."""

from __future__ import annotations

import errno
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import DiskError, StoreError
from evomerge.running.store import RunStore, StoreReader, facts, file, schema
from evomerge.running.store.file import FILE
from tests.conftest import config_data, write_suite
from tests.running import quick
from tests.running.fakes import TIMING, recipe, scores

PAGE = 4096


def invoke(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def run(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run whose models are a formula, with everything that a store holds."""
    import yaml

    folder = tmp_path_factory.mktemp("whole")
    write_suite(folder, generate=False)
    changes: dict[str, Any] = {
        "budget": {"generations": 2},
        "optimizer": {"name": "cma_es", "population": 7},
        "warm_start": {"gradients": {"steps": 2, "share": 0.5}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(tiny_zoo, folder, **changes), sort_keys=False))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compose.executors, "build", quick.build(0))
        compose.start(RunConfig.load(path), Silent())
        yield folder / "run"


def digest(folder: Path) -> str:
    with RunStore.read(folder) as store:
        return store.digest()


def flipped(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 3, 20))):
        content[draw.randrange(100, len(content))] ^= 1 << draw.randrange(8)


def page_lost(content: bytearray, draw: random.Random) -> None:
    start = PAGE * draw.randrange(1, len(content) // PAGE)
    content[start : start + PAGE] = bytes(PAGE) if draw.random() < 0.5 else draw.randbytes(PAGE)


def first_page(content: bytearray, draw: random.Random) -> None:
    content[draw.choice((0, 17, 40, 70, 1000)) :][:1] = b""
    content[:PAGE] = draw.randbytes(PAGE)


def truncated(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(2 * PAGE, len(content)) :]


@pytest.mark.end_to_end
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("damage", [flipped, page_lost, first_page, truncated])
def test_what_is_whole_goes_on_and_ends_in_the_same_bits(
    run: Path, tmp_path: Path, damage: Callable[[bytearray, random.Random], None], seed: int
) -> None:
    content = bytearray((run / FILE).read_bytes())
    damage(content, random.Random(seed))
    hurt, new = tmp_path / "hurt", tmp_path / "new"
    hurt.mkdir()
    (hurt / FILE).write_bytes(content)
    code, output = invoke("doctor", hurt)
    if code == 0:  # an unused byte
        assert digest(hurt) == digest(run)
        return
    assert "--salvage NEW_FOLDER" in output
    for words in (("status", hurt), ("report", hurt), ("show", hurt, "winner"), ("resume", hurt)):
        code, output = invoke(*words)
        assert code == 2, words
        assert output.count("error: ") == 1
    export = invoke("export", hurt, tmp_path / "r.yaml", "--as", "recipe")
    assert export[0] == 2
    code, output = invoke("doctor", hurt, "--salvage", new, "--config", run.parent / "config.yaml")
    assert code == 0, output
    assert (hurt / FILE).read_bytes() == content
    assert [p.name for p in new.iterdir()] == [FILE]
    assert invoke("status", new)[0] == 0
    code, output = invoke("resume", new)
    assert code == 0, output
    assert digest(new) == digest(run)
    assert invoke("doctor", new)[0] == 0


ROWS = [
    ("score", "metric", "X'00ff'"),
    ("score", "margin", "NULL"),
    ("score", "split", "CAST(X'ff80' AS TEXT)"),
    ("ask", "genome", "X'0000'"),
    ("ask", "recipe", "'nothing'"),
    ("tell", "losses", "'text'"),
    ("recipe", "data", "'{'"),
    ("entry", "name", "7"),
    ("failure", "reason", "CAST(X'ff' AS TEXT)"),
    ("timing", "seconds", "'x'"),
    ("session", "versions", "'[]'"),
    ("guide", "radius", "0.5"),
]


@pytest.mark.parametrize(("table", "column", "value"), ROWS, ids=lambda value: str(value))
def test_a_value_that_was_not_written(run: Path, tmp_path: Path, table: str, column: str, value: str) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    with closing(sqlite3.connect(hurt / FILE)) as db, db:
        (key,) = db.execute(f"SELECT name FROM pragma_table_info('{table}') WHERE pk = 1").fetchone()
        where = f"{key} = (SELECT MAX({key}) FROM {table})"
        if table == "score":
            where = "rowid = 7"
        db.execute(f"UPDATE {table} SET {column} = {value} WHERE {where}")
    with pytest.raises(
        StoreError, match=rf"the run store is damaged \(table {table}: .*not what was written"
    ):
        StoreReader.read(hurt)
    code, output = invoke("doctor", hurt, "--json")
    assert code == 2
    data = json.loads(output[: output.rindex("}") + 1])
    assert not data["whole"]
    assert data["tables"][table]["damaged"] >= 1


@pytest.mark.parametrize("key", ["config", "suite", "norms", "spent", "store_id"])
def test_a_fact_that_was_not_written(run: Path, tmp_path: Path, key: str) -> None:
    hurt, new = tmp_path / "hurt", tmp_path / "new"
    shutil.copytree(run, hurt)
    with closing(sqlite3.connect(hurt / FILE)) as db, db:
        db.execute("INSERT OR REPLACE INTO run VALUES (?, '{\"a\": 1', 5)", (key,))
    with pytest.raises(StoreError, match="the run store is damaged"):
        StoreReader.read(hurt)
    if key == "store_id":
        return  # then no checksum can be checked
    if key == "config":
        code, output = invoke("doctor", hurt, "--salvage", new)
        assert code == 2
        assert "--config CONFIG" in output
        other = tmp_path / "other.yaml"
        other.write_text((run.parent / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
        code, output = invoke("doctor", hurt, "--salvage", new, "--config", other)
        assert code == 2
        assert "not the config of the run" in output
        assert not new.exists()
    code, output = invoke("doctor", hurt, "--salvage", new, "--config", run.parent / "config.yaml")
    assert code == 0, output
    assert invoke("resume", new)[0] == 0
    assert digest(new) == digest(run)


@pytest.mark.end_to_end
def test_rows_that_contradict_each_other(run: Path, tmp_path: Path) -> None:
    queries = (
        "DELETE FROM recipe WHERE hash = (SELECT recipe FROM ask LIMIT 1)",
        "DELETE FROM ask WHERE generation = 1 AND position = 2",
        "DELETE FROM score WHERE position = 0 AND split = 'test'",
        "DELETE FROM ask WHERE generation = 1",
        "DROP TABLE guide",
        "ALTER TABLE tell ADD COLUMN more TEXT",
    )
    for number, query in enumerate(queries):
        hurt = tmp_path / f"hurt-{number}"
        shutil.copytree(run, hurt)
        with closing(sqlite3.connect(hurt / FILE)) as db, db:
            db.execute(query)
        with pytest.raises(StoreError, match="the run store is damaged"):
            StoreReader.read(hurt)
        if number % 2:  # that what is whole goes on is shown by every second one
            continue
        code, output = invoke("doctor", hurt, "--salvage", tmp_path / f"new-{number}")
        assert code == 0, output
        assert invoke("resume", tmp_path / f"new-{number}")[0] == 0
        assert digest(tmp_path / f"new-{number}") == digest(run), query


def test_a_fact_without_which_no_run_begins(run: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    with closing(sqlite3.connect(hurt / FILE)) as db, db:
        db.execute("DELETE FROM run WHERE key = ?", (facts.BLOCKS.key,))
    code, output = invoke("doctor", hurt)
    assert code == 2
    assert "fact blocks: missing" in output


def test_a_whole_run_and_one_in_progress(run: Path) -> None:
    code, output = invoke("doctor", run)
    assert code == 0
    assert "run: whole" in output
    with RunStore.open(run):
        assert invoke("doctor", run)[0] == 0
        code, output = invoke("doctor", run, "--salvage", run.parent / "busy")
        assert code == 2
        assert "another process is working on this run" in output


def killed_with_log(folder: Path, count: int) -> Path:
    """Leave a store as a killed process does: with its last events in the log."""
    RunStore.create(folder, {facts.CONFIG: {"seed": count}}).close()
    store = RunStore.open(folder)
    store._db.execute("PRAGMA wal_autocheckpoint=0")
    for number in range(count):
        store.record_scores(recipe(number), scores(number), TIMING)
    copy = folder.with_name(f"{folder.name}-killed")
    shutil.copytree(folder, copy)
    store.close()
    return copy


def test_the_log_of_another_store_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    mine, other = (killed_with_log(tmp_path / name, count) for name, count in (("a", 2), ("b", 5)))
    with RunStore.read(mine) as store:
        assert len(store.scored_blocks("search")) == 2
    assert sorted(p.name for p in mine.iterdir()) == [".lock", FILE, f"{FILE}-shm", f"{FILE}-wal"]
    shutil.copyfile(other / f"{FILE}-wal", mine / f"{FILE}-wal")
    before = (mine / FILE).read_bytes()
    for command in ("status", "resume", "migrate", "doctor"):
        code, output = invoke(command, mine)
        assert code == 2
        assert "belongs to another store" in output
    with pytest.raises(StoreError, match="belongs to another store"):
        RunStore.open(mine)
    assert (mine / FILE).read_bytes() == before
    with closing(sqlite3.connect(tmp_path / "foreign.db")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE bookmarks (place TEXT)")
        db.commit()
        shutil.copyfile(tmp_path / "foreign.db-wal", mine / f"{FILE}-wal")
    with pytest.raises(StoreError, match="belongs to another store"):
        RunStore.open(mine)
    assert (mine / FILE).read_bytes() == before


def test_the_journal_of_another_database_is_refused(tmp_path: Path) -> None:
    RunStore.create(tmp_path, {}).close()
    journal = tmp_path / f"{FILE}-journal"
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE bookmarks (place TEXT)")
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO bookmarks VALUES ('x')")
        db.execute("PRAGMA cache_size=0")
        shutil.copyfile(tmp_path / "other.db-journal", journal)
    before = (tmp_path / FILE).read_bytes()
    for method in (RunStore.read, RunStore.open):
        with pytest.raises(StoreError, match="belongs to another database"):
            method(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_file_system_without_locks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading works; writing says why not, and what to do."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file.fcntl, "flock", none)
    for words in (("status", copy), ("report", copy), ("show", copy, "winner"), ("doctor", copy)):
        code, output = invoke(*words)
        assert code == 0, output
    for words in (("resume", copy), ("migrate", copy)):
        code, output = invoke(*words)
        assert code == 2
        assert "has no locks" in output
        assert "local disk" in output
    with pytest.raises(DiskError, match="has no locks"):
        RunStore.create(tmp_path / "new", {})


READ_ONLY = """
import subprocess, sys
from typer.testing import CliRunner
from evomerge.cli import app

run, out = sys.argv[1:]
for options in (["--bind", run], ["-o", "remount,bind,ro"]):
    if subprocess.run(["mount", *options, run], capture_output=True, check=False).returncode:
        sys.exit(77)
for words in (["status", run], ["report", run], ["show", run, "winner"], ["doctor", run],
              ["export", run, out, "--as", "recipe"]):
    done = CliRunner().invoke(app, words)
    print(words[0], done.exit_code, done.output)
"""


@pytest.mark.end_to_end
def test_a_run_folder_that_is_read_only(run: Path, tmp_path: Path) -> None:
    """On a mount of its own, because permissions do not bind root."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink(missing_ok=True)
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    command = ["unshare", "-rm", sys.executable, "-c", READ_ONLY, str(folder), str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    for word in ("status", "report", "show", "doctor", "export"):
        assert f"{word} 0 " in done.stdout
    assert "no report page" in done.stdout
    assert (tmp_path / "r.yaml").exists()


def test_a_damaged_row_is_found_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {}) as store:
        store.record_scores(recipe(1), scores(1), TIMING)
        with StoreReader.read(tmp_path) as reader:
            assert reader.scored_blocks("search")
        store._db.execute("UPDATE score SET position = position + 0, metric = X'00'")
        store._db.commit()
        with pytest.raises(StoreError, match="not what was written"):
            StoreReader.read(tmp_path)


def test_checksums_of_all_that_sqlite_stores_in_another_form() -> None:
    rows = [(1.0, 2, None, "a", b"a"), (-0.0, 0.0, float("nan"), "", b""), (1e300, True, 7, "é\0", b"\0")]
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (a REAL, b INTEGER, c REAL, d TEXT, e BLOB, crc INTEGER)")
        for row in rows:
            schema.insert(db, "t", row, 17)
        for *row, crc in db.execute("SELECT * FROM t"):
            assert schema.checksum(row, 17) == crc
            assert schema.checksum(row, 18) != crc
    assert len({schema.checksum(row, 0) for row in (("a", "b"), ("ab", ""), (b"a", "b"), (None, "ab"))}) == 4
