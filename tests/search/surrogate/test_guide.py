"""The guide: when the surrogate is used or ignored, what it proposes and screens, when items are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, TaskScores, joined
from evomerge.evaluation.suite import Suite
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.optimizers import Optimizer, OptimizerSpec, create
from evomerge.search.racing import Views
from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.guide import (
    CHECKED_EVERY,
    FEW,
    REFRESHED,
    SCATTERED,
    WINDOW,
    Asked,
    Guide,
    MeanLoss,
    SurrogateSpec,
)
from evomerge.search.surrogate.improvement import FrontLoss
from evomerge.search.surrogate.observed import Observed
from evomerge.search.surrogate.trust_region import SHRINK, SMALLEST, START

SPLITS = {"search": "search", "select": "select", "test": "test"}
SUITE = Suite.model_validate(
    {
        "name": "s",
        "tasks": [
            {"task": "a", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "b", "metric": "acc", "specialist": "p", "splits": SPLITS, "weight": 2},
            {"task": "text", "metric": "loglikelihood", "role": "retention", "splits": SPLITS},
            {"task": "free", "metric": "coherence", "role": "coherence", "splits": SPLITS},
        ],
    }
)
BLOCKS = 4
CONTINUOUS = (Coordinate(),) * 4
DISCRETE = (Coordinate(levels=4, ordered=False),) * 4
MIXED = (Coordinate(), Coordinate(), Coordinate(levels=5), Coordinate(levels=3, ordered=False))
BEST = np.array([0.7, 0.4, 0.55, 0.6])
_hard = np.random.default_rng(0).normal(0, 0.8, (2, BLOCKS, 8))


def part(level: float, drift: float, block: int) -> Scores:
    """Scores on a block: `level` says how far right answers are ahead, `drift` how much is lost."""
    margins = [level * (1 + index) / 2 - _hard[index, block] for index in range(2)]
    skills = [
        TaskScores(task=task, metric=(m > 0).astype(float), margin=m)
        for task, m in zip("ab", margins, strict=True)
    ]
    text = TaskScores(task="text", metric=np.linspace(-2.2, -1.8, 6) - drift)
    free = TaskScores(task="free", metric=np.full(3, 0.9 - drift))
    return Scores(split="search", tasks=(*skills, text, free), blocks=(block,))


def scores(genome: Genome, blocks: Sequence[int]) -> Scores:
    """Four skills' worth of distance from BEST; what is far from the middle loses a little of the rest."""
    away = float(((genome - BEST) ** 2).sum())
    drift = 0.2 * float(np.abs(genome - 0.5).max())
    return joined([part(2.0 - 8 * away, drift, block) for block in blocks])


def whole(level: float) -> Scores:
    return joined([part(level, 0.0, block) for block in range(BLOCKS)])


NORMALISER = Normaliser(SUITE, base=whole(-1.0), parents={"p": whole(3.0)})
BASE = [part(-1.0, 0.0, block) for block in range(BLOCKS)]


def views(**spec: object) -> Views:
    return Views(Objective(ObjectiveSpec.model_validate(spec), NORMALISER), BASE)


def guide(coordinates: Sequence[Coordinate] = CONTINUOUS, **spec: object) -> Guide:
    """A guide that knows ten genomes on all blocks, as a run knows its baselines."""
    on = views()
    found = Guide(
        SurrogateSpec.model_validate(spec),
        coordinates=coordinates,
        base=BASE,
        order=(2, 0, 3, 1),
        loss_on=lambda blocks: MeanLoss(on(blocks).normaliser, ObjectiveSpec(), on(blocks).utility),
        seed=np.random.SeedSequence(5),
    )
    for genome in np.random.default_rng(1).random((10, len(coordinates))):
        found.learn(genome, scores(genome, range(BLOCKS)))
    return found


def optimizer(
    coordinates: Sequence[Coordinate] = CONTINUOUS, name: str = "auto", population: int | None = 8
) -> Optimizer:
    return create(
        OptimizerSpec.model_validate({"name": name, "population": population}),
        coordinates=coordinates,
        starts=[np.full(len(coordinates), 0.3)],
        seed=np.random.SeedSequence(6),
    )


Judge = Callable[[Genome, Sequence[int]], Scores]


def step(
    one: Guide, other: Optimizer, *, of: Judge = scores, sign: float = 1.0
) -> tuple[Asked, list[Genome]]:
    """One generation: ask, score, tell both. sign: -1 tells the guide that what is good was bad."""
    asked = one.ask(other)
    results = [of(genome, sorted(one.blocks)) for genome in asked.genomes]
    losses = views()(one.blocks).losses(results)
    other.tell(losses, asked.chosen)
    return asked, one.tell(asked.genomes, results, sign * losses[:, 0])


# The loss of means -------------------------------------------------------------------------------------

SPECS = {
    "skills alone": {"retention": 0, "coherence": 0},
    "prices": {"retention": 0.4, "coherence": 0.3},
    "limits of skills": {"constraints": {"tasks": {"a": 0.9, "b": 0.1}}},
    "limits of the rest": {"constraints": {"retention": 0.97, "coherence": 0.99}},
    "balanced": {"kind": "balanced"},
    "floors": {},
}
NOTHING_LOST, LOST = (0.4, 0.5, -1.9, 0.95), (0.4, 0.5, -2.1, 0.8)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("values", [NOTHING_LOST, LOST])
def test_the_slope_of_the_loss_is_its_finite_difference(spec: str, values: tuple[float, ...]) -> None:
    objective = views(**SPECS[spec])(range(BLOCKS))
    loss = MeanLoss(NORMALISER, ObjectiveSpec.model_validate(SPECS[spec]), objective.utility)
    if spec == "floors":
        loss = loss.above(np.array([0.9, 0.4, -2.0, 0.9]), np.array([0.05, 0.05]))
    assert loss.tasks == ("a", "b", "text", "free")
    here, step_ = np.array(values), 1e-6
    found, slope = loss(here)
    for axis, unit in enumerate(np.eye(4)):
        expected = (loss(here + step_ * unit)[0] - loss(here - step_ * unit)[0]) / (2 * step_)
        assert slope[axis] == pytest.approx(expected, abs=1e-6)
    assert (slope[2:] == 0).all() == (values is NOTHING_LOST or spec == "skills alone")
    if "limits" in spec and values is LOST:
        assert found > MeanLoss(NORMALISER, ObjectiveSpec(), views()(range(BLOCKS)).utility)(here)[0] + 0.01


@pytest.mark.parametrize("blocks", [(0, 1, 2, 3), (2, 0)])
def test_of_measured_means_it_is_the_objective(blocks: tuple[int, ...]) -> None:
    spec = {"smooth": 0.0, "retention": 0.4, "coherence": 0.3}
    objective = views(**spec)(blocks)
    found = scores(np.array([0.9, 0.4, 0.3, 0.6]), sorted(blocks))
    loss = MeanLoss(objective.normaliser, ObjectiveSpec.model_validate(spec), objective.utility)
    means = np.array([found[task].mean for task in loss.tasks])
    assert loss(means)[0] == pytest.approx(objective.loss(found))
    assert objective.loss(found) != pytest.approx(-objective.mean(found))  # something is lost, too


def test_each_task_can_only_lose() -> None:
    """A retention and a coherence task above the base's do not make up for another of each below it."""
    rest = [("text", "retention"), ("prose", "retention"), ("free", "coherence"), ("story", "coherence")]
    tasks = [{"task": name, "role": role, "splits": SPLITS} for name, role in rest]
    suite = Suite.model_validate({"name": "s", "tasks": [SUITE.tasks[0].model_dump(), *tasks]})

    def of(skill: float, *values: float) -> Scores:
        names = ("a", *(name for name, _ in rest))
        return Scores(
            split="search",
            tasks=tuple(
                TaskScores(task=name, metric=np.full(4, value))
                for name, value in zip(names, (skill, *values), strict=True)
            ),
        )

    normaliser = Normaliser(
        suite, base=of(0.0, -2.0, -3.0, 0.5, 0.5), parents={"p": of(1.0, -2.0, -3.0, 0.5, 0.5)}
    )
    found = of(0.6, -1.0, -3.5, 0.9, 0.3)
    one = ObjectiveSpec(smooth=0.0)
    objective = Objective(one, normaliser)
    loss = MeanLoss(normaliser, one, objective.utility)
    means = np.array([found[task].mean for task in loss.tasks])
    assert loss(means)[0] == pytest.approx(objective.loss(found))
    assert loss(means)[0] == pytest.approx(-0.6 + 0.2 * (1 - np.exp(-0.5)) / 2 + 0.2 * 0.2)
    assert (loss(means)[1] == 0).tolist() == [False, True, False, True, False]
    several = ObjectiveSpec(several=("mean", "retention", "coherence"), smooth=0.0)
    front = FrontLoss(normaliser, several)
    assert front(means) == pytest.approx(Objective(several, normaliser).point(found))
    assert (front.slopes(means[None])[1][0] == 0).sum(axis=1).tolist() == [4, 4, 4]


def test_what_is_observed_is_what_was_scored_block_by_block() -> None:
    observed = Observed(("a", "b", "text", "free"), BASE)
    parts = {block: part(0.5, 0.1, block) for block in (3, 1)}
    columns = observed.columns(joined(list(parts.values())))
    assert set(columns) == {1, 3}
    for block, own in parts.items():
        expected = [own["a"].margin, own["b"].margin, own["text"].metric, own["free"].metric]
        assert (columns[block] == np.concatenate(expected)).all()
        assert observed.outputs[block].margins.tolist() == [True] * 16 + [False] * 9
    means = observed.means(columns, (1, 3))
    assert means[2:] == pytest.approx([-2.1, 0.8])
    whole_ = joined(list(parts.values()))
    assert means[:2] == pytest.approx([whole_["a"].mean, whole_["b"].mean], abs=0.15)


# Asking and telling ------------------------------------------------------------------------------------


def test_the_optimizer_begins_alone_and_then_half_is_proposed() -> None:
    one, other = guide(), optimizer()
    first, _ = step(one, other)
    assert first.chosen is None
    assert first.genomes.tobytes() == optimizer().ask().tobytes()
    asked, told = first, 0
    while asked.chosen is None:
        told += len(asked.genomes)
        asked, _ = step(one, other)
    assert SCATTERED <= told < SCATTERED + 8
    assert asked.genomes.shape == (8, 4)
    assert asked.chosen[:4] == (0, 1, 2, 3)
    assert len(set(asked.chosen)) == 8
    assert max(asked.chosen) < 4 * 8
    assert one.state().proposed == 4


@pytest.mark.parametrize(
    ("name", "share", "population"),
    [
        *((name, 0.5, None) for name in ("cma_es", "catcma", "nsga2", "tpe", "sobol")),
        *(("cma_es", share, population) for share in (0.0, 0.5, 1.0) for population in (4, 5)),
    ],
)
def test_serves_every_optimizer_of_one_objective(name: str, share: float, population: int | None) -> None:
    one, other = guide(share=share), optimizer(name=name, population=population)
    listened = 0
    for _ in range(5):
        size = other.population
        asked, _ = step(one, other)
        assert asked.genomes.shape == (size, 4)
        assert one.state().proposed == (0 if asked.chosen is None else round(share * size))
        listened += asked.chosen is not None
    assert listened


def test_screening_takes_what_it_believes_to_be_best() -> None:
    one, other, plain = guide(share=0.0, oversample=8), optimizer(name="random"), optimizer(name="random")
    screened, drawn = [], []
    for _ in range(6):
        asked, _ = step(one, other)
        if asked.chosen is not None:
            screened += [float(((u - BEST) ** 2).sum()) for u in asked.genomes]
        drawn += [float(((u - BEST) ** 2).sum()) for u in plain.ask()]
        plain.tell(np.zeros((8, 1)))
    assert np.mean(screened) < 0.5 * np.mean(drawn)


@pytest.mark.parametrize("coordinates", [DISCRETE, MIXED])
def test_proposals_in_discrete_coordinates_are_new_and_come_to_all_items(
    coordinates: tuple[Coordinate, ...],
) -> None:
    one, other = guide(coordinates), optimizer(coordinates)
    seen = []
    for _ in range(24):
        known = {key for key, (u, _) in one._known.items() if np.isfinite(one._loss(u, one.blocks))}
        asked, again = step(one, other)
        for genome in again:
            one.learn(genome, scores(genome, sorted(one.blocks)))
        mine = [genome.tobytes() for genome in asked.genomes[: one.state().proposed]]
        seen.append((len(mine), len(one.blocks)))
        assert not known & set(mine)
    assert max(count for count, _ in seen) == 4
    assert [blocks for _, blocks in seen] == sorted(blocks for _, blocks in seen)
    assert seen[-1][1] == BLOCKS


def test_it_is_marked_by_its_predictions_and_not_listened_to_while_they_are_wrong() -> None:
    one, other = guide(blocks=BLOCKS), optimizer(name="random")
    generations = 0
    while one.correlation is None:
        assert one.trusted
        step(one, other, sign=-1)
        generations += 1
    assert generations == -(-SCATTERED // 8) + FEW // 4  # half of a generation is the optimizer's own
    assert one.correlation is not None
    assert one.correlation < -0.5
    assert not one.trusted
    asked, _ = step(one, other)
    assert asked.chosen is None  # the optimizer works alone
    assert one.state().proposed == 0
    generations = 0
    while not one.trusted:
        step(one, other)
        generations += 1
    assert generations <= WINDOW // 8
    assert one.correlation is not None
    assert step(one, other)[0].chosen is not None


def test_failures_are_no_mark_and_teach_nothing() -> None:
    one, other = guide(), optimizer()
    for _ in range(4):
        step(one, other)
    known, pairs = len(one._known), len(one._pairs)
    asked = one.ask(other)
    other.tell(np.ones((8, 1)), asked.chosen)
    assert one.tell(asked.genomes, [None] * 8, np.ones(8)) == []
    assert (len(one._known), len(one._pairs)) == (known, pairs)
    assert one.state().radius < START / SHRINK**3  # nothing proposed was any good


def test_a_collapsed_region_leads_to_more_items_and_to_the_best_on_them() -> None:
    def flat(genome: Genome, blocks: Sequence[int]) -> Scores:
        """Nothing new is better than what is known."""
        return joined([part(-3.0 - 0.1 * float(genome.sum()), 0.0, block) for block in blocks])

    one, other = guide(), optimizer()
    again: list[Genome] = []
    radii = []
    while not again:
        known = sorted(one._known, key=lambda key: one._loss(one._known[key][0], one.blocks))
        before = one.blocks
        _, again = step(one, other, of=flat)
        radii.append(one.state().radius)
        assert len(radii) < 20
    assert before == (2, 0)
    assert one.blocks == (2, 0, 3, 1)
    assert one.correlation is None  # a mark on other items
    assert radii[-1] == START / 2
    assert min(radii) <= SMALLEST / SHRINK
    assert again[0].tobytes() == known[0]
    assert len(again) == REFRESHED
    order = [one._observed.means(one._known[g.tobytes()][1], before) for g in again]
    losses = [
        MeanLoss(views()(before).normaliser, ObjectiveSpec(), views()(before).utility)(means)[0]
        for means in order
    ]
    assert losses == sorted(losses)
    rescored = [g for g in again if not np.isfinite(one._loss(g, one.blocks))]
    assert rescored  # those of the generations; the ten known before have met all blocks
    for genome in rescored:
        one.learn(genome, flat(genome, (1, 3)))
        assert np.isfinite(one._loss(genome, one.blocks))
    for _ in range(12):
        _, again = step(one, other, of=flat)
        assert again == []  # there are no more items


def test_two_guides_told_the_same_ask_for_the_same_bits() -> None:
    asked: list[list[bytes]] = []
    states = []
    for _ in range(2):
        one, other = guide(MIXED), optimizer(MIXED)
        asked.append([])
        for _ in range(8):
            found, again = step(one, other)
            asked[-1].append(found.genomes.tobytes())
            for genome in again:
                one.learn(genome, scores(genome, sorted(one.blocks)))
        states.append(one.state())
    assert asked[0] == asked[1]
    assert states[0] == states[1]
    assert states[0].proposed


def test_estimates_rank_genomes_as_the_truth_does() -> None:
    one, other = guide(), optimizer()
    assert Guide.estimates(one, [BEST, np.zeros(4)]) is not None
    for _ in range(4):
        step(one, other)
    found = one.estimates([BEST, np.full(4, 0.35), np.zeros(4)])
    assert found is not None
    assert found[0] < found[1] < found[2]


# Items that the search does not use ---------------------------------------------------------------------


def adapted(genome: Genome, blocks: Sequence[int]) -> Scores:
    """On blocks 2 and 0, with which the search begins, whatever is new is better; on the others it is not."""
    whole_ = [scores(genome, [block]) if block in (1, 3) else part(2.5, 0.0, block) for block in blocks]
    return joined(whole_)


def nowhere_better(genome: Genome, blocks: Sequence[int]) -> Scores:
    """As `adapted`, and on the others it is worse by more."""
    return joined([part(2.5 if block in (2, 0) else -3.0, 0.0, block) for block in blocks])


@pytest.mark.parametrize("honest", [True, False])
def test_a_best_genome_that_is_better_only_where_it_was_chosen_leads_to_more_items(honest: bool) -> None:
    one, other = guide(), optimizer()
    one.begin()
    judge = scores if honest else adapted
    widened: list[Genome] = []
    for _ in range(CHECKED_EVERY):
        step(one, other, of=judge)
    unseen = one.unseen()
    assert unseen is not None
    genome, blocks = unseen
    assert blocks == (3,)  # the next in the order (2, 0, 3, 1)
    one.learn(genome, judge(genome, blocks))
    widened = one.doubted(genome)
    assert bool(widened) == (not honest)
    assert one.blocks == ((2, 0) if honest else (2, 0, 3, 1))
    assert one.unseen() is None or honest


def test_it_looks_every_few_generations_and_only_with_something_to_compare_with() -> None:
    one, other = guide(), optimizer()
    looks = []
    for _ in range(2 * CHECKED_EVERY):
        step(one, other)
        looks.append(one.unseen() is not None)
    assert not any(looks)  # nothing was known before it began
    one.begin()
    for number in range(2 * CHECKED_EVERY):
        step(one, other)
        assert (one.unseen() is not None) == ((number + 1) % CHECKED_EVERY == 0)


@pytest.mark.parametrize("honest", [True, False])
def test_a_search_has_settled_where_nothing_is_better_on_all_items(honest: bool) -> None:
    one, other = guide(), optimizer()
    one.begin()
    one.frugal = True
    judge = scores if honest else nowhere_better
    for _ in range(CHECKED_EVERY):
        step(one, other, of=judge)
    unseen = one.unseen()
    assert unseen is not None
    genome, blocks = unseen
    assert blocks == (3, 1)
    one.learn(genome, judge(genome, blocks))
    assert not one.check()
    assert one.check() != honest  # the second time in a row, or the first: it is no better than itself
    assert one.check()


def test_nothing_better_on_all_items_is_a_reason_to_stop() -> None:
    def flat(genome: Genome, blocks: Sequence[int]) -> Scores:
        return joined([part(-3.0 - 0.1 * float(genome.sum()), 0.0, block) for block in blocks])

    one, other = guide(blocks=BLOCKS), optimizer()
    for _ in range(30):
        if one.hopeless:
            break
        step(one, other, of=flat)
    assert one.hopeless
    step(one, other)  # and something better takes it back
    assert not one.hopeless
