"""The tree-structured Parzen estimator (Bergstra et al. 2011), through optuna.

Multivariate, with the constant liar for the candidates of one generation. A fresh sampler
replays exactly only if all losses are passed to it again from the beginning, as the loop does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.optimizers.cube import Cube


class Tpe:
    """An optuna study in memory. population: candidates per generation."""

    fixed = 0

    def __init__(
        self, cube: Cube, *, objectives: int, population: int | None = None, seed: np.random.SeedSequence
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.population = population or cube.default_population()
        self._cube = cube
        self._generator = np.random.default_rng(seed)
        self._distributions: dict[str, Any] = {
            f"u{column:05d}": self._distribution(column) for column in range(cube.dimension)
        }
        self._study = optuna.create_study(
            directions=["minimize"] * objectives,
            sampler=optuna.samplers.TPESampler(
                seed=int(self._generator.integers(2**32)), n_startup_trials=1, multivariate=True
            ),
        )
        self._sampled: list[Any] = []
        self._begun = False

    def sample(self, count: int, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `count` rows: the given ones, then samples; uniform ones in the first generation."""
        new = count - len(given)
        if not self._begun:
            rows = self._cube.snap(self._generator.random((new, self._cube.dimension)))
            self._sampled = list(np.vstack([given, rows]))
            return np.vstack([given, rows])
        trials = [self._study.ask(self._distributions) for _ in range(new)]
        self._sampled = [*given, *trials]
        return np.vstack([given, *(self._row(trial.params)[None] for trial in trials)])

    def learn(self, chosen: NDArray[np.int_], losses: NDArray[np.float64]) -> None:
        """Complete the chosen trials and give up the others."""
        from optuna.trial import TrialState, create_trial

        self._begun = True
        told = {int(i): row.tolist() for i, row in zip(chosen, losses, strict=True)}
        for i, sampled in enumerate(self._sampled):
            if isinstance(sampled, np.ndarray):
                if i in told:
                    self._study.add_trial(
                        create_trial(
                            params=self._params(sampled), distributions=self._distributions, values=told[i]
                        )
                    )
            elif i in told:
                self._study.tell(sampled, told[i])
            else:
                self._study.tell(sampled, state=TrialState.FAIL)

    def stop_reason(self) -> None:
        """Return None: there is always another sample."""

    def favourite(self) -> None:
        """Return None: the model has no single favourite."""

    def _distribution(self, column: int) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        levels = int(self._cube.levels[column])
        if column in self._cube.continuous:
            return FloatDistribution(0.0, 1.0)
        if column in self._cube.ordered:
            return IntDistribution(0, levels - 1)
        return CategoricalDistribution(list(range(levels)))

    def _row(self, params: dict[str, Any]) -> NDArray[np.float64]:
        row = np.array([params[name] for name in self._distributions], dtype=np.float64)
        for column in (*self._cube.ordered, *self._cube.named):
            row[column] = self._cube.middle(column, int(row[column]))
        return row

    def _params(self, row: NDArray[np.float64]) -> dict[str, Any]:
        values = [
            self._cube.bin(column, u) if self._cube.levels[column] else float(u)
            for column, u in enumerate(row)
        ]
        return dict(zip(self._distributions, values, strict=True))
