"""Runs killed at random, hundreds of times (`make torture`): each ends in the bits of an unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evomerge.delivery.style import numbers, table, words
from tests.conftest import write_suite

KILLS = int(os.environ.get("EVOMERGE_KILLS", "400"))
SHARES = {"models": 0.625, "workers": 0.3, "ray": 0.075}
NAMES = {
    "models": "models in the driver's process",
    "workers": "worker processes",
    "ray": "actors of a local Ray",
}


@pytest.fixture(scope="module")
def figures() -> Iterator[list[dict[str, Any]]]:
    """The figures of all kinds, printed as one table at the end."""
    collected: list[dict[str, Any]] = []
    yield collected
    shown = table(words("scored by"), words("killed"), *map(numbers, ("kills", "chains", "seconds")))
    for one in collected:
        killed = ", ".join(f"{target} {count}" for target, count in sorted(one["kills"].items()))
        counts = (sum(one["kills"].values()), one["chains"], one["seconds"])
        shown.add_row(NAMES[one["kind"]], killed, *map(str, counts))
    Console(width=120).print(shown)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SHARES))
def test_killed_at_random(
    config: Callable[..., Path], tmp_path: Path, kind: str, figures: list[dict[str, Any]]
) -> None:
    """With everything on: item blocks, a surrogate that proposes, gradients before the first generation."""
    if kind == "ray":
        pytest.importorskip("ray")
    path = config(
        optimizer={"name": "cma_es", "population": 7},
        budget={"generations": 2},
        warm_start={"gradients": {"steps": 2, "share": 0.5}},
    )
    write_suite(tmp_path, generate=False)
    kills = round(KILLS * SHARES[kind])
    done = subprocess.run(
        [sys.executable, "-m", "tests.running.torture", path, tmp_path, str(kills), kind],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    figures.append(found)
    assert sum(found["kills"].values()) == kills
    assert found["chains"] >= 1
    assert found["processes left"] == 0
    assert found["temporary files left"] == []
