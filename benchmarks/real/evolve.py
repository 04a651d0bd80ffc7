"""mergekit-evolve itself on the real models of `run.py`: the same `search` items, judged on the same `test`.

    python benchmarks/real/evolve.py --python OTHER/bin/python [--out runs/real] [--evaluations 39] [--seed 0]

OTHER is the environment of benchmarks/perf/other_tools.py, whose driver starts the tool on a CPU. It gets the
three skills as lm-eval tasks, with the chat template, the documents of `search` and the suite's metrics; one
weight per source and layer, attention apart, as in its own example. It scores 1 + 19 per generation: 20, 39,
58. Its best merge is written and scored with `evomerge.evaluate` as the run of seed 0 scores its models.
mergenetic isn't here: a problem of its has one task of one kind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parents[1] / "perf"))
from other_tools import start
from run import SPECIALISTS, config

import evomerge
from evomerge.api.configs import read
from evomerge.evaluation.permissions import Permissions
from evomerge.merging.reading import read_recipe
from evomerge.prepare import prepare
from evomerge.running.worker import build_harness

METRICS = {"persona_choice": "acc_norm", "tool_single": "exact", "dates": "exact_match"}
"""The task's metric in lm-eval."""
FOLDERS = {"persona_choice": "persona", "tool_single": "tool_calling"}
"""Where the bundled tasks are."""
DATES = {
    "dataset_path": "json",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def documents(prepared: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Return the documents of each skill on `search`."""
    harness = build_harness(prepared.worker)
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in METRICS}
    for block in prepared.worker.blocks_of("search"):
        for task in harness.items("search", block).tasks:
            if task.name in found:
                found[task.name] += [group[0].doc for group in task.groups]
    return found


def prepare_folder(folder: Path, tasks: Path, prepared: Any) -> int:
    """Write what the tool reads; return the items of one evaluation."""
    own = folder / "tasks"
    for name in FOLDERS.values():
        shutil.copytree(tasks / name, own / name, dirs_exist_ok=True)
    items = 0
    for name, docs in documents(prepared).items():
        place = own / FOLDERS.get(name, ".")
        file = place / f"search_{name}.jsonl"
        file.write_text("".join(json.dumps(dict(doc)) + "\n" for doc in docs), "utf-8")
        head: dict[str, Any] = {"include": f"{name}.yaml"} if name in FOLDERS else dict(DATES)
        head |= {
            "task": f"search_{name}",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        if name == "tool_single":  # as the suite asks
            kwargs = {"until": ["\n\n", "\nRequest:"], "do_sample": False, "max_gen_toks": 64}
            head["generation_kwargs"] = kwargs
        (place / f"search_{name}.yaml").write_text(yaml.safe_dump(head))
        items += len(docs)
    located = prepared.config.locations
    genome = {
        "genome": {
            "models": [located[name] for name in SPECIALISTS],
            "base_model": located["base"],
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
            "filters": ["self_attn"],
        },
        "tasks": [{"name": f"search_{name}", "metric": f"{metric},none"} for name, metric in METRICS.items()],
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
    }
    (folder / "genome.yaml").write_text(yaml.safe_dump(genome))
    return items


def main() -> None:
    """Search with the tool, unless it has ended, and judge its best merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the other tool")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--evaluations", type=int, default=39)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out = options.out.resolve()
    prepared = prepare(read(config(options, "seed-0")))
    folder = options.out / f"mergekit-evolve-{options.evaluations}-{options.seed}"
    (folder / "best").mkdir(parents=True, exist_ok=True)
    items = prepare_folder(folder, options.out / "tasks", prepared)
    if not (folder / "ended").exists():
        began = time.perf_counter()
        start(
            options.python, folder, ["search", "mergekit-evolve", str(options.seed), str(options.evaluations)]
        )
        (folder / "ended").write_text(f"{time.perf_counter() - began:.0f}")
    merged = folder / "merged"
    if not merged.exists():
        evomerge.merge(read_recipe(folder / f"best/{options.evaluations}.yaml"), merged)
    print(f"{items * options.evaluations} items, {(folder / 'ended').read_text()} s")
    trusted = Permissions(trust_tasks=True)  # copies of our own
    print(evomerge.evaluate(str(merged), run=options.out / "seed-0", permissions=trusted))


if __name__ == "__main__":
    main()
