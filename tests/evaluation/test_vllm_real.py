"""vLLM itself, on the CPU: swapped weights, the canary, and a whole run. `make vllm` runs this.

Skipped where vllm is not installed: it needs an environment of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.evaluation.engine import TOLERANCE
from evomerge.evaluation.judge import Judge, serving, spent_in
from evomerge.evaluation.judge_spec import JudgeSpec
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.vllm_engine import VllmEngine
from evomerge.running.store import StoreReader
from tests.evaluation import vllm_swaps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
MAIN = [sys.executable, "-W", "ignore", "-c", "from evomerge.cli import main; main()"]
SERVE = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
"""`vllm serve`, which the package for CPUs can't start: it asks for the version of a package `vllm`."""
MOST_MEMORY = 3.0
"""MB that a swap may keep, on average; the models have 0.6 million weights."""


@pytest.fixture(autouse=True)
def _one_engine() -> Iterator[None]:
    yield
    if VllmEngine._end is not None:
        VllmEngine._end()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_fifty_swaps_answer_as_a_fresh_vllm_of_each_export(family: str, tmp_path: Path) -> None:
    models = vllm_swaps.make_zoo(family, tmp_path)
    attention = vllm_swaps.ATTENTION.get(family)
    recipes = vllm_swaps.candidates(models)
    found = vllm_swaps.swaps(models, dtype="float32", recipes=recipes, attention=attention)
    print(family, json.dumps(vllm_swaps.figures(found), indent=1))
    assert len(found) == vllm_swaps.COUNT
    assert [swap.answers for swap in found] == [swap.fresh for swap in found]
    assert max(swap.fresh_logprobs or 0.0 for swap in found) < 1e-6
    different = {swap.logprobs.tobytes() for swap in found}
    assert len(different) > vllm_swaps.COUNT // 2  # or stale weights would pass
    assert max(swap.right for swap in found) < TOLERANCE["float32"]
    assert min(swap.stale for swap in found[1:] if swap.stale is not None) > TOLERANCE["float32"]
    assert np.mean([swap.grown for swap in found[5:]]) < MOST_MEMORY


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_canary_tells_stale_weights_from_rounding(dtype: str, tmp_path: Path) -> None:
    models = vllm_swaps.make_zoo("llama", tmp_path)
    recipes = vllm_swaps.candidates(models, 20)
    found = vllm_swaps.swaps(models, dtype=dtype, recipes=recipes, fresh=False, one_stale=2)
    print(dtype, json.dumps(vllm_swaps.figures(found), indent=1))
    assert max(swap.right for swap in found) < TOLERANCE[dtype]
    assert min(swap.stale for swap in found[1:] if swap.stale is not None) > TOLERANCE[dtype]


def write_run(folder: Path) -> Path:
    """Write models, a data file, its suite and a run config that generates with vLLM."""
    models = vllm_swaps.make_zoo("llama", folder / "models")
    draws = np.random.default_rng(3)
    rows = [
        {"q": " ".join(draws.choice(vllm_swaps.WORDS[4:], 6)), "a": str(draws.choice(vllm_swaps.WORDS[4:]))}
        for _ in range(60)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"data": "words.jsonl", "prompt": "q", "answer": "a", "metric": "contains"}
    suite = {"name": "words", "tasks": [{**task, "gen_kwargs": {"max_gen_toks": 16}}]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    config = {
        "models": {"base": models["base"], "sources": {name: models[name] for name in "abc"}},
        "space": "global_weights",
        "suite": "suite.yaml",
        "optimizer": {"name": "cma_es", "population": 4},
        "budget": {"generations": 3},
        "executor": {"workers": 1, "threads": 1, "device": "cpu", "generation": "vllm", "max_length": 96},
        "racing": {"blocks": 1},
        "warm_start": {"gradients": False},
        "weak_specialists": "allow",
        "finalists": 2,
        "out": "whole",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*words: object, folder: Path) -> str:
    done = subprocess.run(
        [*MAIN, *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def generations(folder: Path) -> int:
    """Return how many generations a run has asked for."""
    if not StoreReader.exists(folder):
        return 0
    with StoreReader.read(folder) as store:
        return len(store.generations())


def test_a_run_that_is_killed_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    checked = run("check", config, folder=tmp_path)
    assert "generation by vllm" in checked
    run("run", config, folder=tmp_path)
    log = tmp_path / "killed.txt"
    killed = subprocess.Popen(
        [*MAIN, "run", str(config), "--out", "killed"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    while generations(tmp_path / "killed") < 2:
        assert killed.poll() is None, f"it ended before it was killed: {log.read_text()}"
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    run("resume", tmp_path / "killed", folder=tmp_path)
    found = {}
    for name in ("whole", "killed"):
        with StoreReader.read(tmp_path / name) as store:
            found[name] = store.digest()
            assert "vllm" in store.versions()
    assert found["whole"] == found["killed"]


def test_vllm_serve_as_a_judge(tmp_path: Path) -> None:
    """A random model's verdicts have no number; what counts is that it is asked, and asked once."""
    models = vllm_swaps.make_zoo("llama", tmp_path / "models")
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--served-model-name": "judge",
        "--dtype": "float32",
        "--max-model-len": "128",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--chat-template": str(tmp_path / "chat.jinja"),
    }
    words = [word for option in options.items() for word in option]
    log = tmp_path / "serve.txt"
    server = subprocess.Popen(
        [*SERVE, "--model", models["base"], "--enforce-eager", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    spec = JudgeSpec(
        url=f"http://127.0.0.1:{port}/v1", model="judge", prompt="{{ prompt }} {{ answer }}", max_tokens=8
    )
    allowed = Permissions(ask_judges=True)
    try:
        while b"startup complete" not in log.read_bytes():
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        served = serving("t", spec, allowed)
        assert served["root"] == models["base"]
        judge = Judge("t", spec, allowed)
        judge.keep_in(tmp_path)
        asked = [("w1 w2", f"w{number}", "w3", {}) for number in range(4, 12)]
        first = judge.ahead(asked)
        spent = spent_in(tmp_path, spec)
        assert spent is not None
        assert (spent.requests, spent.verdicts) == (8, 8)
        assert spent.tokens > 8 * 10
        again = Judge("t", spec, allowed)
        again.keep_in(tmp_path)
        assert again.ahead(asked) == first
        assert spent_in(tmp_path, spec) == spent
    finally:
        server.terminate()
        server.wait()
