"""Expected hypervolume improvement against volumes that are known, and slopes against differences."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.search import pareto
from evomerge.search.objective import Objective, ObjectiveSpec
from evomerge.search.surrogate.improvement import (
    FrontLoss,
    most_improving,
    spread_out,
    undominated,
    volume,
)
from evomerge.search.surrogate.observed import Observed
from tests.search.surrogate.test_guide import BASE, BLOCKS, NORMALISER, scores

EVERYTHING = ("mean", "worst", "a", {"a": 1.0, "b": 3.0}, "retention", "coherence")
GENOMES = np.random.default_rng(3).uniform(0.2, 0.9, (6, 4))


def certain(points: list[list[float]]) -> np.ndarray:
    return np.array([points], dtype=float)


def test_the_candidate_that_adds_most_is_picked_first() -> None:
    front = np.array([[-0.5, -0.5]])
    draws = certain([[-0.4, -0.4], [-0.6, -0.6], [-0.9, -0.3], [-0.55, -0.55]])
    chosen, gain = most_improving(draws, front, np.zeros(2), 2)
    assert chosen == [2, 1]
    covered = pareto.hypervolume(np.concatenate([front, draws[0, chosen]]), np.zeros(2))
    assert gain == pytest.approx(covered - 0.25, abs=0.01)


def test_twins_add_nothing_beside_each_other() -> None:
    draws = certain([[-0.9, -0.1], [-0.9, -0.1], [-0.1, -0.5]])
    assert most_improving(draws, np.empty((0, 2)), np.zeros(2), 2)[0] == [0, 2]


def test_a_candidate_that_may_be_good_is_worth_more_than_one_that_is_surely_not() -> None:
    front = np.array([[-0.5, -0.5]])
    draws = np.array([[[-0.8, -0.8], [-0.45, -0.45]], [[-0.05, -0.05], [-0.45, -0.45]]])
    chosen, gain = most_improving(draws, front, np.zeros(2), 1)
    assert chosen == [0]
    assert gain == pytest.approx((0.64 - 0.25) / 2, abs=0.02)


def test_where_nothing_is_gained_the_lower_losses_come_first() -> None:
    front = np.array([[-1.0, -1.0]])
    assert most_improving(certain([[0.3, 0.3], [0.1, 0.1]]), front, np.zeros(2), 2)[0] == [1, 0]


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_volumes_are_those_of_the_front(objectives: int) -> None:
    points = np.random.default_rng(1).uniform(-1, 0.2, (30, objectives))
    exact = pareto.hypervolume(points, np.zeros(objectives))
    assert volume(points, np.zeros(objectives)) == pytest.approx(exact, abs=0.02)
    assert np.flatnonzero(undominated(points)).tolist() == pareto.front(points)


def test_a_spread_covers_most_with_few() -> None:
    angles = np.linspace(0, np.pi / 2, 31)
    losses = -np.stack([np.cos(angles), np.sin(angles)], axis=1)
    chosen = spread_out(losses, np.zeros(2), 5)
    assert pareto.hypervolume(losses[chosen], np.zeros(2)) > 0.85 * pareto.hypervolume(losses, np.zeros(2))


def means(genomes: np.ndarray, losses: FrontLoss) -> np.ndarray:
    seen = Observed(losses.tasks, BASE)
    blocks = range(BLOCKS)
    return np.array([seen.means(seen.columns(scores(g, blocks)), blocks) for g in genomes])


@pytest.mark.parametrize("limits", [{}, {"tasks": 0.3, "retention": 0.97}])
def test_losses_are_those_of_the_objective(limits: dict[str, float]) -> None:
    spec = ObjectiveSpec.model_validate({"several": EVERYTHING, "constraints": limits, "smooth": 0.0})
    losses = FrontLoss(NORMALISER, spec)
    metrics = np.array([[scores(g, range(BLOCKS))[task].mean for task in losses.tasks] for g in GENOMES])
    measured = Objective(spec, NORMALISER).losses([scores(g, range(BLOCKS)) for g in GENOMES])
    found = losses(metrics)
    assert (found >= 1).all(axis=1).tolist() == (measured >= 1).all(axis=1).tolist()
    feasible = (measured < 1).all(axis=1)
    assert found[feasible] == pytest.approx(measured[feasible])
    assert losses(metrics[None])[0] == pytest.approx(found)


def test_slopes_are_those_of_the_losses() -> None:
    spec = ObjectiveSpec.model_validate(
        {"several": EVERYTHING, "constraints": {"tasks": 0.6, "retention": 0.99, "coherence": 0.99}}
    )
    losses = FrontLoss(NORMALISER, spec)
    scalar = losses.scalar(np.linspace(0.1, 0.3, 6), np.full(6, -0.5), np.full(6, 0.2))
    for values in means(GENOMES, losses):
        _, slope = scalar(values)
        for task in range(len(values)):
            step = np.zeros(len(values))
            step[task] = 1e-6
            rise = (scalar(values + step)[0] - scalar(values - step)[0]) / 2e-6
            assert slope[task] == pytest.approx(rise, rel=1e-3, abs=1e-5)
