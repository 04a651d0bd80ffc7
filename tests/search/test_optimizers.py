"""The contract every optimizer meets. A new optimizer is a new row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evomerge.search.optimizers import Optimizer, OptimizerSpec, create

DIMENSION = 6
Make = Callable[[int], Optimizer]


def _make(**settings: object) -> Make:
    spec = OptimizerSpec.model_validate(settings)
    return lambda seed: create(spec, start=np.full(DIMENSION, 0.5), seed=np.random.SeedSequence(seed))


ROWS = [
    pytest.param(_make(name="cma_es"), id="cma_es"),
    pytest.param(_make(name="cma_es", population=5, sigma=0.4), id="cma_es-small-population"),
]
pytestmark = pytest.mark.parametrize("make", ROWS)


def sphere(genomes: np.ndarray) -> np.ndarray:
    return ((genomes - 0.8) ** 2).sum(axis=1, keepdims=True)


def run(optimizer: Optimizer, generations: int) -> list[np.ndarray]:
    asked = []
    for _ in range(generations):
        genomes = optimizer.ask()
        asked.append(genomes)
        optimizer.tell(sphere(genomes))
    return asked


def test_asks_for_read_only_genomes_in_the_cube(make: Make) -> None:
    for genomes in run(make(0), 20):
        assert genomes.ndim == 2
        assert genomes.shape[1] == DIMENSION
        assert ((genomes >= 0) & (genomes <= 1)).all()
        assert not genomes.flags.writeable


def test_same_seed_same_genomes_and_another_seed_others(make: Make) -> None:
    first, again, other = run(make(3), 5), run(make(3), 5), run(make(4), 5)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all()


def test_replaying_losses_continues_bit_for_bit(make: Make) -> None:
    optimizer = make(1)
    asked = run(optimizer, 8)
    replayed = make(1)
    for genomes in asked:
        assert (replayed.ask() == genomes).all()
        replayed.tell(sphere(genomes))
    assert (optimizer.ask() == replayed.ask()).all()


def test_leaves_the_global_generator_alone(make: Make) -> None:
    before = np.random.get_state()[1].copy()
    run(make(0), 3)
    assert (np.random.get_state()[1] == before).all()


def test_does_not_modify_the_losses(make: Make) -> None:
    optimizer = make(0)
    losses = sphere(optimizer.ask())
    kept = losses.copy()
    optimizer.tell(losses)
    assert (losses == kept).all()


def test_makes_progress(make: Make) -> None:
    asked = run(make(0), 60)
    assert sphere(asked[-1]).min() < 0.05 * sphere(asked[0]).min()


def test_its_favourite_is_good(make: Make) -> None:
    optimizer = make(0)
    asked = run(optimizer, 60)
    favourite = optimizer.favourite()
    assert favourite is not None
    assert sphere(favourite[None]).item() <= np.median(sphere(asked[-1]))


def test_flat_losses_do_not_stop_it(make: Make) -> None:
    optimizer = make(0)
    for _ in range(20):
        optimizer.tell(np.ones((len(optimizer.ask()), 1)))
        assert optimizer.stop_reason() is None


def test_refuses_a_wrong_order_of_calls(make: Make) -> None:
    optimizer = make(0)
    with pytest.raises(RuntimeError, match="ask for a generation first"):
        optimizer.tell(np.ones((4, 1)))
    optimizer.ask()
    with pytest.raises(RuntimeError, match="tell the losses"):
        optimizer.ask()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_losses_that_are_not_finite(make: Make, bad: float) -> None:
    optimizer = make(0)
    losses = sphere(optimizer.ask())
    losses[0] = bad
    with pytest.raises(ValueError, match="finite"):
        optimizer.tell(losses)


def test_refuses_losses_of_another_shape(make: Make) -> None:
    optimizer = make(0)
    count = len(optimizer.ask())
    with pytest.raises(ValueError, match="shape"):
        optimizer.tell(np.ones((count + 1, 1)))


def test_the_start_counts(make: Make) -> None:
    asked = make(0).ask()
    assert np.abs(asked - 0.5).mean() < 0.35
