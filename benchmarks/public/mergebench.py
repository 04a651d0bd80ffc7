"""MergeBench's five experts of Llama-3.2-3B (He et al. 2025, arXiv 2505.10833), merged by one command.

    python benchmarks/public/mergebench.py plan                    hours and cost, nothing is started
    python benchmarks/public/mergebench.py run --out runs/mergebench [--only math+coding] [--device cuda]
    python benchmarks/public/mergebench.py table --out runs/mergebench
    python benchmarks/public/mergebench.py dry-run --model FOLDER --out FOLDER

`run` merges all ten pairs and all five at once with the defaults and at most `--evaluations` (100) full
evaluations each, one after another. It may be stopped and called again: every run goes on from its store. It
needs the weights from the hub (`meta-llama/Llama-3.2-3B` asks for a licence), the data of the tasks, and
about 90 GB of disk. Answers of the coding tasks are executed in a process with limits, so `run` asks for
`--allow-code-execution`.

Searched and selected on `train` and `validation` data, reported on `test`: GSM8K, ARC in four languages,
MBPP; HumanEval and IFEval are reported only. MergeBench scores safety with a package of its own; here it is
the suite `safety`. So the table compares our winner with our baselines, not with the paper's numbers.

`dry-run` does the same eleven runs on stand-ins: copies of any small Llama with noise added, and tasks made
here, to see that everything works on a machine without the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import evomerge
from evomerge.schema import preset_folder

BASE = "meta-llama/Llama-3.2-3B"
EXPERTS = {
    name: f"MergeBench/Llama-3.2-3B_{name}"
    for name in ("instruction", "math", "multilingual", "coding", "safety")
}
PARAMETERS = 3.2e9
LANGUAGES = ("fr", "es", "de", "ru")
TASKS: dict[str, list[dict[str, Any]]] = {
    "instruction": [
        {
            "task": "instruct_rules",
            "metric": "all",
            "smooth": "share",
            "splits": {"search": "search", "select": "select", "test": "test"},
        },
        {"task": "ifeval", "metric": "prompt_level_strict_acc", "splits": {"test": "train"}},
    ],
    "math": [
        {
            "task": "gsm8k",
            "metric": "exact_match,flexible-extract",
            "gen_kwargs": {"max_gen_toks": 400},
            "splits": {
                "search": {"from": "train", "items": 200},
                "select": {"from": "train", "items": 200},
                "test": "test",
            },
        }
    ],
    "multilingual": [
        {
            "task": f"arc_{language}",
            "metric": "acc_norm",
            "weight": 1 / len(LANGUAGES),
            "splits": {
                "search": {"from": "train", "items": 150},
                "select": {"from": "validation", "items": 100},
                "test": "test",
            },
        }
        for language in LANGUAGES
    ],
    "coding": [
        {
            "task": "mbpp",
            "metric": "pass_at_1",
            "gen_kwargs": {"max_gen_toks": 400},
            "splits": {
                "search": {"from": "train", "items": 200},
                "select": {"from": "validation", "items": 80},
                "test": "test",
            },
        },
        {"task": "humaneval", "metric": "pass@1", "splits": {"test": "test"}},
    ],
    "safety": [
        {
            "task": task,
            "metric": metric,
            "weight": 0.5,
            "gen_kwargs": {"max_gen_toks": 96},
            "splits": {"search": "search", "select": "select", "test": "test"},
        }
        for task, metric in (("safety_refuse", "refused"), ("safety_answer", "answered"))
    ],
}
"""Expert -> the tasks that its skill is scored on."""
TOKENS = {
    "instruction": (9_000, 38_000),
    "math": (180_000, 80_000),
    "multilingual": (144_000, 0),
    "coding": (90_000, 80_000),
    "safety": (3_000, 10_000),
}
"""Tokens that an evaluation reads and, at most, writes on `search`: items times rough lengths."""


def groups() -> list[tuple[str, ...]]:
    """Return the merges: ten pairs, and all five."""
    return [*itertools.combinations(EXPERTS, 2), tuple(EXPERTS)]


def config(experts: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Return the run config of one merge."""
    tasks = [
        {**task, "specialist": name} if task["splits"].get("search") else task
        for name in experts
        for task in TASKS[name]
    ]
    folder = preset_folder("benchmarks/suites").parent / "tasks"
    return {
        "models": {"base": BASE, "sources": {name: EXPERTS[name] for name in experts}},
        "space": "task_arithmetic_layers",
        "suite": {"name": "mergebench", "tasks_dir": str(folder), "tasks": tasks},
        "budget": {"evaluations": options.evaluations},
        "executor": {"device": options.device},
        "allow_code_execution": options.allow_code_execution,
        "out": str(Path(options.out) / "+".join(experts)),
    }


def stand_in(experts: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Return the same config on stand-ins: models with noise, and a task per expert made here."""
    data = config(experts, options)
    folder = Path(options.out) / "stand-ins"
    models = {"base": str(folder / "base")}
    models |= {
        name: str(noisy(Path(options.model), folder / name, seed)) for seed, name in enumerate(EXPERTS)
    }
    noisy(Path(options.model), folder / "base", None)
    tasks = []
    for name in experts:
        file = folder / f"{name}.jsonl"
        rows = [{"ask": f"{name} {n} =", "reply": " yes", "options": [" yes", " no"]} for n in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(
            {
                "task": name,
                "data": str(file),
                "prompt": "ask",
                "answer": "reply",
                "choices": "options",
                "metric": "choice",
                "specialist": name,
            }
        )
    return data | {
        "models": {"base": models["base"], "sources": {name: models[name] for name in experts}},
        "suite": {"name": "stand-in", "tasks": tasks},
        "weak_specialists": "allow",
        "executor": {"name": "inline", "device": "cpu"},
    }


def noisy(model: Path, out: Path, seed: int | None) -> Path:
    """Copy a model; seed: also add noise of a hundredth of each matrix's spread."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        return out
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in loaded.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.01 * parameter.detach().float().std() * noise).to(parameter.dtype)
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def plan(options: argparse.Namespace) -> None:
    """Print about how long each run takes, and what it costs."""
    reading = 2 * PARAMETERS / (options.flops * options.utilisation)
    writing = max(2 * PARAMETERS / options.bandwidth, options.step) / options.batch
    print("| merge | hours | cost |\n|---|---|---|")
    whole = 0.0
    for experts in groups():
        read, written = (sum(TOKENS[name][n] for name in experts) for n in (0, 1))
        seconds = read * reading + written * writing
        references = len(experts) + 1 + 6  # base, experts and the short list of hand-made merges
        hours = seconds * (options.evaluations + references + 6) / 3600  # and finalists, test
        whole += hours
        print(f"| {' + '.join(experts)} | {hours:.1f} | {hours * options.per_hour:.0f} |")
    print(f"| all eleven | {whole:.0f} | {whole * options.per_hour:.0f} |")
    print(
        f"\n{options.evaluations} evaluations, {options.flops / 1e12:.0f} TFLOP/s "
        f"at {options.utilisation:.0%}, "
        f"{options.bandwidth / 1e12:.1f} TB/s, batches of {options.batch}, {1000 * options.step:.0f} ms "
        f"a generated token, {options.per_hour:g} per hour. "
        "`evomerge check` measures it where the weights are."
    )


def table(options: argparse.Namespace) -> None:
    """Print the verdict of every finished run."""
    print(
        "| merge | winner | best baseline | difference [95 %] | better | worse |\n|---|---|---|---|---|---|"
    )
    for experts in groups():
        folder = Path(options.out) / "+".join(experts)
        if not (folder / "run.sqlite").exists():
            continue
        data = evomerge.load(folder).report().data
        verdict = data["verdict"]
        if verdict is None:
            print(f"| {' + '.join(experts)} | not finished | | | | |")
            continue
        means = {row["name"]: row["mean"][0] for row in data["rows"]}
        (winner,) = (row for row in data["rows"] if row["role"] == "winner")
        print(
            f"| {' + '.join(experts)} | {100 * winner['mean'][0]:.1f} "
            f"| {100 * means[verdict['best_baseline']]:.1f} ({verdict['best_baseline']}) "
            f"| {verdict['points']:+.1f} [{verdict['low']:.1f}, {verdict['high']:.1f}] "
            f"| {', '.join(verdict['better']) or '-'} | {', '.join(verdict['worse']) or '-'} |"
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("plan", "run", "table", "dry-run"))
    parser.add_argument("--out", default="runs/mergebench")
    parser.add_argument("--only", help="one merge, as in math+coding; default: all eleven")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--model", help="dry-run: the folder of a small Llama")
    parser.add_argument("--flops", type=float, default=990e12, help="plan: of the GPU in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.35)
    parser.add_argument("--bandwidth", type=float, default=3.3e12, help="plan: of the GPU's memory, bytes/s")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--step", type=float, default=0.03, help="plan: seconds a generated token takes at least"
    )
    parser.add_argument("--per-hour", type=float, default=2.5)
    options = parser.parse_args()
    if options.command == "plan":
        plan(options)
        return
    if options.command == "table":
        table(options)
        return
    chosen = [experts for experts in groups() if options.only in (None, "+".join(experts))]
    if not chosen:
        parser.error(
            f"--only {options.only}: no such merge; one of {', '.join('+'.join(g) for g in groups())}"
        )
    if options.command == "dry-run" and options.model is None:
        parser.error("dry-run needs --model FOLDER")
    for number, experts in enumerate(chosen, start=1):
        print(f"{number} of {len(chosen)}: {' + '.join(experts)}", flush=True)
        made = stand_in(experts, options) if options.command == "dry-run" else config(experts, options)
        run = evomerge.optimize(made)
        winner = run.winner
        print(f"  {run.stopped}; winner {winner.name if winner else '-'}", flush=True)
        assert winner is None or math.isfinite(winner.mean)
    table(options)


if __name__ == "__main__":
    main()
