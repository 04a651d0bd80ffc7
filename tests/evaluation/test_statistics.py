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
    PairedTest,
    interval,
    paired_difference,
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
    found = [interval(draw(rng), WEIGHTS, seed=trial) for trial in range(trials)]
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


def test_bootstrap_agrees_with_scipy() -> None:
    rng = np.random.default_rng(6)
    for sample in (rng.gamma(2.0, size=100), rng.integers(0, 3, size=100).astype(float)):
        found = interval([sample], [1.0], seed=0)
        expected = scipy.stats.bootstrap(
            (sample,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
        ).confidence_interval
        assert found.low == pytest.approx(expected.low, abs=0.02)
        assert found.high == pytest.approx(expected.high, abs=0.02)


scores = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=30).map(np.array)


@settings(max_examples=30, deadline=None)
@given(st.lists(scores, min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_model_does_not_differ_from_itself(samples: list[Array], seed: int) -> None:
    found = paired_difference(samples, samples, np.ones(len(samples)), seed=seed)
    assert found == PairedTest(estimate=0.0, low=0.0, high=0.0, p=1.0)


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
    assert interval(a, WEIGHTS, seed=1) == interval(a, WEIGHTS, seed=1)
    assert interval(a, WEIGHTS, seed=1) != interval(a, WEIGHTS, seed=2)
    sequence = np.random.SeedSequence(1)
    first = paired_difference(a, b, WEIGHTS, seed=sequence)
    assert paired_difference(a, b, WEIGHTS, seed=sequence) == first  # using a sequence does not use it up


def test_a_single_task_of_zeros_and_ones_gets_wilson() -> None:
    sample = np.array([1.0] * 18 + [0.0] * 2)
    found = interval([sample], [1.0], seed=0)
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
        lambda: interval(a, np.ones(5), seed=0),
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
            interval(samples, weights, seed=0)
    with pytest.raises(AssertionError, match="different items"):
        paired_difference(one, [np.ones(2)], [1.0], seed=0)
