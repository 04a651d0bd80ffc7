"""What all tests share: the tiny zoo, a small suite on it, run configs, and a browser."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "120"
os.environ["EVOMERGE_STATE"] = tempfile.mkdtemp(prefix="evomerge-state-")
atexit.register(shutil.rmtree, os.environ["EVOMERGE_STATE"], ignore_errors=True)
os.environ["OMP_NUM_THREADS"] = "1"  # test processes share the cores
os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run on tensors in main memory

import hypothesis
import pytest
import yaml

from evomerge.schema import preset_folder
from tests.examples import examples
from tests.zoo_fixture import tiny_zoo as build_tiny_zoo

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# By default examples are derived from the test, so that what passes here passes elsewhere. `make slow`
# searches for new ones; what it finds is mended and kept as an @example.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None, max_examples=examples(100)
)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))

SUITE: dict[str, Any] = {
    "name": "tiny",
    "about": "three skills, retention and one generation task, few items",
    "tasks": [
        {"task": "demo_reverse", "metric": "acc", "specialist": "reverse"},
        {"task": "demo_upper", "metric": "acc", "specialist": "upper"},
        {"task": "demo_text", "metric": "loglikelihood", "role": "retention"},
        {"task": "demo_upper_generate", "metric": "exact_match", "weight": 0},
    ],
}
ITEMS = {"search": 24, "select": 16, "test": 40}


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of every later garbage collection, which would walk it all."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the state folder; workers of pytest-xdist end without calling what atexit holds."""
    shutil.rmtree(os.environ["EVOMERGE_STATE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_zoo(pytestconfig: pytest.Config) -> Path:
    """The folder of the tiny zoo, trained once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    return build_tiny_zoo(pytestconfig.cache.mkdir("zoo"))


def write_suite(folder: Path, *, generate: bool = True, **changes: Any) -> Path:
    """Write the tests' suite into a folder, on a copy of nothing: its tasks are the demo's.

    generate: False leaves out the generation task, which takes half of a candidate's time.
    """
    tasks = [
        {**task, "splits": {s: n for s, n in ITEMS.items() if s != "search" or task.get("weight", 1)}}
        for task in SUITE["tasks"]
        if generate or task["metric"] != "exact_match"
    ]
    tasks_dir = str(preset_folder("benchmarks/suites").parent / "tasks" / "demo")
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "tasks_dir": tasks_dir, "tasks": tasks, **changes}))
    return path


def config_data(zoo: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The tests' run config as data: two specialists, a few candidates, in this process."""
    return {
        "models": {
            "base": str(zoo / "base"),
            "sources": {"upper": str(zoo / "upper"), "reverse": str(zoo / "reverse")},
        },
        "space": "global_weights",
        "suite": str(folder / "suite.yaml"),
        "optimizer": {"name": "cma_es", "population": 4},
        "budget": {"generations": 3},
        "executor": {"name": "inline", "threads": 1, "batch_size": 32},
        "racing": {"blocks": 3, "error": 0.5},
        "finalists": 2,
        "warm_start": {"gradients": False},  # for short tests; those of gradients ask for them
        "weak_specialists": "allow",  # few items, and some tests' models learned nothing
        "seed": 0,
        "out": str(folder / "run"),
        **changes,
    }


@pytest.fixture
def config(tiny_zoo: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a run config into the test's folder; keyword arguments replace top-level keys.

    generate: as in `write_suite`.
    """

    def write(*, generate: bool = True, **changes: Any) -> Path:
        write_suite(tmp_path, generate=generate)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config_data(tiny_zoo, tmp_path, **changes), sort_keys=False))
        return path

    return write


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score by a formula in this process, for tests of all but models, which take most of a run's time."""
    from evomerge import compose
    from tests.running import quick

    monkeypatch.setattr(compose.executors, "build", quick.build(0))


@pytest.fixture(scope="session")
def finished_run(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run on the tiny zoo. Treat it as read-only."""
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent

    folder = tmp_path_factory.mktemp("finished")
    write_suite(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(tiny_zoo, folder), sort_keys=False))
    compose.start(RunConfig.load(path), Silent())
    return folder / "run"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, once per process: a second one would find the first one's event loop running."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
