"""The surrogate on margins that are known functions of the genome."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.special

from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.margins import (
    CLIP,
    ENOUGH,
    NEAREST,
    SOFTNESS,
    Model,
    Outputs,
    Pending,
    Surrogate,
)

DIMENSION, ITEMS = 4, 12
CONTINUOUS = (Coordinate(),) * DIMENSION
MIXED = (Coordinate(), Coordinate(), Coordinate(levels=5), Coordinate(levels=3, ordered=False))
OUTPUTS = Outputs(  # two tasks with margins, and one (its last four columns) without
    task=np.repeat([0, 1, 2], [5, 3, 4]), margins=np.repeat([True, True, False], [5, 3, 4])
)
_rng = np.random.default_rng(0)
DIRECTIONS, SHIFTS = _rng.normal(0, 1.5, (DIMENSION, ITEMS)), _rng.normal(0, 1, ITEMS)


def margins(genome: Genome) -> np.ndarray:
    """Twelve smooth functions of a genome."""
    along: np.ndarray = (genome - 0.5) @ DIRECTIONS
    return along + SHIFTS - 2 * ((genome - 0.6) ** 2).sum()


def soft(columns: np.ndarray) -> np.ndarray:
    """(tasks,) means of columns, right answers counted softly."""
    value = np.where(OUTPUTS.margins, scipy.special.ndtr(columns / SOFTNESS), columns)
    return np.array([value[OUTPUTS.task == task].mean() for task in range(3)])


def taught(
    count: int,
    *,
    coordinates: tuple[Coordinate, ...] = CONTINUOUS,
    of: Callable[[Genome], np.ndarray] = margins,
    blocks: int = 1,
    seed: int = 1,
) -> Surrogate:
    """A surrogate that learnt `count` random genomes on every block."""
    surrogate = Surrogate(coordinates, [OUTPUTS] * blocks, tasks=3)
    generator = np.random.default_rng(seed)
    for genome in generator.random((count, len(coordinates))):
        for block in range(blocks):
            surrogate.learn(genome, block, of(genome) + block)
    return surrogate


def fitted(surrogate: Surrogate, blocks: tuple[int, ...] = (0,)) -> Model:
    model = surrogate.fit(np.full(DIMENSION, 0.5), blocks)
    assert model is not None
    return model


def test_predicts_what_it_was_not_shown() -> None:
    model = fitted(taught(60))
    unseen = np.random.default_rng(2).random((20, DIMENSION))
    found = np.array([model.predict(genome).values for genome in unseen])
    true = np.array([soft(margins(genome)) for genome in unseen])
    assert np.abs(found - true).max() < 0.05
    assert np.abs(true - true.mean(axis=0)).max() > 0.2  # there was something to predict


def test_is_certain_of_what_it_was_shown_and_of_nothing_far_away() -> None:
    generator = np.random.default_rng(1)
    shown = generator.random((60, DIMENSION))
    model = fitted(taught(60))
    for genome in shown[:5]:
        assert model.predict(genome).values == pytest.approx(soft(margins(genome)), abs=0.02)
        assert model.predict(genome).uncertainty < 0.2
    assert model.predict(np.full(DIMENSION, 40.0)).uncertainty > 0.3


@pytest.mark.parametrize("optimism", [0.0, 0.7])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_slopes_are_finite_differences(optimism: float, pending: bool, blocks: int) -> None:
    model = fitted(taught(30, blocks=blocks), tuple(range(blocks)))
    extra = Pending(model, np.random.default_rng(4).random((3, DIMENSION))) if pending else None
    here, step = np.array([0.3, 0.7, 0.45, 0.6]), 1e-5

    def values(genome: Genome) -> np.ndarray:
        return model.predict(genome, optimism=optimism, pending=extra).values

    slopes = model.predict(here, optimism=optimism, pending=extra).slopes
    for axis, unit in enumerate(np.eye(DIMENSION)):
        expected = (values(here + step * unit) - values(here - step * unit)) / (2 * step)
        assert slopes[:, axis] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_optimism_raises_values_and_pending_genomes_lower_the_uncertainty() -> None:
    model = fitted(taught(12))
    here = np.array([0.9, 0.1, 0.9, 0.1])
    plain, hopeful = model.predict(here), model.predict(here, optimism=1.0)
    assert (hopeful.values > plain.values).all()
    pending = Pending(model, [here])
    told = model.predict(here, pending=pending)
    assert told.uncertainty < 0.5 * plain.uncertainty
    assert model.predict(here, optimism=1.0, pending=pending).values.sum() < hopeful.values.sum()
    metric = OUTPUTS.task[~OUTPUTS.margins][0]
    assert told.values[metric] == plain.values[metric]  # nobody knows yet what they will score


def test_left_out_is_what_the_others_predict() -> None:
    count = 14
    genomes = np.random.default_rng(1).random((count, DIMENSION))
    model = fitted(taught(count))
    block = model._blocks[0]
    left = model.left_out()
    found = left.values
    assert left.used.tolist() == [count - 1] * count
    for row in (0, 5, 13):  # from the definition: solve without the row, mean and kernel kept
        others = np.delete(np.arange(count), row)
        gram = block.kernel(genomes[others], genomes[others])
        gram += (block.kernel.noise + 1e-10) * np.eye(count - 1)
        along = block.kernel(genomes[[row]], genomes[others])[0]
        mean = block.mean + along @ np.linalg.solve(gram, block.residuals[others])
        value = np.where(OUTPUTS.margins, scipy.special.ndtr(mean / SOFTNESS), mean)
        expected = [value[OUTPUTS.task == task].mean() for task in range(3)]
        assert found[row] == pytest.approx(expected, rel=1e-6)


def test_left_out_are_as_many_neighbours_as_make_a_genome_as_uncertain_as_was_asked() -> None:
    count = 14
    genomes = np.random.default_rng(1).random((count, DIMENSION))
    model = fitted(taught(count))
    block = model._blocks[0]
    gram = block.kernel(genomes, genomes)
    for row in (0, 5, 13):
        order = np.argsort(gram[row])[:-1]  # the farthest first
        for used in range(count):
            far = order[:used]
            noisy = gram[np.ix_(far, far)] + (block.kernel.noise + 1e-10) * np.eye(used)
            solved = np.linalg.solve(noisy, np.column_stack([gram[row, far], block.residuals[far]]))
            uncertainty = np.sqrt(1 - gram[row, far] @ solved[:, 0])
            found, counted, reached = block.from_afar(row, gram, uncertainty - 1e-9)
            assert counted == used
            assert reached == pytest.approx(uncertainty, abs=1e-6)
            assert found == pytest.approx(block.mean + gram[row, far] @ solved[:, 1:], abs=1e-6)
            assert used == 0 or block.from_afar(row, gram, uncertainty + 1e-9)[1] < used


def test_deviations_are_what_a_standard_deviation_of_all_margins_moves() -> None:
    model, genome = fitted(taught(14)), np.full(DIMENSION, 0.45)
    (block,) = model._blocks
    mean = block.mean + block.kernel(genome[None], block.rows)[0] @ block.weights
    ends = []
    for sign in (1, -1):
        moved = mean + sign * 0.5 * np.sqrt(block.variance)
        value = np.where(block.outputs.margins, scipy.special.ndtr(moved / SOFTNESS), moved)
        ends.append([value[block.outputs.task == task].mean() for task in range(3)])
    assert model.deviations(genome, 0.5) == pytest.approx(np.subtract(*ends) / 2)
    assert model.deviations(genome, 0.0) == pytest.approx(0.0)
    left = model.left_out(0.5)
    assert left.deviations.shape == left.values.shape
    assert (left.deviations > model.left_out().deviations).mean() > 0.9


def test_the_expected_margins_are_those_of_the_prediction_where_they_are_certain() -> None:
    surrogate = taught(14)
    model, genome = fitted(surrogate), np.random.default_rng(1).random((14, DIMENSION))[3]
    assert model.expected(genome) == pytest.approx(model.predict(genome).values, abs=0.02)


def test_the_same_data_gives_the_same_bits() -> None:
    here = np.full(DIMENSION, 0.4)
    first, second = (fitted(taught(40)).predict(here, optimism=0.5) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes()
    assert first.slopes.tobytes() == second.slopes.tobytes()


def test_names_are_no_numbers_and_have_no_slope() -> None:
    """The best of three names is the middle one; as a number, its neighbours would pull it down."""

    def of(genome: Genome) -> np.ndarray:
        level = MIXED[3].level(genome[3])
        return np.full(ITEMS, (-1.5, 1.5, -1.5)[level] + 0.5 * (genome[0] - 0.5))

    model = fitted(taught(40, coordinates=MIXED, of=of))
    found = [model.predict(np.array([0.5, 0.5, 0.5, MIXED[3].middle(i)])).values[0] for i in range(3)]
    assert found[1] > 0.95
    assert max(found[0], found[2]) < 0.05
    slopes = model.predict(np.array([0.5, 0.5, 0.5, 0.5])).slopes
    assert slopes.shape == (3, 4)
    assert (slopes[:, 2:] == 0).all()
    assert slopes[2, 0] > 0.3
    inside = [model.predict(np.array([0.5, 0.5, 0.5, u])).values.tobytes() for u in (0.34, 0.65)]
    assert inside[0] == inside[1]  # all of a bin means the same


def test_too_few_genomes_are_no_model_and_blocks_without_enough_are_left_out() -> None:
    assert taught(ENOUGH - 1).fit(np.full(DIMENSION, 0.5), [0]) is None
    surrogate = taught(ENOUGH, blocks=2)
    other = Surrogate(CONTINUOUS, [OUTPUTS] * 2, tasks=3)
    for genome in np.random.default_rng(1).random((ENOUGH, DIMENSION)):
        other.learn(genome, 0, margins(genome))
    here = np.full(DIMENSION, 0.3)
    alone = fitted(other, (0, 1)).predict(here)
    assert alone.values == pytest.approx(fitted(surrogate, (0,)).predict(here).values)
    assert other.count(1) == 0


def test_a_genome_is_learnt_once_and_margins_are_clipped() -> None:
    surrogate = taught(20, of=lambda _: np.full(ITEMS, 1000.0))
    surrogate.learn(np.random.default_rng(1).random((1, DIMENSION))[0], 0, np.zeros(ITEMS))
    assert surrogate.count(0) == 20
    values = fitted(surrogate).predict(np.full(DIMENSION, 0.5)).values
    assert values == pytest.approx([1.0, 1.0, 1000.0])
    assert scipy.special.ndtr(CLIP / SOFTNESS) == 1.0


def test_where_nothing_varies_it_predicts_that() -> None:
    constant = np.linspace(-1, 1, ITEMS) / 3
    model = fitted(taught(25, of=lambda _: constant))
    found = model.predict(np.array([0.1, 0.9, 0.2, 0.3]), optimism=0.5)
    assert found.values == pytest.approx(soft(constant), abs=1e-6)
    assert np.abs(found.slopes).max() < 1e-6

    def one_varies(genome: Genome) -> np.ndarray:
        return np.append(constant[:-1], 3 * genome[0])

    alone = taught(25, of=lambda genome: np.full(ITEMS, 3 * genome[0]))
    beside = taught(25, of=one_varies)
    fitted(alone), fitted(beside)
    assert alone._kernel == beside._kernel  # constant columns have no say in it


def test_only_the_nearest_are_taken_in() -> None:
    surrogate = taught(NEAREST + 40)
    model = surrogate.fit(np.zeros(DIMENSION), [0])
    assert model is not None
    assert len(model.left_out().used) == NEAREST
    genomes = np.random.default_rng(1).random((NEAREST + 40, DIMENSION))
    far = np.argsort((genomes**2).sum(axis=1))[-1]
    near = np.argsort((genomes**2).sum(axis=1))[0]
    rows = {row.tobytes() for row in model._blocks[0].rows}
    assert genomes[near].tobytes() in rows
    assert genomes[far].tobytes() not in rows


@pytest.mark.parametrize("optimism", [0.0, 0.7])
@pytest.mark.parametrize("pending", [False, True])
def test_many_at_once_are_what_each_is(optimism: float, pending: bool) -> None:
    model = fitted(taught(30, blocks=2), (0, 1))
    genomes = np.random.default_rng(4).random((5, DIMENSION))
    extra = Pending(model, genomes[:2]) if pending else None
    found = model.values(genomes, optimism=optimism, pending=extra)
    one_by_one = [model.predict(genome, optimism=optimism, pending=extra).values for genome in genomes]
    assert found == pytest.approx(np.array(one_by_one), abs=1e-9)


def test_draws_are_joint_and_lie_around_the_prediction() -> None:
    model = fitted(taught(60, blocks=2), (0, 1))
    shown = np.random.default_rng(1).random((1, DIMENSION))
    unseen = np.random.default_rng(2).random((1, DIMENSION))
    genomes = np.concatenate([shown, unseen, unseen + 0.01, [np.full(DIMENSION, 9.0)]])
    draws = model.draws(genomes, np.random.default_rng(3).standard_normal((400, 4, 3)))
    assert draws.mean(axis=0)[:3] == pytest.approx(model.values(genomes)[:3], abs=0.03)
    spread = draws.std(axis=0)
    assert (spread[0] < spread[1]).all()
    assert (spread[1] < spread[3]).all()
    for task in range(3):
        assert np.corrcoef(draws[:, 1, task], draws[:, 2, task])[0, 1] > 0.9


def test_lengths_of_coordinates_are_those_of_a_stretched_space() -> None:
    lengths = np.array([0.5, 2.0, 1.0, 0.0])
    found = fitted(taught(40, coordinates=tuple(Coordinate(length=length) for length in lengths)))
    plain = Surrogate(CONTINUOUS, [OUTPUTS], tasks=3)
    for genome in np.random.default_rng(1).random((40, DIMENSION)):
        plain.learn(genome * lengths, 0, margins(genome))
    expected = plain.fit(np.full(DIMENSION, 0.5) * lengths, [0])
    assert expected is not None
    genome = np.array([0.3, 0.6, 0.2, 0.9])
    here, there = found.predict(genome), expected.predict(genome * lengths)
    assert here.values == pytest.approx(there.values)
    assert here.slopes == pytest.approx(there.slopes * lengths)
