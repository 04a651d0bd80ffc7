"""The built wheel carries presets, tasks and the demo's models, and finds them where it is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import evomerge
assert evomerge.__file__.startswith(sys.argv[1]), evomerge.__file__
from evomerge.prepare import prepare
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.evaluation import tasks
prepared = prepare(RunConfig.load(DEMO_CONFIG))
assert str(prepared.suite.tasks_dir).startswith(sys.argv[1])
print(prepared.space.dimension, len(tasks.build(prepared.suite, seed=0)))
"""


def test_a_built_wheel_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "evomerge" / "py.typed").exists()
    command = [sys.executable, "-c", CHECK, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["50", "8"]
