"""The script that measures what needs a GPU still runs, as far as a CPU can run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.merging.tensors.on_device import available

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "perf" / "gpu.py"


def measured(folder: Path, *parts: str) -> tuple[dict[str, Any], str]:
    """Run parts of the script without a GPU; return what it stored of each part, and what it printed."""
    out = folder / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.read_text())["parts"], done.stdout


@pytest.mark.end_to_end
def test_the_script_starts_and_says_what_needs_a_gpu(tmp_path: Path) -> None:
    parts, said = measured(tmp_path, "memory", "generation")
    assert {name: part["failed"] for name, part in parts.items()} == dict.fromkeys(parts, "needs a card")
    assert said.count("needs a card") == 2


@pytest.mark.slow  # what they measure is compared in tests/merging/tensors and tests/evaluation
@pytest.mark.skipif(not available("cpu"), reason="no Triton")
def test_every_part_runs_or_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    parts, said = measured(tmp_path, "kernels", "bandwidth", "memory", "throughput", "generation")
    failed = {name: part["failed"] for name, part in parts.items() if part["failed"]}
    assert failed == {"memory": "needs a card", "generation": "needs a card"}
    kernels = parts["kernels"]["rows"]
    assert {row["type"] for row in kernels} == {"bfloat16", "float32", "float16"}
    assert all(row["equal bits"] and row["on the device"] for row in kernels)
    assert all(row["on the device"] for row in parts["bandwidth"]["rows"])
    assert parts["throughput"]["rows"]
    assert "| float16 |" in said


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    parts, said = measured(tmp_path, "resume")
    assert not parts["resume"]["failed"]
    (resumed,) = parts["resume"]["rows"]
    assert resumed["killed"]
    assert resumed["digest equal"]
    assert "| killed and resumed |" in said
