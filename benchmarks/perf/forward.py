"""Forward passes on this machine's processor: dtypes by size of the model, workers against threads, logits.

    python benchmarks/perf/forward.py [dtype|split|logits] [--rounds 5]

`dtype`: one thread, float32 and bfloat16 in turns, the best of the rounds. `split`: tokens per second of all
cores together, as one worker with all threads, as one worker per core, and between, in both dtypes; an
otherwise idle machine, please. `logits`: what reading log-likelihoods, hits and leads off the logits of a
batch takes, all at once by the formulas, and as evomerge reads them; the bits must be equal.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from typing import Any

SHAPES = {"0.5 M": (64, 4), "7 M": (256, 8), "42 M": (576, 10), "105 M": (1024, 8)}
"""Parameters -> hidden size and layers of a Llama with 2,000 words."""
INPUTS = {"32 x 32 tokens": (32, 32), "8 x 300": (8, 300), "32 x 1 (generation)": (32, 1)}


def llama(hidden: int, layers: int, dtype: str) -> Any:
    """Return a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        vocab_size=2000,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def dtypes(rounds: int) -> None:
    """Print seconds of both dtypes and their ratio."""
    import torch

    torch.set_num_threads(1)
    print("| parameters | input | float32, s | bfloat16, s | ratio |\n|---|---|---|---|---|")
    for size, (hidden, layers) in SHAPES.items():
        models = [llama(hidden, layers, dtype) for dtype in ("float32", "bfloat16")]
        for name, shape in INPUTS.items():
            ids = torch.randint(0, 2000, shape)
            best = [float("inf")] * 2
            with torch.inference_mode():
                for _ in range(rounds + 1):  # the first is not worse than the rest
                    for at, model in enumerate(models):
                        start = time.perf_counter()
                        model(ids)
                        best[at] = min(best[at], time.perf_counter() - start)
            print(
                f"| {size} | {name} | {best[0]:.4f} | {best[1]:.4f} | {best[0] / best[1]:.2f} |", flush=True
            )


def work(dtype: str, threads: int, seconds: float, ready: Any, tokens: Any) -> None:
    """Compute forward passes for some seconds and add their tokens."""
    import torch

    torch.set_num_threads(threads)
    model = llama(1024, 8, dtype)
    ids = torch.randint(0, 2000, (16, 100))
    with torch.inference_mode():
        model(ids)
        ready.wait()
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            model(ids)
            count += ids.numel()
    with tokens.get_lock():
        tokens.value += count


def split(seconds: float) -> None:
    """Print tokens per second by workers and threads."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    print("| workers x threads | float32, tokens/s | bfloat16 |\n|---|---|---|")
    for workers in (count for count in range(1, cores + 1) if cores % count == 0):
        row = []
        for dtype in ("float32", "bfloat16"):
            ready, tokens = context.Barrier(workers), context.Value("q", 0)
            given = (dtype, cores // workers, seconds, ready, tokens)
            running = [context.Process(target=work, args=given) for _ in range(workers)]
            for process in running:
                process.start()
            for process in running:
                process.join()
            row.append(f"{tokens.value / seconds:.0f}")
        print(f"| {workers} x {cores // workers} | {' | '.join(row)} |", flush=True)


def logits(rounds: int) -> None:
    """Print seconds of reading the gold tokens of a batch."""
    import torch

    from evomerge.evaluation import gold_tokens

    torch.set_num_threads(1)
    print("| tokens | vocabulary | all at once, s | evomerge, s | ratio |\n|---|---|---|---|---|")
    for tokens, vocabulary in ((2048, 2000), (2048, 49_152), (1024, 128_256)):
        found = torch.randn(tokens, 1, vocabulary).to(torch.bfloat16)
        place = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
        gold = torch.randint(0, vocabulary, (tokens,))
        best = [float("inf")] * 2
        for _ in range(rounds):
            start = time.perf_counter()
            whole = found[place].float()
            of_gold = whole.gather(1, gold[:, None])
            expected = [of_gold[:, 0] - whole.logsumexp(1), whole.argmax(1) == gold]
            others = whole.scatter_(1, gold[:, None], -torch.inf).amax(1)
            expected.append(of_gold[:, 0] - others)
            middle = time.perf_counter()
            got = gold_tokens.read(found, place, gold)
            best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        print(
            f"| {tokens} | {vocabulary} | {best[0]:.3f} | {best[1]:.3f} | {best[0] / best[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("dtype", "split", "logits"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "dtype":
        dtypes(options.rounds)
    elif options.what == "logits":
        logits(options.rounds)
    else:
        split(3.0 * options.rounds)
