"""How long does scoring take beside lm-eval? One model, in turns, in one process.

    python benchmarks/perf/evaluate.py MODEL [--dtype float32] [--batch-size 16] [--items 16] [--rounds 3]

MODEL: a folder with a chat model, e.g. SmolLM2-135M-Instruct. Tasks of five shapes are written to a temporary
folder: multiple choice without examples and with five of them, four choices of several words each; short
answers and mixed ones (from a word to a story) to questions in a chat template; generation after examples.
Each is scored by our harness, and by `lm_eval.simple_evaluate` at the same batch size and at its default,
one row (what `lm_eval --model hf` does unless told otherwise), in turns; the numbers are medians of the
process's CPU seconds. The harness has its items prepared, as in a search, where every candidate meets them;
simple_evaluate prepares them each time, which the column "prepares" shows (its CPU seconds with a model that
answers at once). "beyond forward" is the part of our time outside the model. "equal" counts items with the
same metric.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.evaluation.harness import Harness
from evomerge.evaluation.live_lm import quiet
from evomerge.evaluation.suite import Suite

THINGS = (
    *("Paris", "London", "cat", "piano", "gravity", "bread", "chess", "rain", "football", "Mars", "iron"),
    *("coffee", "bicycle", "sleep", "ocean"),
)
SPLITS = {"search": "search", "select": "select", "test": "test"}


def passage(rng: random.Random, words: int) -> str:
    verbs = ("likes", "sees", "follows", "carries", "finds", "paints", "moves", "remembers")
    return " ".join(
        f"The {rng.choice(THINGS)} {rng.choice(verbs)} the {rng.choice(THINGS)}." for _ in range(words // 5)
    )


def chosen(rng: random.Random, words: int) -> dict[str, Any]:
    choices = [f"the {a} and the old {b}" for a, b in (rng.sample(THINGS, 2) for _ in range(4))]
    question = f"{passage(rng, words)}\nQuestion: Which two are named {rng.randrange(10**6)} times?\nAnswer:"
    return {"question": question, "choices": choices, "gold": rng.randrange(4)}


def asked(rng: random.Random, kinds: list[str], chat: Callable[[str], str]) -> dict[str, Any]:
    a, b = rng.sample(THINGS, 2)
    return {"question": chat(rng.choice(kinds).format(a=a, b=b) + f" ({rng.randrange(10**4)})"), "answer": a}


def write(folder: Path, items: int, tokenizer: Any) -> None:
    def chat(text: str) -> str:
        turns = [{"role": "user", "content": text}]
        rendered: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return rendered

    shots = "".join(
        f"Question: What is {a}?\nAnswer: It is {a}, which people like and use.\n\n" for a in THINGS * 2
    )
    short = ["Say only the word {a}.", "Is {a} bigger than {b}? Answer yes or no.", "Name one colour of {a}."]
    mixed = [*short, "In one sentence, what is {a}?", "Write a long story about {a} and {b}."]
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{ question }}", "doc_to_choice": "choices"}
    choice |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{ question }}",
        "doc_to_target": "{{ answer }}",
    }
    generate |= {"metric_list": [{"metric": "exact_match"}]}

    def up_to(tokens: int, *until: str) -> dict[str, Any]:
        return {"generation_kwargs": {"until": list(until), "max_gen_toks": tokens, "do_sample": False}}

    tasks: dict[str, tuple[dict[str, Any], Callable[[random.Random], dict[str, Any]]]] = {
        "choice_zero_shot": (choice, lambda rng: chosen(rng, 170)),
        "choice_five_shot": (
            {**choice, "num_fewshot": 5, "fewshot_split": "train"},
            lambda rng: chosen(rng, 60),
        ),
        "short_answers": ({**generate, **up_to(32)}, lambda rng: asked(rng, short, chat)),
        "mixed_answers": ({**generate, **up_to(192)}, lambda rng: asked(rng, mixed, chat)),
        "after_examples": (
            {**generate, **up_to(48, "\n")},
            lambda rng: asked(rng, mixed, lambda text: f"{shots}Question: {text}\nAnswer:"),
        ),
    }
    for name, (config, make) in tasks.items():
        for split in (*SPLITS, "train"):
            rng = random.Random(f"{name} {split}")
            lines = [json.dumps(make(rng)) for _ in range(items)]
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
        head = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{name}_{split}.jsonl") for split in (*SPLITS, "train")}
            },
            "test_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**head, **config}))


class Silent(HFLM):  # type: ignore[misc]
    """lm-eval's model class without the model: what remains is what it prepares."""

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: Any, **_: Any) -> Any:
        return [""] * len(requests)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


def compare(task: str, folder: Path, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    metric = "acc" if task.startswith("choice") else "exact_match"
    suite = Suite.from_mapping(
        {
            "name": "speed",
            "chat_template": "off",  # the prompts have it, and lm-eval applies none unless told
            "companion": "off",  # lm-eval has none
            "tasks_dir": str(folder),
            "tasks": [{"task": task, "metric": metric, "splits": SPLITS}],
        },
        folder=folder,
        where="speed",
    )
    harness = Harness(suite, tokenizer=tokenizer, batch_size=options.batch_size, max_length=None)
    harness.prepare(model.config)
    harness.try_out(model)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def theirs(kind: type[HFLM], batch_size: int) -> Any:
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        with quiet():
            return lm_eval.simple_evaluate(
                lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True
            )

    mine: list[float] = []
    rival: list[float] = []
    default: list[float] = []
    beyond: list[float] = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        seconds, scores = timed(lambda: harness.evaluate(model, harness.items("test")))
        wall = time.perf_counter() - start
        mine.append(seconds)
        beyond.append((wall - harness.forward_seconds) / wall)
        seconds, results = timed(lambda: theirs(HFLM, options.batch_size))
        rival.append(seconds)
        seconds, _ = timed(lambda: theirs(HFLM, 1))
        default.append(seconds)
    prepares, _ = timed(lambda: theirs(Silent, options.batch_size))
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    equal = int((np.array([sample[metric] for sample in samples]) == scores[task].metric).sum())
    ours, same, alone = (statistics.median(seconds) for seconds in (mine, rival, default))
    print(
        f"| {task} | {ours:.2f} | {same:.2f} | {same / ours:.1f} | {alone:.2f} | {alone / ours:.1f} "
        f"| {prepares:.2f} "
        f"| {100 * statistics.median(beyond):.1f} % | {equal} of {len(samples)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    size = options.batch_size
    print(
        f"| task | ours, CPU s, batch {size} | simple_evaluate, batch {size} | times faster "
        "| simple_evaluate, batch 1 | times faster | prepares | beyond forward | equal |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.items, tokenizer)
        for task in options.tasks or sorted(path.stem for path in folder.glob("*.yaml")):
            compare(task, folder, model, tokenizer, options)


if __name__ == "__main__":
    main()
