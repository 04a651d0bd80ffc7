"""Runs killed at random, hundreds of times (`make torture`): each ends in the bits of an unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_suite

KILLS = int(os.environ.get("EVOMERGE_KILLS", "200"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2], ids=["models", "worker processes"])
def test_killed_at_random(config: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """With everything on: item blocks, a surrogate that proposes, gradients before the first generation."""
    path = config(
        optimizer={"name": "cma_es", "population": 7},
        budget={"generations": 2},
        warm_start={"gradients": {"steps": 2, "share": 0.5}},
    )
    write_suite(tmp_path, generate=False)
    done = subprocess.run(
        [sys.executable, "-m", "tests.running.torture", path, tmp_path, str(KILLS), str(workers)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] == KILLS
    assert found["ends"] >= 1
