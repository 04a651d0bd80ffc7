"""What more workers bring: speed-up, memory, how busy they are kept, and what one driver can take in.

    python benchmarks/perf/scale.py workers --evaluations 60     two local workers beside one, on the demo
    python benchmarks/perf/scale.py memory                       their memory, in proportional set sizes
    python benchmarks/perf/scale.py cluster                      64 simulated workers that fail
    python benchmarks/perf/scale.py stream                       the same without generations
    python benchmarks/perf/scale.py driver                       results per second, stored on disk

`cluster` runs the real scheduler and pool on a simulated clock. A candidate's merge takes 15 s, each of its
16 item blocks 30 s on average. Candidates differ, lognormal with a sigma of 1: the slowest hundredth takes
ten times the median, as a merge does that babbles to the length limit; nobody knows beforehand which. Its
blocks differ by 25 % from each other. In 2 % of the jobs the worker dies on the way, what it did is lost, and
its successor takes 60 s to start. The workload is that of a run: references, baselines with the greedy soup's
steps one by one, generations. Busy is the time of jobs that ended with a result.
Not covered: Ray's own scheduling, networks, GPUs.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Scores, Split, TaskScores, joined
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running.batches import Batches
from evomerge.running.executors import LocalProcesses
from evomerge.running.executors.pool import Died, Message, Pool
from evomerge.running.schedule import Scheduler
from evomerge.running.scorer import Scorer
from evomerge.running.store import RunStore, Timing, facts
from evomerge.running.worker import Job, Result, WorkerSpec
from evomerge.search.stream import pending
from evomerge.stored import StoredRun

LIMITS = {
    "speed-up": 1.7,
    "memory": 1.3,
    "busy": 0.9,
    "busy, asynchronous": 0.95,
    "results per second": 200.0,
}


def recipe(number: int) -> Recipe:
    """Return one of any number of different recipes."""
    weight = {"weight": (number / 2**20,)}
    return Recipe(
        models={"base": "base", "a": "a"},
        base="base",
        groups=(TensorGroup(method="linear", sources=("a",), parameters=weight),),
    )


# -- two workers beside one ---------------------------------------------------------------------------


def workers(evaluations: int) -> float:
    """Run the demo's search with one worker and with two; return how many times faster the latter is."""
    hours = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            config = RunConfig.load(DEMO_CONFIG, out=f"{folder}/{count}", evaluations=evaluations)
            executor = config.executor.model_copy(update={"workers": count, "threads": 1})
            compose.start(config.model_copy(update={"executor": executor}), Silent())
            with StoredRun.read(Path(folder) / str(count)) as run:
                store = run.store
                hours[count] = store.hours()
                scored = len(store.scored_blocks("search"))
                splits: tuple[Split, ...] = ("search", "select", "test")
                work = sum(each.total for split in splits for each in store.timings(split).values())
            busy = work / (3600 * hours[count] * count)
            print(
                f"{count} workers of one thread: {3600 * hours[count]:.1f} s for {scored} candidates, "
                f"busy {busy:.3f} of the time",
                flush=True,
            )
    return hours[1] / hours[2]


# -- memory -------------------------------------------------------------------------------------------


class Merger:
    """A worker that only merges: the live model and the sources of a real one, without tasks."""

    sharing = None

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        from evomerge.merging.live.workbench import Workbench

        self._bench = Workbench(
            spec.models, spec.base, compute_dtype=spec.dtype, low_memory=spec.low_memory, device=spec.device
        )

    def run(self, job: Job) -> Result:
        """Merge, and wait a moment so that every worker gets some of the jobs."""
        self._bench.load(job.recipe)
        time.sleep(0.3)
        return Result(job=job, outcome=scores(job), timing=Timing(total=1, merge=1, forward=0, worker="0"))


def memory(sources: int, hidden: int, layers: int) -> float:
    """Print the memory of one and of two workers; return the worst ratio without kept statistics."""
    import merge  # the models of the merging benchmark

    names = tuple(f"m{i}" for i in range(1, sources + 1))
    merge.SOURCES = names
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        count = merge.build(Path(folder), hidden, layers, 32000)
        size = 2 * count / 2**20
        print(
            f"base and {sources} fine-tunes, {count / 1e6:.0f} M parameters, {size:.0f} MiB each (bfloat16)"
        )
        print("| forward pass | method | low_memory | one worker, MiB | two | ratio |")
        print("|---|---|---|---|---|---|")
        for dtype, method, low in (
            *(("bfloat16", "linear", False), ("float32", "linear", False)),
            *(("bfloat16", "ties", True), ("bfloat16", "ties", False)),
        ):
            spec = WorkerSpec(
                models={name: f"{folder}/{name}" for name in ("base", *names)},
                base="base",
                suite=None,  # type: ignore[arg-type]  # nothing is scored
                batch_size=1,
                dtype=dtype,
                device="cpu",
                threads=1,
                low_memory=low,
            )
            found = [_workers_memory(spec, names, method, count) for count in (1, 2)]
            ratio = found[1] / found[0]
            print(f"| {dtype} | {method} | {low} | {found[0]:.0f} | {found[1]:.0f} | {ratio:.2f} |")
            if low or method == "linear":
                worst = max(worst, ratio)
    return worst


def _workers_memory(spec: WorkerSpec, names: Sequence[str], method: str, count: int) -> float:
    """Return the MiB of `count` workers that have merged: their shares of all pages, added up."""
    settings = {"density": 0.4} if method == "ties" else {}
    recipes = [
        Recipe(
            models=dict(spec.models),
            base="base",
            groups=(
                TensorGroup(
                    method=method,
                    sources=tuple(names),
                    parameters={"weight": tuple(0.1 + 0.01 * i for _ in names), **settings},
                ),
            ),
        )
        for i in range(6)
    ]
    pool = LocalProcesses(spec, workers=count, timeout=600, worker=Merger)
    try:
        list(pool.run([Job(recipe=each, split="search") for each in recipes]))
        processes = [member.handle.process.pid for member in pool._members]
        assert len(processes) == count
        return sum(proportional(pid) for pid in processes if pid is not None)
    finally:
        pool.close()


def proportional(pid: int) -> float:
    """Return the proportional set size of a process in MiB: a page mapped by n processes counts 1 / n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


# -- a simulated cluster ------------------------------------------------------------------------------

MERGE, BLOCK, NOISE, START, BLOCKS, FAILURES = 15.0, 30.0, 0.25, 60.0, 16, 0.02


@dataclass(slots=True, kw_only=True, eq=False)
class Simulated:
    """A simulated worker: what will be heard of it, and when."""

    at: float
    message: Message | None
    since: float | None = None
    weights: str = ""
    merge: float = 0.0


@dataclass(slots=True, kw_only=True)
class Cluster:
    """A backend on a simulated clock.

    spread: sigma of the lognormal times of candidates. useful: seconds of jobs that ended with a result;
    merging: the part of them that was merging.
    """

    seed: int
    spread: float
    lack: str = ""
    lingers: bool = False
    clock: float = 0.0
    useful: float = 0.0
    merging: float = 0.0
    deaths: int = 0
    jobs: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def start(self, name: str, seat: int) -> Simulated:
        return Simulated(at=self.clock + START, message=True)

    def give(self, worker: Simulated, job: Job) -> None:
        self.jobs += 1
        worker.merge = 0.0 if worker.weights == job.recipe.hash else MERGE
        worker.weights = job.recipe.hash
        seconds = worker.merge + sum(self.block_seconds(job, block) for block in job.blocks)
        if self.rng.random() < FAILURES:
            worker.at = self.clock + seconds * self.rng.random()
            worker.message, worker.since = Died(reason="it died"), None
            self.deaths += 1
            return
        timing = Timing(total=seconds, merge=worker.merge, forward=0.0, worker="0")
        worker.at, worker.since = self.clock + seconds, self.clock
        worker.message = Result(job=job, outcome=scores(job), timing=timing, parts=tuple(parts(job)))

    def block_seconds(self, job: Job, block: int) -> float:
        """Return what a block of a candidate takes, whoever scores it, however often."""
        of_candidate = np.random.default_rng([self.seed, int(job.recipe.hash[:12], 16)])
        of_block = np.random.default_rng([self.seed, int(job.recipe.hash[:12], 16), block])
        slow = of_candidate.lognormal(-(self.spread**2) / 2, self.spread)
        return BLOCK * slow * of_block.lognormal(-(NOISE**2) / 2, NOISE)

    def wait(self, workers: Sequence[Simulated], seconds: float) -> list[tuple[Simulated, Message]]:
        first = min(workers, key=lambda worker: worker.at)
        if first.at > self.clock + seconds:
            self.clock += seconds
            return []
        self.clock = max(self.clock, first.at)
        message, first.message = first.message, None
        assert message is not None
        if first.since is not None:
            self.useful += self.clock - first.since
            self.merging += first.merge
            first.since = None
        return [(first, message)]

    def alive(self, worker: Simulated) -> bool:
        return True

    def kill(self, worker: Simulated) -> None: ...

    def close(self, idle: Sequence[Simulated], busy: Sequence[Simulated]) -> None: ...

    def now(self) -> float:
        return self.clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How busy workers were kept: while there were new candidates, and with the end; share of merging."""

    steady: float
    whole: float
    merging: float
    hours: float


def batches(population: int, generations: int) -> Iterator[list[Job]]:
    """Yield what a run asks for, batch by batch: references, baselines, greedy soup, generations."""
    whole = tuple(range(BLOCKS))
    number = iter(range(10**6))

    def some(count: int, split: Split = "search") -> list[Job]:
        blocks = whole if split == "search" else (0,)
        return [Job(recipe=recipe(next(number)), split=split, blocks=blocks) for _ in range(count)]

    yield some(6)
    yield some(20)
    yield from (some(1) for _ in range(4))
    yield from (some(population) for _ in range(generations))


def simulate(
    workers: int, population: int, generations: int, spread: float, *, plain: bool, seed: int = 0
) -> tuple[float, float, Cluster]:
    """Return the busy share of the whole run and of its generations, and the cluster.

    plain: without the scheduler: candidates in one piece, no spare work.
    """
    cluster = Cluster(seed=seed, spread=spread)
    pool = Pool(cluster, workers=workers, timeout=math.inf)
    scheduler = Scheduler(pool)
    spare = [Job(recipe=recipe(10**6 + i), split="test", blocks=tuple(range(4))) for i in range(26)]
    kept: set[str] = set()
    if not plain:
        scheduler.later(spare, lambda result: kept.add(result.job.recipe.hash))
    before = (0.0, 0.0)
    for position, batch in enumerate(batches(population, generations)):
        if position == 6:
            before = (cluster.clock, cluster.useful)
        list(pool.run(batch) if plain else scheduler.run(batch))
    end = (cluster.clock, cluster.useful)
    left = [job for job in spare if job.recipe.hash not in kept]
    list(pool.run(left) if plain else scheduler.run(left))
    whole = cluster.useful / (workers * cluster.clock)
    return whole, (end[1] - before[1]) / (workers * (end[0] - before[0])), cluster


def stream(workers: int, waiting: int, candidates: int, spread: float, *, seed: int = 0) -> Kept:
    """Return how busy an asynchronous search keeps simulated workers; waiting: candidates pending."""
    cluster = Cluster(seed=seed, spread=spread)
    scheduler = Scheduler(Pool(cluster, workers=workers, timeout=math.inf))
    jobs = (Job(recipe=recipe(n), split="search", blocks=tuple(range(BLOCKS))) for n in range(10**6))
    list(scheduler.run([next(jobs) for _ in range(workers)]))  # all have started, and the times are known
    began, useful, merging = cluster.clock, cluster.useful, cluster.merging

    def share() -> float:
        return (cluster.useful - useful) / (workers * (cluster.clock - began))

    scheduler.submit([next(jobs) for _ in range(waiting)])
    for _ in range(candidates - waiting):
        scheduler.next()
        scheduler.submit([next(jobs)])
    steady = share()
    while scheduler.next() is not None:
        pass
    hours, merged = (cluster.clock - began) / 3600, (cluster.merging - merging) / (cluster.useful - useful)
    return Kept(steady=steady, whole=share(), merging=merged, hours=hours)


def asynchronous(workers: int, candidates: int, seeds: int) -> float:
    """Print how busy an asynchronous search keeps workers; return the share of the case that counts."""
    print(f"{workers} workers, {candidates} candidates, mean of {seeds} seeds")
    print("| candidates pending | sigma | busy | with its end | merging | hours |")
    print("|---|---|---|---|---|---|")
    counted = 0.0
    usual = pending(workers)
    for waiting, spread in (
        *((workers, 1.0), (usual, 0.5), (usual, 1.0), (usual, 1.5)),
        *((2 * workers, 1.0),),
    ):
        runs = [stream(workers, waiting, candidates, spread, seed=seed) for seed in range(seeds)]
        steady, whole, merging, hours = np.mean([(r.steady, r.whole, r.merging, r.hours) for r in runs], 0)
        print(
            f"| {waiting} | {spread:g} | {steady:.3f} | {whole:.3f} | {merging:.3f} | {hours:.1f} |",
            flush=True,
        )
        if (waiting, spread) == (usual, 1.0):
            counted = float(steady)
    return counted


def cluster(workers: int, generations: int) -> float:
    """Print how busy simulated workers are kept; return the share of the case that counts."""
    print(f"{workers} workers, {generations} generations; merge {MERGE:g} s, block {BLOCK:g} s on average,")
    print(f"{100 * FAILURES:g} % of the jobs kill their worker, a new one takes {START:g} s")
    print(
        "| candidates per generation | sigma | scheduler | busy, generations | whole run | hours | merging |"
    )
    print("|---|---|---|---|---|---|---|")
    counted = 0.0
    for population in (workers, 2 * workers, 4 * workers, 8 * workers):
        for spread in (1.0,) if population != 4 * workers else (0.5, 1.0, 1.5):
            for plain in (True, False):
                whole, share, found = simulate(workers, population, generations, spread, plain=plain)
                name = "none" if plain else "ours"
                extra = found.merging / found.useful
                print(
                    f"| {population} | {spread:g} | {name} | {share:.3f} | {whole:.3f} | "
                    f"{found.clock / 3600:.1f} | {extra:.3f} |"
                )
                if (population, spread, plain) == (4 * workers, 1.0, False):
                    counted = share
    return counted


# -- what one driver takes in ---------------------------------------------------------------------------


class Instant:
    """An executor of many workers that take no time."""

    workers = 64

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        for job in jobs:
            timing = Timing(total=0.1, merge=0.01, forward=0.09, worker="0")
            found = parts(job, tasks=6, items=40)
            yield Result(job=job, outcome=joined(found), timing=timing, parts=tuple(found))

    def close(self) -> None: ...


def driver(count: int, folder: Path) -> float:
    """Return the results per second that scorer and store take in, every one committed to disk."""
    executor = Instant()
    with RunStore.create(folder, {facts.BLOCKS: BLOCKS}) as store:
        store.begin_session({})
        scorer = Scorer(store, Scheduler(executor), Silent(), Batches(store, 1))
        recipes = [recipe(number) for number in range(count)]
        rates = {}
        for name, blocks, part in (
            ("of one item block", [0], recipes),
            ("of eight item blocks", list(range(BLOCKS)), [recipe(10**6 + i) for i in range(count // 4)]),
        ):
            started, processor = time.perf_counter(), time.process_time()
            for start in range(0, len(part), 256):
                scorer.score(part[start : start + 256], "search", "generation", blocks)
            seconds = time.perf_counter() - started
            rates[name] = len(part) / seconds
            own = (time.process_time() - processor) / len(part)
            print(f"results {name} (6 tasks of 40 items): {rates[name]:.0f} per second, "
                  f"{1e3 * own:.2f} ms of the processor each")  # fmt: skip
    return rates["of one item block"]


def scores(job: Job) -> Scores:
    """Return some scores for a job."""
    return joined(parts(job))


def parts(job: Job, *, tasks: int = 1, items: int = 1) -> list[Scores]:
    """Return some scores for a job, block by block."""
    noise = np.linspace(0, 1, items)
    return [
        Scores(
            split=job.split,
            blocks=(block,),
            tasks=tuple(
                TaskScores(task=f"t{i}", metric=noise, smooth=noise, margin=noise) for i in range(tasks)
            ),
        )
        for block in job.blocks
    ]


def main() -> None:
    """Measure and print; exit with 1 where a limit is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("workers").add_argument("--evaluations", type=int, default=60)
    of_memory = commands.add_parser("memory")
    of_memory.add_argument("--sources", type=int, default=5)
    of_memory.add_argument("--hidden", type=int, default=768)
    of_memory.add_argument("--layers", type=int, default=8)
    of_cluster = commands.add_parser("cluster")
    of_cluster.add_argument("--workers", type=int, default=64)
    of_cluster.add_argument("--generations", type=int, default=20)
    of_stream = commands.add_parser("stream")
    of_stream.add_argument("--workers", type=int, default=64)
    of_stream.add_argument("--candidates", type=int, default=2048)
    of_stream.add_argument("--seeds", type=int, default=3)
    commands.add_parser("driver").add_argument("--results", type=int, default=4096)
    given = parser.parse_args()
    if given.what == "workers":
        name, value = "speed-up", workers(given.evaluations)
    elif given.what == "memory":
        name, value = "memory", memory(given.sources, given.hidden, given.layers)
    elif given.what == "cluster":
        name, value = "busy", cluster(given.workers, given.generations)
    elif given.what == "stream":
        name, value = "busy, asynchronous", asynchronous(given.workers, given.candidates, given.seeds)
    else:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            name, value = "results per second", driver(given.results, Path(folder) / "run")
    limit = LIMITS[name]
    within = value <= limit if name == "memory" else value >= limit
    print(f"{name}: {value:.3g} (limit {limit:g})")
    raise SystemExit(not within)


if __name__ == "__main__":
    main()
