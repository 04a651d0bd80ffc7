"""mergekit-evolve and mergenetic themselves beside our search: the demo's models, items counted alike.

    python benchmarks/perf/other_tools.py run mergekit-evolve --python OTHER/bin/python --evaluations 61
    python benchmarks/perf/other_tools.py run mergenetic --python OTHER/bin/python --evaluations 64,128
    python benchmarks/perf/other_tools.py run ours --evaluations 120      (what `evomerge demo` runs)
    python benchmarks/perf/other_tools.py check --python OTHER/bin/python
    python benchmarks/perf/other_tools.py table

The other tools live in an environment of their own:

    python -m venv --system-site-packages OTHER      # or a .pth file to the project's site-packages
    OTHER/bin/pip install --no-deps mergekit==0.1.5 mergenetic==0.1.1 "immutables<1" sentencepiece \\
        fasttext-numpy2 pybind11 GitPython gitdb smmap
    OTHER/bin/pip install ray cma lm_eval pymoo      # where the project's environment has none

Nothing of theirs is changed on disk: `other_tools_on_cpu.py` starts them and says what it replaces at run
time. They maximise the mean accuracy of the five skills on the `search` documents, which they get as lm-eval
tasks with the prompts and the metric of ours; one document scored once is one item.

    mergekit-evolve   its own CMA-ES from equal weights; one weight per source and layer, attention apart
                      (40 genes), the other options as they are. It scores the mean of its last generation,
                      so each budget has a search of its own: 1 + 15 per generation (61, 136)
    mergenetic        the class of its README's example with pymoo's GA, 16 in a generation; one weight in
                      [0, 1] per source (5 genes: its merger has no other), the LoRA adapter merged before.
                      One search answers all budgets: its best candidate so far
    ours              the defaults: 50 genes

The winners are scored on `test` by our harness. `check` scores base and sources in all three tools.
Results are in runs/bench-other-tools, where a search that has ended is found again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from search import Bench, Case, judge, run_ours, weakest

import evomerge
from evomerge.config import DEMO_CONFIG
from evomerge.evaluation import statistics
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe

RESULTS = Path("runs/bench-other-tools")
DRIVER = Path(__file__).with_name("other_tools_on_cpu.py")
TASKS = Path(__file__).parents[1] / "tasks" / "demo"
SKILLS = ("demo_add", "demo_reverse", "demo_translate", "demo_upper", "demo_sort")
ALL = "demo_skills"
PARTS = {
    "candidates": ("gradients", "candidates"),
    "everything": ("base, parents, baselines", "gradients", "candidates", "finalists on select"),
}
"""What of a run of ours is counted, by the column of the table: names of the report's parts."""


def task_file(task: Mapping[str, Any], name: str, documents: Path) -> dict[str, Any]:
    """Return an lm-eval task that asks as `task` does, but only some documents."""
    files = {"data_files": {"test": str(documents.resolve())}}
    return {**task, "task": name, "dataset_kwargs": files, "test_split": "test"}


def genome(base: str, sources: Sequence[str]) -> dict[str, Any]:
    """Return mergekit-evolve's configuration."""
    return {
        "genome": {
            "models": list(sources),
            "base_model": base,
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
            "filters": ["self_attn"],
        },
        "tasks": [{"name": f"search_{skill}"} for skill in SKILLS],
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }


def arithmetic(base: str, sources: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """Return the mergekit configuration of a task-arithmetic merge with one weight per source."""
    models = [
        {"model": source, "parameters": {"weight": weight}}
        for source, weight in zip(sources, weights, strict=True)
    ]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "bfloat16"}


def latest(counts: Iterable[int], budget: int) -> int:
    """Return the largest number of evaluations that the budget allows."""
    allowed = [count for count in counts if count <= budget]
    if not allowed:
        raise SystemExit(f"no generation had ended after {budget} evaluations")
    return max(allowed)


def items_of(spending: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the items of a run of ours, by the column of the table."""
    items = {part["part"]: part["items"] for part in spending}
    return {column: sum(items.get(name, 0) for name in names) for column, names in PARTS.items()}


class Zoo:
    """The demo's models as the other tools take them.

    Attributes:
        sources: as the demo names them.
        folders: the same, adapters merged into their base.
    """

    def __init__(self, bench: Bench, results: Path) -> None:
        models = bench.prepared.config.models
        located = bench.prepared.config.locations
        self.base = _absolute(located["base"])
        self.sources = [_absolute(located[name]) for name in models.sources]
        self.folders = [self._folder(source, results) for source in self.sources]

    def _folder(self, source: str, results: Path) -> str:
        if "+" not in source:
            return source
        folder = results / "models" / Path(source).name
        if not folder.exists():
            evomerge.merge(Recipe.copy_of(source, dtype="bfloat16"), folder)
        return str(folder.resolve())


def _absolute(location: str) -> str:
    return "+".join(str(Path(part).resolve()) for part in location.split("+"))


def prepare_folder(folder: Path, zoo: Zoo) -> int:
    """Write what the other tools read; return the items of one evaluation."""
    tasks = folder.resolve() / "tasks"
    (folder / "best").mkdir(parents=True, exist_ok=True)
    tasks.mkdir(exist_ok=True)
    documents = {skill: TASKS / "data" / f"{skill}.search.jsonl" for skill in SKILLS}
    together = tasks / "skills.jsonl"
    together.write_text("".join(path.read_text() for path in documents.values()))
    named = {f"search_{skill}": (skill, path) for skill, path in documents.items()}
    for name, (skill, path) in {**named, ALL: (SKILLS[0], together)}.items():
        task = yaml.safe_load((TASKS / f"{skill}.yaml").read_text())
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task_file(task, name, path)))
    items = len(together.read_text().splitlines())
    (folder / "genome.yaml").write_text(yaml.safe_dump(genome(zoo.base, zoo.sources)))
    setup = {"base": zoo.base, "models": zoo.folders, "task": ALL, "items": items}
    (folder / "setup.json").write_text(json.dumps(setup))
    return items


def start(python: Path, folder: Path, words: Sequence[str]) -> str:
    """Start the other tools' program; return what it printed. Raises SystemExit if it fails."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TQDM_DISABLE": "1",
    }
    command = [str(python.absolute()), "-P", str(DRIVER.resolve()), *words]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **quiet},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
    (folder / "out.txt").write_text(done.stdout)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: see {folder / 'log.txt'}")
    return done.stdout


def run_other(tool: str, seed: int, budgets: Sequence[int], options: argparse.Namespace) -> None:
    """Let another tool search once; judge its best candidate after each budget."""
    bench = _bench(seed, max(budgets), options.results)
    zoo = Zoo(bench, options.results)
    folder = options.results / f"{tool}-{max(budgets)}-{seed}"
    items = prepare_folder(folder, zoo)
    if not (folder / "ended").exists():
        began = time.perf_counter()
        start(options.python, folder, ["search", tool, str(seed), str(max(budgets))])
        (folder / "ended").write_text(f"{time.perf_counter() - began:.0f}")
    seconds = float((folder / "ended").read_text())
    best = {int(path.stem): path for path in (folder / "best").iterdir()}
    for budget in budgets:
        count = latest(best, budget)
        path = best[count]
        if path.suffix == ".json":
            merge = arithmetic(zoo.base, zoo.folders, json.loads(path.read_text()))
            path = folder / f"{count}.yaml"
            path.write_text(yaml.safe_dump(merge))
        recipe = read_recipe(path)
        counted = dict.fromkeys(PARTS, count * items)
        _keep(tool, seed, budget, counted, seconds * count / max(best), judge(bench, recipe), options.results)


def run_own(seed: int, budget: int, options: argparse.Namespace) -> None:
    """Run evomerge with its defaults, unless the run has ended, and judge its winner."""
    out = options.results / f"ours-{budget}-{seed}"
    bench = _bench(seed, budget, options.results, out)
    if not out.exists() or evomerge.load(out).winner is None:
        run_ours(bench)
    run = evomerge.load(out)
    assert run.winner is not None
    spent = run.report().data["spending"]
    judged = judge(bench, run.winner.recipe)
    _keep("ours", seed, budget, items_of(spent["parts"]), 3600 * spent["hours"], judged, options.results)


def _bench(seed: int, evaluations: int, results: Path, out: Path | None = None) -> Bench:
    case = Case(source=DEMO_CONFIG, space=None, results=results)
    if out is not None:
        return Bench("ours", seed, evaluations, out, case)
    with tempfile.TemporaryDirectory() as folder:
        return Bench("ours", seed, evaluations, Path(folder) / "run", case)


def _keep(
    tool: str,
    seed: int,
    budget: int,
    counted: Mapping[str, int],
    seconds: float,
    judged: Mapping[str, Any],
    results: Path,
) -> None:
    facts = {"tool": tool, "seed": seed, "budget": budget, "items": counted, "seconds": seconds}
    data: dict[str, Any] = {**judged, **facts}
    (results / f"{tool}-{budget}-{seed}.json").write_text(json.dumps(data))
    print(
        f"{tool} {budget} seed {seed}: search {100 * data['search']:.1f}, test {100 * data['test']:.1f}, "
        f"weakest {weakest(data):.1f}, items {counted}, {seconds:.0f} s",
        flush=True,
    )


def check(options: argparse.Namespace) -> None:
    """Print what base and sources score on `search` in the three tools: mean accuracy of the skills."""
    bench = _bench(0, 1, options.results)
    zoo = Zoo(bench, options.results)
    folder = options.results / "check"
    prepare_folder(folder, zoo)
    lines = start(options.python, folder, ["score", zoo.base, *zoo.folders]).splitlines()
    theirs = [json.loads(line) for line in lines if line.startswith('{"model"')]
    print("| model | ours | mergekit-evolve | mergenetic |\n|---|---|---|---|")
    for parent, row in zip(bench.parents, theirs, strict=True):
        tasks = bench.score(parent.recipe, "search").tasks
        ours = np.mean([np.mean(task.metric) for task in tasks if task.task in SKILLS])
        cells = (ours, row["mergekit-evolve"], row["mergenetic"])
        print(f"| {parent.name} | " + " | ".join(f"{100 * cell:.2f}" for cell in cells) + " |")


def table(results: Path) -> None:
    """Print the comparison as Markdown, and ours minus theirs where ours searched on fewer items."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*-*-*.json")):
        data = json.loads(path.read_text())
        runs.setdefault((data["tool"], data["budget"]), []).append(data)
    if not runs:
        raise SystemExit(f"no results in {results}: call `run` first")
    name, best = max(next(iter(runs.values()))[0]["rows"].items(), key=lambda row: row[1])
    print(f"best hand-made merge, chosen on test: {name} {100 * best:.1f}\n")
    print("| tool | budget | items | with baselines and `select` | search | test | weakest | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for (tool, budget), group in sorted(runs.items()):
        cells = [" ".join(f"{100 * run[key]:.1f}" for run in group) for key in ("search", "test")]
        low = " ".join(f"{weakest(run):.1f}" for run in group)
        seconds = np.mean([run["seconds"] for run in group])
        print(
            f"| {tool} | {budget} | {_items(group, 'candidates'):,.0f} | {_items(group, 'everything'):,.0f} "
            f"| {cells[0]} | {cells[1]} | {low} | {seconds:,.0f} |"
        )
    print("\n| tool | budget | ours | items, ours / theirs | all of ours | ours - theirs, points |")
    print("|---|---|---|---|---|---|")
    for (tool, budget), theirs in sorted(runs.items()):
        for (own, smaller), ours in sorted(runs.items()):
            share, whole = (_items(ours, column) / _items(theirs, column) for column in PARTS)
            if tool != "ours" and own == "ours" and share <= 1:
                print(
                    f"| {tool} | {budget} | {smaller} | {share:.2f} | {whole:.2f} | {paired(ours, theirs)} |"
                )


def _items(group: Sequence[Mapping[str, Any]], column: str) -> float:
    return float(np.mean([run["items"][column] for run in group]))


def paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """Return the difference on `test`, paired over items, each the mean of the seeds that both have."""
    seeds = {run["seed"] for run in ours} & {run["seed"] for run in theirs}
    if not seeds:
        return "-"
    a, b = (
        [
            np.mean(values, axis=0)
            for values in zip(*(run["test_items"] for run in runs if run["seed"] in seeds), strict=True)
        ]
        for runs in (ours, theirs)
    )
    test = statistics.paired_difference(a, b, ours[0]["weights"], seed=0)
    return f"{100 * test.estimate:+.1f} [{100 * test.low:.1f}, {100 * test.high:.1f}]"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "check", "table"))
    parser.add_argument("tool", nargs="?", choices=("mergekit-evolve", "mergenetic", "ours"))
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the other tools")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--evaluations", default="64,128", help="budgets, one or several with commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.command == "table":
        table(options.results)
    elif options.command == "check":
        check(options)
    elif options.tool is None:
        parser.error("run which tool?")
    else:
        budgets = [int(number) for number in options.evaluations.split(",")]
        for seed in map(int, options.seeds.split(",")):
            if options.tool != "ours":
                run_other(options.tool, seed, budgets, options)
                continue
            for budget in budgets:
                run_own(seed, budget, options)


if __name__ == "__main__":
    main()
