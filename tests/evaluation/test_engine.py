"""A generation engine beside the live model: it holds the candidate's weights, or the candidate has failed.

The engine here is a stand-in around a transformers model; what is asked of vLLM itself is checked against a
stand-in for its documented interface. Neither is vLLM.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.evaluation import vllm_engine
from evomerge.evaluation.engine import EngineMismatch, Mirror, canary_logprobs, refuse_sampling
from evomerge.evaluation.scores import Failure, NonFiniteScores, Scores
from evomerge.evaluation.vllm_engine import VllmEngine
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import worker as worker_module
from evomerge.running.worker import Job, Worker, WorkerSpec
from tests.test_cli import refuse

TASK = "demo_upper_generate"
CANARY = (5, 9, 7, 11, 8, 6)


def state(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    tied = getattr(model, "all_tied_weights_keys", {})
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


class Fake:
    """An engine around a copy of a model, which remembers its answers by prompt until it is told to forget.

    deaf: how many of its next loads do nothing. calls: what it was asked for, in order.
    """

    def __init__(self, model: Any, stops: Callable[[list[int], Sequence[str]], bool]) -> None:
        self._model, self._stops = copy.deepcopy(model), stops
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self.deaf, self.calls = 0, list[str]()

    def load(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.calls.append("load")
        if self.deaf:
            self.deaf -= 1
            return
        own = dict(state(self._model))
        given = dict(pairs)
        assert own.keys() == given.keys()
        for name, tensor in given.items():
            own[name].copy_(tensor)

    def forget(self) -> None:
        self.calls.append("forget")
        self._answers.clear()

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        self.calls.append("generate")
        for prompt in map(tuple, prompts):
            if prompt not in self._answers:
                self._answers[prompt] = self._continue(list(prompt), limit, stop)
        return [self._answers[tuple(prompt)] for prompt in prompts]

    def _continue(self, tokens: list[int], limit: int, stop: Sequence[str]) -> list[int]:
        new: list[int] = []
        with torch.no_grad():
            while len(new) < limit and not self._stops(new, stop):
                logits = self._model(input_ids=torch.tensor([tokens + new])).logits
                new.append(int(logits[0, -1].argmax()))
        return new

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        self.calls.append("logprobs")
        found: list[float] = canary_logprobs(self._model, tokens).tolist()
        return found


def fake_for(worker: Worker) -> Fake:
    lm = worker._harness._lm

    def stops(new: list[int], stop: Sequence[str]) -> bool:
        return bool(new) and (new[-1] == lm.eot_token_id or any(end in lm.tok_decode(new) for end in stop))

    return Fake(worker._bench._plain, stops)


@pytest.fixture
def spec(config: Callable[..., Path]) -> tuple[WorkerSpec, Recipe]:
    prepared = prepare(RunConfig.load(config(dtype="float32")))
    return prepared.worker, prepared.template


@pytest.fixture
def pair(
    spec: tuple[WorkerSpec, Recipe], monkeypatch: pytest.MonkeyPatch
) -> tuple[Worker, Worker, Fake, list[Job]]:
    """A worker without and one with an engine, the engine, and a job for each source alone and their mean."""
    plain = Worker(spec[0])
    engine = fake_for(plain)
    monkeypatch.setattr(worker_module, "_engine", lambda _: engine)
    mirrored = Worker(replace(spec[0], generation="vllm"))
    template = spec[1]
    recipes = [
        replace(template, groups=(replace(template.groups[0], parameters={"weight": shares}),))
        for shares in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0))
    ]
    return plain, mirrored, engine, [Job(recipe=recipe, split="test") for recipe in recipes]


def test_scores_are_those_of_the_live_model(pair: tuple[Worker, Worker, Fake, list[Job]]) -> None:
    plain, mirrored, engine, jobs = pair
    means = []
    for job in jobs:
        engine.calls.clear()
        expected, found = plain.run(job).outcome, mirrored.run(job).outcome
        assert isinstance(expected, Scores)
        assert isinstance(found, Scores), found
        assert found.same_as(expected)
        means.append(found[TASK].mean)
        assert engine.calls == ["load", "forget", "logprobs", "generate"]
    assert len(set(means)) > 1  # or a stale engine would have passed


def test_weights_that_are_not_taken_over_are_loaded_once_more(
    pair: tuple[Worker, Worker, Fake, list[Job]],
) -> None:
    plain, mirrored, engine, jobs = pair
    mirrored.run(jobs[0])
    engine.calls.clear()
    engine.deaf = 1
    found, expected = mirrored.run(jobs[1]).outcome, plain.run(jobs[1]).outcome
    assert isinstance(found, Scores)
    assert isinstance(expected, Scores)
    assert found.same_as(expected)
    once = ["load", "forget", "logprobs"]
    assert engine.calls == [*once, *once, "generate"]


def test_weights_never_taken_over_are_that_candidates_failure(
    pair: tuple[Worker, Worker, Fake, list[Job]],
) -> None:
    _, mirrored, engine, jobs = pair
    assert isinstance(mirrored.run(jobs[0]).outcome, Scores)
    engine.deaf = 2
    failed = mirrored.run(jobs[1]).outcome
    reason = "the generation engine does not hold the candidate's weights"
    assert failed == Failure(kind="error", reason=reason)
    assert "generate" not in engine.calls[engine.calls.index("generate") + 1 :]
    assert isinstance(mirrored.run(jobs[1]).outcome, Scores)


def test_answers_of_earlier_weights_are_forgotten(
    pair: tuple[Worker, Worker, Fake, list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the reset, a cache that is keyed by tokens would give a candidate another one's score."""
    plain, mirrored, engine, jobs = pair
    first, second = (plain.run(job).outcome for job in jobs[1:3])
    assert isinstance(first, Scores)
    assert isinstance(second, Scores)
    assert first[TASK].mean != second[TASK].mean
    mirrored.run(jobs[1])
    monkeypatch.setattr(engine, "forget", lambda: None)
    stale = mirrored.run(jobs[2]).outcome
    assert isinstance(stale, Scores)
    np.testing.assert_array_equal(stale[TASK].metric, first[TASK].metric)


def bench_of(zoo: Path) -> Workbench:
    recipe = Recipe.copy_of(str(zoo / "base"), dtype="float32")
    bench = Workbench(recipe.models)
    bench.load(recipe)
    return bench


def test_a_change_nobody_spoke_of_is_found_by_the_canary(tiny_zoo: Path) -> None:
    bench = bench_of(tiny_zoo)
    engine = Fake(bench.model, lambda new, stop: False)
    mirror = Mirror(engine, CANARY, tolerance=1e-3, weights=state)
    mirror.sync(bench.model)
    mirror.sync(bench.model)
    assert engine.calls == ["load", "forget", "logprobs", "logprobs"]
    with torch.no_grad():
        next(bench.model.parameters()).mul_(1.5)
    engine.calls.clear()
    mirror.sync(bench.model)
    assert engine.calls == ["logprobs", "load", "forget", "logprobs"]
    with torch.no_grad():
        next(bench.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteScores):
        mirror.sync(bench.model)


def test_an_engine_of_nan_does_not_pass(tiny_zoo: Path) -> None:
    bench = bench_of(tiny_zoo)
    engine = Fake(bench.model, lambda new, stop: False)
    engine.logprobs = lambda tokens: [math.nan] * (len(tokens) - 1)  # type: ignore[method-assign]
    with pytest.raises(EngineMismatch, match="does not hold the candidate's weights") as caught:
        Mirror(engine, CANARY, tolerance=1e-3, weights=state).sync(bench.model)
    assert "0.001 nats" in str(caught.value)


def test_an_engine_that_does_not_move_does_not_pass_whatever_the_tolerance(tiny_zoo: Path) -> None:
    """In bfloat16 rounding is larger than the difference of two candidates that are near each other."""
    bench = bench_of(tiny_zoo)
    engine = Fake(bench.model, lambda new, stop: False)
    mirror = Mirror(engine, CANARY, tolerance=10.0, weights=state)
    mirror.sync(bench.model)
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.mul_(1.02)
    engine.deaf = 2
    mirror.weights_changed()
    with pytest.raises(EngineMismatch) as caught:
        mirror.sync(bench.model)
    assert "the same numbers as with the weights before" in str(caught.value)
    mirror.sync(bench.model)
    mirror.sync(bench.model)


def test_a_model_of_other_layers_is_refused(tiny_zoo: Path) -> None:
    bench = bench_of(tiny_zoo)
    mirror = Mirror(Fake(bench.model, lambda new, stop: False), CANARY, tolerance=1e-3, weights=state)
    mirror.sync(bench.model)
    shorter = copy.deepcopy(bench.model)
    del shorter.model.layers[-1]
    mirror.weights_changed()
    with pytest.raises(ConfigError, match="other layers"):
        mirror.sync(shorter)


def test_sampling_is_refused() -> None:
    refuse_sampling("t", {"do_sample": False, "temperature": 0.0})
    for options, named in (
        ({"do_sample": True}, "sampling"),
        ({"temperature": 0.7}, "sampling"),
        ({"num_beams": 4}, "num_beams"),
    ):
        with pytest.raises(ConfigError, match=f"task 't' generates with {named}"):
            refuse_sampling("t", options)


def test_without_the_package_it_is_one_message(config: Callable[..., Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is here")
    executor = {"name": "inline", "generation": "vllm"}
    for command in ("check", "run"):
        said = refuse(command, config(executor=executor), folder=tmp_path)
        assert "executor.generation: vllm is not installed" in said
        assert "pip install 'evomerge[vllm]'" in said


def test_the_engine_is_part_of_the_identity_and_the_default_changes_none(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunConfig.load(config())
    named = RunConfig.load(config(executor={**_executor(plain), "generation": "transformers"}))
    other = RunConfig.load(config(executor={**_executor(plain), "generation": "vllm"}))
    assert plain.identity() == named.identity() != other.identity()
    monkeypatch.setattr(vllm_engine, "version", lambda: "0.32.0")
    assert prepare(other).worker.generation == "vllm"
    for changes in (
        {"space": "layer_path", "optimizer": {}},
        {"tokenizer": "union"},
    ):
        wrong = RunConfig.load(config(executor={"generation": "vllm"}, **changes))
        with pytest.raises(ConfigError, match="one model of the base's layers and vocabulary"):
            prepare(wrong)

    asked = RunConfig.load(config(executor={"generation": "vllm"}, chat_template="chatml"))
    with pytest.raises(ConfigError, match="vllm ends answers as the base does"):
        prepare(asked)


def _executor(config: RunConfig) -> dict[str, Any]:
    return {"name": "inline", "threads": 1, "batch_size": config.executor.batch_size}


@pytest.mark.parametrize("old", ["0.31.1", "0.9", "of unknown version"])
def test_an_older_vllm_is_refused(
    old: str, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "version", lambda: old)
    said = refuse("check", config(executor={"name": "inline", "generation": "vllm"}), folder=tmp_path)
    assert "the installed vllm is too old" in said
    assert "expected: vllm 0.32 or newer" in said
    assert f"got: vllm {old}" in said


@pytest.mark.parametrize("new", ["0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.101", "1.0"])
def test_newer_versions_pass(new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "version", lambda: new)
    vllm_engine.check_installed()


class StandIn:
    """What vLLM 0.32 offers, as far as it is used; `test_vllm_real.py` runs the real one."""

    asked: ClassVar[list[tuple[str, Any]]] = []
    failing: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.asked.append(("LLM", options))
        torch.set_num_threads = lambda count: None
        core = types.SimpleNamespace(shutdown=lambda: self.asked.append(("shutdown", None)))
        self.llm_engine = types.SimpleNamespace(engine_core=core)
        if self.failing:
            raise ValueError(f"first line\n{self.failing}")

    def start_weight_update(self) -> None:
        self.asked.append(("start", None))

    def update_weights(self, request: dict[str, Any]) -> None:
        self.asked.append(("update", [name for name, _ in request["update_info"]["weights"]]))

    def finish_weight_update(self) -> None:
        self.asked.append(("finish", None))

    def reset_prefix_cache(self) -> bool:
        self.asked.append(("reset_prefix_cache", None))
        return len(self.asked) < 7

    def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append(("generate", (prompts, sampling_params)))
        prompt = prompts[0]["prompt_token_ids"]
        given = [None, *({token: types.SimpleNamespace(logprob=-float(token))} for token in prompt[1:])]
        answer = types.SimpleNamespace(token_ids=(7, 8))
        return [types.SimpleNamespace(outputs=[answer], prompt_logprobs=given) for _ in prompts]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(vllm_engine, "version", lambda: "0.32.0")
    monkeypatch.setattr(StandIn, "asked", [])
    modules = {
        "vllm": {"LLM": StandIn, "SamplingParams": lambda **options: options},
        "vllm.config": {"WeightTransferConfig": lambda backend: backend},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(device_type="cuda")},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {"WeightTransferEngineFactory": Kinds},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    return StandIn


class Kinds:
    """The kinds of weight updates that vLLM knows."""

    _registry: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def register_engine(cls, name: str, module: str, kind: str) -> None:
        assert name not in cls._registry
        cls._registry[name] = module, kind


def test_what_is_asked_of_vllm(tmp_path: Path, stand_in: type[StandIn]) -> None:
    before = torch.set_num_threads
    with pytest.raises(ConfigError, match="vllm can't use cuda:1"):
        VllmEngine(tmp_path, dtype="bfloat16", max_length=64, device="cuda:1")
    engine = VllmEngine(tmp_path, dtype="bfloat16", max_length=64, device="cuda")
    assert torch.set_num_threads is before
    engine.load([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    engine.forget()
    assert engine.generate([[1, 2], [3]], limit=5, stop=["\n"]) == [[7, 8], [7, 8]]
    assert engine.logprobs([4, 5, 6]) == [-5.0, -6.0]
    asked = stand_in.asked
    options = asked[0][1]
    assert (options["model"], options["dtype"], options["max_model_len"]) == (str(tmp_path), "bfloat16", 64)
    assert options["load_format"] == "dummy"
    assert Kinds._registry[options["weight_transfer_config"]] == (
        "evomerge.evaluation.vllm_weights",
        "WeightsAtHand",
    )
    swap = [("start", None), ("update", ["a", "b"]), ("finish", None), ("reset_prefix_cache", None)]
    assert asked[1:5] == swap
    prompts, greedy = asked[5][1]
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    assert (greedy["temperature"], greedy["max_tokens"], greedy["stop"]) == (0.0, 5, ["\n"])
    assert greedy["include_stop_str_in_output"]
    assert asked[6][1][1]["prompt_logprobs"] == 0
    with pytest.raises(RuntimeError, match="did not reset"):
        engine.forget()


def test_a_new_engine_ends_the_one_before(tmp_path: Path, stand_in: type[StandIn]) -> None:
    """Two in one process share vLLM's distributed state, and the end of one takes it from the other."""
    first = VllmEngine(tmp_path, dtype="bfloat16", max_length=64, device="cuda")
    second = VllmEngine(tmp_path, dtype="bfloat16", max_length=64, device="cuda")
    assert [what for what, _ in stand_in.asked] == ["LLM", "shutdown", "LLM"]
    del first
    assert len(stand_in.asked) == 3
    del second
    assert stand_in.asked[-1] == ("shutdown", None)


def test_a_vllm_for_other_devices_and_one_that_cannot_start_are_one_message(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="the installed vllm does not run on cpu") as caught:
        VllmEngine(tmp_path, dtype="float32", max_length=64, device="cpu")
    assert "one for cuda" in str(caught.value)
    monkeypatch.setattr(stand_in, "failing", "head_size 24 is not supported")
    with pytest.raises(ConfigError, match="can't start with this model") as caught:
        VllmEngine(tmp_path, dtype="float32", max_length=64, device="cuda")
    assert "got: head_size 24 is not supported" in str(caught.value)
