"""Winner selection: luck is seen through, finalists differ, soups only ever help, both splits count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search.selection import (
    FEWEST,
    Candidate,
    estimates,
    finalists,
    greedy_soup,
    mean_genome,
    winner,
)
from evomerge.search.spaces.space import Coordinate, Genome


def candidate(genome: object, loss: float, *, generation: int = 0, items: int = 100) -> Candidate:
    u = np.atleast_1d(np.array(genome, dtype=np.float64))
    weights = tuple(float(f"{x:.6g}") for x in u)
    sources = tuple(f"s{i}" for i in range(len(u)))
    group = TensorGroup(method="linear", sources=sources, parameters={"weight": weights})
    recipe = Recipe(models={s: s for s in ("base", *sources)}, base="base", groups=(group,))
    return Candidate(
        name=str(weights), recipe=recipe, loss=loss, genome=u, generation=generation, items=items
    )


def bowl(u: Genome) -> float:
    return float(((u - 0.6) ** 2).sum())


def noisy(seed: int, noise: float, count: int = 80) -> tuple[list[Candidate], np.ndarray]:
    rng = np.random.default_rng(seed)
    genomes = rng.uniform(0, 1, (count, 3))
    truth = np.array([bowl(u) for u in genomes])
    losses = truth + noise * rng.normal(size=count)
    return [candidate(genomes[i], float(losses[i]), generation=i // 8) for i in range(count)], truth


def test_estimates_are_nearer_the_truth_and_pick_better_than_the_lowest_loss() -> None:
    trials = [noisy(seed, 0.15) for seed in range(20)]
    error, regret = {"loss": 0.0, "estimate": 0.0}, {"loss": 0.0, "estimate": 0.0}
    for found, truth in trials:
        for name, values in (("loss", np.array([c.loss for c in found])), ("estimate", estimates(found))):
            error[name] += float(((values - truth) ** 2).mean())
            regret[name] += float(truth[values.argmin()] - truth.min())
    assert error["estimate"] < 0.4 * error["loss"]
    assert regret["estimate"] < 0.5 * regret["loss"]


def test_without_noise_estimates_are_the_losses() -> None:
    found, truth = noisy(0, 0.0)
    assert estimates(found) == pytest.approx(truth, abs=0.01)
    assert estimates(found).argmin() == truth.argmin()


def test_pure_noise_is_shrunk_to_its_mean() -> None:
    rng = np.random.default_rng(0)
    found = [candidate(rng.uniform(0, 1, 3), float(rng.normal())) for _ in range(100)]
    losses = np.array([c.loss for c in found])
    assert np.std(estimates(found)) < 0.5 * np.std(losses)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [candidate([0.1 * i], float(i)) for i in range(FEWEST - 1)],
        [candidate([0.5], float(i)) for i in range(20)],
        [candidate([i / 20], 1.0) for i in range(20)],
    ],
    ids=["none", "too few", "one genome", "one loss"],
)
def test_where_nothing_can_be_fitted_losses_stay(found: list[Candidate]) -> None:
    assert estimates(found).tolist() == [c.loss for c in found]


def test_estimates_do_not_depend_on_the_day() -> None:
    found, _ = noisy(3, 0.2)
    assert estimates(found).tobytes() == estimates(found).tobytes()


def test_candidates_that_a_race_stopped_are_no_finalists() -> None:
    found = [candidate([0.1], 0.0, items=20), candidate([0.2], 1.0), candidate([0.3], 2.0)]
    assert [c.loss for c in finalists(found, 3)] == [1.0, 2.0]
    assert estimates(found).tolist() == [0.0, 1.0, 2.0]


def test_estimates_rank_finalists() -> None:
    found = [candidate([0.1], 0.0), candidate([0.2], 1.0, generation=1), candidate([0.3], 2.0, generation=2)]
    assert finalists(found, 2, np.array([2.0, 0.5, 1.0])) == [found[1], found[2]]


def test_no_generation_takes_all_places_unless_others_run_out() -> None:
    found = [candidate([g + i / 100], g + i / 100, generation=g) for g in range(4) for i in range(10)]
    per_generation = [c.generation for c in finalists(found, 8)]
    assert per_generation == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [c.generation for c in finalists(found[:12], 8)] == [0, 0, 0, 0, 0, 0, 1, 1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=25),
    st.integers(1, 10),
)
def test_finalists_are_distinct_sorted_and_hold_the_best(
    rows: list[tuple[int, int, int]], count: int
) -> None:
    found = [candidate([u / 10], float(loss), generation=g) for u, loss, g in rows]
    chosen = finalists(found, count)
    hashes = [c.recipe.hash for c in chosen]
    assert len(set(hashes)) == len(hashes) == min(count, len({c.recipe.hash for c in found}))
    assert [c.loss for c in chosen] == sorted(c.loss for c in chosen)
    assert chosen[0].loss == min(c.loss for c in found)


def scored(loss: Callable[[Genome], float]) -> Callable[[Genome], Candidate | None]:
    return lambda u: candidate(u, loss(u))


def test_the_soup_is_the_mean_of_those_that_help() -> None:
    corners = [[0.5, 0.6], [0.7, 0.6], [0.0, 0.0], [0.6, 0.5]]
    ranked = [candidate(u, bowl(np.array(u))) for u in corners]
    soup = greedy_soup(ranked, [Coordinate()] * 2, scored(bowl))
    assert soup is not None
    assert soup.genome is not None
    assert soup.genome == pytest.approx([0.6, 0.6])  # the third spoils it, the fourth adds nothing
    assert soup.loss < min(c.loss for c in ranked)


def test_no_soup_where_the_first_is_best_alone_or_nothing_can_be_scored() -> None:
    ranked = [candidate([0.6], 0.0), candidate([0.1], 0.25), candidate([0.9], 0.09)]
    assert greedy_soup(ranked, [Coordinate()], scored(bowl)) is None
    assert greedy_soup(ranked, [Coordinate()], lambda u: None) is None
    assert greedy_soup([], [Coordinate()], scored(bowl)) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_soup_is_never_worse_on_search_than_its_first_member(genomes: list[list[float]]) -> None:
    ranked = [candidate(u, bowl(np.array(u))) for u in genomes]
    soup = greedy_soup(ranked, [Coordinate()] * 3, scored(bowl))
    assert soup is None or soup.loss <= ranked[0].loss


def test_names_have_no_mean() -> None:
    kinds = [Coordinate(), Coordinate(levels=5), Coordinate(levels=3, ordered=False)]
    mean = mean_genome([np.array([0.0, 0.1, 0.9]), np.array([1.0, 0.5, 0.1])], kinds)
    assert mean == pytest.approx([0.5, 0.3, 0.9])


def test_both_splits_decide_by_their_items() -> None:
    search, select = np.array([0.0, 1.0]), np.array([1.0, 0.4])
    assert winner(search, select, items=(100, 100)) == 0
    assert winner(search, select, items=(100, 200)) == 1
    assert winner(search, np.array([np.nan, 5.0]), items=(100, 200)) == 1


def test_both_splits_pick_better_than_select_alone() -> None:
    rng = np.random.default_rng(0)
    alone = pooled = 0.0
    for _ in range(400):
        truth = rng.normal(0, 1, 8)
        search, select = truth + rng.normal(0, 1, 8), truth + rng.normal(0, 1.2, 8)
        alone += truth[select.argmin()]
        pooled += truth[winner(search, select, items=(144, 100))]
    assert pooled / 400 < alone / 400 - 0.1
