"""The trust region on a model whose best genome is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.margins import Array, Model, Outputs, Surrogate
from evomerge.search.surrogate.trust_region import GROW, LADDER, LARGEST, SHRINK, SMALLEST, START, TrustRegion

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


RADII = (START, START / 2, START / 4)
Step = tuple[tuple[float, ...], tuple[float, ...]]
"""What the proposals of RADII promised, where the best loss known is 0, and what they reached."""


def after(*steps: Step, of: TrustRegion | None = None) -> TrustRegion:
    found = of or region()
    for promised, reached in steps:
        radii = [found.radius * share for share in LADDER]
        found.learn(before=0.0, promised=promised, reached=reached, radii=radii)
    return found


MUCH, SOME, LITTLE = -1.0, -0.5, -0.1
KEPT_IT: Step = (MUCH,) * 3, (MUCH, SOME, SOME)
NOTHING: Step = (MUCH,) * 3, (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("step", "radius"),
    [
        (KEPT_IT, GROW * START),
        (((MUCH, MUCH, MUCH), (SOME, 0.0, 0.0)), GROW * START),
        (((MUCH, MUCH, MUCH), (LITTLE, 0.0, 0.0)), START),
        (((MUCH, SOME, LITTLE), (0.3, SOME, LITTLE)), GROW * START / 2),
        (((MUCH, SOME, SOME), (0.3, 0.0, LITTLE)), START / 4),
        (((MUCH, SOME, LITTLE), (0.3, float("inf"), LITTLE)), GROW * START / 4),
        (NOTHING, SHRINK * START),
        (((MUCH, MUCH, MUCH), (0.3, 0.1, 0.2)), SHRINK * START),
        (((MUCH, MUCH, MUCH), (float("inf"),) * 3), SHRINK * START),
        (((0.0, 0.0, 0.0), (LITTLE, 0.0, 0.0)), GROW * START),  # more than the nothing that was promised
    ],
)
def test_follows_the_best_proposal_by_what_it_kept_of_its_promise(step: Step, radius: float) -> None:
    assert after(step).radius == pytest.approx(radius)


def test_has_a_largest_and_a_smallest_size() -> None:
    assert after(*[KEPT_IT] * 20).radius == LARGEST
    collapsed = after(*[NOTHING] * 20)
    assert collapsed.radius == SMALLEST
    assert collapsed.collapsed
    collapsed.reset()
    assert not collapsed.collapsed
    assert SMALLEST < collapsed.radius < START


@pytest.mark.parametrize("centre", [[0.5, 0.5, 0.5], [0.0, 0.95, 0.6], [1.0, 0.0, 1.0]])
def test_proposals_lie_in_the_box_and_the_first_is_the_best_there(centre: list[float]) -> None:
    around = np.array(centre)
    fitted, box = model(around=around), region()
    found = box.propose(fitted, wrong, around, 7)
    assert found.radii == (*RADII, *RADII, START)
    proposals = found.genomes
    assert proposals.shape == (7, 3)
    assert ((proposals >= 0) & (proposals <= 1)).all()
    assert (np.abs(proposals - around).max(axis=1) <= np.array(found.radii) + 1e-12).all()
    losses = [1 - float(fitted.predict(genome).values[0]) for genome in proposals[:3]]
    assert losses == sorted(losses)  # the larger the box, the better its best
    true = [-margins(genome).mean() for genome in (around, *proposals)]
    assert max(true[1:]) < true[0]
    best = np.clip(np.full(3, BEST), around - START, around + START)  # of the box, in truth
    assert proposals[0] == pytest.approx(best, abs=0.06)


def test_a_batch_looks_at_different_places() -> None:
    """It is all the same genome where the model knows everything, but not where it doesn't."""
    proposals = region().propose(model(count=10), wrong, np.full(3, 0.65), 4).genomes
    apart = [np.abs(a - b).max() for i, a in enumerate(proposals) for b in proposals[:i]]
    assert min(apart) > 1e-3


@pytest.mark.parametrize("coordinates", [MIXED, (Coordinate(levels=5, ordered=False),) * 12])
def test_changes_discrete_coordinates_one_by_one_for_the_better(coordinates: tuple[Coordinate, ...]) -> None:
    rng = np.random.default_rng(1)
    centre = np.array([0.5 if c.levels is None else c.middle(0) for c in coordinates])
    box, discrete = region(coordinates), [i for i, c in enumerate(coordinates) if c.levels is not None]
    surrogate = Surrogate(coordinates, [OUTPUTS], tasks=1)
    for genome in rng.random((80, len(coordinates))):
        snapped = np.array(
            [
                u if c.levels is None else c.middle(c.level(u))
                for u, c in zip(genome, coordinates, strict=True)
            ]
        )
        surrogate.learn(snapped, 0, margins(snapped) / len(coordinates))
    fitted = surrogate.fit(centre, [0])
    assert fitted is not None
    proposals = box.propose(fitted, wrong, centre, 3).genomes
    changed = (proposals[:, discrete] != centre[discrete]).sum(axis=1)
    assert changed.min() >= 1
    assert changed.tolist() == [max(1, round(radius * len(discrete))) for radius in RADII]
    assert margins(proposals[0]).mean() > margins(centre).mean()


def test_discrete_genomes_are_not_proposed_twice() -> None:
    coordinates = [Coordinate(levels=3, ordered=False)] * 3
    fitted, centre = model(coordinates, count=10), np.full(3, 0.5)
    box, known = region(coordinates), {centre.tobytes()}
    for _ in range(2):
        proposals = box.propose(fitted, wrong, centre, 3, known=known).genomes
        keys = {genome.tobytes() for genome in proposals}
        assert len(keys) == 3
        assert not keys & known
        known |= keys
    nothing = box.propose(fitted, wrong, centre, 3, known={g.tobytes() for g in _all(coordinates)})
    assert (nothing.genomes.shape, nothing.radii) == ((0, 3), ())


def _all(coordinates: Sequence[Coordinate]) -> list[Genome]:
    middles = [[c.middle(level) for level in range(c.levels or 1)] for c in coordinates]
    return [np.array(genome) for genome in itertools.product(*middles)]


def test_whole_numbers_move_by_one() -> None:
    coordinates = [Coordinate(levels=9)] * 2
    around = np.array([Coordinate(levels=9).middle(3)] * 2)
    box = region(coordinates)
    proposals = box.propose(model(coordinates), wrong, around, 4).genomes
    assert (np.abs(proposals - around).sum(axis=1) < 1.5 / 9).all()


def test_the_same_seed_proposes_the_same_bits() -> None:
    fitted, centre = model(), np.full(3, 0.5)
    first, again = (region().propose(fitted, wrong, centre, 4).genomes for _ in range(2))
    assert first.tobytes() == again.tobytes()
    used = region()
    used.propose(fitted, wrong, centre, 4)
    assert used.propose(fitted, wrong, centre, 4).genomes.tobytes() != first.tobytes()


def test_what_is_pending_is_not_proposed_again_and_a_batch_may_be_proposed_in_parts() -> None:
    fitted, centre = model(), np.full(3, 0.5)
    batch = region().propose(fitted, wrong, centre, 5)
    first = region().propose(fitted, wrong, centre, 1).genomes
    again = region().propose(fitted, wrong, centre, 1, pending=first).genomes
    assert again.tobytes() != first.tobytes()
    parts = region()
    found = [parts.propose(fitted, wrong, centre, 2)]
    found.append(parts.propose(fitted, wrong, centre, 3, pending=found[0].genomes, first=2))
    assert np.vstack([part.genomes for part in found]).tobytes() == batch.genomes.tobytes()
    assert found[0].radii + found[1].radii == batch.radii
