"""Our search beside those a careful person would write: equal scored items, the same models, several seeds.

    python benchmarks/perf/search.py run --methods ours,cma --seeds 0,1,2,3,4 --evaluations 25,50,100
    python benchmarks/perf/search.py table

`run` scores each method with each seed and leaves one JSON file per run in runs/bench-search, which later
calls find, so it may be interrupted and continued, and two may run side by side. `table` reads them.

The rivals see every `search` item of every candidate, maximise the mean normalised score there, start from
the hand-made merges that the space can express, and keep the candidate with the best score, as such scripts
do. Everybody's pick is then scored on `test`, which nothing was chosen on. Scoring the hand-made merges
counts for nobody.

    cma, tpe, gp, ga, pso, turbo, saasbo, hebo, smac, random     see rivals.py; smac scores item blocks, too
    ours    the defaults: floors, gradients, then CMA-ES, surrogate, item blocks, selection on `select`
    ours-PART[-PART]  the same with other settings: mean, balanced, floors (the objective's kind); gradients,
            nogradients; plain (no surrogate); async (no generations); alike (distances count all genes
            alike); nostacks (a search of layer paths without hand-made stacks); or the name of a search space

One run of a rival answers all its budgets, for it does not know them. Ours plans for its budget, so it runs
once for each.

mergekit-evolve and mergenetic themselves: `other_tools.py`. Their searches are `cma` and `ga`, here on our
engine, from our starts.

Of the demo's models, or of those of any run config (`--config zoo/run.yaml`), and of any search space
(`--space global_weights`: 5 genes; `--space benchmarks/perf/fine_layers.yaml`: 250), whose results then go
into a folder of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rivals import RIVALS, Genome, Spent

from evomerge import compose
from evomerge import prepare as preparation
from evomerge.config import DEMO_CONFIG, RunConfig, load_space
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

RESULTS = Path("runs/bench-search")
LEFT_OUT: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "alike": (compose, "movements", lambda *_: None),
    "nostacks": (preparation, "_stacks", lambda *_: 0),
}
"""Parts of the search that no setting switches off: what does nothing in their place."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What all runs of a folder share: a config of models, its space or another, a folder of results.

    keep: where run folders are kept, None: nowhere.
    """

    source: Path
    space: str | None
    results: Path
    keep: Path | None = None

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """Give a run its folder, which is kept where that was asked for."""
        if self.keep is not None:
            yield self.keep / name
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "run"


@contextlib.contextmanager
def left_out(method: str) -> Iterator[None]:
    """Leave parts of the search out while a method runs."""
    parts = [LEFT_OUT[part] for part in method.split("-")[1:] if part in LEFT_OUT]
    before = [getattr(place, name) for place, name, _ in parts]
    for place, name, nothing in parts:
        setattr(place, name, nothing)
    try:
        yield
    finally:
        for (place, name, _), own in zip(parts, before, strict=True):
            setattr(place, name, own)


def configured(method: str, seed: int, evaluations: int, out: Path, case: Case) -> RunConfig:
    """Return the config for one run."""
    source = case.source
    config = RunConfig.load(source, seed=seed, out=str(out), evaluations=evaluations)
    changes: dict[str, Any] = {
        "executor": config.executor.model_copy(update={"name": "inline", "threads": 1})
    }
    if case.space is not None:
        changes["space"] = load_space(case.space)
    if method in RIVALS:
        blocks = 8 if method == "smac" else 1
        changes |= {"racing": config.racing.model_copy(update={"blocks": blocks}), "surrogate": "off"}
    for part in method.split("-")[1:]:
        if part in ("gradients", "nogradients"):
            gradients = GradientSpec() if part == "gradients" else "off"
            changes["warm_start"] = config.warm_start.model_copy(update={"gradients": gradients})
        elif part in get_args(UtilityKind):
            changes["objective"] = config.objective.model_copy(update={"kind": part})
        elif part == "async":
            changes["optimizer"] = config.optimizer.model_copy(update={"async_": True})
        elif part == "plain":
            changes["surrogate"] = "off"
        elif part in LEFT_OUT:
            continue
        else:
            changes["space"] = load_space(part)
    return config.model_copy(update=changes)


class Bench:
    """The models with everything a run and its judge need.

    Attributes:
        starts: the genomes of the hand-made merges and the parents that the space can express.
    """

    def __init__(self, method: str, seed: int, evaluations: int, out: Path, case: Case) -> None:
        self.prepared = prepare(configured(method, seed, evaluations, out, case))
        space, names = self.prepared.space, self.prepared.space.sources
        norms = task_vector_norms(self.prepared.config.locations, BASE)
        self.parents = baselines.parents(self.prepared.template, names)
        self.hand_made = baselines.hand_made(self.prepared.template, names, norms)
        known = {named.recipe.hash for named in (*self.parents, *self.hand_made)}
        encoded = [space.encode(named.recipe) for named in (*self.hand_made, *self.parents)]
        by_hash = {space.decode(genome).hash: genome for genome in encoded if genome is not None}
        self.starts: list[Genome] = list(by_hash.values())
        worker = self.prepared.worker
        self.executor = Remembered(
            executors.build(self.prepared.config.executor, worker),
            case.results / f"shared-{worker.blocks}.pickle",
            known | set(by_hash),
        )
        self._scores: dict[tuple[str, str, tuple[int, ...]], Scores] = {}

    def score(self, recipe: Recipe, split: str, blocks: int | None = None) -> Scores:
        """Score a recipe on a split. blocks: of how many item blocks, the first ones; None: of all."""
        key = recipe.hash, split, self.prepared.worker.blocks_of(split)[:blocks]
        if key not in self._scores:
            (result,) = self.executor.run([Job(recipe=recipe, split=split, blocks=key[2])])
            assert isinstance(result.outcome, Scores), result.outcome
            self._scores[key] = result.outcome
        return self._scores[key]

    def normaliser(self, split: str, blocks: int | None = None) -> Normaliser:
        """Return the scale of a split, or of its first item blocks."""
        scores = [self.score(parent.recipe, split, blocks) for parent in self.parents]
        by_name = {p.name: s for p, s in zip(self.parents[1:], scores[1:], strict=True)}
        return Normaliser(self.prepared.suite, base=scores[0], parents=by_name)


class Counted:
    """The loss that a rival minimises. It counts the items and reports its best candidate for every budget.

    done: is told a budget, the best candidate and the items scored for it.
    """

    def __init__(
        self, bench: Bench, budgets: Sequence[int], done: Callable[[int, Recipe, int], None]
    ) -> None:
        self._bench, self._budgets, self._done = bench, sorted(budgets), done
        self._full = bench.score(bench.prepared.template, "search").items
        self._best: tuple[float, Recipe | None] = (np.inf, None)
        self._items = 0
        self._objectives: dict[int | None, Objective] = {}
        starts = sorted(bench.starts, key=self._loss_of_start)
        self.starts: Sequence[Genome] = starts
        self._free = {bench.prepared.space.decode(start).hash for start in starts}

    def __call__(self, genome: Genome, blocks: int | None = None) -> float:
        """Return minus the mean on the first item blocks, or on all. Raises Spent."""
        blocks = None if blocks == len(self._bench.prepared.worker.blocks_of("search")) else blocks
        recipe = self._bench.prepared.space.decode(np.clip(genome, 0.0, 1.0))
        if recipe.hash not in self._free:
            cost = self._bench.score(self._bench.prepared.template, "search", blocks).items
            while self._items + cost > self._budgets[0] * self._full:
                assert self._best[1] is not None
                self._done(self._budgets.pop(0), self._best[1], self._items)
                if not self._budgets:
                    raise Spent
            self._items += cost
        loss = self._loss(recipe, blocks)
        if blocks is None and loss < self._best[0]:
            self._best = (loss, recipe)
        return loss

    def _loss_of_start(self, start: Genome) -> float:
        recipe = self._bench.prepared.space.decode(start)
        loss = self._loss(recipe)
        self._best = min(self._best, (loss, recipe), key=lambda pair: pair[0])
        return loss

    def _loss(self, recipe: Recipe, blocks: int | None = None) -> float:
        if blocks not in self._objectives:
            normaliser = self._bench.normaliser("search", blocks)
            self._objectives[blocks] = Objective(ObjectiveSpec(kind="mean"), normaliser)
        return -self._objectives[blocks].mean(self._bench.score(recipe, "search", blocks))


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


def run_one(method: str, seed: int, budgets: Sequence[int], case: Case) -> None:
    """Run a method with a seed, judge its pick for each budget on `test`, write the JSON files."""
    paths = {budget: case.results / f"{method}-{budget}-{seed}.json" for budget in budgets}
    if all(path.exists() for path in paths.values()):
        return
    started = time.perf_counter()

    def done(budget: int, picked: Recipe, items: int) -> None:
        seconds = time.perf_counter() - started
        facts = {"method": method, "seed": seed, "evaluations": budget, "items": items, "seconds": seconds}
        data = facts | judge(bench, picked)
        paths[budget].write_text(json.dumps(data))
        print(
            f"{method} {budget} seed {seed}: test {100 * data['test']:.1f}, weakest {weakest(data):.1f}, "
            f"search - test {100 * (data['search'] - data['test']):+.1f}, "
            f"{items / data['full']:.1f} evaluations, {seconds:.0f} s",
            flush=True,
        )

    with case.folder(f"{method}-{max(budgets)}-{seed}") as folder, left_out(method):
        bench = Bench(method, seed, max(budgets), folder, case)
        if method in RIVALS:
            loss = Counted(bench, budgets, done)
            with contextlib.suppress(Spent):
                RIVALS[method](loss, loss.starts, seed)
        else:
            (budget,) = budgets
            done(budget, *run_ours(bench))


def judge(bench: Bench, picked: Recipe) -> dict[str, Any]:
    """Score a pick on `test`, beside the parents and the hand-made merges."""
    normaliser = bench.normaliser("test")
    scores = bench.score(picked, "test")
    return {
        "full": bench.score(bench.prepared.template, "search").items,
        "genes": bench.prepared.space.dimension,
        "test": normaliser.mean(scores),
        "search": bench.normaliser("search").mean(bench.score(picked, "search")),
        "tasks": normaliser.task(scores),
        "test_items": [values.tolist() for values in normaliser.items(scores)],
        "weights": normaliser.weights.tolist(),
        "rows": {
            named.name: normaliser.mean(bench.score(named.recipe, "test"))
            for named in (*bench.parents, *bench.hand_made)
        },
        "recipe": picked.hash,
    }


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
    for (method, budget), runs in sorted(found.items()):
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
    needed(found)


def needed(found: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Print, for each rival and each of our methods, what we need to be as good, and what a third buys."""
    print(
        "\n| rival, budget | its test | ours | our items for as good a test | ratio "
        "| with at most a third of its items: ours - its, points [95 % interval] | seeds |"
    )
    print("|---|---|---|---|---|---|---|")
    for (rival, budget), theirs in sorted(found.items()):
        if rival not in RIVALS:
            continue
        for ours in sorted({method for method, _ in found if method.startswith("ours")}):
            mine = [(_median(runs, "items"), runs) for (method, _), runs in found.items() if method == ours]
            own = sorted(mine, key=lambda pair: pair[0])
            equal = [items for items, runs in own if _median(runs, "test") >= _median(theirs, "test")]
            items, full = _median(theirs, "items"), theirs[0]["full"]
            third = [runs for spent, runs in own if spent <= items / 3]
            print(
                f"| {rival} {budget} | {100 * _median(theirs, 'test'):.1f} | {ours} "
                f"| {f'{equal[0] / full:.1f} evaluations' if equal else 'more than was run'} "
                f"| {f'{equal[0] / items:.2f}' if equal else '-'} | {_paired(third[-1:], theirs)} |"
            )


def _paired(ours: Sequence[list[dict[str, Any]]], theirs: list[dict[str, Any]]) -> str:
    """The cells of a paired difference, over items and the seeds both have."""
    seeds = sorted({run["seed"] for runs in ours for run in runs} & {run["seed"] for run in theirs})
    if not seeds:
        return "- | 0"
    a, b = (_mean_items(group, seeds) for group in (ours[0], theirs))
    test = statistics.paired_difference(a, b, theirs[0]["weights"], seed=0)
    used = _median(ours[0], "items") / ours[0][0]["full"]
    return (
        f"{used:.1f} evaluations: {100 * test.estimate:+.1f} [{100 * test.low:.1f}, {100 * test.high:.1f}] "
        f"| {len(seeds)}"
    )


def _median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.median([run[key] for run in runs]))


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
    parser.add_argument("--evaluations", default="200", help="budgets, one or several with commas")
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="a run config of other models")
    parser.add_argument("--space", help="a search space's name or file; else that of the config")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the run folders (default: they are deleted)")
    parser.add_argument("--ceiling", type=float, help="the ceiling's mean on test, in [0, 1]")
    options = parser.parse_args()
    own = RESULTS if options.config == DEMO_CONFIG else RESULTS / options.config.resolve().parent.name
    own = options.results or own
    results = own / Path(options.space).stem if options.space else own
    results.mkdir(parents=True, exist_ok=True)
    if options.command == "table":
        table(results, options.ceiling)
        return
    case = Case(source=options.config, space=options.space, results=results, keep=options.keep)
    budgets = [int(number) for number in options.evaluations.split(",")]
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            for group in [budgets] if method in RIVALS else [[budget] for budget in budgets]:
                run_one(method, seed, group, case)


if __name__ == "__main__":
    main()
