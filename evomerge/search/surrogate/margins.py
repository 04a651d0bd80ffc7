"""The surrogate: a model of the scores of recipes not yet scored, learnt from those that were.

It does not model the loss. It models every item's margin (how far the right answer is ahead) as a Gaussian
process over genomes and counts, with that, the answers that would be right: a composite objective
(Astudillo and Frazier 2019, arXiv:1906.01537). One evaluation then teaches as many numbers as it has items,
where a model of the loss learns one; all items share one kernel matrix, so they cost one factorisation.

Margins come from a model's own likelihoods (`TaskScores.margin`); tasks without them (generation) are
modelled by their metric, and retention by its mean log-likelihood.

Kernel: Matérn 5/2 (Rasmussen and Williams 2006, eq. 4.17) on coordinates in [0, 1] (names are one-hot); its
length and the noise are those with the highest marginal likelihood on a grid (eq. 5.8), all items pooled,
each with its own mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.evaluation.scores import Array
from evomerge.search.spaces.space import Coordinate, Genome

NEAREST = 256
"""Scored genomes, those nearest to where the model is asked, that a fit takes in."""
ENOUGH = 8
"""Scored genomes from which on a block is modelled."""
SOFTNESS = 0.5
"""In nats: how soft the step from wrong to right is. It keeps a slope where all items are decided."""
CLIP = 6.0
"""In nats: margins beyond are clipped; the size of a very wrong margin carries no further information."""

NAMED = 0.25
"""What the one-hot feature of a name counts for: another name is as far away as 0.35 on a continuous one."""

LossOf = Callable[[Array], tuple[float, Array]]
"""The loss of tasks' values (tasks,) and its slope (tasks,): weights and head-room are its business."""

_LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
_NOISES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a block's outputs mean: the columns of its observations.

    task: (columns,) index of the task of each column. margins: (columns,) whether it is a margin; else it
    is taken as it is, a task's value being the mean over its columns.
    """

    task: NDArray[np.intp]
    margins: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedMeans:
    """Means of the tasks' values at one genome, and how they change with it.

    values: (tasks,) on the tasks' own scales (share of right answers, mean log-likelihood).
    slopes: (tasks, dimension).
    uncertainty: the posterior standard deviation in units of the columns' own, near 0 at scored genomes, 1
        where nothing near is known; of several blocks the largest.
    """

    values: Array
    slopes: Array
    uncertainty: float


class Surrogate:
    """Observations of blocks of items at genomes, and the models fitted to them.

    coordinates: of the genomes. outputs: for each block what its columns are. tasks: how many tasks.
    """

    def __init__(self, coordinates: Sequence[Coordinate], outputs: Sequence[Outputs], *, tasks: int) -> None:
        self._features = _Features(coordinates)
        self._outputs = tuple(outputs)
        self._tasks = tasks
        self._seen: list[set[bytes]] = [set() for _ in outputs]
        self._rows: list[list[Array]] = [[] for _ in outputs]
        self._values: list[list[Array]] = [[] for _ in outputs]
        self._kernel: _Kernel | None = None

    def learn(self, genome: Genome, block: int, columns: Array) -> None:
        """Take in what a genome scored on a block: (columns,) in the order of its `Outputs`."""
        key = genome.tobytes()
        if key in self._seen[block]:
            return
        self._seen[block].add(key)
        self._rows[block].append(self._features(genome))
        bounded = np.where(self._outputs[block].margins, np.clip(columns, -CLIP, CLIP), columns)
        self._values[block].append(bounded)

    def count(self, block: int) -> int:
        """Return how many genomes were scored on a block."""
        return len(self._rows[block])

    def fit(self, around: Genome, blocks: Sequence[int], *, tune: bool = True) -> Model | None:
        """Return the model of the tasks' means over some blocks, near a genome.

        tune: choose the kernel anew (else the last choice stays). None where no block has enough data.
        """
        known = [block for block in blocks if len(self._rows[block]) >= ENOUGH]
        if not known:
            return None
        with threadpool_limits(1):
            here = self._features(around)
            near = {block: self._near(block, here) for block in known}
            if tune or self._kernel is None:
                largest = max(known, key=lambda block: len(near[block]))
                rows, values = self._taken(largest, near[largest])
                self._kernel = _tuned(rows, values)
            fitted = [
                _Block.fit(*self._taken(block, near[block]), self._outputs[block], self._kernel)
                for block in known
            ]
        return Model(self._features, fitted, tasks=self._tasks)

    def _near(self, block: int, here: Array) -> list[int]:
        rows = np.array(self._rows[block])
        if len(rows) <= NEAREST:
            return list(range(len(rows)))
        order = np.argsort(((rows - here) ** 2).sum(axis=1), kind="stable")
        return sorted(int(i) for i in order[:NEAREST])

    def _taken(self, block: int, indices: Sequence[int]) -> tuple[Array, Array]:
        rows, values = self._rows[block], self._values[block]
        return np.array([rows[i] for i in indices]), np.array([values[i] for i in indices])


class Model:
    """A fitted surrogate. Get one from `Surrogate.fit`."""

    def __init__(self, features: _Features, blocks: Sequence[_Block], *, tasks: int) -> None:
        self._features, self._blocks, self._tasks = features, tuple(blocks), tasks
        counts = np.zeros(tasks)
        for block in self._blocks:
            counts += np.bincount(block.outputs.task, minlength=tasks)
        self._counts = np.maximum(counts, 1)

    def predict(
        self, genome: Genome, *, optimism: float = 0.0, pending: Pending | None = None
    ) -> PredictedMeans:
        """Predict at a genome.

        optimism: in posterior standard deviations, added to every margin (an upper confidence bound).
        pending: genomes about to be scored; their values count as known.
        """
        here = self._features(genome)
        values = np.zeros(self._tasks)
        slopes = np.zeros((self._tasks, len(here)))
        spread = 0.0
        for index, block in enumerate(self._blocks):
            known = block.known if pending is None else pending.known[index]
            spread = max(spread, block.predict(here, values, slopes, optimism=optimism, known=known))
        values /= self._counts
        slopes /= self._counts[:, None]
        return PredictedMeans(values=values, slopes=self._features.back(slopes), uncertainty=spread)

    def values(
        self, genomes: Sequence[Genome] | Array, *, optimism: float = 0.0, pending: Pending | None = None
    ) -> Array:
        """Return (n, tasks): the predictions of `predict` for every genome, without derivatives."""
        here = np.array([self._features(genome) for genome in genomes])
        found = np.zeros((len(here), self._tasks))
        for index, block in enumerate(self._blocks):
            known = block.known if pending is None else pending.known[index]
            found += block.values(here, self._tasks, optimism=optimism, known=known)
        return found / self._counts

    def draws(self, genomes: Sequence[Genome] | Array, normals: Array) -> Array:
        """Return (draws, n, tasks): what the tasks' values at some genomes may be, drawn jointly.

        normals: (draws, n, tasks), standard normal. The items of a task err together, in all blocks: what
        the kernel does not know about a genome it does not know about any of them.
        """
        here = np.array([self._features(genome) for genome in genomes])
        found = np.zeros((len(normals), len(here), self._tasks))
        for block in self._blocks:
            found += block.draws(here, normals)
        return found / self._counts

    def expected(self, genome: Genome) -> Array:
        """Return (tasks,) the values of the expected margins.

        `predict` has the expected values: it takes the uncertainty of margins into account, which draws what
        is uncertain towards one half.
        """
        here = self._features(genome)
        found = np.zeros(self._tasks)
        for block in self._blocks:
            _counted(
                found, block.outputs, block.mean + block.kernel(here[None], block.rows)[0] @ block.weights
            )
        return found / self._counts

    def deviations(self, genome: Genome, uncertainty: float) -> Array:
        """Return (tasks,) how far values of expected margins move with one standard deviation of the margins.

        The items of a task err together: what the kernel does not know about a genome it does not know about
        any of them. uncertainty: of the margins, as in `PredictedMeans`.
        """
        here = self._features(genome)
        found = np.zeros(self._tasks)
        for block in self._blocks:
            mean = block.mean + block.kernel(here[None], block.rows)[0] @ block.weights
            block.move(found, mean, uncertainty)
        return found / self._counts

    def left_out(self, uncertainty: float = 0.0) -> LeftOut:
        """Return, for each genome of the largest block, what others, far from it, expect.

        Those nearest to it are left out, itself and as many more as make it at least this uncertain (as in
        `PredictedMeans`). Rows are in the order in which they were learnt.
        """
        block = max(self._blocks, key=lambda b: len(b.rows))
        gram = block.kernel(block.rows, block.rows)
        count = len(block.rows)
        values, deviations = np.zeros((count, self._tasks)), np.zeros((count, self._tasks))
        used = np.zeros(count, dtype=np.intp)
        for row in range(count):
            mean, used[row], reached = block.from_afar(row, gram, uncertainty)
            _counted(values[row], block.outputs, mean)
            block.move(deviations[row], mean, reached)
        own = np.maximum(np.bincount(block.outputs.task, minlength=self._tasks), 1)
        return LeftOut(values=values / own, deviations=deviations / own, used=used)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What a model expects of genomes that it was not told of.

    values, deviations: (n, tasks) as `Model.expected` and `Model.deviations`. used: (n,) how many genomes
    each was predicted from.
    """

    values: Array
    deviations: Array
    used: NDArray[np.intp]


class Pending:
    """Genomes about to be scored, which reduce the model's uncertainty (Desautels et al. 2014)."""

    def __init__(self, model: Model, genomes: Sequence[Genome]) -> None:
        extra = np.array([model._features(genome) for genome in genomes])
        self.known = [block.extended(extra) for block in model._blocks]


class _Features:
    """Genomes as points in which distances mean something: names one-hot, the rest times its length."""

    def __init__(self, coordinates: Sequence[Coordinate]) -> None:
        self._discrete = [(i, c) for i, c in enumerate(coordinates) if c.levels is not None]
        self._lengths = np.array([c.length if c.levels is None else 0.0 for c in coordinates])
        widths = [1 if c.levels is None or c.ordered else c.levels for c in coordinates]
        self._from = np.cumsum([0, *widths[:-1]])
        """Of every coordinate its first feature."""
        self._width = sum(widths)

    def back(self, slopes: Array) -> Array:
        """Return slopes in features, (n, features), as slopes in coordinates, 0 in those of bins."""
        found: Array = slopes[:, self._from] * self._lengths
        return found

    def __call__(self, genome: Genome) -> Array:
        found = np.zeros(self._width)
        found[self._from] = genome * self._lengths
        for index, coordinate in self._discrete:
            assert coordinate.levels is not None
            at, level = self._from[index], coordinate.level(float(genome[index]))
            if coordinate.ordered:
                found[at] = coordinate.middle(level)
            else:
                found[at : at + coordinate.levels] = 0.0
                found[at + level] = NAMED
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    length: float
    noise: float

    def __call__(self, a: Array, b: Array) -> Array:
        """Return (n, m) the correlations of points a (n, features) and b (m, features)."""
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
        return self.bell(squares)[0]

    def bell(self, squares: Array) -> tuple[Array, Array]:
        """Return the correlations at squared distances, and their falls f: slopes are -f times the step."""
        far = np.sqrt(5 * np.maximum(squares, 0.0)) / self.length
        decay = np.exp(-far)
        return (1 + far + far**2 / 3) * decay, 5 / 3 / self.length**2 * (1 + far) * decay


def _tuned(rows: Array, values: Array) -> _Kernel:
    """Return the kernel with the highest marginal likelihood of all columns, each scaled to variance 1."""
    best, chosen = np.inf, _Kernel(length=1.0, noise=1e-2)
    centred = values - values.mean(axis=0)
    scale = centred.std(axis=0)
    varied = scale > 0
    if not varied.any():
        return chosen
    scaled = centred[:, varied] / scale[varied]
    energy = scaled @ scaled.T
    count, columns = scaled.shape
    for length in _LENGTHS:
        gram = _Kernel(length=length, noise=0.0)(rows, rows)
        eigenvalues, vectors = scipy.linalg.eigh(gram, driver="evd")
        along = ((energy @ vectors) * vectors).sum(axis=0)
        for noise in _NOISES:
            lifted = np.maximum(eigenvalues, 0.0) + noise
            variance = float((along / lifted).sum()) / (columns * count)
            loss = count * np.log(max(variance, 1e-300)) + float(np.log(lifted).sum())
            if loss < best:
                best, chosen = loss, _Kernel(length=length, noise=noise)
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Genomes whose values are known, or will be, as points: (n, features), and the inverse (n, n) of their
    kernel matrix with noise. squares: (n,) of their lengths."""

    rows: Array
    squares: Array
    inverse: Array

    @classmethod
    def of(cls, rows: Array, factor: Array) -> _Rows:
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(rows)), check_finite=False)
        return cls(rows=rows, squares=(rows**2).sum(axis=1), inverse=inverse)

    def bell(self, here: Array, kernel: _Kernel) -> tuple[Array, Array]:
        """Return (n,) the correlations with a point, and (n,) their falls."""
        return kernel.bell(self.squares - 2 * (self.rows @ here) + here @ here)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The Gaussian processes of one block's columns; they share kernel and factor.

    known: the genomes it was fitted to. weights: (n, columns). mean, variance: (columns,). present, starts:
    the tasks that have columns, and where these begin.
    """

    known: _Rows
    weights: Array
    residuals: Array
    mean: Array
    variance: Array
    kernel: _Kernel
    outputs: Outputs
    present: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def fit(cls, rows: Array, values: Array, outputs: Outputs, kernel: _Kernel) -> _Block:
        order = np.argsort(outputs.task, kind="stable")  # columns of a task lie together
        outputs, values = Outputs(task=outputs.task[order], margins=outputs.margins[order]), values[:, order]
        present, starts = np.unique(outputs.task, return_index=True)
        factor = _factor(kernel, rows)
        mean = values.mean(axis=0)
        residuals = values - mean
        half = scipy.linalg.solve_triangular(factor, residuals, lower=True, check_finite=False)
        weights = scipy.linalg.solve_triangular(factor, half, lower=True, trans="T", check_finite=False)
        return cls(
            known=_Rows.of(rows, factor),
            weights=weights,
            residuals=residuals,
            mean=mean,
            variance=(half**2).mean(axis=0),
            kernel=kernel,
            outputs=outputs,
            present=present,
            starts=starts,
        )

    @property
    def rows(self) -> Array:
        """(n, features)."""
        return self.known.rows

    def predict(self, here: Array, values: Array, slopes: Array, *, optimism: float, known: _Rows) -> float:
        """Add this block's sums to `values` and `slopes`; return the relative standard deviation.

        known: what the uncertainty takes for known, the block's own rows or more.
        """
        column, fall = self.known.bell(here, self.kernel)
        mean = self.mean + column @ self.weights
        near, near_fall = (column, fall) if known is self.known else known.bell(here, self.kernel)
        back = known.inverse @ near
        spread = float(np.sqrt(max(1.0 - float(near @ back), 1e-12)))
        spread_change = -_change(back, known, near_fall, here) / spread
        deviation = np.sqrt(self.variance)
        margins = self.outputs.margins
        width = np.where(margins, np.sqrt(SOFTNESS**2 + spread**2 * self.variance), 1.0)
        lifted = mean + optimism * spread * deviation
        score = lifted / width
        density = np.exp(-0.5 * score**2) / np.sqrt(2 * np.pi)
        value = np.where(margins, scipy.special.ndtr(score), lifted)
        # d value = by_mean d mean + by_spread d spread
        by_mean = np.where(margins, density / width, 1.0)
        by_spread = by_mean * optimism * deviation
        by_spread -= np.where(margins, density * lifted * spread * self.variance / width**3, 0.0)
        values[self.present] += np.add.reduceat(value, self.starts)
        of_task = zip(
            np.split(self.weights, self.starts[1:], axis=1), np.split(by_mean, self.starts[1:]), strict=True
        )
        by_row = np.array([weights @ change for weights, change in of_task])  # (present, n)
        slopes[self.present] += _change(by_row, self.known, fall, here)
        slopes[self.present] += np.outer(np.add.reduceat(by_spread, self.starts), spread_change)
        return spread

    def values(self, here: Array, tasks: int, *, optimism: float, known: _Rows) -> Array:
        """Return (points, tasks) this block's sums at points (points, features); known as in `predict`."""
        column = self.kernel(here, self.rows)
        mean = self.mean + column @ self.weights
        near = column if known is self.known else self.kernel(here, known.rows)
        spread = np.maximum(1.0 - ((near @ known.inverse) * near).sum(axis=1), 1e-12)[:, None]
        lifted = mean + optimism * np.sqrt(spread * self.variance)
        width = np.sqrt(SOFTNESS**2 + spread * self.variance)
        value = np.where(self.outputs.margins, scipy.special.ndtr(lifted / width), lifted)
        found = np.zeros((len(here), tasks))
        found[:, self.present] = np.add.reduceat(value, self.starts, axis=1)
        return found

    def draws(self, here: Array, normals: Array) -> Array:
        """Return (draws, points, tasks) this block's sums at points (points, features), as `Model.draws`."""
        column = self.kernel(here, self.rows)
        mean = self.mean + column @ self.weights
        left = self.kernel(here, here) - (column @ self.known.inverse) @ column.T
        left[np.diag_indices_from(left)] += 1e-6
        values, vectors = scipy.linalg.eigh(left, driver="evd")
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        deviation, task, margins = np.sqrt(self.variance), self.outputs.task, self.outputs.margins
        found = np.zeros(normals.shape)
        for row, normal in zip(found, normals, strict=True):
            drawn = mean + (root @ normal)[:, task] * deviation
            value = np.where(margins, scipy.special.ndtr(drawn / SOFTNESS), drawn)
            row[:, self.present] = np.add.reduceat(value, self.starts, axis=1)
        return found

    def extended(self, extra: Array) -> _Rows:
        """Return the rows with further ones, whose values are not known yet."""
        rows = np.vstack([self.rows, extra])
        return _Rows.of(rows, _factor(self.kernel, rows))

    def move(self, sums: Array, mean: Array, uncertainty: float) -> None:
        """Add to sums, (tasks,), how far values of means move with a standard deviation of all margins."""
        step = uncertainty * np.sqrt(self.variance)
        high, low = np.zeros_like(sums), np.zeros_like(sums)
        _counted(high, self.outputs, mean + step)
        _counted(low, self.outputs, mean - step)
        sums += (high - low) / 2

    def from_afar(self, row: int, gram: Array, uncertainty: float) -> tuple[Array, int, float]:
        """Return (columns,) the means of a row that the rows farthest from it leave.

        Also how many these are, and how uncertain they leave it. gram: (n, n) the correlations of all rows.
        uncertainty: what the rows that are used leave at least.
        """
        order = np.argsort(gram[row], kind="stable")
        order = order[order != row]
        kernel = gram[np.ix_(order, order)]
        kernel[np.diag_indices_from(kernel)] += self.kernel.noise + 1e-10
        factor = scipy.linalg.cholesky(kernel, lower=True, check_finite=False)
        near = scipy.linalg.solve_triangular(factor, gram[row, order], lower=True, check_finite=False)
        variances = np.concatenate([[1.0], np.maximum(1.0 - np.cumsum(near**2), 0.0)])
        count = max(int((variances >= uncertainty**2).sum()) - 1, 0)
        used = scipy.linalg.solve_triangular(
            factor[:count, :count], near[:count], lower=True, trans="T", check_finite=False
        )
        found: Array = self.mean + used @ self.residuals[order[:count]]
        return found, count, float(np.sqrt(variances[count]))


def _factor(kernel: _Kernel, rows: Array) -> Array:
    """Return (n, n) the lower Cholesky factor of the kernel matrix of rows, noise included."""
    gram = kernel(rows, rows)
    gram[np.diag_indices_from(gram)] += kernel.noise + 1e-10
    factor: Array = scipy.linalg.cholesky(gram, lower=True, check_finite=False)
    return factor


def _change(weights: Array, known: _Rows, fall: Array, here: Array) -> Array:
    """Return how weighted sums (weights over the last axis) of correlations change with the point."""
    fallen = weights * fall
    found: Array = fallen @ known.rows - fallen.sum(axis=-1)[..., None] * here
    return found


def _counted(sums: Array, outputs: Outputs, mean: Array) -> None:
    value = np.where(outputs.margins, scipy.special.ndtr(mean / SOFTNESS), mean)
    sums += np.bincount(outputs.task, weights=value, minlength=len(sums))
