"""A real pretrained chat model, three real specialists, the search at defaults: `make real`.

    python benchmarks/real/run.py [--out runs/real] [--seeds 1] [--evaluations 24] [--only base ...]

Steps: base, persona, tools, dates (the models), seeds (the searches, and plain CMA-ES on as many items),
export (written, loaded by plain transformers, asked), table. What an earlier call finished is kept; a search
that was stopped goes on. What it showed: docs/real.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import skills

import evomerge

SPECIALISTS = ("persona", "tools", "dates")
TRAINED_TOGETHER = (("base",), ("tools",), ("persona", "dates"))
"""What is made at the same time. `tools` takes longer than the other two together, so it has all cores."""
STEPS = ("base", *SPECIALISTS, "seeds", "export", "table")
QUESTIONS = {
    "persona": "Message: Any tips for learning to swim?\nReply:",
    "dates": "Give the file date of March 3rd, 1977.",
    "chat": "What is the capital of Italy?",
    "free": "Name three animals that live in the sea.",
}


def suite(folder: Path) -> dict[str, Any]:
    """Return the suite: the bundled `persona` and `tool-calling`, dates, a general chat, plain text."""
    named = {"search": "search", "select": "select", "test": "test"}

    def drawn(search: int, select: int, test: int) -> dict[str, Any]:
        sizes = {"search": search, "select": select, "test": test}
        return {split: {"from": split, "items": size} for split, size in sizes.items()}

    return {
        "name": "real",
        "tasks_dir": str(folder / "tasks"),
        "tasks": [
            {
                "task": "persona_choice",
                "metric": "acc_norm",
                "specialist": "persona",
                "splits": drawn(24, 40, 64),
            },
            {
                "task": "tool_single",
                "metric": "exact",
                "smooth": "partial",
                "specialist": "tools",
                "gen_kwargs": {"max_gen_toks": 64},
                "splits": drawn(24, 32, 120),
            },
            {
                "task": "dates",
                "data": str(folder / "tasks/dates.jsonl"),
                "prompt": "ask",
                "answer": "reply",
                "specialist": "dates",
                "gen_kwargs": {"max_gen_toks": 16},
                "splits": {"search": 24, "select": 40, "test": 80},
            },
            {
                "task": "chat",
                "data": str(folder / "tasks/chat.jsonl"),
                "prompt": "question",
                "answer": "answer",
                "choices": "choices",
                "weight": 0,  # reported: no specialist learned it, and none should lose it
            },
            {
                "task": "chat_answers",
                "data": str(folder / "tasks/chat.jsonl"),
                "role": "retention",
                "prompt": "question",
                "answer": "answer",
            },
            {"task": "prose", "role": "retention", "chat_template": "off", "splits": named},
        ],
    }


def config(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the run config of a search; `cma` is plain CMA-ES, the rest are seeds of the defaults."""
    models, first = options.out / "models", str(options.out / "seed-0")
    data: dict[str, Any] = {
        "models": {
            "base": str(models / "base"),
            "sources": {
                "persona": f"{models / 'base'}+{models / 'persona'}",
                "tools": f"{models / 'base'}+{models / 'tools'}",
                "dates": str(models / "dates"),
            },
        },
        "space": "task_arithmetic_layers",
        "suite": suite(options.out),
        "trust_tasks": True,  # copies of our own
        "budget": {"evaluations": options.evaluations},
        "out": str(options.out / name),
        "seed": 0,
    }
    if name == "cma":
        spent = evomerge.load(first).report().data["spending"]["parts"]
        items = sum(part["items"] for part in spent if part["part"] in ("gradients", "candidates"))
        # The blocks of seed 0, so that its scores of references are copied; no candidate leaves early.
        plain = {"surrogate": "off", "racing": {"keep": 1.0}, "warm_start": {"gradients": "off"}}
        return {**data, **plain, "scores_from": first, "budget": {"items": items}}
    return {
        **data,
        "seed": int(name.removeprefix("seed-")),
        "scores_from": None if name == "seed-0" else first,
    }


@contextmanager
def noted(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """Keep seconds, and the largest memory of this process's children, of a step in notes.json."""
    file = options.out / "notes.json"
    notes = json.loads(file.read_text("utf-8")) if file.exists() else {}
    note: dict[str, Any] = {}
    ended = threading.Event()
    peaks: dict[str, int] = {}

    def watch() -> None:
        while not ended.wait(5.0):  # reading the maps of large processes takes the system long
            found = memory()
            for key, value in found.items():
                peaks[key] = max(peaks.get(key, 0), value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield note
    finally:
        ended.set()
        watcher.join()
    notes[name] = {
        "seconds": time.perf_counter() - start,
        "memory": peaks,
        "load": os.getloadavg()[0],
        **note,
    }
    file.write_text(json.dumps(notes, indent=2) + "\n", "utf-8")


def memory() -> dict[str, int]:
    """Return the memory of this process and of all its children now, in bytes.

    whole: shared pages counted once (PSS). largest: of one child, without pages mapped from files.
    """
    whole, largest, todo = 0, 0, [os.getpid()]
    while todo:
        process = todo.pop()
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text("utf-8")
            for task in Path(f"/proc/{process}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text("utf-8").split()]
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()[1:]}
        whole += sizes["Pss"]
        if process != os.getpid():
            largest = max(largest, sizes["Anonymous"] + sizes.get("Pss_Shmem", 0))
    return {"whole": whole, "largest": largest}


def train(options: argparse.Namespace, wanted: list[str]) -> None:
    """Make the models that are missing: first the base, then the specialists. The cores are shared out."""
    folder = options.out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("models.py")
    cores = len(os.sched_getaffinity(0))
    for group in TRAINED_TOGETHER:
        missing = [name for name in group if name in ("base", *wanted) and not (folder / name).exists()]
        if not missing:
            continue
        threads = str(max(1, cores // len(missing)))
        with noted(options, "+".join(missing)), ThreadPoolExecutor(cores) as pool:
            commands = [[sys.executable, str(script), name, str(folder / name), threads] for name in missing]
            codes = list(pool.map(subprocess.call, commands))
        if any(codes):
            raise SystemExit(f"training of {', '.join(missing)} failed: {codes}")
    if not (options.out / "tasks").exists():
        skills.write(options.out / "tasks")


def search(options: argparse.Namespace, name: str) -> None:
    """Check and run a search, or go on with it; nothing where it has ended."""
    out = options.out / name
    if out.exists() and evomerge.load(out).winner is not None:
        return
    data = config(options, name)
    estimate: Any = None
    if name == "seed-0" and not out.exists():
        with noted(options, f"check of {name}"):
            estimate = evomerge.check(data)
        print(estimate)
        estimate = estimate.data
    with noted(options, name) as note:
        note["estimate"] = estimate
        run = evomerge.optimize(data)
    print(run.report())


def export(options: argparse.Namespace) -> None:
    """Write the winner of seed 0, load it with plain transformers, and ask it."""
    out = options.out / "merged"
    if not out.exists():
        written = evomerge.load(options.out / "seed-0").export(out)
        print(f"exported: same bits as scored: {written.equal}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tool = next(row for row in skills.tools() if '"get_weather"' in row[1])[0]
    answers: dict[str, dict[str, str]] = {}
    for name, place in (("base", options.out / "models/base"), ("merged", out)):
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
        answers[name] = {}
        for topic, question in {**QUESTIONS, "tools": tool}.items():
            chat = [{"role": "user", "content": question}]
            asked = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**asked, max_new_tokens=60, do_sample=False)[
                0, asked["input_ids"].shape[1] :
            ]
            answers[name][topic] = tokenizer.decode(ids, skip_special_tokens=True)
    (options.out / "answers.json").write_text(json.dumps(answers, indent=2, ensure_ascii=False), "utf-8")
    for topic in answers["base"]:
        for name in answers:
            print(f"{topic} | {name}: {answers[name][topic]!r}")


def table(options: argparse.Namespace) -> None:
    """Print what docs/real.md shows: scores, verdicts, seconds, memory, estimates, answers."""
    runs = [*(f"seed-{seed}" for seed in range(options.seeds)), "cma"]
    runs = [name for name in runs if (options.out / name / "run.sqlite").exists()]
    notes = json.loads((options.out / "notes.json").read_text("utf-8"))
    found = {name: evomerge.load(options.out / name).report().data for name in runs}
    tasks = [task["task"] for task in suite(options.out)["tasks"] if "role" not in task]
    print(f"| run | model | {' | '.join(tasks)} | mean | retention |\n|{'---|' * (len(tasks) + 4)}")
    for name, data in found.items():
        wanted = {"base", *SPECIALISTS, "winner", (data["verdict"] or {}).get("best_baseline")}
        for row in data["rows"]:
            if row["role"] != "winner" and row["name"] not in wanted:
                continue
            cells = [f"{100 * row['tasks'][task][0]:.0f}" for task in tasks]
            mean = (
                " [".join(f"{100 * value:.0f}" for value in row["mean"][:2])
                + f", {100 * row['mean'][2]:.0f}]"
            )
            print(f"| {name} | {row['name']} | {' | '.join(cells)} | {mean} | {100 * row['retention']:.0f} |")
    print("\n| run | verdict | stopped | search minus test, points |\n|---|---|---|---|")
    for name, data in found.items():
        gap = data["optimism"] and 100 * (data["optimism"]["chosen"] - data["optimism"]["test"])
        verdict = (data["verdict"] or {}).get("sentence")
        print(f"| {name} | {verdict} | {data['stopped']} | {gap and f'{gap:.1f}'} |")
    print("\n| run | part | items | worker seconds |\n|---|---|---|---|")
    for name, data in found.items():
        for part in data["spending"]["parts"]:
            seconds = "" if part["seconds"] is None else f"{part['seconds']:.0f}"
            print(f"| {name} | {part['part']} | {part['items']} | {seconds} |")
        split = {key: f"{value / 1000:.2f} s" for key, value in data["milliseconds_per_candidate"].items()}
        print(f"| {name} | a candidate | | {split} |")
    head = ("step", "minutes", "estimated", "memory of all, GB", "of the largest process", "load")
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, note in notes.items():
        estimated = (note.get("estimate") or {}).get("estimated_minutes")
        sizes = [f"{note['memory'].get(key, 0) / 1e9:.1f}" for key in ("whole", "largest")]
        print(
            f"| {name} | {note['seconds'] / 60:.1f} | {'' if estimated is None else f'{estimated:.1f}'} | "
            f"{' | '.join(sizes)} | {note['load']:.1f} |"
        )


def main() -> None:
    """Run the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--only", nargs="*", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    options.out = options.out.resolve()
    train(options, options.only)
    if "seeds" in options.only:
        for seed in range(options.seeds):
            search(options, f"seed-{seed}")
            if seed == 0:
                search(options, "cma")
    if "export" in options.only:
        export(options)
    if "table" in options.only:
        table(options)


if __name__ == "__main__":
    main()
