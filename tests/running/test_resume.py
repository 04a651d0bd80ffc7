"""A killed run, resumed, ends like an unbroken one; the same seed twice gives the same store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import StoreError
from evomerge.running.store import RunStore, facts
from tests.conftest import write_suite

pytestmark = pytest.mark.end_to_end


@pytest.mark.slow  # test_crashes.py does this in seconds, without models
def test_a_run_killed_at_any_stored_event_ends_in_the_same_bits(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    """With everything on: item blocks, a surrogate that proposes, gradients before the first generation."""
    path = config(
        optimizer={"name": "cma_es", "population": 7},
        budget={"generations": 3},
        warm_start={"gradients": {"steps": 2, "share": 0.5}},
    )
    write_suite(tmp_path, generate=False)
    command = [sys.executable, "-m", "tests.running.killed", str(path), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    whole, killed = found["whole"], found["killed"]
    assert whole["integrity"] == "ok"
    assert whole["starts"] == ["gradient start"]
    assert whole["proposed"] > 0
    assert min(whole["blocks"]) < 3
    assert {name.rpartition("-")[2] for name in killed} == {
        *("write_value", "record_ask", "record_scores", "record_tell", "record_entry")
    }
    for name, after_resume in killed.items():
        assert after_resume == whole, name


def test_same_seed_twice_gives_the_same_store_and_another_seed_another(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(generate=False, baselines=[], budget={"generations": 1})
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"run-{number}"
        compose.start(RunConfig.load(path, seed=seed, out=str(out)), Silent())
        with RunStore.read(out) as store:
            digests.append(store.digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.usefixtures("formula")
def test_a_larger_budget_continues_the_same_search(config: Callable[..., Path], tmp_path: Path) -> None:
    compose.start(RunConfig.load(config(generate=False, budget={"generations": 1})), Silent())
    seen = {}

    class Looks(Silent):
        def phase(self, name: str, jobs: int, known: int) -> None:
            with RunStore.read(tmp_path / "run") as store:
                seen[name] = facts.STOPPED.get(store)

    compose.resume(tmp_path / "run", Looks(), generations=2)
    assert seen["generation 1"] is None  # while it works, the old winner does not count
    with RunStore.read(tmp_path / "run") as store:
        longer = [g.genomes.tolist() for g in store.generations()]
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    compose.start(RunConfig.load(config(generate=False, budget={"generations": 2})), Silent())
    with RunStore.read(tmp_path / "run") as store:
        assert [g.genomes.tolist() for g in store.generations()] == longer


@pytest.mark.usefixtures("formula")
def test_a_moved_run_resumes_where_it_lies(config: Callable[..., Path], tmp_path: Path) -> None:
    compose.start(RunConfig.load(config(generate=False, budget={"generations": 1})), Silent())
    (tmp_path / "run").rename(tmp_path / "moved")
    before = RunStore.read(tmp_path / "moved").digest()
    compose.resume(tmp_path / "moved", Silent())
    assert not (tmp_path / "run").exists()
    assert RunStore.read(tmp_path / "moved").digest() == before


@pytest.mark.usefixtures("formula")
def test_a_folder_of_another_run_is_refused_and_kept(config: Callable[..., Path], tmp_path: Path) -> None:
    compose.start(RunConfig.load(config(generate=False, budget={"generations": 1})), Silent())
    before = (tmp_path / "run" / "run.sqlite").read_bytes()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())["models"]
    reordered = {**written, "sources": dict(reversed(written["sources"].items()))}
    for changes, named in (
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"optimizer": {"population": 5}}, "optimizer.population 4 there, 5 here"),
        ({"space": "ties_layers"}, "space.method"),
        ({"models": reordered}, "other settings"),  # the order of the sources is the order of the genes
    ):
        with pytest.raises(StoreError, match="holds a run of another config") as error:
            compose.start(RunConfig.load(config(generate=False, **changes)), Silent())
        assert named in str(error.value)
        assert (tmp_path / "run" / "run.sqlite").read_bytes() == before
