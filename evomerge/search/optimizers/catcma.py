"""CatCMA with margin (Hamano et al. 2025, arXiv:2504.07884): CMA-ES for mixed spaces, through cmaes.

A normal distribution over continuous and ordered coordinates, a categorical one over names, both
learned together; a margin keeps every level possible. For two objectives several of them share the
front (COMO-CatCMA with margin, same paper): each improves the hypervolume beyond the others' points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.optimizers.cube import Cube

_LARGEST_STEP = 1e3
"""Standard deviation, in unit cubes, at which CatCMA has run away."""
_SMALLEST_STEP = 1e-6
_KERNELS = 5


class CatCma:
    """One CatCMAwM in the unit cube.

    start: (dimension,) initial mean; its names begin with half of the probability. sigma: initial
    standard deviation. population: candidates per generation, by default 4 + floor(3 ln(dimension)).
    """

    fixed = 0

    def __init__(
        self,
        cube: Cube,
        *,
        start: NDArray[np.float64],
        sigma: float = 0.15,
        population: int | None = None,
        seed: np.random.SeedSequence,
    ) -> None:
        self._coding = _Coding(cube)
        self.population = population or cube.default_population()
        self._sigma, self._seed, self._restarts = sigma, seed, 0
        self._es = self._coding.build(start, sigma, self.population, seed)
        self._sampled: list[Any] = []
        self._rows = np.empty((0, cube.dimension))
        self._best: tuple[float, NDArray[np.float64]] = (np.inf, start)

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then samples of the joint distribution."""
        drawn = [self._es.ask() for _ in range(count - len(given))]
        self._sampled = [self._coding.solution(row, self._es) for row in given] + drawn
        self._rows = np.vstack([given, *(self._coding.row(solution)[None] for solution in drawn)])
        return self._rows

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Update both distributions; begin anew at the best row where the step size has run away.

        It does where a screen keeps only samples from one side for long: the path of the means then
        never turns, and on coordinates of bins nothing else holds the steps back.
        """
        first = int(np.argmin(losses[:, 0]))
        self._best = min(
            self._best, (float(losses[first, 0]), self._rows[chosen[first]].copy()), key=lambda pair: pair[0]
        )
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                told = zip(chosen, losses[:, 0], strict=True)
                self._es.tell([(self._sampled[i], loss) for i, loss in told])
                sane = self._coding.largest_step(self._es) < _LARGEST_STEP
            except (AssertionError, np.linalg.LinAlgError):  # cmaes' own word for values without bounds
                sane = False
        if not sane:
            self._restarts += 1
            key = (*self._seed.spawn_key, self._restarts)
            seed = np.random.SeedSequence(self._seed.entropy, spawn_key=key)
            self._es = self._coding.build(self._best[1], self._sigma, self.population, seed)

    def stop_reason(self) -> str | None:
        """Say that the continuous part has converged where there is no other, or None."""
        if not self._coding.purely_continuous:
            return None
        step = self._es._sigma * np.sqrt(np.diag(self._es._C)).max()
        return "CatCMA converged" if step < _SMALLEST_STEP else None

    def favourite(self) -> NDArray[np.float64]:
        """Return the mean and the likeliest names, shape (dimension,)."""
        return self._coding.centre(self._es)


class ComoCatCma:
    """COMO-CatCMAwM: CatCMAwM kernels that share a front of two objectives.

    starts: (k, dimension); the kernels begin there, then at uniformly drawn points. population: candidates
    of one kernel; a generation is one kernel's candidates and the centres that changed, which can't be
    left out because the others' progress is measured against them.
    """

    def __init__(
        self,
        cube: Cube,
        *,
        starts: NDArray[np.float64],
        sigma: float = 0.15,
        population: int | None = None,
        seed: np.random.SeedSequence,
    ) -> None:
        from cmaes import COMOCatCMAwM

        self._cube, self._coding = cube, _Coding(cube)
        self._size = population or cube.default_population()
        own, *seeds = (
            np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, i)) for i in range(_KERNELS + 1)
        )
        centres = np.vstack([starts, np.random.default_rng(own).random((_KERNELS, cube.dimension))])
        kernels = [
            self._coding.build(centre, sigma, self._size, s)
            for centre, s in zip(centres[:_KERNELS], seeds, strict=True)
        ]
        self._es = COMOCatCMAwM(
            x_space=self._coding.x_space,
            z_space=self._coding.z_space,
            c_space=self._coding.c_space,
            kernels=kernels,
            seed=int(own.generate_state(1)[0]),
        )
        self._sampled: list[Any] = []

    @property
    def population(self) -> int:
        """Candidates of the kernel whose turn it is, and centres to be scored."""
        return int(self._es.ask_queue_size)

    @property
    def fixed(self) -> int:
        """Number of centres to be scored."""
        return self.population - self._size

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, centres to be scored, samples of one kernel."""
        from cmaes import COMOCatCMAwM

        queue = list(self._es.ask_iter())
        centres = [s for s in queue if s._kernel_id is None]
        samples = [s for s in queue if s._kernel_id is not None]
        number, kernel = self._es.current_kernel_id, self._es.current_kernel

        def of_kernel(solution: Any) -> Any:
            return COMOCatCMAwM.Solution(
                solution.x, solution.z, solution.c, _v_raw=solution._v_raw, _kernel_id=number
            )

        wanted = count - len(given) - len(centres)
        samples += [of_kernel(kernel.ask()) for _ in range(wanted - len(samples))]
        kept = [of_kernel(self._coding.solution(row, kernel)) for row in given]
        drawn = centres + samples[:wanted]
        self._sampled = kept + drawn
        return np.vstack([given, *(self._coding.row(solution)[None] for solution in drawn)])

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Update the kernel whose turn it was."""
        self._es.tell([(self._sampled[i], row) for i, row in zip(chosen, losses, strict=True)])

    def stop_reason(self) -> None:
        """Return None: a front is never finished."""

    def favourite(self) -> None:
        """Return None: a front has no single best point."""


class _Coding:
    """The unit cube in the terms of cmaes: x continuous, z ordered (bin middles), c names (one-hot)."""

    def __init__(self, cube: Cube) -> None:
        self._cube = cube
        self._gaussian = np.concatenate([cube.continuous, cube.ordered])
        self._shape = (len(cube.named), int(max(cube.levels[cube.named], default=0)))
        self.x_space = [[0.0, 1.0]] * len(cube.continuous) or None
        self.z_space = [
            [cube.middle(column, bin_) for bin_ in range(cube.levels[column])] for column in cube.ordered
        ] or None
        self.c_space = [int(cube.levels[column]) for column in cube.named] or None

    @property
    def purely_continuous(self) -> bool:
        """Whether there is nothing but continuous coordinates."""
        return self.z_space is None and self.c_space is None

    def build(
        self, start: NDArray[np.float64], sigma: float, population: int, seed: np.random.SeedSequence
    ) -> Any:
        """Return a CatCMAwM that begins at a row."""
        from cmaes import CatCMAwM

        shares = np.zeros(self._shape)
        for i, column in enumerate(self._cube.named):
            levels = int(self._cube.levels[column])
            shares[i, :levels] = 0.5 / levels
            shares[i, self._cube.bin(column, start[column])] += 0.5
        es = CatCMAwM(
            x_space=self.x_space,
            z_space=self.z_space,
            c_space=self.c_space,
            population_size=population,
            mean=start[self._gaussian].copy(),  # it is updated in place
            sigma=1.0,
            cov=np.eye(len(self._gaussian)) * sigma**2,  # its own default is 0 for a start on the boundary
            cat_param=shares if self.c_space else None,
            seed=int(seed.generate_state(1)[0]),
        )
        es.tell = _by_rank(es.tell)
        return es

    def row(self, solution: Any) -> NDArray[np.float64]:
        """Return the row of a solution, shape (dimension,)."""
        row = np.empty(self._cube.dimension)
        if solution.x is not None:
            row[self._cube.continuous] = np.clip(solution.x, 0.0, 1.0)
        if solution.z is not None:
            row[self._cube.ordered] = solution.z
        if solution.c is not None:
            self._set_names(row, solution.c.argmax(axis=1))
        return row

    def solution(self, row: NDArray[np.float64], es: Any) -> Any:
        """Return a row from elsewhere as a solution, its step shortened (Hansen 2011, arXiv:1110.4181)."""
        from cmaes import CatCMAwM

        one_hot = np.zeros(self._shape, dtype=bool)
        for i, column in enumerate(self._cube.named):
            one_hot[i, self._cube.bin(column, row[column])] = True
        raw = None
        if len(self._gaussian):
            axes, lengths = es._eigen_decomposition()
            step = _divided(row[self._gaussian] - es._mean, es._A)
            far = np.linalg.norm(_divided(axes.T @ step, lengths)) / max(es._sigma, 1e-300)
            most = np.sqrt(len(step)) + 2.0
            raw = es._mean + es._A * step * min(1.0, most / max(far, 1e-300))
        return CatCMAwM.Solution(
            x=row[self._cube.continuous],
            z=row[self._cube.ordered],
            c=one_hot if self.c_space else None,
            _v_raw=raw,
        )

    def largest_step(self, es: Any) -> float:
        """Return the largest standard deviation of a coordinate, 0 without such; NaN counts as infinite."""
        if not len(self._gaussian):
            return 0.0
        largest = float((es._sigma * es._A * np.sqrt(np.diag(es._C))).max())
        return largest if np.isfinite(largest) else np.inf

    def centre(self, es: Any) -> NDArray[np.float64]:
        """Return the mean of the normal distribution and the likeliest names, shape (dimension,)."""
        row = np.empty(self._cube.dimension)
        if len(self._gaussian):
            row[self._gaussian] = es._mean
        if self.c_space:
            self._set_names(row, es._q.argmax(axis=1))
        return row

    def _set_names(self, row: NDArray[np.float64], bins: NDArray[np.int_]) -> None:
        for column, bin_ in zip(self._cube.named, bins, strict=True):
            row[column] = self._cube.middle(column, bin_)


def _divided(steps: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return steps in units of lengths, 0 along what has none left: there the distribution stays put."""
    found: NDArray[np.float64] = np.divide(steps, lengths, out=np.zeros_like(steps), where=lengths > 0)
    return found


def _by_rank(tell: Callable[[list[tuple[Any, float]]], None]) -> Callable[[list[tuple[Any, float]]], None]:
    """Return a `tell` that passes ranks on instead of losses.

    The algorithm is invariant to that, but for the weight of its penalty for points outside the cube,
    which cmaes takes from the spread of the losses, and which is NaN where they all tie.
    """

    def told(solutions: list[tuple[Any, float]]) -> None:
        ordered = sorted(solutions, key=lambda pair: pair[1])
        tell([(solution, float(rank)) for rank, (solution, _) in enumerate(ordered)])

    return told
