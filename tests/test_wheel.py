"""The built wheel carries presets, tasks and the demo's models, and finds them where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import evomerge

ROOT = Path(__file__).parent.parent

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import evomerge
assert evomerge.__file__.startswith(sys.argv[1]), evomerge.__file__
from evomerge.prepare import prepare
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.running.worker import build_harness
prepared = prepare(RunConfig.load(DEMO_CONFIG))
assert str(prepared.suite.tasks_dir).startswith(sys.argv[1])
print(prepared.space.dimension, len(build_harness(prepared.worker).examples()))
"""


def test_a_built_wheel_is_complete(tmp_path: Path) -> None:
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "evomerge" / "py.typed").exists()
    command = [sys.executable, "-c", CHECK, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["50", "8"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_wheel_comes_with_a_bill_of_materials(tmp_path: Path) -> None:
    settings = {"DIST": tmp_path / "dist", "AUDIT": tmp_path / "audit", "BIN": Path(sys.executable).parent}
    words = [f"{name}={value}" for name, value in settings.items()]
    made = subprocess.run(
        ["make", "-s", "--assume-old=.venv/.installed", "wheel", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (bill,) = (tmp_path / "dist").glob("*.cdx.json")
    content = json.loads(bill.read_text())
    assert content["bomFormat"] == "CycloneDX"
    assert content["metadata"]["component"]["version"] == evomerge.__version__
    parts = {part["name"]: part["version"] for part in content["components"]}
    assert {"torch", "transformers", "lm-eval"} <= parts.keys()
    assert not {"pytest", "ruff", "evomerge"} & parts.keys()
    pins = (tmp_path / "dist" / "requirements.txt").read_text().split()
    assert pins == sorted(f"{name}=={version}" for name, version in parts.items())
    assert len(list((tmp_path / "dist").glob("*.whl"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_wheel_works_in_a_new_environment_outside_the_repository(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], check=False, capture_output=True).returncode:
        pytest.skip(f"no Python {version} on this machine")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    new = tmp_path / "venv" / "bin"
    install = [new / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    for words in (["doctor"], ["spaces"], ["demo", "--evaluations", "4"]):
        done = subprocess.run(
            [new / "evomerge", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "it scores the same on every test item" in done.stdout
