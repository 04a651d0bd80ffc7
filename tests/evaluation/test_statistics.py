"""Intervals cover as often as they say, tests reject as rarely as they say, and seeds decide every bit."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluation.scores import Array
from evomerge.evaluation.statistics import (
    Interval,
    holm,
    interval,
    mcnemar,
    paired_difference,
    paired_items,
    proportion_interval,
)

WEIGHTS = np.array([1.0, 2.0, 1.0])
CHANCES = np.array([0.3, 0.6, 0.9])


def binary(rng: np.random.Generator, n: int = 80) -> list[Array]:
    return [(rng.random(n) < chance).astype(float) for chance in CHANCES]


def continuous(rng: np.random.Generator, n: int = 80) -> list[Array]:
    return [rng.gamma(2.0, chance / 2, size=n) for chance in CHANCES]


@pytest.mark.parametrize("draw", [binary, continuous])
def test_intervals_cover_19_times_out_of_20(draw) -> None:  # type: ignore[no-untyped-def]
    truth = float(WEIGHTS @ CHANCES / WEIGHTS.sum())
    rng = np.random.default_rng(1)
    trials = 200
    found = [interval(draw(rng), WEIGHTS) for _ in range(trials)]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 0.91 <= covered / trials <= 0.985


def test_paired_intervals_cover_and_tests_reject_as_they_say() -> None:
    rng = np.random.default_rng(2)
    trials, covered, rejected = 150, 0, 0
    for trial in range(trials):
        a, b = binary(rng), binary(rng)
        found = paired_difference(a, b, WEIGHTS, seed=trial)
        covered += found.low <= 0 <= found.high
        rejected += found.p <= 0.05
    assert 0.9 <= covered / trials <= 0.99
    assert 0.01 <= rejected / trials <= 0.1


def test_pairing_sharpens() -> None:
    rng = np.random.default_rng(3)
    b = binary(rng, 200)
    a = [np.where(rng.random(200) < 0.1, 1.0, x) for x in b]  # a tenth of the items, put right
    found = paired_difference(a, b, WEIGHTS, seed=0)
    assert found.low > 0
    assert found.p < 0.01
    apart = paired_difference(a, [rng.permutation(x) for x in b], WEIGHTS, seed=0)
    assert apart.high - apart.low > 2 * (found.high - found.low)


def test_sign_flips_agree_with_scipy() -> None:
    rng = np.random.default_rng(4)
    difference = rng.normal(0.15, 1, size=60)
    found = paired_difference([difference], [np.zeros(60)], [1.0], seed=0)
    expected = scipy.stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
        alternative="two-sided",
    )
    assert found.p == pytest.approx(expected.pvalue, abs=0.015)


def test_intervals_of_many_items_agree_with_scipy() -> None:
    rng = np.random.default_rng(6)
    for sample in (rng.gamma(2.0, size=2000), rng.integers(0, 3, size=2000).astype(float)):
        found = interval([sample], [1.0])
        expected = scipy.stats.ttest_1samp(sample, 0.0).confidence_interval()
        assert found.low == pytest.approx(expected.low, abs=0.01)
        assert found.high == pytest.approx(expected.high, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [1, 5])
def test_equal_items_still_give_an_interval(value: float, tasks: int) -> None:
    same = [np.full(20, value)] * tasks
    found = interval(same, np.ones(tasks))
    assert found.low <= value <= found.high
    assert found.high - found.low > 0.02
    test = paired_difference(same, same, np.ones(tasks), seed=0)
    assert test.low < -0.01 < 0.01 < test.high


@pytest.mark.parametrize("n", [10, 20, 50, 200])
@pytest.mark.parametrize("chances", [(0.02, 0.05, 0.1), (0.4, 0.5, 0.6), (0.9, 0.95, 0.98)])
def test_coverage_near_the_ends_and_in_the_middle(n: int, chances: tuple[float, ...]) -> None:
    rng, truth = np.random.default_rng(n), float(WEIGHTS @ np.array(chances) / WEIGHTS.sum())
    drawn = [[(rng.random(n) < p).astype(float) for p in chances] for _ in range(400)]
    covered = np.mean([one.low <= truth <= one.high for one in (interval(d, WEIGHTS) for d in drawn)])
    assert covered >= 0.92


scores = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=30).map(np.array)


@settings(max_examples=30, deadline=None)
@given(st.lists(scores, min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_model_does_not_differ_from_itself(samples: list[Array], seed: int) -> None:
    found = paired_difference(samples, samples, np.ones(len(samples)), seed=seed)
    assert (found.estimate, found.p) == (0.0, 1.0)
    assert found.low < 0 < found.high
    assert found.low == pytest.approx(-found.high)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=3), st.integers(0, 2**32))
def test_paired_invariants(pairs: list[tuple[Array, Array]], seed: int) -> None:
    a = [x[: min(len(x), len(y))] for x, y in pairs]
    b = [y[: min(len(x), len(y))] for x, y in pairs]
    weights = np.arange(1.0, len(pairs) + 1)
    found = paired_difference(a, b, weights, seed=seed)
    swapped = paired_difference(b, a, weights, seed=seed)
    expected = sum(w * (x.mean() - y.mean()) for w, x, y in zip(weights, a, b, strict=True)) / weights.sum()
    assert found.estimate == pytest.approx(expected, abs=1e-12)
    assert found.low - 1e-12 <= found.estimate <= found.high + 1e-12
    assert 0 < found.p <= 1
    assert swapped.estimate == pytest.approx(-found.estimate, abs=1e-12)
    assert swapped.p == pytest.approx(found.p, abs=0.03)
    assert paired_difference(a, b, weights * 10, seed=seed).estimate == pytest.approx(found.estimate)


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(8)
    a, b = continuous(rng), continuous(rng)
    assert paired_difference(a, b, WEIGHTS, seed=1) == paired_difference(a, b, WEIGHTS, seed=1)
    sequence = np.random.SeedSequence(1)
    first = paired_difference(a, b, WEIGHTS, seed=sequence)
    assert paired_difference(a, b, WEIGHTS, seed=sequence) == first  # using a sequence does not use it up


def test_a_single_task_of_zeros_and_ones_gets_wilson() -> None:
    sample = np.array([1.0] * 18 + [0.0] * 2)
    found = interval([sample], [1.0])
    assert found == proportion_interval(18, 20)
    assert found == Interval(
        estimate=0.9, low=pytest.approx(0.699, abs=1e-3), high=pytest.approx(0.972, abs=1e-3)
    )
    assert proportion_interval(0, 20).low == 0
    assert proportion_interval(20, 20).high == 1


def test_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    paired_difference(binary(np.random.default_rng(0)), binary(np.random.default_rng(1)), WEIGHTS, seed=0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_five_tasks_of_500_items_take_milliseconds() -> None:
    rng = np.random.default_rng(9)
    a, b = ([rng.integers(0, 2, 500).astype(float) for _ in range(5)] for _ in range(2))
    for function in (
        lambda: interval(a, np.ones(5)),
        lambda: paired_difference(a, b, np.ones(5), seed=0),
    ):
        times = []
        for _ in range(5):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        assert min(times) < 0.05


def test_misuse_is_caught() -> None:
    one = [np.ones(3)]
    for samples, weights in (([], []), (one, [1.0, 1.0]), ([np.ones(0)], [1.0]), (one, [-1.0]), (one, [0.0])):
        with pytest.raises(AssertionError):
            interval(samples, weights)
    with pytest.raises(AssertionError, match="different items"):
        paired_difference(one, [np.ones(2)], [1.0], seed=0)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([], []),
        ([0.2], [0.2]),
        # By hand: 4 x 0.005, then 3 x 0.01, then 2 x 0.03, then 1 x 0.04 raised to the one before it.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_is_between_p_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(one <= other <= min(1.0, len(p) * one) + 1e-12 for one, other in zip(p, adjusted, strict=True))
    assert np.all(np.diff(np.array(adjusted)[np.argsort(p, kind="stable")]) >= 0)


def test_holm_keeps_the_family_to_5_percent() -> None:
    rng = np.random.default_rng(10)
    families = rng.random((2000, 6))
    wrong = sum(min(holm(family.tolist())) <= 0.05 for family in families)
    assert 0.035 <= wrong / 2000 <= 0.065


def test_mcnemar_known_values() -> None:
    # 8 items only the first solved, 2 only the second: twice P(X <= 2), X ~ Bin(10, 1/2): 2 x 56 / 1024.
    a = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 30)
    b = np.array([0.0] * 8 + [1.0] * 2 + [1.0] * 30)
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(112 / 1024)
    assert mcnemar(a, a) == 1.0


def test_one_task_gets_the_exact_p_where_items_are_right_or_wrong() -> None:
    rng = np.random.default_rng(11)
    a, b = ((rng.random(120) < chance).astype(float) for chance in (0.6, 0.5))
    found, sampled = paired_items(a, b, seed=0), paired_difference([a], [b], [1.0], seed=0)
    assert found.p == mcnemar(a, b)
    assert found.p == pytest.approx(sampled.p, abs=0.015)
    assert (found.estimate, found.low, found.high) == (sampled.estimate, sampled.low, sampled.high)
    a = a + rng.normal(0, 0.1, 120)
    assert paired_items(a, b, seed=0) == paired_difference([a], [b], [1.0], seed=0)
