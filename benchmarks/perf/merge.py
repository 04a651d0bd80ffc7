"""How fast merging is, and in how much memory: one-shot against mergekit, warm against `Tensor.copy_`.

    make bench-merge                                         (sets up mergekit in its own environment)
    python benchmarks/perf/merge.py [--mergekit PATH/TO/mergekit-yaml] [--rounds N] [--hidden 768 ...]

Builds random bfloat16 Llamas (a base and three fine-tunes of about 90M parameters), then measures side by
side, in turns, and prints medians. Times are of whole processes for one-shot merges; memory is the peak
resident set of the process, mapped files included. Not covered: GPUs, downloads, evaluation.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.tensors import kernels

SOURCES = ("m1", "m2", "m3")
ONE_SHOT = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.4},
}
WARM = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties", "model_stock", "breadcrumbs")


def build(folder: Path, hidden: int, layers: int, vocabulary: int) -> int:
    """Write the base and its fine-tunes and return the number of parameters of each."""
    inner = (hidden * 8 // 3 + 63) // 64 * 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    for model in ("base", *SOURCES):
        change = 0.0 if model == "base" else 0.002
        tensors = {
            name: (tensor + change * torch.randn(tensor.shape, generator=random)).bfloat16()
            for name, tensor in base.items()
        }
        (folder / model).mkdir()
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(config))
    return sum(tensor.numel() for tensor in base.values())


STOPWATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.stdout.decode()[-3000:] if done.returncode else 0)
"""
"""Times one command. In a small process of its own: a child's peak counts what its parent had at the fork."""


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command and return its wall-clock seconds and its peak resident set in MB."""
    done = subprocess.run(
        [sys.executable, "-c", STOPWATCH, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def one_shot(folder: Path, mergekit: str | None, rounds: int) -> None:
    """Print whole-process times and memory of both tools, and their ratios."""
    print("\n## One-shot: whole processes, three fine-tunes and their base\n")
    print("| method | evomerge s | mergekit s | times faster | evomerge MB | mergekit MB | share of memory |")
    print("|---|---|---|---|---|---|---|")
    out = folder / "out"
    ours_command = [str(Path(sys.executable).with_name("evomerge")), "merge"]
    for method, parameters in ONE_SHOT.items():
        config = {
            "merge_method": method,
            "models": [
                {"model": str(folder / name), "parameters": {"weight": 0.3 + 0.1 * i, **parameters}}
                for i, name in enumerate(SOURCES)
            ],
            "dtype": "bfloat16",
        }
        if method != "linear":
            config["base_model"] = str(folder / "base")
        path = folder / f"{method}.yml"
        path.write_text(yaml.safe_dump(config))
        seen: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            seen["ours"].append(timed([*ours_command, str(path), str(out), "--quiet"]))
            shutil.rmtree(out)
            if mergekit:
                seen["theirs"].append(timed([mergekit, str(path), str(out)]))
                shutil.rmtree(out)
        ours, theirs = (
            [statistics.median(values) for values in zip(*runs, strict=True)] for runs in seen.values()
        )
        if theirs:
            print(
                f"| {method} | {ours[0]:.2f} | {theirs[0]:.2f} | {theirs[0] / ours[0]:.1f} "
                f"| {ours[1]:.0f} | {theirs[1]:.0f} | {ours[1] / theirs[1]:.2f} |"
            )
        else:
            print(f"| {method} | {ours[0]:.2f} | - | - | {ours[1]:.0f} | - | - |")


def candidate(method: str, models: dict[str, str], turn: int) -> Recipe:
    """Return a recipe with parameters of its own for this turn."""
    names = SOURCES[:2] if method == "slerp" else SOURCES
    drift = turn * 0.01
    possible = {
        "weight": tuple(0.3 + 0.1 * i + drift for i in range(len(names))),
        "density": tuple(0.3 + 0.1 * i + drift for i in range(len(names))),
        "t": 0.3 + drift,
        "gamma": 0.02,
    }
    from evomerge.merging import methods

    parameters = {key: value for key, value in possible.items() if key in methods.get(method).parameters}
    group = TensorGroup(method=method, sources=names, parameters=parameters)
    return Recipe(models=models, base="base", groups=(group,), seed=turn)


def warm(folder: Path, rounds: int, *, low_memory: bool) -> None:
    """Print the time of a new candidate in a used workbench beside that of copying the same bytes."""
    models = {name: str(folder / name) for name in ("base", *SOURCES)}
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (theirs, not the merge's)

    start = anonymous()
    bench = Workbench(models, "base", compute_dtype="bfloat16", low_memory=low_memory)
    source = bench.sources["m1"]
    names = list(source.headers)
    live = {name: tensor for name, tensor in bench.model.state_dict().items() if name in source.headers}
    for each in bench.sources.values():
        for name in names:
            each.stored(name).float().sum()  # all files are in memory, as in the second candidate of a search

    def copy() -> None:
        for name in names:
            live[name].copy_(source.stored(name))

    print(f"## Warm: a new candidate in the live model, {torch.get_num_threads()} threads", end="")
    print(f"{', low memory' if low_memory else ''}\n")
    print("| method | first s | candidate ms | `copy_` ms | ratio |")
    print("|---|---|---|---|---|")
    for method in WARM:
        first = clock(lambda method=method: bench.load(candidate(method, models, 0)))
        pairs = []
        for turn in range(1, rounds + 1):
            recipe = candidate(method, models, turn)
            pairs.append((clock(lambda recipe=recipe: bench.load(recipe)), clock(copy)))
            bench._loaded.clear()  # `copy` has changed the live model
        merged, copied = (statistics.median(times) for times in zip(*pairs, strict=True))
        row = f"| {method} | {first:.2f} | {1e3 * merged:.1f} | {1e3 * copied:.1f} | {merged / copied:.2f} |"
        print(row, flush=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    parameters = sum(header.count for header in source.headers.values())
    formula = 2 * parameters + bench.nbytes
    print(
        f"\nMemory: {(anonymous() - start) / 1e6:.0f} MB of its own (the formula says {formula / 1e6:.0f}: ",
        end="",
    )
    print(
        f"{2 * parameters / 1e6:.0f} live model, {bench.nbytes / 1e6:.0f} statistics), and mapped files of ",
        end="",
    )
    print(f"{2 * parameters * len(models) / 1e6:.0f} MB that all workers share.")


def clock(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def anonymous() -> int:
    """Return this process's anonymous resident memory in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def answers(command: str) -> bool:
    """Say whether a command is there and starts."""
    if not shutil.which(command):
        return False
    return subprocess.run([command, "--help"], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mergekit", help="the mergekit-yaml to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)  # the models; a process of its own
    parser.add_argument("--low-memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.warm:
        warm(given.warm, 3 * given.rounds, low_memory=given.low_memory)
        return
    mergekit = given.mergekit
    if mergekit and not answers(mergekit):
        print(f"{mergekit} is not there or does not start: measuring evomerge alone")
        mergekit = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = build(folder, given.hidden, given.layers, given.vocabulary)
        how = "compiled" if kernels.available() else "none"
        print(f"{count / 1e6:.1f}M parameters, bfloat16; kernels: {how}", flush=True)
        one_shot(folder, mergekit, given.rounds)
        again = [sys.executable, __file__, "--warm", name, "--rounds", str(given.rounds)]
        for options in ([], ["--low-memory"]):
            print(flush=True)
            subprocess.run([*again, *options], check=True)


if __name__ == "__main__":
    main()
