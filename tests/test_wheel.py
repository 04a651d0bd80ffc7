"""The built wheel carries presets, tasks and the demo's models, and finds them where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import evomerge
from evomerge.evaluation.suite import Suite

ROOT = Path(__file__).parent.parent

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import evomerge
assert evomerge.__file__.startswith(sys.argv[1]), evomerge.__file__
from evomerge.config import DEMO_CONFIG, RunConfig, load_suite
config = RunConfig.load(DEMO_CONFIG)
suite = load_suite(config.suite)
places = [place for source in config.locations.values() for place in source.split("+")]
assert all(place.startswith(sys.argv[1]) for place in [str(suite.tasks_dir), *places]), places
print(config.space.name, len(suite.tasks), len(suite.file_hashes()))
"""


def test_the_files_of_a_wheel_are_complete(tmp_path: Path) -> None:
    """Packed they are in the slow tests: compressing the models takes longer than all else here."""
    site = tmp_path / "site"
    for file in WheelBuilder(str(ROOT)).recurse_included_files():
        place = site / file.distribution_path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.path, place)
    assert (site / "evomerge" / "py.typed").exists()
    for place in ("evomerge/zoo/demo", "evomerge/zoo/demo.yaml"):
        assert listed(site / place) == listed(ROOT / place)
    command = [sys.executable, "-c", CHECK, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = Suite.load("demo").file_hashes()
    assert done.stdout.split() == ["task_arithmetic_layers", "8", str(len(files))]


def listed(place: Path) -> list[str]:
    return sorted(
        str(path.relative_to(place.parent)) for path in [place, *place.rglob("*")] if path.is_file()
    )


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
