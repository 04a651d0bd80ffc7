"""The contract of all optimizers, kept in one place: the order of calls, shapes, starts, injected points.

An algorithm (one file each) only samples and learns; `AskTell` around it does what all have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController

from evomerge.search.optimizers.cube import Cube
from evomerge.search.spaces.space import Genome


class Optimizer(Protocol):
    """The contract of every optimizer (tests/search/optimizers/test_optimizers.py holds the table)."""

    @property
    def population(self) -> int:
        """Number of losses the next `tell` takes; it may change between generations."""
        ...

    def ask(self, count: int | None = None) -> NDArray[np.float64]:
        """Return the next generation.

        Args:
            count: Number of genomes, at least `population` (the default). A larger generation is drawn from
                the same distribution; `tell` then takes the losses of `population` of them.

        Returns:
            Genomes of shape (n, dimension), values in [0, 1], read-only. Discrete coordinates are in the
            middles of their bins.

        Raises:
            RuntimeError: The losses of the last generation were not passed to `tell`.
            ValueError: `count` is below `population`.
        """
        ...

    @property
    def required(self) -> tuple[int, ...]:
        """Rows of the last ask that `chosen` has to hold; empty but for catcma with two objectives."""
        ...

    def tell(self, losses: NDArray[np.float64], chosen: Sequence[int] | None = None) -> None:
        """Update the optimizer with the losses of the last generation.

        Args:
            losses: Shape (population, objectives), finite; lower is better. The array is copied.
            chosen: The row of each loss in the last `ask`, all different. None: all rows, of a generation
                of `population`.

        Raises:
            RuntimeError: There is no generation to tell about.
            ValueError: Shape or rows do not fit the last `ask`, or a loss is not finite.
        """
        ...

    def inject(self, genomes: ArrayLike) -> None:
        """Put genomes of shape (k, dimension) first into the next generation, the rest into later ones."""
        ...

    def draw(self, count: int) -> NDArray[np.float64]:
        """Return genomes of shape (count, dimension) that belong to no generation: injected ones first."""
        ...

    def absorb(self, genomes: ArrayLike, losses: NDArray[np.float64]) -> None:
        """Take the losses of `population` genomes, whenever they were drawn, as those of a generation."""
        ...

    def stop_reason(self) -> str | None:
        """Return why another generation is pointless (one sentence), or None."""
        ...

    def favourite(self) -> Genome | None:
        """Return the optimizer's best estimate of the optimum (CMA-ES: the mean), None where it has none."""
        ...


class Algorithm(Protocol):
    """What an optimizer's own file provides; arrays have the cube's free columns.

    fixed: how many rows after the given ones a generation can't do without.
    """

    @property
    def population(self) -> int: ...

    @property
    def fixed(self) -> int: ...

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows, shape (count, dimension), of which the first ones are `given`.

        An asynchronous search calls it several times before `learn`, which is about the last call.
        """
        ...

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Take the losses, shape (population, objectives), of some rows of the last sample."""
        ...

    def stop_reason(self) -> str | None: ...

    def favourite(self) -> NDArray[np.float64] | None: ...


class AskTell:
    """An Optimizer around an Algorithm.

    starts: (k, dimension) points that enter the first generations, best first; never more than half
    of a generation, so that there is something new beside them. BLAS runs on one thread inside:
    with more, the bits of linear algebra depend on the machine.
    """

    def __init__(
        self, name: str, algorithm: Algorithm, cube: Cube, *, objectives: int, starts: Sequence[Genome] = ()
    ) -> None:
        self._name, self._algorithm, self._cube, self._objectives = name, algorithm, cube, objectives
        self._starts = list(starts)
        self._injected: list[Genome] = []
        self._asked: tuple[int, int] | None = None  # rows, and how many of them are told
        self._required: tuple[int, ...] = ()
        self._threads = ThreadpoolController()

    @property
    def population(self) -> int:
        """Number of losses the next `tell` takes."""
        return self._algorithm.population

    @property
    def required(self) -> tuple[int, ...]:
        """Rows of the last ask that `chosen` has to hold."""
        return self._required

    def ask(self, count: int | None = None) -> NDArray[np.float64]:
        """Return the next generation, shape (population or count, dimension), read-only."""
        if self._asked is not None:
            raise RuntimeError(f"{self._name}.ask: tell the losses of the last generation first")
        population, fixed = self._algorithm.population, self._algorithm.fixed
        count = population if count is None else count
        if count < population:
            raise ValueError(
                f"{self._name}.ask: a generation has at least {population} candidates, got {count}"
            )
        given = self._given(population - fixed)
        with self._threads.limit(limits=1):
            rows = self._algorithm.sample(count, given)
        genomes = self._cube.expand(self._cube.snap(rows))
        assert genomes.shape[0] == count
        genomes.setflags(write=False)
        self._asked = (count, population)
        self._required = tuple(range(len(given), len(given) + fixed))
        return genomes

    def tell(self, losses: NDArray[np.float64], chosen: Sequence[int] | None = None) -> None:
        """Take the losses of the last generation, or of its chosen rows."""
        if self._asked is None:
            raise RuntimeError(f"{self._name}.tell: ask for a generation first")
        count, population = self._asked
        losses = np.array(losses, dtype=np.float64)
        if chosen is None and count > population:
            raise ValueError(
                f"{self._name}.tell: the last ask returned {count} candidates; name the {population} chosen"
            )
        rows = np.arange(count) if chosen is None else np.array(chosen, dtype=int)
        if len(rows) != population or len(set(rows.tolist())) != population:
            raise ValueError(f"{self._name}.tell: choose {population} different rows, got {rows.tolist()}")
        if not ((rows >= 0) & (rows < count)).all():
            raise ValueError(f"{self._name}.tell: chosen rows are 0 to {count - 1}, got {rows.tolist()}")
        if not set(self._required) <= set(rows.tolist()):
            raise ValueError(f"{self._name}.tell: the rows {list(self._required)} can't be left out")
        if losses.shape != (population, self._objectives):
            raise ValueError(
                f"{self._name}.tell: losses have shape ({population}, {self._objectives}), got {losses.shape}"
            )
        if not np.isfinite(losses).all():
            raise ValueError(f"{self._name}.tell: losses must be finite; give failures a loss first")
        with self._threads.limit(limits=1):
            self._algorithm.learn(rows, losses)
        self._asked = None

    def inject(self, genomes: ArrayLike) -> None:
        """Put points, shape (k, dimension), first into the next generation."""
        points = np.array(genomes, dtype=np.float64)
        width = self._cube.width
        if points.ndim != 2 or points.shape[1] != width or not ((points >= 0) & (points <= 1)).all():
            raise ValueError(
                f"{self._name}.inject: points have shape (k, {width}) and values in [0, 1], "
                f"got shape {points.shape}"
            )
        self._injected += list(points)

    def draw(self, count: int) -> NDArray[np.float64]:
        """Return genomes, shape (count, dimension), that belong to no generation."""
        if self._asked is not None:
            raise RuntimeError(f"{self._name}.draw: tell the losses of the last generation first")
        with self._threads.limit(limits=1):
            rows = self._algorithm.sample(count, self._given(count))
        return self._cube.expand(self._cube.snap(rows))

    def absorb(self, genomes: ArrayLike, losses: NDArray[np.float64]) -> None:
        """Take the losses of `population` genomes as those of a generation."""
        self.inject(genomes)
        self.ask()
        self.tell(losses)

    def stop_reason(self) -> str | None:
        """Say why another generation is pointless, or None."""
        return self._algorithm.stop_reason()

    def favourite(self) -> Genome | None:
        """Return the algorithm's best estimate of the optimum, None where it has none."""
        genome = self._algorithm.favourite()
        return None if genome is None else self._cube.expand(self._cube.snap(genome[None]))[0]

    def _given(self, room: int) -> NDArray[np.float64]:
        """Take injected points, then starts, off their queues; shape (k, free columns)."""
        taken, self._injected = self._injected[:room], self._injected[room:]
        left = max(0, room // 2 - len(taken))
        taken, self._starts = taken + self._starts[:left], self._starts[left:]
        return self._cube.snap(np.reshape(taken, (len(taken), self._cube.width))[:, self._cube.free])
