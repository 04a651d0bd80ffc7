"""The guide of several objectives: what it picks, when it is ignored, when items are added, who survives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import Optimizer, OptimizerSpec, create
from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.front_guide import POPULATION, FrontGuide, small
from evomerge.search.surrogate.guide import WINDOW, Asked, SurrogateSpec
from evomerge.search.surrogate.improvement import FrontLoss
from evomerge.search.surrogate.trust_region import SMALLEST
from tests.search.surrogate.test_guide import BASE, BEST, BLOCKS, CONTINUOUS, MIXED, scores, views

SPEC = ObjectiveSpec(several=("mean", "retention"))
ORDER = (2, 0, 3, 1)


def guide(coordinates: Sequence[Coordinate] = CONTINUOUS, **spec: object) -> FrontGuide:
    """A guide that knows ten genomes on all blocks, as a run knows its baselines."""
    on = views(several=["mean", "retention"])
    found = FrontGuide(
        SurrogateSpec.model_validate(spec),
        coordinates=coordinates,
        base=BASE,
        order=ORDER,
        loss_on=lambda blocks: FrontLoss(on(blocks).normaliser, SPEC),
        reference=np.array([0.5, 0.5]),
        seed=np.random.SeedSequence(5),
    )
    for genome in np.random.default_rng(1).random((10, len(coordinates))):
        found.learn(genome, scores(genome, range(BLOCKS)))
    return found


def optimizer(coordinates: Sequence[Coordinate] = CONTINUOUS, name: str = "nsga2") -> Optimizer:
    return create(
        small(OptimizerSpec.model_validate({"name": name})),
        coordinates=coordinates,
        objectives=2,
        starts=[np.full(len(coordinates), 0.3)],
        seed=np.random.SeedSequence(6),
    )


def step(one: FrontGuide, other: Optimizer, *, luck: float = 0.0) -> tuple[Asked, list[Genome]]:
    """One generation. luck: of a share of the candidates, which then score like others."""
    asked = one.ask(other)
    swapped = np.random.default_rng(len(asked.genomes)).permutation(len(asked.genomes))
    genomes = asked.genomes[swapped] if luck else asked.genomes
    results = [scores(genome, sorted(one.blocks)) for genome in genomes]
    losses = views(several=["mean", "retention"])(one.blocks).losses(results)
    other.tell(losses, asked.chosen)
    return asked, one.tell(asked.genomes, results, losses[:, 0])


@pytest.mark.parametrize("coordinates", [CONTINUOUS, MIXED])
@pytest.mark.parametrize("name", ["nsga2", "catcma"])
def test_generations_are_full_and_come_nearer(coordinates: Sequence[Coordinate], name: str) -> None:
    one, other = guide(coordinates), optimizer(coordinates, name)
    away = []
    for _ in range(5):
        population = other.population
        asked, _ = step(one, other)
        assert len(asked.genomes) == population
        away.append(float(((asked.genomes - BEST) ** 2).sum(axis=1).min()))
    assert min(away[2:]) < away[0]
    assert one.state().proposed > 0


def test_the_same_scores_lead_to_the_same_genomes() -> None:
    runs = [(guide(), optimizer()) for _ in range(2)]
    for _ in range(4):
        first, second = (step(*run)[0].genomes.tobytes() for run in runs)
        assert first == second


def test_without_a_share_it_screens_only() -> None:
    one, other = guide(share=0.0), optimizer()
    for _ in range(4):
        step(one, other)
    assert one.state().proposed == 0


def test_predictions_that_do_not_hold_leave_it_to_the_optimizer() -> None:
    one, other = guide(), optimizer()
    while one.correlation is None:
        step(one, other, luck=1.0)
    assert len(one._pairs) >= WINDOW
    one._pairs = [(predicted, -predicted) for predicted, _ in one._pairs]
    assert not one.trusted
    assert step(one, other)[0].chosen is None


def test_items_are_added_once_the_region_has_collapsed() -> None:
    one, other = guide(), optimizer()
    again: list[Genome] = []
    for _ in range(3):
        step(one, other)
    one._region.radius = SMALLEST
    for _ in range(40):
        before = one.blocks
        _, again = step(one, other)
        if again:
            break
        one._region.radius = SMALLEST
    assert before == ORDER[:2]
    assert one.blocks == ORDER
    assert {g.tobytes() for g in again} <= set(one._known)


def test_survivors_are_few_and_the_best_of_an_objective_is_among_them() -> None:
    one, other = guide(), optimizer()
    for _ in range(5):
        step(one, other)
    survivors = one.survivors()
    assert 1 < len(survivors) <= 16
    front, losses = one._front()
    kept = {genome.tobytes() for genome in survivors}
    assert kept & {genome.tobytes() for genome in front}
    assert len(losses) == len(front)


def test_a_named_population_stays() -> None:
    assert small(OptimizerSpec(population=20)).population == 20
    assert small(OptimizerSpec()).population == POPULATION
