"""Predictions of recipes not scored: the interval holds what it promises, also on part of the items."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, TaskScores, joined
from evomerge.search.spaces.space import Coordinate
from evomerge.search.surrogate.prediction import Example, PredictedScore, predict_score, shared_blocks
from tests.search.fakes import SUITE

BLOCKS, ITEMS, DIMENSION = 4, 30, 3
COORDINATES = [Coordinate()] * DIMENSION
RNG = np.random.default_rng(3)
SLOPES = {task: RNG.normal(0, 3, (BLOCKS, ITEMS, DIMENSION)) for task in ("a", "b")}
EASE = {task: RNG.normal(0, 1.5, (BLOCKS, ITEMS)) for task in ("a", "b")}


def parts(lead: float, genome: np.ndarray | None = None) -> list[Scores]:
    """Scores on every block: margins linear in the genome, and as far ahead as `lead` says."""
    found = []
    for block in range(BLOCKS):
        tasks = []
        for task in ("a", "b"):
            margin = lead + EASE[task][block]
            if genome is not None:
                margin = margin + SLOPES[task][block] @ (genome - 0.5) - 4 * ((genome - 0.5) ** 2).sum()
            tasks.append(TaskScores(task=task, metric=(margin > 0).astype(float), margin=margin))
        found.append(Scores(split="search", tasks=tuple(tasks), blocks=(block,)))
    return found


BASE = parts(-1.5)
NORMALISER = Normaliser(SUITE, base=joined(BASE), parents={name: joined(parts(1.5)) for name in ("a", "b")})


def example(seed: int, blocks: tuple[int, ...] = tuple(range(BLOCKS))) -> Example:
    genome = np.random.default_rng(seed).random(DIMENSION)
    found = parts(0.0, genome)
    return Example(recipe=str(seed), genome=genome, parts={b: found[b] for b in blocks})


KNOWN = [example(n) for n in range(30)]


def predict(genome: np.ndarray, examples: list[Example]) -> PredictedScore:
    return predict_score(genome, examples, coordinates=COORDINATES, normaliser=NORMALISER, base=BASE)


@pytest.mark.parametrize("blocks", [(0, 1, 2, 3), (2, 0)])
def test_nineteen_of_twenty_lie_in_the_interval(blocks: tuple[int, ...]) -> None:
    known = [example(n) for n in range(12)] + [example(n, blocks) for n in range(12, 40)]
    new = [example(n) for n in range(100, 140)]
    truth = np.array([NORMALISER.mean(joined(list(e.parts.values()))) for e in new])
    found = [predict(e.genome, known) for e in new]
    inside = [f.low <= t <= f.high for f, t in zip(found, truth, strict=True)]
    assert np.mean(inside) >= 0.9
    assert np.corrcoef([f.mean for f in found], truth)[0, 1] > 0.8
    assert np.mean([f.high - f.low for f in found]) < np.ptp(truth)
    assert found[0].blocks == tuple(sorted(blocks))
    assert found[0].learnt == 40


def test_the_interval_is_wider_far_away_and_on_part_of_the_items() -> None:
    near = [
        Example(recipe=e.recipe, genome=0.2 * e.genome, parts=dict(enumerate(parts(0.0, 0.2 * e.genome))))
        for e in KNOWN
    ]
    here, there = predict(np.full(DIMENSION, 0.1), near), predict(np.full(DIMENSION, 0.4), near)
    assert there.uncertainty > here.uncertainty
    assert there.error > here.error
    assert there.high - there.low > here.high - here.low
    part = KNOWN[:10] + [example(n, (1,)) for n in range(10, 30)]
    genome = np.full(DIMENSION, 0.4)
    assert np.subtract(*_bounds(predict(genome, part))) < np.subtract(*_bounds(predict(genome, KNOWN)))


def test_candidates_of_another_search_are_predicted_as_well_as_promised() -> None:
    inside, halves, errors = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        starts = 0.5 + rng.normal(0, 0.15, (2, DIMENSION))
        searches = [np.clip(s + rng.normal(0, 0.2, (24, DIMENSION)), 0, 1) for s in starts]
        known, new = (
            [Example(recipe=g.tobytes().hex(), genome=g, parts=dict(enumerate(parts(0.0, g)))) for g in group]
            for group in searches
        )
        for asked in new[::3]:
            found = predict(asked.genome, known)
            truth = NORMALISER.mean(joined(list(asked.parts.values())))
            if found.known:
                inside.append(found.low <= truth <= found.high)
                halves.append((found.high - found.low) / 2)
                errors.append(truth - found.mean)
    assert len(inside) > 30
    assert np.mean(inside) >= 0.9
    assert np.median(halves) < 4 * np.sqrt(np.mean(np.square(errors)))


def test_the_interval_is_narrower_where_the_items_are_decided() -> None:
    def decided(genome: np.ndarray) -> float:
        return 20 * float(genome[0] - 0.5)  # far right of the middle all answers are right, whatever else

    def of(genome: np.ndarray) -> Example:
        found = [
            Scores(
                split="search",
                tasks=tuple(
                    TaskScores(task=t.task, metric=(m > 0).astype(float), margin=m)
                    for t in part
                    for m in [decided(genome) + 0.2 * np.asarray(t.margin)]
                ),
                blocks=part.blocks,
            )
            for part in parts(0.0, genome)
        ]
        return Example(recipe=genome.tobytes().hex(), genome=genome, parts=dict(enumerate(found)))

    known = [of(np.random.default_rng(n).random(DIMENSION)) for n in range(40)]
    sure, unsure = (predict(np.array([at, 0.5, 0.5]), known) for at in (0.95, 0.5))
    assert sure.high - sure.low < 0.7 * (unsure.high - unsure.low)


def test_where_nothing_near_was_scored_nothing_is_known() -> None:
    wide = np.full(40, 0.5)
    genomes = [wide + np.random.default_rng(n).normal(0, 0.05, 40) for n in range(20)]
    examples = [
        Example(recipe=str(n), genome=g, parts=dict(enumerate(parts(0.0, g[:DIMENSION]))))
        for n, g in enumerate(genomes)
    ]
    asked = [genomes[0] + 0.01, np.ones(40)]
    found = [
        predict_score(g, examples, coordinates=[Coordinate()] * 40, normaliser=NORMALISER, base=BASE)
        for g in asked
    ]
    assert [f.known for f in found] == [True, False]
    assert found[1].lowest <= found[1].highest
    assert found[1].uncertainty > 0.9


def test_what_lies_farther_away_than_scored_recipes_from_each_other_is_not_known() -> None:
    rng = np.random.default_rng(0)
    genomes = 0.05 * rng.random((20, DIMENSION))
    examples = [
        Example(recipe=str(n), genome=g, parts=dict(enumerate(parts(0.0, g)))) for n, g in enumerate(genomes)
    ]
    found = [predict(np.full(DIMENSION, at), examples) for at in (0.03, 0.5)]
    assert [f.known for f in found] == [True, False]


def _bounds(found: PredictedScore) -> tuple[float, float]:
    return found.low, found.high


def test_the_mean_is_that_of_the_tasks() -> None:
    found = predict(np.full(DIMENSION, 0.5), [example(n) for n in range(20)])
    assert found.mean == pytest.approx(np.mean(list(found.tasks.values())))
    assert found.mean == pytest.approx((found.low + found.high) / 2)
    assert found.lowest < found.highest
    assert found.retention is None


def test_too_few_scores_are_said_to_be_too_few() -> None:
    known = [example(n) for n in range(7)]
    twins = [Example(recipe=f"{e.recipe} again", genome=e.genome, parts=e.parts) for e in known]
    with pytest.raises(UserError, match="too little was scored"):
        predict(np.full(DIMENSION, 0.5), [*known, *twins])


def test_the_most_blocks_that_enough_were_scored_on() -> None:
    sets = [{0, 1, 2, 3}, {2}, {2}, {1, 2}, {1, 2}]
    assert shared_blocks(sets) == (1, 2)
    assert shared_blocks(sets, 0.9) == (2,)
    assert shared_blocks(sets, 0.2) == (0, 1, 2, 3)
    assert shared_blocks([]) == ()
