"""Tokens that a search generates on a suite of generation tasks only: ours beside pycma alone.

    python benchmarks/perf/generation_search.py --seeds 0,1,2,3,4

The five skills of the demo are asked as questions that the models answer in writing, scored by exact match.
pycma sees the exact metric of every `search` item of every candidate, starts from the best hand-made merge
and keeps the candidate with the best score. Ours is the demo's default config with a fraction of the
evaluations: companions, surrogate, item blocks, selection on `select`. Base, parents and hand-made merges are
scored for both and not counted. All other tokens are, those of `select` too, but for `test`, on which both
picks are judged. Results stay in runs/bench-generation, so the command can be interrupted and repeated;
another --companion or --gold needs another --results.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig, load_suite
from evomerge.delivery.progress import Silent
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.store import BASE
from evomerge.running.worker import Job, Result
from evomerge.search import baselines

LONGEST = 12
GOLD = "{{answer}}"
STEP = 50


def write_suite(
    run: RunConfig, folder: Path, companion: str, gold: str, items: int | None, judged: int | None = None
) -> Path:
    """Write the skills of a zoo as generation tasks, with their suite; return the suite's file.

    items: of `search`, at most; judged: of `test`.
    """
    (folder / "data").mkdir(parents=True)
    suite = load_suite(run.suite)
    places = Path(str(suite.tasks_dir))
    (written,) = (task.task for task in suite.tasks if task.task.endswith("_generate"))
    generating = yaml.safe_load((places / f"{written}.yaml").read_text())
    rows = []
    for spec in suite.tasks:
        if spec.role != "skill" or not spec.weight:
            continue
        skill = str(spec.specialist)
        config = yaml.safe_load((places / f"{spec.task}.yaml").read_text())
        config |= {"task": f"write_{skill}", "doc_to_target": gold}
        config |= {key: generating[key] for key in ("output_type", "target_delimiter", "metric_list")}
        if gold != GOLD:
            config["metric_list"] = [config["metric_list"][0] | {"regexes_to_ignore": ["= "]}]
        config["generation_kwargs"] = generating["generation_kwargs"] | {"max_gen_toks": LONGEST}
        (folder / f"write_{skill}.yaml").write_text(yaml.safe_dump(config))
        for name, split in config["dataset_kwargs"]["data_files"].items():
            lines = (places / split).read_text().splitlines(keepends=True)
            (folder / split).write_text("".join(lines[: {"search": items, "test": judged}.get(name)]))
        splits = {"search": "search", "select": "select", "test": "test"}
        rows.append(
            {"task": f"write_{skill}", "metric": "exact_match", "specialist": skill, "splits": splits}
        )
    path = folder / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"name": "written", "companion": companion, "tasks_dir": ".", "tasks": rows})
    )
    return path


class Counting:
    """An executor that adds up the generated tokens, but for `test` and the recipes that both methods score.

    What these score is remembered in a file, for the next seed.
    """

    def __init__(self, executor: executors.Executor, free: set[str], path: Path) -> None:
        self._executor, self._free, self._path = executor, free, path
        self.sharing = executor.sharing
        self._known: dict[Any, Result] = pickle.loads(path.read_bytes()) if path.exists() else {}
        self.tokens = 0.0

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Score jobs like the executor inside."""
        for job in jobs:
            if not isinstance(job, Job):  # a gradient generates nothing
                yield from self._executor.run([job])
                continue
            key = (job.recipe.hash, job.split, job.blocks)
            if key in self._known:
                yield replace(self._known[key], job=job)
                continue
            (result,) = self._executor.run([job])
            if job.recipe.hash in self._free:
                self._known[key] = replace(result, job=None)
                self._path.write_bytes(pickle.dumps(self._known))
            elif isinstance(result.outcome, Scores) and job.split != "test":
                self.tokens += sum(float(t.tokens.sum()) for t in result.outcome if t.tokens is not None)
            yield result

    def around(self, executor: executors.Executor) -> Counting:
        """Count what another executor scores from now on."""
        self._executor = executor
        return self

    def close(self) -> None:
        """Close the executor inside."""
        self._executor.close()


class Bench:
    """The demo's models on the written suite, with what a run and its judge need."""

    def __init__(
        self,
        seed: int,
        evaluations: int,
        folder: Path,
        results: Path,
        *,
        alone: bool,
        companion: str = "auto",
        gold: str = GOLD,
        config: Path = DEMO_CONFIG,
        items: int | None = None,
        gradients: str = "auto",
    ) -> None:
        config = RunConfig.load(config, seed=seed, out=str(folder / "run"), evaluations=evaluations)
        changes: dict[str, Any] = {
            "suite": str(write_suite(config, folder / "suite", companion, gold, items)),
            "warm_start": config.warm_start.model_copy(update={"gradients": gradients}),
            "executor": config.executor.model_copy(update={"name": "inline", "threads": 1}),
        }
        if alone:
            changes |= {"racing": config.racing.model_copy(update={"blocks": 1}), "surrogate": "off"}
        self.prepared = prepare(config.model_copy(update=changes))
        norms = task_vector_norms(self.prepared.config.locations, BASE)
        names = self.prepared.space.sources
        self.parents = baselines.parents(self.prepared.template, names)
        self.hand_made = baselines.hand_made(self.prepared.template, names, norms)
        free = {named.recipe.hash for named in (*self.parents, *self.hand_made)}
        built = executors.build(self.prepared.config.executor, self.prepared.worker)
        shared = results / f"shared-{self.prepared.worker.blocks}.pickle"
        self.executor = Counting(built, free, shared)

    def score(self, recipe: Recipe, split: str) -> Scores:
        """Score a recipe on a split."""
        job = Job(recipe=recipe, split=split, blocks=self.prepared.worker.blocks_of(split))
        (result,) = self.executor.run([job])
        assert isinstance(result.outcome, Scores), result.outcome
        return result.outcome

    def normaliser(self, split: str) -> Normaliser:
        """Return the scale of a split."""
        scores = [self.score(parent.recipe, split) for parent in self.parents]
        by_name = {p.name: s for p, s in zip(self.parents[1:], scores[1:], strict=True)}
        return Normaliser(self.prepared.suite, base=scores[0], parents=by_name)


def pycma(bench: Bench, seed: int, evaluations: int) -> list[tuple[float, Recipe]]:
    """Return the pick of pycma with its own settings, and the tokens so far, every STEP evaluations."""
    import cma

    space, normaliser = bench.prepared.space, bench.normaliser("search")
    best: tuple[float, Recipe | None] = (-np.inf, None)

    def loss(genome: np.ndarray[Any, Any]) -> float:
        nonlocal best
        recipe = space.decode(np.clip(genome, 0.0, 1.0))
        mean = normaliser.mean(bench.score(recipe, "search"))
        if mean > best[0]:
            best = (mean, recipe)
        return -mean

    ranked = sorted(bench.hand_made, key=lambda n: -normaliser.mean(bench.score(n.recipe, "search")))
    start = next(g for named in ranked if (g := space.encode(named.recipe)) is not None)
    search = cma.CMAEvolutionStrategy(start, 0.15, {"bounds": [0, 1], "seed": seed + 1, "verbose": -9})
    count, picks = 0, []
    while count + search.popsize <= evaluations:
        genomes = search.ask()
        search.tell(genomes, [loss(genome) for genome in genomes])
        count += len(genomes)
        assert best[1] is not None
        if count // STEP > len(picks) or count + search.popsize > evaluations:
            picks.append((bench.executor.tokens, best[1]))
    return picks


def ours(bench: Bench) -> list[tuple[float, Recipe]]:
    """Return the winner of a whole run, and the tokens of the run."""
    built = executors.build
    executors.build = lambda spec, worker: bench.executor.around(built(spec, worker))
    try:
        winner = compose.execute(bench.prepared, Silent()).winner.recipe
        return [(bench.executor.tokens, winner)]
    finally:
        executors.build = built


def run_one(method: str, seed: int, evaluations: int, results: Path, **settings: Any) -> dict[str, Any]:
    """Run a method with a seed, or read its earlier result."""
    path = results / f"{method}-{evaluations}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(seed, evaluations, Path(folder), results, alone=method == "pycma", **settings)
        picks = pycma(bench, seed, evaluations) if method == "pycma" else ours(bench)
        normaliser = bench.normaliser("test")
        course = [(tokens, normaliser.mean(bench.score(pick, "test"))) for tokens, pick in picks]
        tokens, test = course[-1]
        seconds = time.perf_counter() - started
        data = {"tokens": tokens, "test": test, "course": course, "seconds": seconds}
    path.write_text(json.dumps(data))
    return data


def main() -> None:
    """Run both methods for every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--evaluations", type=int, default=200, help="of pycma")
    parser.add_argument("--fraction", type=float, default=0.15, help="of these evaluations, for ours")
    parser.add_argument("--results", type=Path, default=Path("runs/bench-generation"))
    parser.add_argument("--only", choices=("pycma", "ours"), help="run one method, with --evaluations")
    parser.add_argument("--companion", choices=("auto", "off", "specialist", "distribution"), default="auto")
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="the run config of another zoo")
    parser.add_argument("--items", type=int, help="of `search`, at most")
    parser.add_argument("--gradients", choices=("auto", "off"), default="auto")
    parser.add_argument(
        "--gold", default=GOLD, help="another text of a right answer; the metric then ignores '= '"
    )
    options = parser.parse_args()
    names = ("companion", "gold", "config", "items", "gradients")
    settings = {name: getattr(options, name) for name in names}
    options.results.mkdir(parents=True, exist_ok=True)
    if options.only:
        for seed in map(int, options.seeds.split(",")):
            print(
                seed,
                run_one(options.only, seed, options.evaluations, options.results, **settings),
                flush=True,
            )
        return
    print("| seed | pycma: test | tokens | ours: test | tokens | share of the tokens |")
    print("|---|---|---|---|---|---|")
    for seed in map(int, options.seeds.split(",")):
        rival = run_one("pycma", seed, options.evaluations, options.results, **settings)
        count = round(options.fraction * options.evaluations)
        own = run_one("ours", seed, count, options.results, **settings)
        print(
            f"| {seed} | {100 * rival['test']:.1f} | {rival['tokens']:,.0f} | {100 * own['test']:.1f} "
            f"| {own['tokens']:,.0f} | {own['tokens'] / rival['tokens']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
