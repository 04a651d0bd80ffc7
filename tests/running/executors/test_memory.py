"""How many workers fit into a machine's memory, and which dtype its processor is asked for."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from evomerge.running import executors
from evomerge.running.executors import ExecutorSpec, ModelSizes, devices, memory

GB = 10**9
LARGE = ModelSizes(parameters=7 * GB, dtype="bfloat16", files=42 * GB)


@pytest.mark.parametrize(
    ("free", "workers"),
    [(None, None), (1 * GB, 1), (64 * GB, 1), (110 * GB, 2), (256 * GB, 6)],
    ids=["not known", "too little for one", "less than files and one", "two", "six"],
)
def test_as_many_workers_as_fit_beside_the_files(free: int | None, workers: int | None) -> None:
    assert LARGE.fitting(free, "bfloat16") == workers


def test_a_config_without_workers_has_one_per_core_or_fewer_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(executors, "cores", lambda: 16)
    monkeypatch.setattr(devices, "cores", lambda: 16)
    monkeypatch.setattr(executors, "automatic", lambda: "cpu")
    monkeypatch.setattr(executors.memory, "free", lambda: 110 * GB)
    few = executors.fitted(ExecutorSpec(), LARGE, "bfloat16")
    assert executors.worker_count(few) == 2
    assert executors.resolve(few, LARGE)[2] == 8  # threads
    engine = ModelSizes(parameters=7 * GB, dtype="bfloat16", files=42 * GB, engine=True)
    assert engine.worker("bfloat16") > LARGE.worker("bfloat16") + 14 * GB
    differentiated = ModelSizes(parameters=7 * GB, dtype="bfloat16", files=42 * GB, gradients=True)
    assert differentiated.worker("bfloat16") == LARGE.worker("bfloat16") + 7 * GB
    small = ModelSizes(parameters=135_000_000, dtype="bfloat16", files=GB)
    assert executors.worker_count(executors.fitted(ExecutorSpec(), small, "bfloat16")) == 16
    named = ExecutorSpec(workers=12)
    assert executors.fitted(named, LARGE, "bfloat16") is named
    inline = ExecutorSpec(name="inline")
    assert executors.fitted(inline, LARGE, "bfloat16") is inline


@pytest.mark.parametrize(
    ("parameters", "merged", "able", "dtype"),
    [
        (135_000_000, "bfloat16", True, "bfloat16"),
        (135_000_000, "bfloat16", False, "float32"),
        (135_000_000, "float16", True, "float32"),
        (135_000_000, "float32", True, "float32"),
        (500_000, "bfloat16", True, "float32"),
    ],
)
def test_bfloat16_on_a_cpu_needs_instructions_a_large_model_and_weights_that_lose_nothing(
    parameters: int, merged: str, able: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "automatic", lambda: "cpu")
    monkeypatch.setattr(executors, "multiplies_bfloat16", lambda: able)
    models = ModelSizes(parameters=parameters, dtype=merged, files=0)
    assert executors.resolve(ExecutorSpec(), models)[1] == dtype
    assert executors.resolve(ExecutorSpec(dtype="float32"), models)[1] == "float32"
    assert executors.resolve(ExecutorSpec())[1] == "float32"


def test_a_container_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable:   48000000 kB\n",
        "/sys/fs/cgroup/memory.max": f"{8 * GB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon {3 * GB}\nfile {4 * GB}\nkernel 0\n",
    }

    def read(path: Path, **_: object) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert memory.free() == 5 * GB
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.free() == 48_000_000 * 1024
    files.clear()
    assert memory.free() is None


def test_the_examples_in_docstrings() -> None:
    assert doctest.testmod(memory).failed == 0
