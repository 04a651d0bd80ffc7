"""Optimizers: ask for genomes, tell their losses. One file each; `create` builds one by name.

An optimizer works in the unit cube, minimises, owns its random generator, and is exactly replayable:
given the same losses it asks for the same genomes, bit for bit, in any process. The common part (order of
calls, shapes, starts, injected points) is in ask_tell.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from evomerge.errors import ConfigError
from evomerge.schema import Strict
from evomerge.search.optimizers.ask_tell import Algorithm, AskTell, Optimizer
from evomerge.search.optimizers.catcma import CatCma, ComoCatCma
from evomerge.search.optimizers.cma_es import SEPARABLE_ABOVE, CmaEs, Restarts
from evomerge.search.optimizers.cube import Cube
from evomerge.search.optimizers.nsga import Nsga
from evomerge.search.optimizers.random import Random
from evomerge.search.optimizers.sobol import Sobol
from evomerge.search.optimizers.tpe import Tpe
from evomerge.search.spaces.space import Coordinate, Genome

__all__ = ["Optimizer", "OptimizerSpec", "choose", "create"]

Name = Literal["auto", "cma_es", "catcma", "nsga2", "nsga3", "tpe", "random", "sobol"]


class OptimizerSpec(Strict):
    """The `optimizer` part of a run config."""

    name: Name = "auto"
    """The algorithm. `auto` picks by the space's coordinates and the number of objectives."""
    sigma: float = Field(default=0.15, gt=0, le=1)
    """Initial standard deviation in the unit cube (cma_es, catcma)."""
    population: int | None = Field(default=None, ge=4, le=10_000)
    """Candidates per generation. Default: the algorithm's own, 4 + 3 ln(dimension) for most."""
    restarts: Restarts = "ipop"
    """What cma_es does when it has converged: restart with twice the population (`ipop`), alternate large and
    small populations (`bipop`), or stop (`none`)."""
    async_: bool = Field(default=False, alias="async")
    """Whether there is always a next candidate to score, so that no worker waits for the end of a generation.
    The optimizer learns from candidates in the order in which they are done, and no race stops one early. For
    one objective, and for all optimizers but nsga2 and nsga3."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs begun before `async` existed keep config and identity."""
        data: dict[str, Any] = handler(self)
        return data | {"async": True} if data.pop("async_", False) else data


def choose(
    spec: OptimizerSpec, coordinates: Sequence[Coordinate], objectives: int = 1
) -> tuple[OptimizerSpec, str]:
    """Resolve `auto` to an optimizer.

    Args:
        spec: The `optimizer` part of a run config.
        coordinates: The kind of every coordinate of the search space.
        objectives: Number of losses per candidate.

    Returns:
        The spec with a concrete name, and one sentence with the reason.

    >>> choose(OptimizerSpec(), [Coordinate(), Coordinate(levels=3)])[1]
    'catcma: 1 of 2 coordinates is discrete'
    """
    if spec.name != "auto":
        return spec, f"{spec.name}: named in the config"
    discrete = sum(c.levels is not None for c in coordinates)
    name: Name
    if objectives > 3:
        name, why = "nsga3", f"{objectives} objectives, of which hardly any candidate dominates another"
    elif objectives > 1:
        name, why = "nsga2", f"{objectives} objectives"
    elif discrete:
        name, why = "catcma", f"{discrete} of {len(coordinates)} coordinates {_are(discrete)} discrete"
    else:
        name, why = "cma_es", f"one objective and {len(coordinates)} coordinates, all continuous"
        if len(coordinates) > SEPARABLE_ABOVE:
            why += ", so many that only their variances are learned (sep-CMA)"
    return spec.model_copy(update={"name": name}), f"{name}: {why}"


def create(
    spec: OptimizerSpec,
    *,
    coordinates: Sequence[Coordinate],
    objectives: int = 1,
    starts: Sequence[Genome],
    seed: np.random.SeedSequence,
) -> Optimizer:
    """Create the optimizer named in a run config.

    Args:
        spec: The `optimizer` part of the config; `auto` is resolved by `choose`.
        coordinates: The kind of every coordinate of the search space, in genome order.
        objectives: Number of losses per candidate.
        starts: At least one genome of shape (dimension,), best first. CMA-ES and CatCMA begin around the
            first; the others return all of them in their first generations.
        seed: The optimizer's own random stream. It is not advanced.

    Returns:
        An optimizer that, with the same seed and the same losses, asks for the same genomes bit for bit.

    Raises:
        ConfigError: The optimizer can't search these coordinates or this number of objectives.
    """
    _check_async(spec, objectives)
    spec, _ = choose(spec, coordinates, objectives)
    seed = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key)  # libraries spawn from theirs
    cube = Cube(coordinates)
    if not cube.dimension:
        raise ConfigError("no coordinate of the search space can vary, so there is nothing to search")
    centres = cube.snap(np.array(starts, dtype=np.float64)[:, cube.free])
    algorithm = _algorithm(spec, cube, objectives, centres, seed)
    queued = () if spec.name in ("cma_es", "catcma") else tuple(np.array(starts, dtype=np.float64))
    return AskTell(spec.name, algorithm, cube, objectives=objectives, starts=queued)


def _algorithm(
    spec: OptimizerSpec,
    cube: Cube,
    objectives: int,
    starts: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    seed: np.random.SeedSequence,
) -> Algorithm:
    population = spec.population
    match spec.name:
        case "cma_es":
            _check_cma_es(cube, objectives)
            return CmaEs(
                cube,
                starts=starts,
                sigma=spec.sigma,
                population=population,
                restarts=spec.restarts,
                seed=seed,
            )
        case "catcma" if objectives == 1:
            return CatCma(cube, start=starts[0], sigma=spec.sigma, population=population, seed=seed)
        case "catcma" if objectives == 2:
            return ComoCatCma(cube, starts=starts, sigma=spec.sigma, population=population, seed=seed)
        case "catcma":
            raise ConfigError(
                f"optimizer catcma: it knows one or two objectives, and there are {objectives}",
                fix="use nsga2 or nsga3",
            )
        case "nsga2" | "nsga3":
            return Nsga(spec.name, cube, objectives=objectives, population=population, seed=seed)
        case "tpe":
            return Tpe(cube, objectives=objectives, population=population, seed=seed)
        case "sobol":
            return Sobol(cube, population=population, seed=seed)
        case _:
            return Random(cube, population=population, seed=seed)


def _check_async(spec: OptimizerSpec, objectives: int) -> None:
    if not spec.async_:
        return
    if objectives > 1:
        raise ConfigError(
            f"optimizer.async: it is for one objective, and there are {objectives}",
            fix="leave optimizer.async out",
        )
    if spec.name in ("nsga2", "nsga3"):
        raise ConfigError(
            f"optimizer.async: {spec.name} learns from whole generations only",
            expected="cma_es, catcma, tpe, random or sobol",
            fix="name one of these, or leave optimizer.async out",
        )


def _check_cma_es(cube: Cube, objectives: int) -> None:
    if objectives > 1:
        raise ConfigError(
            f"optimizer cma_es: it minimises one objective, and there are {objectives}",
            fix="use nsga2, nsga3 or catcma (two objectives), or a weighted mean",
        )
    if discrete := len(cube.ordered) + len(cube.named):
        raise ConfigError(
            f"optimizer cma_es: {discrete} of {cube.dimension} coordinates {_are(discrete)} discrete",
            expected="a space of continuous coordinates",
            fix="use catcma, which is CMA-ES for mixed spaces",
        )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
