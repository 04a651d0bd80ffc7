"""Stores of older versions are brought up to date, whole or not at all; newer ones are refused."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import StoreError
from evomerge.files import remove_abandoned
from evomerge.running.store import RunStore, facts, migrations, schema
from evomerge.running.store.migrations import migrate
from tests.conftest import write_suite
from tests.running import quick

OLD = sorted((Path(__file__).parents[2] / "golden" / "runs").glob("*.sqlite"))
"""Runs of the tests' tiny models that older versions made."""


@pytest.fixture(params=OLD, ids=lambda path: path.stem)
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    shutil.copyfile(request.param, tmp_path / "run" / "run.sqlite")
    return tmp_path / "run"


def rows(path: Path, table: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


def invoke(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_an_old_run_is_refused_with_the_command_that_migrates_it(old_run: Path) -> None:
    before = (old_run / "run.sqlite").read_bytes()
    for verb in ("status", "resume", "report"):
        code, output = invoke(verb, old_run)
        assert code == 2
        assert "older version of evomerge" in output
        assert f"evomerge migrate {old_run}" in output.replace("\n", "")
    assert (old_run / "run.sqlite").read_bytes() == before
    assert migrate(old_run) is not None
    code, output = invoke("resume", old_run)
    assert code == 2
    assert "can't replay" in output
    assert "warm_start" in output


def test_a_migrated_run_is_read_like_a_new_one(old_run: Path) -> None:
    before = (old_run / "run.sqlite").read_bytes()
    version = rows(old_run / "run.sqlite", "pragma_user_version")[0][0]
    counts = {
        table: len(rows(old_run / "run.sqlite", table))
        for table in ("ask", "tell", "score", "entry", "timing")
    }
    code, output = invoke("migrate", old_run, "--json")
    assert code == 0, output
    backup = old_run / f"run.sqlite.version-{version}"
    assert json.loads(output) == {
        "run": str(old_run),
        "migrated": True,
        "from": version,
        "backup": str(backup),
        "continues": False,
    }
    assert backup.read_bytes() == before
    assert sorted(p.name for p in old_run.iterdir()) == [".lock", "run.sqlite", backup.name]
    assert {table: len(rows(old_run / "run.sqlite", table)) for table in counts} == counts
    with RunStore.read(old_run) as migrated:
        (winner,) = migrated.entries("winner")
        assert migrated.result(winner.recipe.hash, "test") is not None
        assert set(migrated.scored_blocks("select")) >= {winner.recipe.hash}
    for words in (("status", old_run), ("report", old_run), ("show", old_run, "winner")):
        code, output = invoke(*words)
        assert code == 0, output
    assert "nothing to do" in invoke("migrate", old_run)[1]
    assert "can't be replayed" not in invoke("migrate", old_run)[1]


def test_an_interrupted_migration_changes_nothing(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (old_run / "run.sqlite").read_bytes()

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(migrations, "write_facts", cut)
        with pytest.raises(KeyboardInterrupt):
            migrate(old_run)
    assert (old_run / "run.sqlite").read_bytes() == before
    assert not list(old_run.glob(".run*"))
    assert migrate(old_run) is not None


def test_what_can_not_be_migrated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StoreError, match="no run here"):
        migrate(run)
    with RunStore.create(run, {}), pytest.raises(StoreError, match="another process is working"):
        migrate(run)
    with closing(sqlite3.connect(run / "run.sqlite")) as db:
        db.execute("PRAGMA user_version=99")
    for word in ("migrate", "status", "resume"):
        code, output = invoke(word, run)
        assert code == 2
        assert "newer version of evomerge" in output
        assert "update evomerge" in output
    (run / "run.sqlite").write_bytes(b"torn" * 100)
    with pytest.raises(StoreError, match="damaged"):
        migrate(run)


@pytest.mark.parametrize("what", ["another program's", "copied tables", "a folder", "empty", "newer"])
def test_what_is_no_run_store_is_refused_and_not_changed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run.sqlite"
    if what == "a folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE bookmarks (place TEXT)")
            if what == "copied tables":
                db.executescript(schema._SCHEMA)
            elif what == "newer":
                db.execute(f"PRAGMA application_id={schema.APPLICATION_ID}")
                db.execute("PRAGMA user_version=99")
    before = None if path.is_dir() else path.read_bytes()
    for verb in ("migrate", "status", "report", "resume", "doctor"):
        code, output = invoke(verb, tmp_path)
        assert code == 2, output
        assert output.count("error: ") == 1
        assert "Traceback" not in output
    assert path.is_dir() if before is None else path.read_bytes() == before
    assert not list(tmp_path.glob("run.sqlite-*"))
    with pytest.raises(StoreError):
        RunStore.open(tmp_path)


def without_checksums(path: Path) -> None:
    """Make a store one of schema version 3: its tables had no checksums."""
    with closing(sqlite3.connect(path)) as db:
        for table in schema.tables():
            db.execute(f"ALTER TABLE {table} DROP COLUMN crc")
        db.execute("DELETE FROM run WHERE key = ?", (facts.STORE_ID.key,))
        db.execute("PRAGMA user_version=3")
        db.commit()


@pytest.mark.end_to_end
def test_a_run_without_checksums_goes_on_after_its_migration(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    path = config()
    write_suite(tmp_path, generate=False)
    for name in ("whole", "run", "damaged"):
        compose.start(RunConfig.load(path, out=str(tmp_path / name), generations=1), Silent())
    with RunStore.read(tmp_path / "run") as store:
        before = store.digest()
    for name in ("run", "damaged"):
        without_checksums(tmp_path / name / "run.sqlite")
    with closing(sqlite3.connect(tmp_path / "damaged" / "run.sqlite")) as db, db:
        db.execute("UPDATE score SET metric = X'00' WHERE rowid = 3")
    with pytest.raises(StoreError, match=r"damaged \(table score: .*metric can't be parsed"):
        migrate(tmp_path / "damaged")
    done = migrate(tmp_path / "run")
    assert done is not None
    assert done.continues
    with RunStore.read(tmp_path / "run") as store:
        assert store.digest() == before
    for name in ("run", "whole"):
        compose.resume(tmp_path / name, Silent(), generations=2)
    with RunStore.read(tmp_path / "run") as run, RunStore.read(tmp_path / "whole") as whole:
        assert run.digest() == whole.digest()


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from evomerge.running.store import migrations
from evomerge.running.store.migrations import migrate

steps = 0

def count(event, arguments):
    # Opening, making, renaming and deleting files, and opening databases: what a migration does to the disk.
    global steps
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "sqlite3.connect"):
        steps += 1
        if steps == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
migrate(Path(sys.argv[1]))
print(steps)
"""


def killed_at(folder: Path, step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_AT, str(folder), str(step)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_migration_killed_at_any_step_leaves_the_old_store_or_the_new(tmp_path: Path) -> None:
    old = OLD[0].read_bytes()
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "run.sqlite").write_bytes(old)
    steps = int(killed_at(tmp_path / "count", 0).stdout)
    ends = set()
    for step in range(1, steps + 1, 3):
        run = tmp_path / f"run-{step}"
        run.mkdir()
        (run / "run.sqlite").write_bytes(old)
        assert killed_at(run, step).returncode == -signal.SIGKILL
        if (run / "run.sqlite").read_bytes() == old:
            ends.add("old")
        else:
            RunStore.read(run).close()
            ends.add("new")
        migrate(run)
        RunStore.read(run).close()
        remove_abandoned(run)
        assert sorted(p.name for p in run.iterdir()) == [".lock", "run.sqlite", "run.sqlite.version-1"]
    assert ends == {"old", "new"}


@pytest.mark.end_to_end
def test_a_run_goes_on_after_a_migration_that_only_adds(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the next version will do: a new table, a new column that must not be NULL, a higher number."""
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    path = config()
    write_suite(tmp_path, generate=False)
    for name in ("whole", "run"):
        compose.start(RunConfig.load(path, out=str(tmp_path / name), generations=1), Silent())
    compose.resume(tmp_path / "whole", Silent(), generations=2)

    tables = schema._SCHEMA.replace("started REAL PRIMARY KEY,", "started REAL PRIMARY KEY, budget TEXT,")
    tables += "CREATE TABLE note (at REAL PRIMARY KEY, words TEXT NOT NULL) WITHOUT ROWID;"
    monkeypatch.setattr(schema, "_SCHEMA", tables)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    monkeypatch.setitem(migrations.FILLS, ("session", "budget"), "unknown")
    with pytest.raises(StoreError, match="older version"):
        RunStore.read(tmp_path / "run")
    done = migrate(tmp_path / "run")
    assert done is not None
    assert done.continues
    assert rows(tmp_path / "run" / "run.sqlite", "session")[0][1] == "unknown"
    monkeypatch.setattr(RunStore, "begin_session", lambda *_, **__: None)  # knows nothing of the new column
    compose.resume(tmp_path / "run", Silent(), generations=2)
    assert migrate(tmp_path / "whole") is not None
    with RunStore.read(tmp_path / "run") as run, RunStore.read(tmp_path / "whole") as whole:
        assert run.digest() == whole.digest()
