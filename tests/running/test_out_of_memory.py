"""Out of memory: a batch is halved once, what is compared is scored alike, and resuming repeats it exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import UserError
from evomerge.evaluation.scores import SPLITS, Failure, Scores
from evomerge.running.batches import decisions
from evomerge.running.out_of_memory import is_out_of_memory
from evomerge.running.store import RunStore
from evomerge.running.worker import failure_of
from tests.conftest import config_data, write_suite
from tests.running.hungry import InOne, Small, in_two

CHANGES: dict[str, Any] = {
    "optimizer": {"name": "cma_es", "population": 5},
    "budget": {"generations": 2},
    "finalists": 1,
}
ALWAYS = Small(frozenset((split, block, "") for split in SPLITS for block in range(3)))


@pytest.fixture(scope="module")
def plain(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config's file, with its run beside it that had all the memory it wanted."""
    folder = tmp_path_factory.mktemp("plain")
    write_suite(folder, generate=False)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(tiny_zoo, folder, **CHANGES), sort_keys=False))
    compose.start(RunConfig.load(path), Silent())
    return path


@pytest.fixture
def prepared(plain: Path, tmp_path: Path) -> compose.Prepared:
    return compose.prepare(RunConfig.load(plain, out=str(tmp_path / "run")))


@pytest.fixture
def late(plain: Path) -> Small:
    """Too small for a candidate of the second generation on a block, and for a baseline on `test`."""
    with RunStore.read(plain.parent / "run") as store:
        first, second = store.generations()
        met = store.scored_blocks("search")
        new = next(r for r in second.recipes if r not in first.recipes)
        last = store.entries("baseline")[-3].recipe.hash
    return Small(frozenset({("search", met[new][-1], new), ("test", 0, last)}))


def run(prepared: compose.Prepared, executor: Any, monkeypatch: pytest.MonkeyPatch, out: str = "run") -> Path:
    """Run the config with an executor, in a folder beside its own; return the folder."""
    folder = prepared.folder.parent / out
    monkeypatch.setattr(compose.executors, "build", lambda *_: executor)
    compose.start(prepared.config.model_copy(update={"out": str(folder)}), Silent())
    return folder


def everything(store: RunStore) -> dict[tuple[str, str, int], Scores]:
    found: dict[tuple[str, str, int], Scores] = {}
    for split in SPLITS:
        for recipe, blocks in store.scored_blocks(split).items():
            for block in blocks:
                scores = store.result(recipe, split, block)
                assert isinstance(scores, Scores)
                found[recipe, split, block] = scores
    return found


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 2 GB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory is what this text says"), False),
    ],
)
def test_what_means_out_of_memory(error: Exception, means: bool) -> None:
    assert is_out_of_memory(error) == means
    assert (failure_of(error, "at batch size 4").kind == "out_of_memory") == means


def test_an_allocation_that_cannot_be_had_here_means_it() -> None:
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**17)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_from_the_first_candidate_on_all_are_scored_in_smaller_batches(
    prepared: compose.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are those of a run that began with the smaller batch."""
    executor = InOne(ALWAYS, prepared.worker)
    folder = run(prepared, executor, monkeypatch)
    with RunStore.read(folder) as store:
        made = {(d.split, d.block): (d.size, d.before) for d in decisions(store)}
        found = everything(store)
    assert made == dict.fromkeys(
        [("search", 0), ("search", 1), ("search", 2), ("select", 0), ("test", 0)], (16, 32)
    )
    smaller = prepared.config.executor.model_copy(update={"batch_size": 16})
    prepared = compose.prepare(prepared.config.model_copy(update={"executor": smaller}))
    other = run(prepared, InOne(Small(frozenset()), prepared.worker), monkeypatch, "smaller")
    with RunStore.read(other) as store:
        assert decisions(store) == []
        same = everything(store)
    assert found.keys() == same.keys()
    assert len(same) > 50
    assert all(mine.same_as(same[place]) for place, mine in found.items())


def test_a_generation_is_scored_alike_and_what_was_before_stays(
    prepared: compose.Prepared, late: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = InOne(late, prepared.worker)
    folder = run(prepared, executor, monkeypatch)
    last: dict[tuple[str, str, int], int] = {}
    for job in executor.jobs:
        last |= {(job.recipe.hash, job.split, b): n for b, n in zip(job.blocks, job.batch_sizes, strict=True)}
    ((_, block, recipe),) = (place for place in late.places if place[0] == "search")
    with RunStore.read(folder) as store:
        first, second = store.generations()
        made = decisions(store)
        failures = store.failures()
    assert [(d.split, d.block, d.size, d.before) for d in made] == [
        ("search", block, 16, 32),
        ("test", 0, 16, 32),
    ]
    assert made[0].phase == "generation 1"
    again = {r for r in second.recipes if (r, "search", block) in last} - set(first.recipes)
    assert recipe in again
    for (asked, split, at), size in last.items():
        halved = split == "test" or (split == "search" and at == block and asked in again)
        assert size == (16 if halved else 32), (split, at, asked)
    assert len(again) > 1
    assert failures == []


def test_who_never_fits_has_failed_and_the_others_go_on(
    prepared: compose.Prepared, late: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = replace(late, most=1)
    folder = run(prepared, InOne(never, prepared.worker), monkeypatch)
    with RunStore.read(folder) as store:
        failed = {(split, recipe): failure for recipe, split, failure in store.failures()}
        assert len(decisions(store)) == 2
        assert store.entries("winner")
    reason = Failure(kind="out_of_memory", reason="out of memory at batch size 16")
    assert failed == {(split, recipe): reason for split, _, recipe in never.places}


def test_a_base_that_never_fits_ends_the_run(
    prepared: compose.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="base could not be scored on search: out of memory at batch size 16"):
        run(prepared, InOne(replace(ALWAYS, most=1), prepared.worker), monkeypatch)


def test_two_workers_end_in_the_same_bits_as_one(
    prepared: compose.Prepared, late: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for build in (InOne, in_two):
        executor = build(late, prepared.worker)
        try:
            with RunStore.read(run(prepared, executor, monkeypatch, build.__name__)) as store:
                digests.append(store.digest())
        finally:
            executor.close()
    assert digests[0] == digests[1]


def test_a_run_killed_around_a_halving_ends_in_the_same_bits(
    plain: Path, late: Small, tmp_path: Path
) -> None:
    places = [f"{split}/{block}/{recipe}" for split, block, recipe in late.places]
    command = [sys.executable, "-m", "tests.running.hungry", str(plain), str(tmp_path), *places]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["decisions"][0].endswith(
        "in batches of 16 instead of 32, from generation 1 on; scores from before differ in their last digits"
    )
    assert found["decisions"][1] == (
        "out of memory: `test` in batches of 16 instead of 32, for all rows alike"
    )
    assert len(found["killed"]) == 4
    for name, facts in found["killed"].items():
        assert facts == found["whole"], name
