"""How often a verdict, an interval or a gate is wrong: whole searches in which nothing can help, and draws.

    python benchmarks/perf/honesty.py searches --count 500    # the real loop on simulated scores
    python benchmarks/perf/honesty.py real --count 50         # real runs: copies of a tiny base with noise
    python benchmarks/perf/honesty.py intervals               # coverage by number of items and tasks
    python benchmarks/perf/honesty.py gate                    # a planted loss, and none

Not covered: several objectives; racing and surrogate in the simulated searches (the real runs have them).
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import yaml

from evomerge.config import load_space
from evomerge.delivery.gate import Limit, passed, verdicts
from evomerge.evaluation import statistics
from evomerge.evaluation.gains import find_duds
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Array, Failure, Scores, Split, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.schema import preset_folder
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import SearchPlan
from evomerge.search.ports import GuideState, Named
from evomerge.search.spaces.merge_space import SearchSpace

SOURCES = ("a", "b", "c")
ITEMS: dict[Split, int] = {"search": 60, "select": 60, "test": 200}
BASE, SPECIALIST, MERGE = 0.2, 0.8, 0.5
"""True accuracies: every merge has the same, so no candidate is better than any hand-made merge."""
ALIKE = 0.5
"""Share of items on which all models with the same accuracy answer alike."""
TENSORS = tuple(
    f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
)
SUITE = Suite.model_validate(
    {
        "name": "simulated",
        "tasks": [
            {
                "task": name,
                "metric": "acc",
                "specialist": name,
                "splits": {"search": "a", "select": "b", "test": "c"},
            }
            for name in SOURCES
        ],
    }
)


class DrawnScores:
    """Draws every recipe's answers; a recipe's draws depend on the run's number and its hash only."""

    seconds = 0.0
    not_after = None

    def __init__(self, run: int) -> None:
        self.run = run
        self.cache: dict[tuple[str, Split], Scores] = {}

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        return [self.one(recipe, split) for recipe in recipes]

    def require(self, named: Sequence[Named], split: Split, phase: str) -> list[Scores]:
        return [self.one(entry.recipe, split) for entry in named]

    def known(
        self, recipes: Sequence[Recipe], split: Split, blocks: Sequence[int]
    ) -> list[Scores | Failure | None]:
        return [None] * len(recipes)

    def one(self, recipe: Recipe, split: Split) -> Scores:
        key = (recipe.hash, split)
        if key not in self.cache:
            number = tuple(ITEMS).index(split)
            shared = np.random.default_rng([self.run, number])
            own = np.random.default_rng([self.run, number, int(recipe.hash[:12], 16)])
            tasks = []
            for task in SOURCES:
                count = ITEMS[split]
                alike, common, separate = (
                    shared.random(count) < ALIKE,
                    shared.random(count),
                    own.random(count),
                )
                right = np.where(alike, common, separate) < accuracy(recipe, task)
                tasks.append(TaskScores(task=task, metric=right.astype(float)))
            self.cache[key] = Scores(split=split, tasks=tuple(tasks))
        return self.cache[key]


def accuracy(recipe: Recipe, task: str) -> float:
    """Return a recipe's true accuracy on a task."""
    sources = recipe.groups[0].sources
    if recipe.groups[0].method == "linear" and len(sources) == 1:
        return SPECIALIST if sources == (task,) else BASE
    return MERGE


class Entries:
    """A journal that keeps the entries only, and an observer that looks away."""

    def __init__(self) -> None:
        self.baselines: list[Named] = []
        self.parents: list[Named] = []

    def record_entry(self, role: str, position: int, entry: Named) -> None:
        if role == "baseline":
            self.baselines.append(entry)
        if role in ("base", "parent"):
            self.parents.append(entry)

    def record_ask(self, generation: int, genomes: Array, recipes: Sequence[Recipe]) -> None: ...
    def record_tell(self, generation: int, losses: Array, seconds: float) -> None: ...
    def record_guide(self, generation: int, state: GuideState) -> None: ...
    def record_front(
        self, generation: int, hypervolume: float, reference: Array, recipes: Sequence[Recipe]
    ) -> None: ...
    def record_spent(self, generation: int, items: int) -> None: ...
    def trim_entries(self, role: str, count: int) -> None: ...
    def generation_done(self, generation: int, evaluations: float, best: float) -> None: ...
    def noted(self, message: str) -> None: ...
    def has_ask(self, generation: int) -> bool:
        return False


class Generations:
    """A budget of a number of generations."""

    timed = False

    def __init__(self, most: int) -> None:
        self.most = most

    def stop_reason(
        self, *, generations: int, items: int, forecast: int, full: int, stale: int
    ) -> str | None:
        return "enough" if generations >= self.most else None

    def deadline(self) -> float | None:
        return None

    def out_of_time(self, generations: int, *, cut: bool) -> str:
        raise AssertionError


def simulated(run: int) -> tuple[bool, bool, bool, bool]:
    """Run one search; return: said to have helped, and which intervals contain the truth.

    The intervals: winner less a baseline fixed beforehand (truth 0), winner less best baseline (truth 0), and
    the winner's mean, given the references.
    """
    template = Recipe(
        models={name: name for name in ("base", *SOURCES)},
        groups=(TensorGroup(method="linear", sources=SOURCES),),
        base="base",
    )
    space = SearchSpace(load_space("global_weights"), template=template, sources=SOURCES, tensors=TENSORS)
    plan = SearchPlan(
        suite=SUITE, space=space, template=space.decode(np.full(space.dimension, 0.5)),
        norms=dict.fromkeys(SOURCES, 1.0), optimizer=OptimizerSpec(), objective=ObjectiveSpec(),
        finalists=3, seed=run,
    )  # fmt: skip
    scorer, entries = DrawnScores(run), Entries()
    winner = (
        Search(plan, scorer=scorer, journal=entries, budget=Generations(8), observer=entries).run().winner
    )
    base, *parents = entries.parents
    by_split = {s: {p.name: scorer.one(p.recipe, s) for p in parents} for s in ITEMS}
    duds = find_duds(SUITE, base=scorer.one(base.recipe, "search"), parents=by_split["search"])
    scale = Normaliser(
        SUITE, base=scorer.one(base.recipe, "test"), parents=by_split["test"], duds=[d.task for d in duds]
    )
    mine = scorer.one(winner.recipe, "test")
    rows = [scorer.one(entry.recipe, "test") for entry in (*entries.parents, *entries.baselines)]
    searched = [scorer.one(entry.recipe, "search") for entry in (*entries.parents, *entries.baselines)]
    on_search = Normaliser(SUITE, base=searched[0], parents=by_split["search"], duds=[d.task for d in duds])
    _, best = scale.compare_with_best(
        mine,
        {str(number): row for number, row in enumerate(rows)},
        fixed=str(max(range(len(rows)), key=lambda number: on_search.mean(searched[number]))),
        seed=0,
    )
    fixed = scale.compare(mine, scorer.one(entries.baselines[0].recipe, "test"), seed=0)
    mean = scale.interval(mine)
    truth = float(np.mean([(MERGE - part.zero) / part.headroom for part in scale.skills]))
    return (
        best.low > 0,
        fixed.low <= 0 <= fixed.high,
        best.low <= 0 <= best.high,
        mean.low <= truth <= mean.high,
    )


def searches(count: int) -> None:
    """Print how often simulated searches that can't help are said to, and how often intervals are right."""
    results = np.array([simulated(run) for run in range(count)])
    helped, fixed, best, mean = results.mean(axis=0)
    print(f"{count} simulated searches, no merge better than another, {ITEMS['test']} test items per task")
    print(f"'search helped': {100 * helped:.1f} %")
    print(f"95 % interval of winner less a fixed baseline contains the truth: {100 * fixed:.1f} %")
    print(f"95 % interval of winner less best baseline (chosen on test) contains 0: {100 * best:.1f} %")
    print(f"95 % interval of the winner's mean contains the truth: {100 * mean:.1f} %")


def real(count: int, zoo: Path | None) -> None:
    """Print how often real runs on copies of a tiny base with noise are said to have helped."""
    from evomerge import compose
    from evomerge.config import RunConfig
    from evomerge.delivery.progress import Silent
    from evomerge.delivery.summary import Summary
    from evomerge.stored import StoredRun
    from evomerge.zoo.build import build_zoo

    helped, done = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if zoo is None:
            zoo = folder / "zoo"
            build_zoo(zoo, seed=0, size="tiny", progress=lambda _: None)
        splits = {"search": 24, "select": 16, "test": 40}
        tasks = [{"task": f"demo_{name}", "metric": "acc", "splits": splits} for name in ("reverse", "upper")]
        place = preset_folder("benchmarks/suites").parent / "tasks" / "demo"
        suite = {"name": "tiny", "about": "", "tasks_dir": str(place), "tasks": tasks}
        (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
        for run in range(count):
            sources = {name: noisy(zoo / "upper", folder / name, [run, k]) for k, name in enumerate("ab")}
            config = {
                "models": {"base": str(zoo.resolve() / "upper"), "sources": sources},
                "space": "global_weights",
                "suite": str(folder / "suite.yaml"),
                "optimizer": {"name": "cma_es", "population": 4},
                "budget": {"generations": 3},
                "executor": {"name": "inline", "threads": 1, "batch_size": 32},
                "racing": {"blocks": 3, "error": 0.5},
                "finalists": 2,
                "seed": run,
                "out": str(folder / f"run{run}"),
            }
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            compose.start(RunConfig.load(folder / "config.yaml"), Silent())
            with StoredRun.read(folder / f"run{run}") as stored:
                summary = Summary(stored)
                verdict = summary.verdict(summary.rows())
            assert verdict is not None
            helped, done = helped + verdict.helped, done + 1
            shutil.rmtree(folder / f"run{run}")
            print(f"{done} real runs, 'search helped': {helped}", flush=True)


def noisy(model: Path, out: Path, seed: list[int]) -> str:
    """Write a copy of a model whose weights have small random noise; nothing is learned by that."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**31)))
    (file,) = out.glob("*.safetensors")
    tensors = {
        name: t + 0.05 * t.float().std() * torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return str(out)


def intervals(trials: int) -> None:
    """Print how often intervals contain the truth: of one model's mean, and of the difference of two."""
    rng = np.random.default_rng(0)
    print("accuracy  tasks  items:  coverage of a mean, of a difference (%)")
    for low, high in ((0.0, 0.1), (0.4, 0.6), (0.9, 1.0)):
        for tasks in (1, 2, 5):
            parts = []
            for n in (10, 20, 50, 200, 500):
                mean = difference = 0
                for _ in range(trials):
                    p, q = rng.uniform(low, high, tasks), rng.uniform(low, high, tasks)
                    units = rng.uniform(1, 4, tasks)  # 1 / headroom
                    alike, common = rng.random((tasks, n)) < ALIKE, rng.random((tasks, n))
                    a, b = (
                        list((np.where(alike, common, rng.random((tasks, n))) < x[:, None]) * units[:, None])
                        for x in (p, q)
                    )
                    spans = [(0.0, unit) for unit in units.tolist()]
                    weights = np.ones(tasks)
                    one = statistics.interval(a, weights, spans=spans)
                    two = statistics.interval(
                        [x - y for x, y in zip(a, b, strict=True)], weights, spans=[(-u, u) for _, u in spans]
                    )
                    mean += one.low <= (p * units).mean() <= one.high
                    difference += two.low <= ((p - q) * units).mean() <= two.high
                parts.append(f"{n}: {100 * mean / trials:.1f} {100 * difference / trials:.1f}")
            print(f"{low:.1f}-{high:.1f}   {tasks}      {'   '.join(parts)}", flush=True)


def gate(trials: int) -> None:
    """Print how often a gate finds a loss of 5 points on one of its tasks, and stops a winner without one.

    Beside it stands what a test could find that knows the variance: one task at 5 %, and of several tasks
    that may all be at their limit each at the level that keeps five independent tests together at 5 %.
    """
    rng, n, lost = np.random.default_rng(0), 500, 0.05
    print("items that differ, tasks, gain on the others: found, ideal, stopped without a loss (%)")
    for differ in (0.06, 0.08, 0.10, 0.15, 0.20):
        for tasks, gained in ((1, 0.0), (5, 0.0), (5, 0.02), (5, 0.05)):
            found, stopped = (
                np.mean([not gated(rng, differ, (drop, *[-gained] * (tasks - 1)), n) for _ in range(trials)])
                for drop in (lost, 0.0)
            )
            level = 0.05 if tasks == 1 or gained else 1 - 0.95 ** (1 / tasks)
            errors = lost / math.sqrt((differ - lost**2) / n)
            ideal = scipy.stats.norm.cdf(errors - scipy.stats.norm.isf(level))
            print(
                f"{100 * differ:.0f} %  {tasks}  {100 * gained:.0f}:  {100 * found:.1f}  {100 * ideal:.1f}  "
                f"{100 * stopped:.1f}",
                flush=True,
            )


def gated(rng: np.random.Generator, differ: float, drops: Sequence[float], n: int) -> bool:
    """Return whether a gate passes a model that differs on a share of n items and loses so much per task."""
    limits = []
    for drop in drops:
        better, worse = rng.multinomial(n, [(differ - drop) / 2, (differ + drop) / 2, 1 - differ])[:2]
        samples = np.repeat([1.0, -1.0, 0.0], [better, worse, n - better - worse])
        limits.append(
            Limit(rule="max_loss", samples=[samples], weights=np.ones(1), limit=0.0, spans=[(-1.0, 1.0)])
        )
    return passed(verdicts(limits, 0.95))


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["searches", "real", "intervals", "gate"])
    parser.add_argument("--count", type=int, help="searches, runs or draws")
    parser.add_argument("--zoo", type=Path, help="a tiny zoo for `real`, instead of building one")
    options = parser.parse_args()
    if options.what == "searches":
        searches(options.count or 500)
    elif options.what == "real":
        real(options.count or 50, options.zoo)
    elif options.what == "intervals":
        intervals(options.count or 2000)
    else:
        gate(options.count or 2000)


if __name__ == "__main__":
    main()
