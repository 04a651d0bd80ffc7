"""Our search beside those a careful person would write: equal scored items, the same models, several seeds.

    python benchmarks/perf/search.py run --methods ours,cma --seeds 0,1,2,3,4 --evaluations 200
    python benchmarks/perf/search.py table

`run` scores each method with each seed and leaves one JSON file per run in runs/bench-search, which later
calls find, so it may be interrupted and continued, and two may run side by side. `table` reads them.

The rivals see every `search` item of every candidate, maximise the mean normalised score there, start from
the best hand-made merge where they can, and keep the candidate with the best score, as such scripts do.
Everybody's pick is then scored on `test`, which nothing was chosen on.

    cma     pycma, its own population and settings, sigma 0.15 (what mergekit-evolve does)
    tpe     Optuna's TPE, multivariate
    ga      pymoo's genetic algorithm
    random  uniform in the space
    ours    the defaults: floors, gradients, then CMA-ES, surrogate, item blocks, selection on `select`
    ours-PART[-PART]  the same with other settings: mean, balanced, floors (the objective's kind); gradients,
            nogradients; plain (no surrogate); or the name of a search space

Of the demo's models, or of those of any run config (`--config zoo/run.yaml`), whose results then go into a
folder of their own.
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
from typing import Any, get_args

import numpy as np

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.delivery.progress import Silent
from evomerge.evaluation import statistics
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running import executors
from evomerge.running.store import BASE, StoreReader
from evomerge.running.worker import Job, Result
from evomerge.search import baselines
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.utility import UtilityKind
from evomerge.search.warm_start import GradientSpec
from evomerge.stored import StoredRun

RIVALS = ("cma", "tpe", "ga", "random")
RESULTS = Path("runs/bench-search")


class Remembered:
    """An executor that keeps the results of a few recipes every run needs in a file."""

    def __init__(self, executor: executors.Executor, path: Path, shared: set[str]) -> None:
        self._executor, self._path, self._shared = executor, path, shared
        self.sharing = executor.sharing
        self._known: dict[Any, Result] = pickle.loads(path.read_bytes()) if path.exists() else {}

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        for job in jobs:
            key = (job.recipe.hash, job.split, job.blocks) if isinstance(job, Job) else None
            if key in self._known:
                yield replace(self._known[key], job=job)
                continue
            (result,) = self._executor.run([job])
            if key is not None and key[0] in self._shared:
                self._known[key] = replace(result, job=None)
                draft = self._path.with_suffix(f".{time.time_ns()}")
                draft.write_bytes(pickle.dumps(self._known))
                draft.replace(self._path)
            yield result

    def close(self) -> None:
        self._executor.close()


def configured(method: str, seed: int, evaluations: int, out: Path, source: Path) -> RunConfig:
    """Return the config for one run. source: the file of the models."""
    config = RunConfig.load(source, seed=seed, out=str(out), evaluations=evaluations)
    changes: dict[str, Any] = {
        "executor": config.executor.model_copy(update={"name": "inline", "threads": 1})
    }
    if method in RIVALS:
        changes |= {"racing": config.racing.model_copy(update={"blocks": 1}), "surrogate": "off"}
    for part in method.split("-")[1:]:
        if part in ("gradients", "nogradients"):
            gradients = GradientSpec() if part == "gradients" else "off"
            changes["warm_start"] = config.warm_start.model_copy(update={"gradients": gradients})
        elif part in get_args(UtilityKind):
            changes["objective"] = config.objective.model_copy(update={"kind": part})
        elif part == "plain":
            changes["surrogate"] = "off"
        else:
            from evomerge.config import load_space

            changes["space"] = load_space(part)
    return config.model_copy(update=changes)


class Bench:
    """The demo's models with everything a run and its judge need."""

    def __init__(
        self, method: str, seed: int, evaluations: int, out: Path, results: Path, source: Path
    ) -> None:
        self.prepared = prepare(configured(method, seed, evaluations, out, source))
        names = self.prepared.space.sources
        norms = task_vector_norms(self.prepared.config.locations, BASE)
        self.parents = baselines.parents(self.prepared.template, names)
        self.hand_made = baselines.hand_made(self.prepared.template, names, norms)
        shared = {named.recipe.hash for named in (*self.parents, *self.hand_made)}
        worker = self.prepared.worker
        self.executor = Remembered(
            executors.build(self.prepared.config.executor, worker),
            results / f"shared-{worker.blocks}.pickle",
            shared,
        )

    def score(self, recipe: Recipe, split: str) -> Scores:
        blocks = self.prepared.worker.blocks_of(split)
        (result,) = self.executor.run([Job(recipe=recipe, split=split, blocks=blocks)])
        assert isinstance(result.outcome, Scores), result.outcome
        return result.outcome

    def normaliser(self, split: str) -> Normaliser:
        scores = [self.score(parent.recipe, split) for parent in self.parents]
        by_name = {p.name: s for p, s in zip(self.parents[1:], scores[1:], strict=True)}
        return Normaliser(self.prepared.suite, base=scores[0], parents=by_name)


def run_rival(bench: Bench, method: str, seed: int, evaluations: int) -> tuple[Recipe, int]:
    """Search with a rival; return its pick and the items it scored."""
    space, normaliser = bench.prepared.space, bench.normaliser("search")
    objective = Objective(ObjectiveSpec(kind="mean"), normaliser)
    best: tuple[float, Recipe | None] = (-np.inf, None)
    count = items = 0

    def loss(genome: np.ndarray[Any, Any]) -> float:
        nonlocal best, count, items
        recipe = space.decode(np.clip(genome, 0.0, 1.0))
        scores = bench.score(recipe, "search")
        count, items = count + 1, items + scores.items
        mean = objective.mean(scores)
        if mean > best[0]:
            best = (mean, recipe)
        return -mean

    ranked = sorted(bench.hand_made, key=lambda named: -objective.mean(bench.score(named.recipe, "search")))
    start = next(g for named in ranked if (g := space.encode(named.recipe)) is not None)
    if method == "cma":
        import cma

        options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9, "maxfevals": evaluations}
        search = cma.CMAEvolutionStrategy(start, 0.15, options)
        while count + search.popsize <= evaluations:
            genomes = search.ask()
            search.tell(genomes, [loss(g) for g in genomes])
    elif method == "tpe":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
        names = [f"u{i:03d}" for i in range(space.dimension)]
        study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))
        study.optimize(
            lambda t: loss(np.array([t.suggest_float(n, 0, 1) for n in names])), n_trials=evaluations
        )
    elif method == "ga":
        from pymoo.algorithms.soo.nonconvex.ga import GA
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.optimize import minimize

        class Merge(ElementwiseProblem):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(n_var=space.dimension, n_obj=1, xl=0.0, xu=1.0)

            def _evaluate(self, x: Any, out: Any, *_: Any, **__: Any) -> None:
                out["F"] = loss(x)

        first = np.random.default_rng(seed).random((20, space.dimension))
        first[0] = start
        minimize(Merge(), GA(pop_size=20, sampling=first), ("n_eval", evaluations), seed=seed)
    else:
        generator = np.random.default_rng(seed)
        loss(start)
        while count < evaluations:
            loss(generator.random(space.dimension))
    assert best[1] is not None
    return best[1], items


def run_ours(bench: Bench) -> tuple[Recipe, int]:
    """Run the whole of evomerge; return its winner and the `search` items that it scored for it."""
    prepared = bench.prepared
    built, executors.build = executors.build, lambda *_: bench.executor  # type: ignore[assignment]
    try:
        outcome = compose.execute(prepared, Silent())
    finally:
        executors.build = built
    known = {named.recipe.hash for named in (*bench.parents, *bench.hand_made)}
    with StoredRun.read(prepared.folder) as run:
        store = run.store
        known |= {named.recipe.hash for named in store.entries("baseline")}
        scored = store.scored_blocks("search")
        sizes = [part.items for part in _parts(store, bench.prepared.template.hash, scored)]
        items = sum(sizes[b] for hash_, blocks in scored.items() if hash_ not in known for b in blocks)
        items += store.gradient_items()
    return outcome.winner.recipe, items


def _parts(store: StoreReader, recipe: str, scored: dict[str, tuple[int, ...]]) -> list[Scores]:
    """The scores of a recipe on each block: what sizes the blocks have."""
    parts = [store.result(recipe, "search", block) for block in scored[recipe]]
    return [part for part in parts if isinstance(part, Scores)]


def run_one(method: str, seed: int, evaluations: int, results: Path, source: Path) -> None:
    """Run a method with a seed, judge its pick on `test`, write the JSON file."""
    path = results / f"{method}-{evaluations}-{seed}.json"
    if path.exists():
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(method, seed, evaluations, Path(folder) / "run", results, source)
        picked, items = run_rival(bench, method, seed, evaluations) if method in RIVALS else run_ours(bench)
        full = bench.score(bench.prepared.template, "search").items
        normaliser = bench.normaliser("test")
        scores = bench.score(picked, "test")
        search = bench.normaliser("search").mean(bench.score(picked, "search"))
        rows = {
            named.name: normaliser.mean(bench.score(named.recipe, "test"))
            for named in (*bench.parents, *bench.hand_made)
        }
    data = {
        "method": method,
        "seed": seed,
        "evaluations": evaluations,
        "items": items,
        "full": full,
        "seconds": time.perf_counter() - started,
        "test": normaliser.mean(scores),
        "search": search,
        "tasks": normaliser.task(scores),
        "test_items": [values.tolist() for values in normaliser.items(scores)],
        "weights": normaliser.weights.tolist(),
        "rows": rows,
        "recipe": picked.hash,
    }
    path.write_text(json.dumps(data))
    print(
        f"{method} {evaluations} seed {seed}: test {100 * data['test']:.1f}, weakest {weakest(data):.1f}, "
        f"search - test {100 * (search - data['test']):+.1f}, {items / full:.1f} evaluations, "
        f"{data['seconds']:.0f} s",
        flush=True,
    )


def weakest(run: dict[str, Any]) -> float:
    """Return the lowest normalised score of a task on `test`, in points."""
    return 100 * float(min(run["tasks"].values()))


def table(results: Path, ceiling: float | None) -> None:
    """Print what the results say, as Markdown."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*-*-*.json")):
        data = json.loads(path.read_text())
        found.setdefault((data["method"], data["evaluations"]), []).append(data)
    if not found:
        raise SystemExit(f"no results in {results}: call `run` first")
    rows = {name: mean for runs in found.values() for run in runs for name, mean in run["rows"].items()}
    name, base = max(rows.items(), key=lambda pair: pair[1])
    print(
        f"best baseline on test: {name} {100 * base:.1f}"
        + (f"; ceiling {100 * ceiling:.1f}" if ceiling else "")
    )
    print(
        "\n| method | budget | evaluations used | test, median (range) | weakest task, median (range) "
        "| search - test, median | head-room closed | seeds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (method, budget), runs in found.items():
        tests = sorted(100 * run["test"] for run in runs)
        low = [weakest(run) for run in runs]
        gaps = [100 * (run["search"] - run["test"]) for run in runs]
        used = np.median([run["items"] / run["full"] for run in runs])
        closed = "-" if not ceiling else f"{(np.median(tests) / 100 - base) / (ceiling - base):.0%}"
        print(
            f"| {method} | {budget} | {used:.0f} | {np.median(tests):.1f} "
            f"({tests[0]:.1f} to {tests[-1]:.1f}) "
            f"| {np.median(low):.1f} ({min(low):.1f} to {max(low):.1f}) | {np.median(gaps):+.1f} "
            f"| {closed} | {len(runs)} |"
        )
    print("\n| ours against | ours - theirs, points [95 % interval] | seeds |")
    print("|---|---|---|")
    for (method, budget), runs in found.items():
        for (ours, own_budget), own in found.items():
            if method not in RIVALS or not ours.startswith("ours"):
                continue
            seeds = sorted({run["seed"] for run in runs} & {run["seed"] for run in own})
            if not seeds:
                continue
            a, b = (_mean_items(group, seeds) for group in (own, runs))
            test = statistics.paired_difference(a, b, own[0]["weights"], seed=0)
            print(
                f"| {ours} {own_budget} - {method} {budget} | {100 * test.estimate:+.1f} "
                f"[{100 * test.low:.1f}, {100 * test.high:.1f}] | {len(seeds)} |"
            )


def _mean_items(runs: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """Per task and item the mean over the seeds' winners: what to expect of one run."""
    chosen = [run for run in runs if run["seed"] in seeds]
    return [np.mean(values, axis=0) for values in zip(*(run["test_items"] for run in chosen), strict=True)]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--methods", default="ours,cma,tpe,ga,random")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="a run config of other models")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--ceiling", type=float, help="the ceiling's mean on test, in [0, 1]")
    options = parser.parse_args()
    own = RESULTS if options.config == DEMO_CONFIG else RESULTS / options.config.resolve().parent.name
    options.results = options.results or own
    options.results.mkdir(parents=True, exist_ok=True)
    if options.command == "table":
        table(options.results, options.ceiling)
        return
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            run_one(method, seed, options.evaluations, options.results, options.config)


if __name__ == "__main__":
    main()
