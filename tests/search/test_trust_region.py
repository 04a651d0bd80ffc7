"""The trust region on a model whose best genome is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.search.genes import Coordinate, Genome
from evomerge.search.surrogate import Array, Model, Outputs, Surrogate
from evomerge.search.trust_region import GROW, LARGEST, SHRINK, SMALLEST, START, TrustRegion

CONTINUOUS = (Coordinate(),) * 3
MIXED = (Coordinate(), Coordinate(levels=4), Coordinate(), Coordinate(levels=3, ordered=False))
BEST = 0.7
OUTPUTS = Outputs(task=np.zeros(10, dtype=np.intp), margins=np.ones(10, dtype=bool))


def margins(genome: Genome) -> Array:
    """Ten items, right or wrong by how close the genome is to BEST everywhere."""
    return np.linspace(0.2, 2, 10) - 4 * float(((genome - BEST) ** 2).sum())


def wrong(values: Array) -> tuple[float, Array]:
    return 1 - float(values[0]), -np.ones(1)


def model(
    coordinates: Sequence[Coordinate] = CONTINUOUS, around: Genome | None = None, count: int = 40
) -> Model:
    surrogate = Surrogate(coordinates, [OUTPUTS], tasks=1)
    for genome in np.random.default_rng(0).random((count, len(coordinates))):
        surrogate.learn(genome, 0, margins(genome))
    found = surrogate.fit(np.full(len(coordinates), 0.5) if around is None else around, [0])
    assert found is not None
    return found


def region(coordinates: Sequence[Coordinate] = CONTINUOUS, seed: int = 0) -> TrustRegion:
    return TrustRegion(coordinates, seed=np.random.SeedSequence(seed))


def after(*steps: tuple[float, float, float]) -> TrustRegion:
    found = region()
    for before, promised, reached in steps:
        found.learn(before=before, promised=promised, reached=reached)
    return found


KEPT_IT, HALF, HARDLY, NOTHING, WORSE, FAILED = (
    (0.0, -1.0, -1.0),
    (0.0, -1.0, -0.5),
    (0.0, -1.0, -0.1),
    (0.0, -1.0, 0.0),
    (0.0, -1.0, 0.3),
    (0.0, -1.0, float("inf")),
)


@pytest.mark.parametrize(
    ("step", "radius"),
    [
        (KEPT_IT, GROW * START),
        (HALF, GROW * START),
        (HARDLY, START),
        (NOTHING, SHRINK * START),
        (WORSE, SHRINK * START),
        (FAILED, SHRINK * START),
    ],
)
def test_grows_on_what_was_promised_and_shrinks_on_nothing(
    step: tuple[float, float, float], radius: float
) -> None:
    assert after(step).radius == pytest.approx(radius)


def test_has_a_largest_and_a_smallest_size() -> None:
    assert after(*[KEPT_IT] * 20).radius == LARGEST
    collapsed = after(*[NOTHING] * 20)
    assert collapsed.radius == SMALLEST
    assert collapsed.collapsed
    collapsed.reset()
    assert not collapsed.collapsed
    assert SMALLEST < collapsed.radius < START


def test_an_unexpected_improvement_is_one() -> None:
    """Where the model promised nothing, whatever was gained is more than that."""
    assert after((0.0, 0.0, -0.1)).radius > START


@pytest.mark.parametrize("centre", [[0.5, 0.5, 0.5], [0.0, 0.95, 0.6], [1.0, 0.0, 1.0]])
def test_proposals_lie_in_the_box_and_the_first_is_the_best_there(centre: list[float]) -> None:
    around = np.array(centre)
    fitted, box = model(around=around), region()
    proposals, promised = box.propose(fitted, wrong, around, 5)
    assert proposals.shape == (5, 3)
    assert ((proposals >= 0) & (proposals <= 1)).all()
    assert (np.abs(proposals - around) <= START + 1e-12).all()
    losses = [1 - float(fitted.predict(genome).values[0]) for genome in proposals]
    assert promised == pytest.approx(losses[0])
    true = [-margins(genome).mean() for genome in (around, *proposals)]
    assert max(true[1:]) < true[0]
    best = np.clip(np.full(3, BEST), around - START, around + START)  # of the box, in truth
    assert proposals[0] == pytest.approx(best, abs=0.06)


def test_a_batch_looks_at_different_places() -> None:
    """It is all the same genome where the model knows everything, but not where it doesn't."""
    proposals, _ = region().propose(model(count=10), wrong, np.full(3, 0.65), 4)
    apart = [np.abs(a - b).max() for i, a in enumerate(proposals) for b in proposals[:i]]
    assert min(apart) > 1e-3


def test_discrete_coordinates_stay_at_the_centre() -> None:
    centre = np.array([0.5, 0.625, 0.5, 0.5])
    box = region(MIXED)
    assert box.moves
    proposals, _ = box.propose(model(MIXED), wrong, centre, 3)
    assert (proposals[:, [1, 3]] == centre[[1, 3]]).all()
    assert (proposals[:, [0, 2]] != centre[[0, 2]]).all()
    assert not region([Coordinate(levels=3)] * 4).moves


def test_the_same_seed_proposes_the_same_bits() -> None:
    fitted, centre = model(), np.full(3, 0.5)
    first, again = (region().propose(fitted, wrong, centre, 4)[0] for _ in range(2))
    assert first.tobytes() == again.tobytes()
    used = region()
    used.propose(fitted, wrong, centre, 4)
    assert used.propose(fitted, wrong, centre, 4)[0].tobytes() != first.tobytes()
