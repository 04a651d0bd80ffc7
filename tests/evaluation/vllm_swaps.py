"""Fifty candidates swapped into one running vLLM, compared with a fresh vLLM of each export, and the canary.

    .venv-vllm/bin/python -m tests.evaluation.vllm_swaps --family llama --dtype float32

prints the figures of benchmarks/perf/LOG.md. Models are random, with heads of 64, because vLLM's attention on
a CPU takes no small ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from evomerge.evaluation.engine import CANARY, canary_logprobs
from evomerge.evaluation.generation import Generator, Request
from evomerge.evaluation.vllm_engine import VllmEngine
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup

COUNT, LIMIT, LENGTH = 50, 16, 96
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 32, "tie_word_embeddings": True},
    "mixtral": {**_EXPERTS, "sliding_window": None},
    "qwen3_moe": {**_EXPERTS, "mlp_only_layers": [], "decoder_sparse_step": 1},
}
ATTENTION = {"gemma2": "eager"}
"""Family -> attention of the live model: transformers' default leaves out the cap on Gemma 2's scores."""
METHODS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("linear", {}, 3),
    ("task_arithmetic", {}, 2),
    ("ties", {"density": 0.5}, 3),
    ("dare_ties", {"density": 0.6}, 2),
    ("dare_linear", {"density": 0.7}, 3),
    ("della", {"density": 0.6, "epsilon": 0.1}, 2),
    ("breadcrumbs", {"density": 0.8}, 3),
    ("slerp", {}, 2),
    ("multislerp", {}, 3),
    ("karcher", {}, 3),
    ("sce", {"select_topk": 0.6}, 2),
    ("model_stock", {}, 3),
)
"""Method, parameters and number of sources; weights are drawn for every candidate."""


def make_zoo(family: str, folder: Path, *, step: float | None = None, **sizes: Any) -> dict[str, str]:
    """Write a base and models `a`, `b`, `c`; return name -> folder.

    step: standard deviation of their differences from the base; None makes models that have little in common,
    so that candidates differ much.
    """
    kind = transformers.CONFIG_MAPPING[family]
    config = kind(**{**SIZES, **FAMILIES[family], **sizes})
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    made = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            torch.manual_seed(seed + 1 if step is None else 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.15)  # or all answers are one word
            torch.manual_seed(seed + 10)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(
                        torch.randn(parameter.shape) * (0.15 if step is None else step) * bool(seed)
                    )
        model.to(torch.bfloat16).save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        ).save_pretrained(folder / name)
        made[name] = str(folder / name)
    return made


def candidates(models: dict[str, str], count: int = COUNT) -> list[Recipe]:
    """Return recipes of all methods in turn, each with other weights."""
    draws = np.random.default_rng(0)
    found = []
    for number in range(count):
        method, parameters, sources = METHODS[number % len(METHODS)]
        names = ("a", "b", "c") if sources == 3 else tuple(draws.permutation(["a", "b", "c"])[:2].tolist())
        weights = tuple(draws.uniform(0.2, 0.9, len(names)).round(3).tolist())
        chosen = {"t": weights[0]} if method == "slerp" else {"weight": weights}
        if method in ("karcher", "sce", "model_stock"):
            chosen = {}
        group = TensorGroup(method=method, sources=names, parameters={**parameters, **chosen})
        found.append(Recipe(models=models, base="base", groups=(group,), dtype="bfloat16", seed=number))
    return found


def prompts() -> list[list[int]]:
    """Return prompts of several lengths, two of which begin alike."""
    draws = np.random.default_rng(1)
    made = [draws.integers(4, len(WORDS), length).tolist() for length in (3, 5, 8, 13, 21, 34, 55)]
    return [*made, [*made[-1][:40], 5, 9]]


def canary() -> list[int]:
    """Return a canary of the usual length."""
    return [1, *np.random.default_rng(2).integers(4, len(WORDS), CANARY - 1).tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What one candidate showed.

    answers, fresh: of the running engine and of a fresh one; live: transformers' greedy tokens.
    right: mean difference of the canary in nats per token, engine against live model. stale: the same with
    the previous candidate's weights in the engine. one_stale: the same with one tensor of the previous
    candidate, for each tensor. logprobs: of the canary. fresh_logprobs: the largest difference of the fresh
    engine's to them.
    grown: MB of memory more than before this swap. seconds: of the swap.
    """

    answers: list[list[int]]
    live: list[list[int]]
    right: float
    stale: float | None
    one_stale: dict[str, float]
    logprobs: np.ndarray[Any, Any]
    grown: float
    seconds: float
    fresh: list[list[int]] | None = None
    fresh_logprobs: float | None = None


def resident() -> float:
    """Return the process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def difference(engine: VllmEngine, expected: np.ndarray[Any, Any]) -> float:
    """Return the canary's mean difference in nats per token."""
    return float(np.abs(np.array(engine.logprobs(canary())) - expected).mean())


def greedy(model: Any) -> list[list[int]]:
    """Return transformers' greedy answers, ended as vLLM ends them."""
    found = []
    for prompt in prompts():
        tokens = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )[0].tolist()[len(prompt) :]
        found.append(tokens)
    return found


def swaps(
    models: dict[str, str],
    *,
    dtype: str,
    recipes: list[Recipe],
    fresh: bool = True,
    one_stale: int = 0,
    attention: str | None = None,
) -> list[Swap]:
    """Swap all candidates into one engine.

    one_stale: try single stale tensors for so many candidates. attention: of the live model.
    """
    bench = Workbench(models, "base", compute_dtype=dtype, attn_implementation=attention)
    engine = VllmEngine(Path(models["base"]), dtype=dtype, max_length=LENGTH, device="cpu")
    found: list[Swap] = []
    before: dict[str, torch.Tensor] = {}
    for number, recipe in enumerate(recipes):
        bench.load(recipe)
        expected = canary_logprobs(bench.model, canary())
        stale = difference(engine, expected) if number else None
        pairs = dict(bench.tensors())
        single: dict[str, float] = {}
        if before and number <= one_stale:
            for name in pairs:
                engine.load([(other, before[name] if other == name else pairs[other]) for other in pairs])
                engine.forget()
                single[name] = difference(engine, expected)
        memory, started = resident(), time.perf_counter()
        engine.load(bench.tensors())
        engine.forget()
        seconds = time.perf_counter() - started
        right, answers = difference(engine, expected), engine.generate(prompts(), limit=LIMIT, stop=[])
        grown = resident() - memory
        before = {name: tensor.clone() for name, tensor in pairs.items()}
        found.append(
            Swap(
                answers=answers,
                live=greedy(bench.model),
                right=right,
                stale=stale,
                one_stale=single,
                logprobs=np.array(engine.logprobs(canary())),
                grown=grown,
                seconds=seconds,
            )
        )
    close(engine)
    if not fresh:
        return found
    return [
        replace(swap, **_fresh(recipe, dtype, swap.logprobs))
        for recipe, swap in zip(recipes, found, strict=True)
    ]


def close(engine: VllmEngine) -> None:
    """End an engine. Only one can live in a process: the end of one takes the distributed state of all."""
    engine._llm.llm_engine.engine_core.shutdown()
    if VllmEngine._end is not None:
        VllmEngine._end.detach()
        VllmEngine._end = None
    del engine._llm
    gc.collect()


def _fresh(recipe: Recipe, dtype: str, logprobs: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return what a new vLLM of the exported folder says, loaded as a user would load it."""
    import vllm

    folder = Path(tempfile.mkdtemp(prefix="evomerge-export-"))
    engine = VllmEngine.__new__(VllmEngine)
    engine._vllm = vllm
    try:
        engine._llm = vllm.LLM(
            model=str(write(recipe, folder / "model")),
            dtype=dtype,
            max_model_len=LENGTH,
            kv_cache_memory_bytes=2**26,
            enforce_eager=True,
            seed=0,
        )
        answers = engine.generate(prompts(), limit=LIMIT, stop=[])
        apart = float(np.abs(np.array(engine.logprobs(canary())) - logprobs).max())
        close(engine)
    finally:
        shutil.rmtree(folder)
    return {"fresh": answers, "fresh_logprobs": apart}


def figures(found: list[Swap]) -> dict[str, Any]:
    """Return what the log states."""
    stale = [swap.stale for swap in found if swap.stale is not None]
    single = sorted(value for swap in found for value in swap.one_stale.values())
    compared = [swap for swap in found if swap.fresh is not None]
    return {
        "swaps": len(found),
        "different answers": len({json.dumps(swap.answers) for swap in found}),
        "equal to a fresh vLLM": f"{sum(s.answers == s.fresh for s in compared)} of {len(compared)}",
        "largest difference to a fresh vLLM's canary": max(
            (s.fresh_logprobs or 0 for s in compared), default=0
        ),
        "equal to transformers": f"{sum(s.answers == s.live for s in found)} of {len(found)}",
        "right, nats per token (median, largest)": (
            float(np.median([s.right for s in found])),
            max(s.right for s in found),
        ),
        "stale (smallest, median)": (min(stale), float(np.median(stale))) if stale else None,
        "one stale tensor (smallest, 10 %, median, count)": (
            (single[0], single[len(single) // 10], single[len(single) // 2], len(single)) if single else None
        ),
        "smallest one stale": min(
            ((value, name) for s in found for name, value in s.one_stale.items()), default=None
        ),
        "MB grown (all swaps after the first, largest)": (
            sum(s.grown for s in found[1:]),
            max(s.grown for s in found[1:]),
        ),
        "seconds per swap (median)": float(np.median([s.seconds for s in found])),
    }


def speed(models: dict[str, str], dtype: str, *, rows: int = 64, limit: int = 32) -> dict[str, float]:
    """Return the processor's seconds in which both programs continue `rows` prompts by `limit` tokens."""
    draws = np.random.default_rng(4)
    asked = [draws.integers(4, len(WORDS), 24).tolist() for _ in range(rows)]
    bench = Workbench(models, "base", compute_dtype=dtype)
    bench.load(candidates(models, 1)[0])
    engine = VllmEngine(Path(models["base"]), dtype=dtype, max_length=LENGTH, device="cpu")
    engine.load(bench.tensors())
    live = Generator(bench.model, str, ends=frozenset(), batch_size=rows)
    requests = [Request(prompt=tuple(prompt), limit=limit) for prompt in asked]
    found: dict[str, float] = {}
    for _ in range(3):
        for name, work in (
            ("vllm", lambda: engine.generate(asked, limit=limit, stop=[])),
            ("live model", lambda: live.answer(requests)),
        ):
            engine.forget()
            started = time.process_time()
            work()
            found[name] = min(found.get(name, np.inf), time.process_time() - started)
    return found


def main() -> None:
    """Print the figures of one family in one type."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--step", type=float, help="how far the models are from the base")
    parser.add_argument("--one-stale", type=int, default=0)
    parser.add_argument("--no-fresh", action="store_true")
    parser.add_argument("--speed", action="store_true", help="only compare the speed of generation")
    parser.add_argument("--sizes", default="{}", help="JSON, changes of the config")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="evomerge-vllm-") as folder:
        models = make_zoo(asked.family, Path(folder), step=asked.step, **json.loads(asked.sizes))
        if asked.speed:
            print(speed(models, asked.dtype))
            return
        found = swaps(
            models,
            dtype=asked.dtype,
            recipes=candidates(models, asked.count),
            fresh=not asked.no_fresh,
            one_stale=asked.one_stale,
            attention=ATTENTION.get(asked.family),
        )
    for name, value in {
        **figures(found),
        "seconds": round(time.perf_counter() - started),
    }.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
