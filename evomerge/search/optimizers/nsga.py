"""NSGA-II (Deb et al. 2002) and NSGA-III (Deb and Jain 2014), through pymoo, on mixed spaces.

Continuous and ordered coordinates are recombined by simulated binary crossover and polynomial mutation,
names by uniform crossover and by drawing another name. With one objective NSGA-II is a genetic algorithm
that keeps the best of parents and offspring.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.search.optimizers.cube import Cube

_SMALLEST_POPULATION = 20


class Nsga:
    """A population in the unit cube whose offspring compete with it by dominance.

    population: members, and candidates per generation, by default twice that of CMA-ES and at least 20;
    for "nsga3" also the largest number of reference directions (Das and Dennis 1998).
    """

    fixed = 0

    def __init__(
        self,
        kind: Literal["nsga2", "nsga3"],
        cube: Cube,
        *,
        objectives: int,
        population: int | None = None,
        seed: np.random.SeedSequence,
    ) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.algorithms.moo.nsga3 import NSGA3
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        self.population = population or max(_SMALLEST_POPULATION, 2 * cube.default_population())
        self._cube = cube
        self._generator = np.random.default_rng(seed)
        settings = {
            "pop_size": self.population,
            "crossover": _Crossover(cube),
            "mutation": _Mutation(cube),
            "eliminate_duplicates": True,
        }
        if kind == "nsga3":
            if objectives < 2:
                raise ConfigError("optimizer nsga3: there is only one objective", fix="use cma_es or catcma")
            settings["ref_dirs"] = _directions(objectives, self.population)
        self._problem = Problem(n_var=cube.dimension, n_obj=objectives, xl=0.0, xu=1.0)
        self._nsga = (NSGA2 if kind == "nsga2" else NSGA3)(**settings)
        self._nsga.setup(
            self._problem,
            termination=NoTermination(),
            seed=int(self._generator.integers(2**63)),
            verbose=False,
        )
        self._sampled = np.empty((0, cube.dimension))

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then offspring; in the first generation uniform draws."""
        rows, wanted = given, count - len(given)
        if self._nsga.is_initialized and wanted:
            self._nsga.n_offsprings = wanted
            offspring = self._nsga.ask()
            if offspring is not None:
                rows = np.vstack([rows, offspring.get("X")])
        # Offspring that are twins are left out, and a small discrete space may have no others.
        missing = count - len(rows)
        uniform = self._generator.random((missing, self._cube.dimension))
        self._sampled = np.vstack([rows, self._cube.snap(uniform)])
        return self._sampled

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Let the best of population and offspring survive."""
        from pymoo.core.evaluator import Evaluator
        from pymoo.core.population import Population
        from pymoo.problems.static import StaticProblem

        infills = Population.new("X", self._sampled[chosen])
        with warnings.catch_warnings():  # NSGA-III changes the filters of the whole process
            warnings.simplefilter("ignore")
            Evaluator().eval(StaticProblem(self._problem, F=losses), infills)
            self._nsga.tell(infills=infills)

    def stop_reason(self) -> None:
        """Return None: mutation always finds another point."""

    def favourite(self) -> None:
        """Return None: a population has no single favourite."""


class _Crossover:
    """Simulated binary crossover, and uniform crossover of names, as pymoo calls an operator."""

    n_parents = n_offsprings = 2

    def __init__(self, cube: Cube) -> None:
        from pymoo.operators.crossover.sbx import SBX

        self._named, self._numbers = cube.named, SBX(eta=15, prob=0.9)

    def __call__(self, problem: Any, parents: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
        offspring = self._numbers(problem, parents, random_state=random_state)
        if len(self._named):
            first, second = (np.array([pair[i].get("X")[self._named] for pair in parents]) for i in range(2))
            swap = random_state.random(first.shape) < 0.5
            rows = offspring.get("X")
            rows[:, self._named] = np.vstack([np.where(swap, second, first), np.where(swap, first, second)])
            offspring.set("X", rows)
        return offspring


class _Mutation:
    """Polynomial mutation, and another name with probability 1/dimension, as pymoo calls an operator."""

    def __init__(self, cube: Cube) -> None:
        from pymoo.operators.mutation.pm import PM

        self._cube, self._numbers = cube, PM(eta=20)

    def __call__(self, problem: Any, offspring: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
        named, levels = self._cube.named, self._cube.levels[self._cube.named]
        names = offspring.get("X")[:, named]
        rows = self._numbers(problem, offspring, random_state=random_state).get("X")
        if len(named):
            changed = random_state.random(names.shape) < 1 / self._cube.dimension
            shift = random_state.integers(1, levels, size=names.shape) / levels
            rows[:, named] = np.where(changed, (names + shift) % 1.0, names)
        offspring.set("X", self._cube.snap(rows))
        return offspring


def _directions(objectives: int, population: int) -> NDArray[np.float64]:
    """Return the finest regular set of at most `population` directions, shape (n, objectives)."""
    from pymoo.util.ref_dirs import get_reference_directions

    partitions = 1
    while math.comb(partitions + objectives, objectives - 1) <= population:
        partitions += 1
    found: NDArray[np.float64] = get_reference_directions("das-dennis", objectives, n_partitions=partitions)
    return found
