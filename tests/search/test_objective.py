"""Losses: what they reward, and what failures cost."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.search.objective import FAILURE_MARGIN, Objective, ObjectiveSpec

SPLITS = {"search": "search", "select": "select", "test": "test"}
SUITE = Suite.model_validate(
    {
        "name": "s",
        "tasks": [
            {"task": "skill", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "text", "metric": "loglikelihood", "role": "retention", "splits": SPLITS},
        ],
    }
)


def scores(accuracy: float, smooth: float, text: float = -2.0) -> Scores:
    hits = np.zeros(10)
    hits[: round(10 * accuracy)] = 1
    skill = TaskScores(task="skill", metric=hits, smooth=np.full(10, smooth))
    return Scores(split="search", tasks=(skill, TaskScores(task="text", metric=np.full(5, text))))


def objective(**settings: float) -> Objective:
    normaliser = Normaliser(SUITE, base=scores(0, 0.2), parents={"p": scores(1, 0.7)})
    return Objective(ObjectiveSpec.model_validate(settings), normaliser)


def test_base_and_specialist_are_zero_and_minus_one() -> None:
    assert objective().loss(scores(0, 0.2)) == pytest.approx(0)
    assert objective().loss(scores(1, 0.7)) == pytest.approx(-1)


def test_the_smooth_term_breaks_ties() -> None:
    assert objective(smooth=0.3).loss(scores(0.5, 0.45)) < objective(smooth=0.3).loss(scores(0.5, 0.4))
    assert objective(smooth=0).loss(scores(0.5, 0.45)) == objective(smooth=0).loss(scores(0.5, 0.4))


def test_lost_retention_costs_and_gained_retention_does_not_pay() -> None:
    plain = objective(retention=0.5)
    assert plain.loss(scores(0.5, 0.4, -2.1)) == pytest.approx(
        plain.loss(scores(0.5, 0.4)) + 0.5 * (1 - np.exp(-0.1))
    )
    assert plain.loss(scores(0.5, 0.4, -1.9)) == plain.loss(scores(0.5, 0.4))


def test_failures_are_worse_than_the_worst() -> None:
    failure = Failure(kind="crash", reason="died")
    losses = objective().losses([scores(1, 0.7), failure, scores(0, 0.0)])
    assert losses.shape == (3, 1)
    assert losses[1, 0] == pytest.approx(max(losses[0, 0], losses[2, 0]) + FAILURE_MARGIN)
    assert objective().losses([failure, failure]).tolist() == [[FAILURE_MARGIN], [FAILURE_MARGIN]]
