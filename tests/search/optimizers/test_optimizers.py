"""The contract every optimizer meets. A new optimizer is a new row."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.search.optimizers import Optimizer, OptimizerSpec, choose, create
from evomerge.search.optimizers.catcma import CatCma
from evomerge.search.optimizers.cube import Cube
from evomerge.search.spaces.space import Coordinate

CONTINUOUS = (Coordinate(),) * 6
MIXED = (
    *(Coordinate(),) * 3,
    Coordinate(levels=5),
    Coordinate(levels=7),
    Coordinate(levels=4, ordered=False),
    Coordinate(levels=3, ordered=False),
    Coordinate(levels=2),
    Coordinate(levels=1),
)
NAMED = (Coordinate(levels=3, ordered=False),) * 8
TARGET = np.array([0.8, 0.6, 0.3, 0.9, 0.2, 0.6, 0.5, 0.9])


def sphere(genomes: np.ndarray) -> np.ndarray:
    return ((genomes - 0.8) ** 2).sum(axis=1, keepdims=True)


def mixed(genomes: np.ndarray) -> np.ndarray:
    """Squared distance in numbers, 0.3 for each wrong name; the best is about 2e-4."""
    loss = ((genomes[:, :5] - TARGET[:5]) ** 2).sum(axis=1)
    for column in (5, 6, 7):
        levels = MIXED[column].levels or 1
        loss += 0.3 * ((genomes[:, column] * levels).astype(int) != int(TARGET[column] * levels))
    return loss[:, None]


def names(genomes: np.ndarray) -> np.ndarray:
    """The number of names that are not the right one, out of 8."""
    return ((genomes * 3).astype(int) != np.arange(8) % 3).sum(axis=1, keepdims=True).astype(float)


def two(genomes: np.ndarray) -> np.ndarray:
    return np.hstack([sphere(genomes), ((genomes - 0.2) ** 2).sum(axis=1, keepdims=True)])


def three(genomes: np.ndarray) -> np.ndarray:
    return np.hstack([two(genomes), ((genomes - 0.5) ** 2).max(axis=1, keepdims=True)])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer on one kind of space. beats: whether it has to beat random search, in `evaluations`."""

    spec: OptimizerSpec
    coordinates: Sequence[Coordinate] = CONTINUOUS
    losses: Callable[[np.ndarray], np.ndarray] = sphere
    objectives: int = 1
    beats: bool = True
    evaluations: int = 300

    def meant(self, u: float) -> list[float]:
        """The genome that a point with the same value everywhere means: bins at their middles."""
        return [u if c.levels is None else c.middle(c.level(u)) for c in self.coordinates]

    def make(self, seed: int, *starts: np.ndarray, name: str | None = None) -> Optimizer:
        return create(
            self.spec if name is None else OptimizerSpec(name=name),  # type: ignore[arg-type]
            coordinates=self.coordinates,
            objectives=self.objectives,
            starts=starts or [np.full(len(self.coordinates), 0.5)],
            seed=np.random.SeedSequence(seed),
        )


def _spec(**settings: object) -> OptimizerSpec:
    return OptimizerSpec.model_validate(settings)


ROWS = {
    "cma_es": Row(spec=_spec(name="cma_es")),
    "cma_es-small-population": Row(spec=_spec(name="cma_es", population=5, sigma=0.4)),
    "cma_es-bipop": Row(spec=_spec(name="cma_es", restarts="bipop")),
    "cma_es-no-restarts": Row(spec=_spec(name="cma_es", restarts="none")),
    "cma_es-separable": Row(spec=_spec(name="cma_es"), coordinates=(Coordinate(),) * 201),
    "cma_es-one-coordinate": Row(spec=_spec(name="cma_es"), coordinates=(Coordinate(),)),
    "catcma": Row(spec=_spec(name="catcma")),
    "catcma-mixed": Row(spec=_spec(name="catcma"), coordinates=MIXED, losses=mixed),
    "catcma-names": Row(spec=_spec(name="catcma"), coordinates=NAMED, losses=names),
    "catcma-two": Row(spec=_spec(name="catcma"), losses=two, objectives=2),
    "catcma-two-mixed": Row(
        spec=_spec(name="catcma"),
        coordinates=MIXED,
        losses=lambda u: np.hstack([mixed(u), mixed(1 - u)]),
        objectives=2,
    ),
    "nsga2": Row(spec=_spec(name="nsga2")),
    "nsga2-mixed": Row(spec=_spec(name="nsga2"), coordinates=MIXED, losses=mixed),
    "nsga2-two": Row(spec=_spec(name="nsga2"), losses=two, objectives=2),
    "nsga3-two": Row(spec=_spec(name="nsga3"), losses=two, objectives=2),
    "nsga3-three": Row(spec=_spec(name="nsga3"), losses=three, objectives=3),
    "tpe": Row(spec=_spec(name="tpe", population=5), evaluations=80),
    "tpe-mixed": Row(spec=_spec(name="tpe", population=5), coordinates=MIXED, losses=mixed, evaluations=80),
    "tpe-two": Row(spec=_spec(name="tpe", population=5), losses=two, objectives=2, evaluations=80),
    "random": Row(spec=_spec(name="random"), beats=False),
    "random-mixed": Row(spec=_spec(name="random"), coordinates=MIXED, losses=mixed, beats=False),
    "sobol": Row(spec=_spec(name="sobol"), beats=False),
    "sobol-mixed": Row(spec=_spec(name="sobol"), coordinates=MIXED, losses=mixed, objectives=1, beats=False),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def run(optimizer: Optimizer, row: Row, generations: int) -> list[np.ndarray]:
    asked = []
    for _ in range(generations):
        genomes = optimizer.ask()
        asked.append(genomes)
        optimizer.tell(row.losses(genomes))
    return asked


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_asks_for_read_only_genomes_in_the_cube_and_in_the_middle_of_bins(row: Row) -> None:
    optimizer = row.make(0)
    for _ in range(12):
        population = optimizer.population
        genomes = optimizer.ask()
        assert genomes.shape == (population, len(row.coordinates))
        assert ((genomes >= 0) & (genomes <= 1)).all()
        assert not genomes.flags.writeable
        for column, coordinate in enumerate(row.coordinates):
            if coordinate.levels is not None:
                middles = [coordinate.middle(level) for level in range(coordinate.levels)]
                assert np.isin(genomes[:, column], middles).all()
        optimizer.tell(row.losses(genomes))


def test_same_seed_same_genomes_and_another_seed_others(row: Row) -> None:
    first, again, other = (run(row.make(seed), row, 4) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first[:1], other[:1])


def test_replaying_losses_continues_bit_for_bit(row: Row) -> None:
    optimizer = row.make(1)
    asked = run(optimizer, row, 6)
    replayed = row.make(1)
    for genomes in asked:
        assert (replayed.ask() == genomes).all()
        replayed.tell(row.losses(genomes))
    assert (optimizer.ask() == replayed.ask()).all()


def test_global_generators_are_left_alone_and_have_no_say(row: Row) -> None:
    before = np.random.get_state()[1].copy(), random.getstate()
    first = run(row.make(0), row, 3)
    assert (np.random.get_state()[1] == before[0]).all()
    assert random.getstate() == before[1]
    np.random.seed(7)
    random.seed(7)
    assert same(first, run(row.make(0), row, 3))


def test_does_not_modify_losses_or_the_seed(row: Row) -> None:
    seed = np.random.SeedSequence(0)
    create(
        row.spec,
        coordinates=row.coordinates,
        objectives=row.objectives,
        starts=[np.full(len(row.coordinates), 0.5)],
        seed=seed,
    )
    assert seed.n_children_spawned == 0
    optimizer = row.make(0)
    losses = row.losses(optimizer.ask())
    kept = losses.copy()
    optimizer.tell(losses)
    assert (losses == kept).all()


def uncovered(losses: np.ndarray) -> float:
    """Share of points below 1.5 that no row of losses dominates: hypervolume, lower is better."""
    points = 1.5 * np.random.default_rng(0).random((4000, losses.shape[1]))
    return float(1 - (losses[:, None] <= points).all(axis=2).any(axis=0).mean())


def test_makes_more_progress_than_random_search(row: Row) -> None:
    if not row.beats:
        pytest.skip("this is random search")

    def quality(optimizer: Optimizer) -> float:
        told: list[np.ndarray] = []
        while sum(map(len, told)) < row.evaluations:
            losses = row.losses(optimizer.ask())
            told.append(losses)
            optimizer.tell(losses)
        found = np.vstack(told)[: row.evaluations]
        return float(found.min()) if row.objectives == 1 else uncovered(found)

    for seed in range(2):
        assert quality(row.make(seed)) < quality(row.make(seed, name="random"))


def test_its_favourite_is_good(row: Row) -> None:
    optimizer = row.make(0)
    asked = run(optimizer, row, 30 if optimizer.favourite() is not None else 1)
    favourite = optimizer.favourite()
    if favourite is None:
        assert row.spec.name not in ("cma_es", "catcma") or row.objectives > 1
    else:
        assert favourite.shape == (len(row.coordinates),)
        assert row.losses(favourite[None]).item() <= np.median(row.losses(asked[-1]))


def test_flat_losses_do_not_stop_it(row: Row) -> None:
    optimizer = row.make(0)
    for _ in range(20):
        optimizer.tell(np.ones((len(optimizer.ask()), row.objectives)))
        assert optimizer.stop_reason() is None


def test_refuses_a_wrong_order_of_calls(row: Row) -> None:
    optimizer = row.make(0)
    with pytest.raises(RuntimeError, match="ask for a generation first"):
        optimizer.tell(np.ones((4, row.objectives)))
    optimizer.ask()
    with pytest.raises(RuntimeError, match="tell the losses"):
        optimizer.ask()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_losses_that_are_not_finite_and_can_be_told_others(row: Row, bad: float) -> None:
    optimizer, other = row.make(0), row.make(0)
    losses = row.losses(optimizer.ask())
    with pytest.raises(ValueError, match="finite"):
        optimizer.tell(np.where(np.arange(len(losses))[:, None] == 0, bad, losses))
    optimizer.tell(losses)
    other.tell(row.losses(other.ask()))
    assert (optimizer.ask() == other.ask()).all()


def test_refuses_losses_of_another_shape(row: Row) -> None:
    optimizer = row.make(0)
    count = len(optimizer.ask())
    for shape in ((count + 1, row.objectives), (count, row.objectives + 1), (count,)):
        with pytest.raises(ValueError, match="shape"):
            optimizer.tell(np.ones(shape))


def test_starts_count(row: Row) -> None:
    u = np.full(len(row.coordinates), 0.85)
    optimizer = row.make(0, u, 1 - u)
    asked = optimizer.ask()
    if optimizer.required:  # several centres, of which all but one are asked for themselves
        assert any(asked[i] == pytest.approx(row.meant(v)) for i in optimizer.required for v in (0.85, 0.15))
    elif row.spec.name in ("cma_es", "catcma"):
        assert np.abs(asked - 0.85).mean() < np.abs(asked - 0.15).mean()
    else:
        assert asked[0] == pytest.approx(row.meant(0.85))
        assert asked[1] == pytest.approx(row.meant(0.15))
        assert len(np.unique(asked[2:, 0])) > 2


def test_more_starts_than_half_a_generation_come_later(row: Row) -> None:
    if row.spec.name in ("cma_es", "catcma"):
        pytest.skip("it begins around the first start alone")
    generator = np.random.default_rng(0)
    continuous = np.array([c.levels is None for c in row.coordinates])
    starts = generator.random((row.make(0).population + 1, len(row.coordinates)))
    asked = np.vstack(run(row.make(0, *starts), row, 3))
    for start in starts:
        assert (asked[:, continuous] == start[continuous]).all(axis=1).any()


def test_injected_points_come_first_and_are_learned_from(row: Row) -> None:
    optimizer, plain = row.make(0), row.make(0)
    run(optimizer, row, 2)
    run(plain, row, 2)
    corner = np.zeros(len(row.coordinates))
    optimizer.inject([corner, corner + 0.8])
    asked = optimizer.ask()
    assert asked[0] == pytest.approx(row.meant(0.0))
    assert asked[1] == pytest.approx(row.meant(0.8))
    optimizer.tell(row.losses(asked))
    plain.tell(row.losses(plain.ask()))
    if row.beats:
        assert optimizer.ask().tobytes() != plain.ask().tobytes()


def test_injecting_more_than_a_generation_fills_the_next_ones(row: Row) -> None:
    optimizer = row.make(0)
    count = 2 * optimizer.population
    points = np.random.default_rng(1).random((count, len(row.coordinates)))
    optimizer.inject(points)
    continuous = np.array([c.levels is None for c in row.coordinates])
    asked = np.vstack(run(optimizer, row, 5))
    for point in points:
        assert (asked[:, continuous] == point[continuous]).all(axis=1).any()


def test_told_what_was_drawn_long_before_it_learns_and_repeats_itself(row: Row) -> None:
    """As in an asynchronous search: always more drawn than told."""
    if row.objectives > 1 or row.spec.name in ("nsga2", "nsga3"):
        return
    ends = []
    for _ in range(2):
        optimizer = row.make(3)
        waiting = list(optimizer.draw(20))
        told = []
        for _ in range(30):
            group = np.array([waiting.pop(0) for _ in range(optimizer.population)])
            told.append(row.losses(group))
            optimizer.absorb(group, told[-1])
            while len(waiting) < max(20, optimizer.population):
                waiting += list(optimizer.draw(3))
        ends.append(told)
    assert same(*ends)
    if row.beats:
        assert np.median(ends[0][-1]) < np.median(ends[0][0])


@pytest.mark.parametrize("points", [[0.5], [[0.5]], [[1.5] * 99]])
def test_refuses_to_inject_points_of_another_space(points: object) -> None:
    with pytest.raises(ValueError, match="points have shape"):
        ROWS["nsga2"].make(0).inject(points)  # type: ignore[arg-type]


def test_an_oversized_generation_is_told_in_part_and_in_any_order(row: Row) -> None:
    def screened(seed: int) -> list[np.ndarray]:
        optimizer, generator, asked = row.make(seed), np.random.default_rng(5), []
        for _ in range(3):
            population = optimizer.population
            genomes = optimizer.ask(3 * population)
            assert genomes.shape == (3 * population, len(row.coordinates))
            others = np.setdiff1d(np.arange(3 * population), optimizer.required)
            chosen = [
                *generator.permutation(others)[: population - len(optimizer.required)],
                *optimizer.required,
            ]
            optimizer.tell(row.losses(genomes[chosen]), chosen)
            asked.append(genomes)
        return asked

    assert same(screened(0), screened(0))
    assert not same(screened(0)[:1], screened(1)[:1])


def test_told_only_a_part_it_still_learns(row: Row) -> None:
    if not row.beats or row.objectives > 1:
        pytest.skip("not a learner with one objective")
    optimizer, medians = row.make(0), []
    for _ in range(8):
        population = optimizer.population
        losses = row.losses(optimizer.ask(2 * population))
        medians.append(float(np.median(losses)))
        chosen = np.argsort(losses[:, 0], kind="stable")[:population]
        optimizer.tell(losses[chosen], chosen.tolist())
    assert medians[-1] < medians[0]


def test_refuses_a_choice_that_is_none(row: Row) -> None:
    optimizer = row.make(0)
    population = optimizer.population
    with pytest.raises(ValueError, match="at least"):
        optimizer.ask(population - 1)
    genomes = optimizer.ask(2 * population)
    losses = row.losses(genomes[:population])
    with pytest.raises(ValueError, match="name the"):
        optimizer.tell(row.losses(genomes))
    for chosen in ([0] * population, list(range(population - 1))):
        with pytest.raises(ValueError, match="different rows"):
            optimizer.tell(losses[: len(chosen)], chosen)
    with pytest.raises(ValueError, match="chosen rows are"):
        optimizer.tell(losses, range(2 * population - len(losses) + 1, 2 * population + 1))
    optimizer.tell(losses, range(population))


def test_the_centres_of_catcma_on_two_objectives_can_not_be_left_out() -> None:
    optimizer = ROWS["catcma-two"].make(0)
    losses = two(optimizer.ask(2 * optimizer.population))
    assert optimizer.required
    chosen = np.setdiff1d(np.arange(len(losses)), optimizer.required)[: len(losses) // 2]
    with pytest.raises(ValueError, match="can't be left out"):
        optimizer.tell(losses[chosen], chosen.tolist())


IN_A_NEW_PROCESS = """
import hashlib, sys
sys.modules["matplotlib"] = None  # no optimizer needs it, and its absence is no warning
import evomerge.search.optimizers
heavy = {"torch", "cma", "cmaes", "pymoo", "optuna"} & set(sys.modules)
assert not heavy, heavy
from tests.search.optimizers.test_optimizers import digests
print(*digests(), sep="\\n")
assert "torch" not in sys.modules
"""


def digests() -> list[str]:
    """The bits each optimizer of the table asks for in 4 generations."""
    import hashlib

    return [
        f"{name} {hashlib.sha256(b''.join(u.tobytes() for u in run(row.make(2), row, 4))).hexdigest()}"
        for name, row in ROWS.items()
    ]


def test_a_new_process_without_matplotlib_asks_for_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_NEW_PROCESS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == digests()


def test_restarts_grow_the_population_and_find_what_one_run_misses() -> None:
    def trap(genomes: np.ndarray) -> np.ndarray:
        """A wide basin around 0.3 and a deeper one around 0.8."""
        wide = ((genomes - 0.3) ** 2).sum(axis=1)
        deep = ((genomes - 0.8) ** 2).sum(axis=1) - 0.2
        return np.minimum(wide, deep)[:, None]

    found = {}
    for restarts in ("none", "ipop", "bipop"):
        optimizer = create(
            OptimizerSpec(name="cma_es", restarts=restarts),  # type: ignore[arg-type]
            coordinates=CONTINUOUS[:2],
            starts=[np.full(2, 0.3)],
            seed=np.random.SeedSequence(0),
        )
        best, populations, asked = np.inf, [], 0
        while asked < 6000 and optimizer.stop_reason() is None:
            losses = trap(optimizer.ask())
            populations.append(len(losses))
            asked += len(losses)
            best = min(best, float(losses.min()))
            optimizer.tell(losses)
        favourite = optimizer.favourite()
        assert favourite is not None
        found[restarts] = best, sorted(set(populations)), trap(favourite[None]).item(), asked
    assert found["none"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["none"][1] == [6]
    assert found["none"][3] < 3000
    for restarts in ("ipop", "bipop"):
        assert found[restarts][0] == pytest.approx(-0.2, abs=1e-6)
        assert found[restarts][2] == pytest.approx(-0.2, abs=1e-3)
    assert found["ipop"][1][:3] == [6, 12, 24]


def test_a_restart_begins_at_the_next_start() -> None:
    optimizer = create(
        OptimizerSpec(name="cma_es", sigma=0.05),
        coordinates=CONTINUOUS[:2],
        starts=[np.full(2, 0.3), np.full(2, 0.7)],
        seed=np.random.SeedSequence(0),
    )
    first = optimizer.population
    while optimizer.population == first:
        genomes = optimizer.ask()
        optimizer.tell(((genomes - 0.3) ** 2).sum(axis=1, keepdims=True))
    assert np.abs(optimizer.ask() - 0.7).max() < 0.3


@pytest.mark.parametrize(
    ("coordinates", "objectives", "name", "why"),
    [
        (CONTINUOUS, 1, "cma_es", "6 coordinates, all continuous"),
        ((Coordinate(),) * 201, 1, "cma_es", "sep-CMA"),
        (MIXED, 1, "catcma", "6 of 9 coordinates are discrete"),
        (CONTINUOUS, 2, "nsga2", "2 objectives"),
        (MIXED, 3, "nsga2", "3 objectives"),
        (MIXED, 4, "nsga3", "4 objectives"),
    ],
)
def test_auto_picks_and_says_why(
    coordinates: Sequence[Coordinate], objectives: int, name: str, why: str
) -> None:
    spec, sentence = choose(OptimizerSpec(sigma=0.3), coordinates, objectives)
    assert (spec.name, spec.sigma) == (name, 0.3)
    assert sentence.startswith(f"{name}: ")
    assert why in sentence
    optimizer = create(
        OptimizerSpec(),
        coordinates=coordinates,
        objectives=objectives,
        starts=[np.full(len(coordinates), 0.5)],
        seed=np.random.SeedSequence(0),
    )
    optimizer.tell(np.ones((len(optimizer.ask()), objectives)))


def test_a_named_optimizer_stays() -> None:
    assert choose(OptimizerSpec(name="tpe"), MIXED)[0].name == "tpe"


@pytest.mark.parametrize(
    ("name", "coordinates", "objectives", "message"),
    [
        ("cma_es", MIXED, 1, "use catcma"),
        ("cma_es", CONTINUOUS, 2, "nsga2"),
        ("catcma", MIXED, 3, "nsga2 or nsga3"),
        ("nsga3", CONTINUOUS, 1, "only one objective"),
        ("random", (Coordinate(levels=1),), 1, "nothing to search"),
    ],
)
def test_refuses_what_it_can_not_search(
    name: str, coordinates: Sequence[Coordinate], objectives: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create(
            OptimizerSpec(name=name),  # type: ignore[arg-type]
            coordinates=coordinates,
            objectives=objectives,
            starts=[np.full(len(coordinates), 0.5)],
            seed=np.random.SeedSequence(0),
        )


def test_catcma_survives_a_screen_that_keeps_one_side() -> None:
    """Such a screen drove its step size beyond what floats hold, by generation 299 here."""
    coordinates = [Coordinate(levels=2, ordered=False)] * 6 + [Coordinate(levels=5)] * 8
    optimizer = create(
        OptimizerSpec(name="catcma"),
        coordinates=coordinates,
        starts=[np.full(len(coordinates), 0.5)],
        seed=np.random.SeedSequence(0),
    )
    for generation in range(320):
        half = optimizer.population // 2
        optimizer.inject(np.random.default_rng(generation).random((half, len(coordinates))))
        rows = optimizer.ask(4 * optimizer.population)
        rest = np.argsort(rows[half:, -1], kind="stable")[::-1][: optimizer.population - half] + half
        chosen = (*range(half), *rest.tolist())
        optimizer.tell(-rows[list(chosen), -1:], chosen)
    assert np.isfinite(rows).all()


def test_catcma_takes_points_from_elsewhere_where_an_axis_has_shrunk_to_nothing() -> None:
    cube = Cube([Coordinate(), Coordinate(), Coordinate(levels=5)])
    algorithm = CatCma(cube, start=np.full(3, 0.5), seed=np.random.SeedSequence(0))
    algorithm._es._A[0] = 0.0
    algorithm.sample(8, np.array([[0.9, 0.2, 0.3]]))
    given = algorithm._sampled[0]._v_raw
    assert np.isfinite(given).all()
    assert given[0] == algorithm._es._mean[0]
