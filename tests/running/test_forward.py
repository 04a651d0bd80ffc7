"""How forward passes are computed is settled at the start of a run, kept with it, and held on to."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import export as exporting
from evomerge.delivery.notes import notes
from evomerge.delivery.origins import origins
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError
from evomerge.prepare import check_folder, prepare, run_facts
from evomerge.running import executors, forward, out_of_memory
from evomerge.running.store import RunStore, facts
from evomerge.stored import StoredRun, environment_note
from tests.test_cli import invoke, refuse

INLINE = {"name": "inline", "batch_size": 32}


def test_what_transformers_chooses_is_recorded_and_shown(finished_run: Path) -> None:
    with RunStore.read(finished_run) as store:
        found = forward.stored(store)
        summary = Summary(StoredRun(store))
        pick = exporting.find(summary, "winner")
        card = exporting.card(summary, pick, origins(pick.recipe, {}))
    assert found is not None
    assert forward.as_data(found) == {
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "max_length": 64,
        "batch_size": 32,
        "threads": 1,
        "generation": "transformers",
    }
    assert found.sentence in invoke("status", finished_run).output
    assert json.loads(invoke("status", finished_run, "--json").output)["forward"] == forward.as_data(found)
    assert found.sentence in invoke("report", finished_run).output
    assert found.sentence in card
    assert "processor" in card


@pytest.mark.parametrize("attention", ["sdpaa", "flash_attention_2", "somebody/kernel"])
@pytest.mark.parametrize("command", ["check", "run"])
def test_an_attention_that_cannot_be_had_is_one_message(
    command: str, attention: str, config: Callable[..., Path], tmp_path: Path
) -> None:
    said = refuse(command, config(executor={**INLINE, "attention": attention}), folder=tmp_path)
    assert f"executor.attention: '{attention}' can't be used here" in said
    assert "eager or sdpa" in said


def test_an_unknown_dtype_is_one_message(config: Callable[..., Path], tmp_path: Path) -> None:
    said = refuse("run", config(executor={**INLINE, "dtype": "float8"}), folder=tmp_path)
    assert "executor.dtype" in said
    assert "'float32'" in said


def test_settings_reach_the_model(config: Callable[..., Path]) -> None:
    spec = {**INLINE, "attention": "eager", "dtype": "bfloat16", "max_length": 48, "threads": 2}
    prepared = prepare(RunConfig.load(config(executor=spec)))
    found = forward.find(prepared.worker)
    assert (found.attention, found.dtype, found.max_length, found.threads) == ("eager", "bfloat16", 48, 2)
    assert forward.Forward(**{**forward.as_data(found), "device": "cuda", "threads": None}).sentence == (
        "forward passes: cuda, bfloat16, eager attention, up to 48 tokens, batches of 32"
    )
    assert replace(found, generation="vllm").sentence.endswith("threads: 2, generation by vllm")


@pytest.fixture
def begun(config: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A config and a run of it that was begun with two threads and got no further."""
    path = config(generate=False, executor={**INLINE, "threads": 2})
    prepared = prepare(RunConfig.load(path))
    RunStore.create(prepared.folder, run_facts(prepared)).close()
    return path, tmp_path / "run"


def test_a_run_keeps_its_threads_and_another_number_is_refused(
    begun: tuple[Path, Path], config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    prepared = prepare(RunConfig.load(config(generate=False, executor=INLINE)))
    assert prepared.worker.threads == 2
    check_folder(prepared)
    for changes, what in (({"threads": 1}, "number of threads"), ({"threads": 7}, "number of threads")):
        other = prepare(RunConfig.load(config(generate=False, executor={**INLINE, **changes})))
        with pytest.raises(StoreError, match=what) as caught:
            check_folder(other)
        assert "expected: 2" in str(caught.value)
        assert "set executor.threads: 2" in str(caught.value)


def test_a_run_keeps_the_dtype_that_another_processor_would_choose_otherwise(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = begun
    monkeypatch.setattr(executors, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(executors, "WORTH_BFLOAT16", 0)
    prepared = prepare(RunConfig.load(path))
    assert prepared.worker.dtype == "float32"
    check_folder(prepared)
    assert prepare(RunConfig.load(path, out="elsewhere")).worker.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attention", {"attention": "eager"}),
        ("dtype", {"dtype": "bfloat16"}),
        ("max_length", {"max_length": 32}),
        ("batch_size", {"batch_size": 16}),
        ("device", {"device": "cpu:0"}),
    ],
)
def test_what_changes_bits_is_part_of_the_identity(
    name: str, changes: dict[str, Any], begun: tuple[Path, Path], config: Callable[..., Path]
) -> None:
    other = RunConfig.load(config(generate=False, executor={**INLINE, "threads": 2, **changes}))
    with pytest.raises(StoreError, match="holds a run of another config") as caught:
        compose.start(other, Silent())
    assert f"executor.{name}" in str(caught.value)


def test_where_candidates_are_merged_may_change_on_resume(
    begun: tuple[Path, Path], config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights have the same bits."""
    executor = {**INLINE, "threads": 2, "merge_on": "cpu"}
    check_folder(prepare(RunConfig.load(config(generate=False, executor=executor))))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ConfigError, match=r"executor\.merge_on: device, but candidates can't be merged on cpu"
    ):
        prepare(RunConfig.load(config(generate=False, executor={**executor, "merge_on": "device"})))


def test_an_attention_that_transformers_chooses_otherwise_now_is_refused(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = begun
    found = forward.as_data(forward.find(prepare(RunConfig.load(path)).worker))
    with RunStore.open(folder) as store:
        facts.FORWARD.set(store, {**found, "attention": "eager"})
    with pytest.raises(StoreError, match="the attention implementation changed") as caught:
        compose.start(RunConfig.load(path), Silent())
    assert "expected: eager" in str(caught.value)


def test_another_environment_is_a_note_before_and_in_the_report(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    _, folder = begun
    now = forward.versions()
    assert "processor" in now
    with RunStore.open(folder) as store:
        assert environment_note(tmp_path / "none") is None
        store.begin_session({**now, "torch": "1.0", "processor": "another (AVX2)"})
    said = environment_note(folder)
    assert said is not None
    assert f"torch 1.0 before, {now['torch']} now" in said
    assert "processor another (AVX2) before" in said
    with RunStore.open(folder) as store:
        store.begin_session(now)
        lines = notes(Summary(StoredRun(store)))
    changed = [line for line in lines if line.startswith("the environment changed during the run")]
    assert any("torch 1.0" in line for line in changed)


@pytest.mark.end_to_end
def test_a_run_notes_the_kernels_that_a_process_of_the_same_environment_has(tmp_path: Path) -> None:
    now = forward.versions()
    assert {"blas", "simd"} <= now.keys()
    script = (
        "from evomerge import compose; from evomerge.running import forward; "
        "versions = forward.versions(); print(versions['blas'], versions['simd'])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{now['blas']} {now['simd']}", done.stderr


def test_another_blas_kernel_is_a_note_and_an_unknown_one_is_not() -> None:
    now = forward.versions()
    assert forward.changes({**now, "blas": "openblas Another"}, now) == (
        f"blas openblas Another before, {now['blas']} now"
    )
    old = {name: version for name, version in now.items() if name not in ("blas", "simd")}
    assert forward.changes(old, now) is None


@pytest.mark.parametrize("module", [forward, out_of_memory], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
