"""Run as a program: fill the disk under a run, a report and an export, make room, go on; print the outcome.

Usage: python -m tests.running.full_disk CONFIG FOLDER MEANS, with one of the means `tmpfs` (FOLDER becomes a
small disk of its own; needs the right to mount, as under `unshare -rm`) and `limit` (no file can grow beyond
a size).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.delivery.progress import Silent
from evomerge.merging.export import writer
from tests.running import quick
from tests.running.crash import facts

SIZE = 40_000_000
ROOM = {"tmpfs": (0, 60_000, 250_000), "limit": (0, 250_000)}
"""Means -> how many bytes runs have in the end."""
NO_MOUNT = 77
"""Exit code where no disk can be mounted here."""


def small_disk(folder: Path) -> Callable[[int], AbstractContextManager[None]]:
    """Mount a small disk; return what leaves only so many bytes of it free for a while."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        sys.exit(NO_MOUNT)

    @contextmanager
    def left(free: int) -> Any:
        state = os.statvfs(folder)
        filler = folder / "filler"
        filler.write_bytes(bytes(max(0, state.f_bavail * state.f_bsize - free)))
        try:
            yield
        finally:
            filler.unlink()

    return left


def size_limit(_: Path) -> Callable[[int], AbstractContextManager[None]]:
    """Return what lets no file grow beyond so many bytes for a while."""

    @contextmanager
    def left(free: int) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return left


def invoke(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return {"code": done.exit_code, "error": done.stderr, "traceback": "Traceback" in done.output}


def main(config: Path, folder: Path, means: str) -> None:
    compose.executors.build = quick.build(0)
    compose.start(compose.RunConfig.load(config, out=str(folder.parent / "whole")), Silent())
    folder.mkdir()
    left = {"tmpfs": small_disk, "limit": size_limit}[means](folder)
    found: dict[str, Any] = {"whole": facts(folder.parent / "whole"), "resumed": {}, "full": {}}
    for free in ROOM[means]:
        run = folder / f"run-{free}"
        with left(free):
            found["full"][f"run {free}"] = invoke("run", config, "--out", run)
        again = invoke("run", config, "--out", run)
        assert again["code"] == 0, again
        (run / "report.html").unlink()
        found["resumed"][f"run {free}"] = facts(run)
    run = folder / "run-0"
    usage = namedtuple("usage", "total used free")
    writer.shutil.disk_usage = lambda _: usage(10**12, 0, 10**12)  # type: ignore[attr-defined] # a quota is not seen
    for free in (0, 60_000):
        with left(free):
            found["full"][f"report {free}"] = invoke("report", run)
            found["full"][f"model {free}"] = invoke("export", run, folder / "model")
        with left(0):
            found["full"][f"recipe {free}"] = invoke("export", run, folder / "r.yaml", "--as", "recipe")
    found["left over"] = sorted(p.name for p in (*folder.iterdir(), *run.iterdir()))
    recipe = ("export", run, folder / "r.yaml", "--as", "recipe")
    for words in (("report", run), ("export", run, folder / "model"), recipe):
        again = invoke(*words)
        assert again["code"] == 0, again
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
