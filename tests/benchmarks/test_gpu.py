"""The script that measures what needs a GPU still runs, as far as a CPU can run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.merging.tensors.on_device import available

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "perf" / "gpu.py"


@pytest.mark.skipif(not available("cpu"), reason="no Triton")
def test_every_part_runs_or_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = json.loads(out.read_text())["parts"]
    failed = {name: part["failed"] for name, part in parts.items() if part["failed"]}
    assert failed == {"memory": "needs a card", "generation": "needs a card"}
    kernels = parts["kernels"]["rows"]
    assert {row["type"] for row in kernels} == {"bfloat16", "float32", "float16"}
    assert all(row["equal bits"] and row["on the device"] for row in kernels)
    assert all(row["on the device"] for row in parts["bandwidth"]["rows"])
    (resumed,) = parts["resume"]["rows"]
    assert resumed["killed"]
    assert resumed["digest equal"]
    assert parts["throughput"]["rows"]
    assert "| killed and resumed |" in done.stdout
