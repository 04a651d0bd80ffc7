"""Out of memory: a batch is halved once, what is compared is scored alike, resuming repeats it exactly."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import UserError
from evomerge.evaluation.scores import SPLITS, Failure, Scores
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss, SmoothTask
from evomerge.prepare import prepare
from evomerge.running.batches import GRADIENTS, Batches, decisions, scoring_alike
from evomerge.running.out_of_memory import is_out_of_memory, release
from evomerge.running.slopes import Slopes
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import Job, Result, Worker, failure_of
from tests.running.fakes import recipe, spec
from tests.running.hungry import BATCH, BLOCKS, InOne, Small, in_two, session

HALF = BATCH // 2
PLENTY = Small(frozenset())
ALWAYS = Small(frozenset((split, block, "") for split in SPLITS for block in range(BLOCKS)))


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


@pytest.mark.parametrize(
    ("device", "freed"), [("cuda", ["cuda"]), ("cuda:1", ["cuda"]), ("mps", ["mps"]), ("cpu", [])]
)
def test_what_an_attempt_left_cached_is_given_back(
    device: str, freed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins for the accelerators: there are none here."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: found.append("mps"))
    release(device)
    assert found == freed


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had all the memory it wanted."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    session(folder, InOne(PLENTY))
    return folder


@pytest.fixture(scope="module")
def late(plain: Path) -> Small:
    """Too small for a candidate of the second generation on a block, and for a baseline on `test`."""
    with RunStore.read(plain) as store:
        first, second = store.generations()[:2]
        met = store.scored_blocks("search")
        known = {b.recipe.hash for b in store.entries("baseline")} | set(first.recipes)
        new = next(r for r in second.recipes[1:] if r not in known)
        baseline = store.entries("baseline")[-3].recipe.hash
    return Small(frozenset({("search", met[new][-1], new), ("test", 0, baseline)}))


def sizes_on(executor: InOne) -> dict[tuple[str, str, int], list[int]]:
    """All batch sizes each recipe was scored with on a block of a split."""
    found: dict[tuple[str, str, int], list[int]] = {}
    for job in executor.jobs:
        for block, size in job.batch_sizes.items():
            found.setdefault((job.recipe.hash, job.split, block), []).append(size)
    return found


def everything(folder: Path) -> dict[tuple[str, str, int], Scores]:
    found = {}
    with RunStore.read(folder) as store:
        for split in SPLITS:
            for hash_, blocks in store.scored_blocks(split).items():
                for block in blocks:
                    scores = store.result(hash_, split, block)
                    assert isinstance(scores, Scores)
                    found[hash_, split, block] = scores
    return found


@pytest.mark.end_to_end
def test_out_of_memory_from_the_start_is_a_run_with_the_smaller_batch(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(tmp_path / "run", InOne(ALWAYS))
    monkeypatch.setattr("tests.running.hungry.BATCH", HALF)
    session(tmp_path / "smaller", InOne(PLENTY))
    found, same = everything(tmp_path / "run"), everything(tmp_path / "smaller")
    assert found.keys() == same.keys()
    assert len(same) > 60
    assert all(mine.same_as(same[place]) for place, mine in found.items())
    larger = everything(plain)
    assert not any(mine.same_as(larger[place]) for place, mine in found.items() if place in larger)
    with RunStore.read(tmp_path / "run") as store:
        made = {(d.split, d.block): (d.size, d.before) for d in decisions(store)}
        assert made == dict.fromkeys(
            [("search", 0), ("search", 1), ("search", 2), ("select", 0), ("test", 0)], (HALF, BATCH)
        )
        assert all(d.sentence.endswith("for all alike") for d in decisions(store))
        worker = replace(spec(), batch_size=BATCH)
        assert scoring_alike(worker, store, "test").batch_size == HALF


def test_a_generation_is_scored_alike_and_what_was_before_stays(late: Small, tmp_path: Path) -> None:
    executor = InOne(late)
    session(tmp_path / "run", executor)
    found = sizes_on(executor)
    ((_, block, hungry),) = (place for place in late.places if place[0] == "search")
    with RunStore.read(tmp_path / "run") as store:
        first, second, third = store.generations()
        known = {e.recipe.hash for role in ("base", "parent", "baseline") for e in store.entries(role)}
        made, failures = decisions(store), store.failures()
    assert [(d.split, d.block, d.size, d.before) for d in made] == [
        ("search", block, HALF, BATCH),
        ("test", 0, HALF, BATCH),
    ]
    assert made[0].phase == "generation 1"
    assert made[1].sentence == (
        f"out of memory: `test` in batches of {HALF} instead of {BATCH}, for all alike"
    )
    assert made[0].sentence == (
        f"out of memory: `search`, item block {block}, in batches of {HALF} instead of {BATCH}, from "
        "generation 1 on; scores from before differ in their last digits"
    )
    before = known | set(first.recipes)
    here = {hash_: sizes for (hash_, split, at), sizes in found.items() if (split, at) == ("search", block)}
    assert {sizes[-1] for hash_, sizes in here.items() if hash_ in before} == {BATCH}
    again = [here[hash_] for hash_ in second.recipes if hash_ in here and hash_ not in before]
    assert len(again) > 1
    assert [BATCH, HALF] in again  # one that fitted is scored again, like the one that did not
    assert {sizes[-1] for sizes in again} == {HALF}
    assert {sizes[-1] for hash_, sizes in here.items() if hash_ not in before} == {HALF}
    assert here[hungry] == [BATCH, HALF]
    assert set(third.recipes) - before - set(second.recipes)
    tested = [sizes for (_, split, _), sizes in found.items() if split == "test"]
    assert {sizes[-1] for sizes in tested} == {HALF}
    assert [BATCH, HALF] in tested
    assert all(len(sizes) <= 2 for sizes in found.values())
    assert failures == []


def test_who_never_fits_has_failed_and_the_others_go_on(late: Small, tmp_path: Path) -> None:
    session(tmp_path / "run", InOne(replace(late, most=1)))
    with RunStore.read(tmp_path / "run") as store:
        failed = {(split, hash_): failure for hash_, split, failure in store.failures()}
        assert len(decisions(store)) == 2
        assert store.entries("winner")
    reason = Failure(kind="out_of_memory", reason=f"out of memory at batch size {HALF}")
    assert failed == {(split, hash_): reason for split, _, hash_ in late.places}


def test_a_base_that_never_fits_ends_the_run(tmp_path: Path) -> None:
    reason = f"base could not be scored on search: out of memory at batch size {HALF}"
    with pytest.raises(UserError, match=reason + r"\n.*a smaller executor.batch_size"):
        session(tmp_path / "run", InOne(replace(ALWAYS, most=1)))
    with RunStore.read(tmp_path / "run") as store:
        assert store.failures() == []


def test_a_batch_of_one_is_not_halved(late: Small, tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {}) as store:
        batches = Batches(store, 1)
        job = Job(recipe=recipe(1), split="search")
        failure = Failure(kind="out_of_memory", reason="out of memory at batch size 1")
        assert not batches.calls_for_halving(Result(job=job, outcome=failure, block=0))
        assert Batches(store, 2).calls_for_halving(Result(job=job, outcome=failure, block=0))
        assert not Batches(store, 2).calls_for_halving(Result(job=job, outcome=failure))  # while merging


@pytest.mark.end_to_end
def test_two_workers_end_in_the_same_bits_as_one(late: Small, tmp_path: Path) -> None:
    digests = []
    for build in (InOne, in_two):
        executor = build(late)
        try:
            session(tmp_path / build.__name__, executor)
        finally:
            executor.close()
        with RunStore.read(tmp_path / build.__name__) as store:
            digests.append(store.digest())
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_run_killed_around_a_halving_ends_in_the_same_bits(late: Small, tmp_path: Path) -> None:
    places = [f"{split}/{block}/{hash_}" for split, block, hash_ in sorted(late.places)]
    command = [sys.executable, "-m", "tests.running.hungry", str(tmp_path), *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"][-1] == 2
    assert len(found["killed"]) == 4
    for name, after_resume in found["killed"].items():
        assert after_resume == found["whole"], name


def test_gradients_go_on_with_half_the_batch(tmp_path: Path) -> None:
    asked: list[int] = []

    class Executor:
        def run(self, jobs: Any) -> Any:
            for job in jobs:
                asked.append(job.batch_size)
                fits = job.batch_size <= HALF and job.recipe.seed != 3
                failure = Failure(kind="out_of_memory", reason="out of memory in a gradient")
                outcome = Gradient(loss=-0.5, groups=({"weight": (0.1,)},)) if fits else failure
                yield Result(job=job, outcome=outcome)

        def close(self) -> None: ...

    loss = SmoothLoss(tasks=(SmoothTask(task="skill", gain=1.0, items=(0,)),), price=0.2, softness=1.0)
    with RunStore.create(tmp_path, {}) as store:
        for _ in range(2):
            slopes = Slopes(store, Executor(), Silent(), Batches(store, BATCH))
            outcomes = [slopes.gradient(recipe(n), loss, step=n, steps=4) for n in range(4)]
        assert [isinstance(o, Gradient) for o in outcomes] == [True, True, True, False]
        assert [(d.split, d.size) for d in decisions(store)] == [(GRADIENTS, HALF)]
    assert asked == [BATCH, HALF, HALF, HALF, HALF]


def test_a_worker_scores_in_the_batches_a_job_names_and_survives_too_large_ones(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(RunConfig.load(config()))
    worker, smaller = Worker(prepared.worker), Worker(replace(prepared.worker, batch_size=HALF))
    job = Job(recipe=prepared.template, split="search", blocks=(0, 2))
    expected = smaller.run(job).outcome
    halved = dataclasses.replace(job, batch_sizes={0: HALF, 2: HALF})
    outcome = worker.run(halved).outcome
    assert isinstance(expected, Scores)
    assert isinstance(outcome, Scores)
    assert outcome.same_as(expected)
    assert not outcome.same_as(worker.run(job).outcome)  # type: ignore[arg-type]  # or nothing was tested
    forward = worker._bench.model.forward

    def small(*arguments: Any, **named: Any) -> Any:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        if len(ids) > HALF:
            torch.empty(10**15)
        return forward(*arguments, **named)

    monkeypatch.setattr(worker._bench.model, "forward", small)
    monkeypatch.setattr("evomerge.evaluation.likelihood.trims", lambda _: True)
    failed = worker.run(dataclasses.replace(job, batch_sizes={0: HALF, 2: BATCH}))
    assert failed.outcome == Failure(kind="out_of_memory", reason=f"out of memory at batch size {BATCH}")
    assert failed.block == 2
    again = worker.run(halved).outcome
    assert isinstance(again, Scores)
    assert again.same_as(expected)


def test_decisions_are_stored_in_one_order_whichever_came_first(tmp_path: Path) -> None:
    stored = []
    for number, order in enumerate(((0, 2), (2, 0))):
        with RunStore.create(tmp_path / str(number), {}) as store:
            batches = Batches(store, BATCH)
            for block in order:
                batches.halve("search", {block: []}, "baselines")
            stored.append(facts.BATCH_SIZES.get(store))
            assert [d.block for d in decisions(store)] == [0, 2]
    assert stored[0] == stored[1]
