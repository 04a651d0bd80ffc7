"""What scores are worth: values, slopes, floors."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.search.utility import Utility, levels_of

SHARES = np.array([0.25, 0.75])
FLAT, BENT = Utility(shares=SHARES), Utility(shares=SHARES, concave=True)
UTILITIES = {
    "mean": FLAT,
    "balanced": BENT,
    "floors": FLAT.above(np.array([0.3, -np.inf]), 1.0).above(np.array([0.5, 0.6]), 2.0),
    "balanced, with floors": BENT.above(np.array([0.3, 0.2]), 1.0),
}


@pytest.mark.parametrize("name", UTILITIES)
@pytest.mark.parametrize("scores", [(-0.4, 0.1), (0.2, 0.55), (0.4, 0.7), (1.3, 0.9)])
def test_slopes_are_finite_differences(name: str, scores: tuple[float, float]) -> None:
    utility, here, step = UTILITIES[name], np.array(scores), 1e-6
    _, slopes = utility(here)
    for axis, unit in enumerate(np.eye(2)):
        higher, lower = (float(utility(here + by * unit)[0].sum()) for by in (step, -step))
        assert slopes[axis] == pytest.approx((higher - lower) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("name", ["mean", "balanced"])
def test_the_base_is_worth_nothing_and_the_specialists_one(name: str) -> None:
    utility = UTILITIES[name]
    assert utility(np.zeros(2))[0].sum() == 0
    assert utility(np.ones(2))[0].sum() == pytest.approx(1)


def test_below_its_floor_a_task_costs_more_than_it_can_gain_elsewhere() -> None:
    floored = FLAT.above(levels_of(["a", "b"], {"a": 0.5}), 1.0)
    assert not floored.linear
    assert FLAT.linear
    kept, traded = floored(np.array([0.5, 0.5]))[0].sum(), floored(np.array([0.3, 0.7]))[0].sum()
    assert traded < kept
    assert floored(np.array([0.6, 0.1]))[0].tolist() == FLAT(np.array([0.6, 0.1]))[0].tolist()
    assert FLAT.above(levels_of(["a", "b"], {}), 1.0) is FLAT
