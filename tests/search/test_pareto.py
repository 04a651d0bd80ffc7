"""Fronts against brute force, hypervolume against known values, knees where everybody sees them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search import loop, pareto
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.selection import Candidate
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_merge_space import make

POINTS = st.integers(1, 12).flatmap(
    lambda n: st.integers(2, 4).flatmap(
        lambda m: arrays(np.float64, (n, m), elements=st.integers(0, 5).map(lambda x: x / 5))
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(POINTS)
def test_the_front_is_what_nothing_dominates(losses: np.ndarray) -> None:
    rows = pareto.front(losses)
    for i, point in enumerate(losses):
        dominated = any(dominates(other, point) for other in losses)
        known = any((other == point).all() for other in losses[:i])
        assert (i in rows) == (not dominated and not known)


@given(POINTS)
def test_hypervolume_against_counting_cells(losses: np.ndarray) -> None:
    m = losses.shape[1]
    middles = np.stack(np.meshgrid(*[(np.arange(5) + 0.5) / 5] * m, indexing="ij"), axis=-1).reshape(-1, m)
    covered = (losses[:, None] <= middles).all(axis=2).any(axis=0)
    assert pareto.hypervolume(losses, np.ones(m)) == pytest.approx(covered.mean())


@pytest.mark.parametrize(
    ("losses", "reference", "volume"),
    [
        ([[0, 0]], [1, 1], 1.0),
        ([[1, 0]], [1, 1], 0.0),  # on the border
        ([[2, -5]], [1, 1], 0.0),
        ([[-1, 0], [0, -1]], [1, 1], 3.0),
        ([[0, 0, 0], [-1, 0.5, 0.5]], [1, 1, 1], 1.25),
    ],
)
def test_hypervolume_of_known_sets(losses: list[list[float]], reference: list[float], volume: float) -> None:
    assert pareto.hypervolume(np.array(losses, dtype=float), np.array(reference)) == pytest.approx(volume)


@given(POINTS, st.integers(1, 12))
def test_a_spread_is_of_the_front_and_as_large_as_asked_for(losses: np.ndarray, count: int) -> None:
    rows, chosen = pareto.front(losses), pareto.spread(losses, count)
    assert set(chosen) <= set(rows)
    assert len(chosen) == len(set(chosen)) == min(count, len(rows))
    first = pareto.spread(losses, count, rows[-1:])
    assert first[0] == rows[-1]
    assert len(first) == len(chosen)
    if count > losses.shape[1]:
        assert (losses[chosen].min(axis=0) == losses.min(axis=0)).all()


def test_a_spread_leaves_no_gap_that_it_could_close() -> None:
    angles = np.linspace(0, np.pi / 2, 41)
    chosen = sorted(pareto.spread(1 - np.stack([np.cos(angles), np.sin(angles)], axis=1), 5))
    assert np.diff(chosen).max() <= 20
    assert {0, 40} <= set(chosen)


@pytest.mark.parametrize("power", [0.5, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_knee_is_in_the_middle_of_symmetric_fronts_of_any_shape(power: float, scale: float) -> None:
    x = np.linspace(0, 1, 21)
    losses = np.stack([x, scale * (1 - x**power) ** (1 / power)], axis=1)
    losses = losses[np.argsort(-losses[:, 0])]
    reference = np.array([1.0, scale]) * 1.1
    first, second = losses[pareto.knee(losses, reference, reference)] / [1.0, scale]
    assert first == pytest.approx(second, abs=0.1)


def test_extremes_do_not_move_the_knee() -> None:
    """Scaled by the range of the front, a copy of a parent was nearest to the ideal."""
    merges = np.array([[-0.30, -0.45], [-0.42, -0.40], [-0.50, -0.25]])
    copies = np.array([[-1.0, -0.02], [0.05, -0.46]])  # a specialist, and what lost its skill
    reference = np.array([0.1, 0.1])
    for extremes in (copies, copies[:1], copies[1:], copies[:0]):
        losses = np.concatenate([merges, extremes])
        assert pareto.knee(losses, reference, np.ones(2)) == 1


@given(POINTS)
def test_an_archive_fed_piece_by_piece_is_the_front_of_everything(losses: np.ndarray) -> None:
    archive = pareto.Archive(np.ones(losses.shape[1]))
    volume = 0.0
    for number, row in enumerate(losses):
        archive.add([candidate(number)], row[None])
        assert archive.hypervolume >= volume - 1e-12  # it never shrinks
        volume = archive.hypervolume
    assert {c.name for c in archive.members} == {str(i) for i in pareto.front(losses)}
    assert volume == pytest.approx(pareto.hypervolume(losses, archive.reference))
    assert len(archive.recipes) == len(archive.members)


def test_weights_pick_the_largest_weighted_sum() -> None:
    values = [{"a": 1.0, "b": 0.0}, {"a": 0.6, "b": 0.6}, {"a": 0.0, "b": 1.0}]
    assert pareto.heaviest(values, {"a": 1}) == 0
    assert pareto.heaviest(values, {"a": 0.5, "b": 0.5}) == 1
    assert pareto.heaviest(values, {"b": 3, "a": 1}) == 2


def candidate(number: int) -> Candidate:
    group = TensorGroup(method="linear", sources=("a",))
    recipe = Recipe(models={"base": "base", "a": "a"}, base="base", groups=(group,), seed=number)
    return Candidate(name=str(number), recipe=recipe, loss=0.0)


# The loop with several objectives ----------------------------------------------------------------------


class Scatter:
    """Asks for points all over the square, always as many; needs losses of two objectives."""

    def __init__(self, seed: np.random.SeedSequence, *, count: int = 10) -> None:
        self._generator, self._count = np.random.default_rng(seed), count

    def ask(self) -> np.ndarray:
        return self._generator.random((self._count, 2))

    def tell(self, losses: np.ndarray, chosen: None = None) -> None:
        assert losses.shape == (self._count, 2)
        assert np.isfinite(losses).all()

    def stop_reason(self) -> str | None:
        return None

    def favourite(self) -> None:
        return None


def search(
    monkeypatch: pytest.MonkeyPatch,
    scorer: FakeScorer,
    journal: FakeJournal,
    *,
    generations: int = 6,
    **objective: object,
) -> Outcome:
    monkeypatch.setattr(loop, "create", lambda _, *, seed, **__: Scatter(seed))
    space = make("global_weights")
    plan = SearchPlan(
        suite=SUITE,
        space=space,
        template=space.decode(np.full(2, 0.5)),
        norms={"a": 1.0, "b": 2.0},
        optimizer=OptimizerSpec(),
        objective=ObjectiveSpec.model_validate({"several": ["a", "b"], **objective}),
        finalists=4,
        seed=0,
    )
    return Search(
        plan, scorer=scorer, journal=journal, budget=FakeBudget(generations), observer=Quiet()
    ).run()


class Opposed(FakeScorer):
    """The more of one weight, the less of the other task."""

    def _one(self, recipe: Recipe, split: Split, phase: str) -> Scores | Failure:
        found = super()._one(recipe, split, phase)
        weights = recipe.groups[0].parameters.get("weight", ())
        if isinstance(found, Failure) or len(weights) != 2:
            return found
        a, b = (float(w) / 1.5 for w in weights)
        values = {"a": max(0.0, min(1.0, a - 0.5 * b**2)), "b": max(0.0, min(1.0, b - 0.5 * a**2))}
        tasks = tuple(
            type(t)(task=t.task, metric=np.full(10, values[t.task]), smooth=np.full(10, values[t.task]))
            for t in found
        )
        return Scores(split=split, tasks=tasks)


def test_a_front_is_kept_and_its_hypervolume_never_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FakeJournal()
    search(monkeypatch, Opposed(), journal)
    volumes = [volume for volume, _, _ in journal.fronts]
    assert len(volumes) == len(journal.tells) == 6
    assert volumes == sorted(volumes)
    assert volumes[-1] > 0
    references = [tuple(reference) for _, reference, _ in journal.fronts]
    assert len(set(references)) == 1
    told = np.concatenate(journal.tells)
    assert volumes[-1] == pytest.approx(pareto.hypervolume(told, np.array(references[0])))
    assert len(journal.fronts[-1][2]) == len(pareto.front(told))


def test_the_winner_is_the_knee_of_the_finalists_on_select(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, journal = Opposed(), FakeJournal()
    outcome = search(monkeypatch, scorer, journal)
    finalists = [entry.recipe for role, _, entry in journal.entries if role == "finalist"]
    assert len(finalists) == 4
    assert {r.hash for r in finalists} <= set(journal.fronts[-1][2])
    points = []
    for recipe in finalists:
        scores = scorer._one(recipe, "select", "selection")
        assert isinstance(scores, Scores)
        points.append([-scores["a"].mean, -scores["b"].mean])
    reference = np.full(2, 0.1)  # the base has 0 of both, a parent 1 of one
    knee = pareto.knee(np.array(points), reference, np.full(2, 1.1))
    assert outcome.winner.recipe.hash == finalists[knee].hash
    tested = {hash_ for hash_, split, phase in scorer.asked if split == "test" and phase == "test"}
    assert tested & {r.hash for r in finalists} == {outcome.winner.recipe.hash}


def test_the_same_seed_gives_the_same_front(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeJournal(), FakeJournal()
    search(monkeypatch, Opposed(), first)
    search(monkeypatch, Opposed(), second)
    assert [(v, r) for v, _, r in first.fronts] == [(v, r) for v, _, r in second.fronts]


def test_constraints_hold_for_the_winner_of_a_front(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, journal = Opposed(), FakeJournal()
    outcome = search(monkeypatch, scorer, journal, constraints={"tasks": {"a": 0.6}})
    scores = scorer._one(outcome.winner.recipe, "test", "test")
    assert isinstance(scores, Scores)
    assert scores["a"].mean >= 0.6


def test_failures_stay_out_of_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FakeJournal()
    search(monkeypatch, Opposed(fail_share=0.5), journal)
    assert journal.fronts[-1][0] > 0
    with pytest.raises(UserError, match="could be scored, so there is no winner"):
        search(monkeypatch, Opposed(fail_share=1.0), FakeJournal(), generations=2)
