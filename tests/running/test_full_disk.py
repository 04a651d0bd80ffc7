"""A disk that is full: one message, exit code 2, nothing broken; with room again the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_suite
from tests.running.full_disk import NO_MOUNT, ROOM


@pytest.mark.end_to_end
@pytest.mark.parametrize("means", [pytest.param("tmpfs", marks=pytest.mark.slow), "limit"])
def test_a_full_disk(config: Callable[..., Path], tmp_path: Path, means: str) -> None:
    path = config(budget={"generations": 2})
    write_suite(tmp_path, generate=False)
    own = ["unshare", "-rm"] if means == "tmpfs" else []
    if own and shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(
        [*own, sys.executable, "-m", "tests.running.full_disk", path, tmp_path / "disk", means],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EVOMERGE_KERNELS": "0"},
    )
    if own and (done.returncode == NO_MOUNT or done.stderr.startswith("unshare:")):
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, result in found["full"].items():
        assert result["code"] == 2, (name, result)
        assert result["error"].count("error: ") == 1, (name, result)
        assert not result["traceback"], name
        assert any(
            words in result["error"] for words in ("could not be written", "can't be written", "space")
        ), (
            name,
            result,
        )
    assert found["whole"]["integrity"] == "ok"
    for name, facts in found["resumed"].items():
        assert facts == found["whole"], name
    runs = [f"run-{free}" for free in ROOM[means]]
    assert found["left over"] == sorted([*runs, ".lock", "log.jsonl", "log.txt", "run.sqlite"])
