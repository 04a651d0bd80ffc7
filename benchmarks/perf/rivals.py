"""The rivals of `search.py`: each library's optimizer with the settings its own documents recommend.

A rival is a function of a loss to minimise, of its starts and of a seed. The starts are the genomes of the
hand-made merges, best first; their losses are known and cost nothing. A rival never returns: the loss
raises `Spent` when the evaluations are used up. So what it had after 25 evaluations is the same whether
25 or 100 were allowed.

Some need packages that evomerge does not depend on. Give them a virtual environment of their own and keep
the pinned torch:

    python -m venv --system-site-packages rivals            # or a .pth file to the project's site-packages
    rivals/bin/pip install --no-deps -c constraints.txt botorch gpytorch linear_operator jaxtyping \\
        wadler-lindig pyro-ppl pyro-api multipledispatch opt_einsum pyre-extensions typing_inspect \\
        mypy_extensions numpyro jax jaxlib ml_dtypes smac ConfigSpace dask distributed dask-jobqueue emcee \\
        pynisher toolz locket partd zict tblib sortedcontainers tornado hebo disjoint-set
    rivals/bin/python -c "import torch; print(torch.__version__)"      # still the pinned one?
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

Genome = np.ndarray[Any, Any]
BATCH = 5
"""How many candidates the methods with a Gaussian process of BoTorch and HEBO ask for at a time."""


class Spent(Exception):  # noqa: N818  (it is no error: it ends a search)
    """The evaluations are used up."""


class Loss(Protocol):
    """What a rival minimises: minus the mean normalised score on `search`."""

    def __call__(self, genome: Genome, blocks: int | None = None) -> float:
        """Return the loss on the first item blocks, or on all of them. Raises Spent."""
        ...


Rival = Callable[[Loss, Sequence[Genome], int], NoReturn]


def cma(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """CMA-ES of pycma: its own population and settings, sigma 0.15, as mergekit-evolve has it."""
    import cma as pycma

    search = pycma.CMAEvolutionStrategy(starts[0], 0.15, {"bounds": [0, 1], "seed": seed + 1, "verbose": -9})
    while True:
        genomes = search.ask()
        search.tell(genomes, [loss(genome) for genome in genomes])


def tpe(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """TPE of Optuna, multivariate, else as the installed version has it."""
    import optuna

    _optuna(loss, starts, optuna.samplers.TPESampler(seed=seed, multivariate=True))


def gp(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """The Gaussian process of Optuna, log expected improvement."""
    import optuna

    _optuna(loss, starts, optuna.samplers.GPSampler(seed=seed))


def _optuna(loss: Loss, starts: Sequence[Genome], sampler: Any) -> NoReturn:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)
    names = [f"u{i:03d}" for i in range(len(starts[0]))]
    for start in starts:
        study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))
    while True:
        study.optimize(lambda t: loss(np.array([t.suggest_float(n, 0, 1) for n in names])), n_trials=1)


def ga(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """The genetic algorithm of pymoo, twenty in a generation; what mergenetic is built on."""
    from pymoo.algorithms.soo.nonconvex.ga import GA

    _pymoo(loss, GA(pop_size=20, sampling=_population(starts, 20, seed)), seed)


def pso(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """The particle swarm of pymoo, adaptive, its own 25 particles."""
    from pymoo.algorithms.soo.nonconvex.pso import PSO

    _pymoo(loss, PSO(pop_size=25, sampling=_population(starts, 25, seed)), seed)


def _population(starts: Sequence[Genome], size: int, seed: int) -> Genome:
    """The starts and uniform genomes: a first population."""
    first = np.random.default_rng(seed).random((size, len(starts[0])))
    first[: len(starts)] = starts[:size]
    return first


def _pymoo(loss: Loss, algorithm: Any, seed: int) -> NoReturn:
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.optimize import minimize
    from pymoo.termination.max_gen import MaximumGenerationTermination

    class Merge(ElementwiseProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=algorithm.initialization.sampling.shape[1], n_obj=1, xl=0.0, xu=1.0)

        def _evaluate(self, x: Any, out: Any, *_: Any, **__: Any) -> None:
            out["F"] = loss(x)

    minimize(Merge(), algorithm, MaximumGenerationTermination(10**6), seed=seed)
    raise AssertionError("the loss ends a search")


def turbo(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """TuRBO-1 with BoTorch's Gaussian process (Eriksson et al. 2019): one trust region, Thompson sampling.

    Side .8 at first, at most 1.6, twice as long after three batches with a gain, half as long after
    max(4, genes) / 5 batches without one; below 2^-7 it begins anew. A candidate differs from the best one in
    about 20 genes. Beside the starts five points of a Sobol sequence are scored first. Draws are of half as
    many candidates as in the tutorial of BoTorch.
    """
    import torch
    from torch.quasirandom import SobolEngine

    torch.manual_seed(seed)
    size = len(starts[0])
    sobol = SobolEngine(size, scramble=True, seed=seed)
    patience = int(np.ceil(max(4, size) / BATCH))
    points = [*starts, *sobol.draw(BATCH).double().numpy()]
    values = [loss(point) for point in points]
    first, side, gains, failures = 0, 0.8, 0, 0
    while True:
        batch = _turbo_batch(np.array(points[first:]), np.array(values[first:]), side, sobol)
        best = min(values[first:])
        for point in batch:
            points.append(point)
            values.append(loss(point))
        gained = min(values[-len(batch) :]) < best - 1e-3 * abs(best)
        gains, failures = (gains + 1, 0) if gained else (0, failures + 1)
        if gains == 3:
            side, gains = min(2 * side, 1.6), 0
        elif failures == patience:
            side, failures = side / 2, 0
        if side < 0.5**7:
            first, side, gains, failures = len(points), 0.8, 0, 0
            points.extend(sobol.draw(2 * BATCH).double().numpy())
            values.extend(loss(point) for point in points[first:])


def _turbo_batch(points: Genome, values: Genome, side: float, sobol: Any) -> Genome:
    """The candidates that are best in draws from the model within the trust region."""
    import gpytorch
    import torch
    from botorch.fit import fit_gpytorch_mll
    from botorch.generation import MaxPosteriorSampling
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import Interval
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood

    x = torch.tensor(points)
    y = -torch.tensor(values)
    y = ((y - y.mean()) / y.std().clamp_min(1e-9)).unsqueeze(-1)
    size = x.shape[1]
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=size, lengthscale_constraint=Interval(0.005, 4.0)))
    noise = GaussianLikelihood(noise_constraint=Interval(1e-8, 1e-3))
    model = SingleTaskGP(x, y, covar_module=kernel, likelihood=noise, outcome_transform=None)
    with gpytorch.settings.max_cholesky_size(10_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(noise, model))
        centre = x[y.argmax()]
        scales = kernel.base_kernel.lengthscale.squeeze(0).detach()
        scales = scales / scales.mean()
        scales = scales / scales.log().mean().exp()
        low = (centre - scales * side / 2).clamp(0, 1)
        high = (centre + scales * side / 2).clamp(0, 1)
        drawn = low + (high - low) * sobol.draw(min(5000, max(2000, 200 * size)) // 2).double()
        changed = torch.rand_like(drawn) <= min(20 / size, 1)
        changed[torch.arange(len(drawn)), torch.randint(size, (len(drawn),))] = True
        candidates = torch.where(changed, drawn, centre)
        with torch.no_grad():
            picked = MaxPosteriorSampling(model, replacement=False)(candidates, num_samples=BATCH)
    return np.asarray(picked)


def saasbo(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """SAASBO of BoTorch (Eriksson and Jankowiak 2021): a fully Bayesian model in which few genes count.

    NUTS with 64 steps to warm up and 64 samples of which every eighth is kept (BoTorch's tutorial: 512 and
    256, every sixteenth), log expected improvement, batches of five.
    """
    import torch
    from botorch.acquisition.logei import qLogExpectedImprovement
    from botorch.fit import fit_fully_bayesian_model_nuts
    from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
    from botorch.optim import optimize_acqf
    from torch.quasirandom import SobolEngine

    torch.manual_seed(seed)
    size = len(starts[0])
    points = [*starts, *SobolEngine(size, scramble=True, seed=seed).draw(BATCH).double().numpy()]
    values = [loss(point) for point in points]
    bounds = torch.stack([torch.zeros(size), torch.ones(size)]).double()
    while True:
        x, y = torch.tensor(np.array(points)), -torch.tensor(np.array(values)).unsqueeze(-1)
        y = (y - y.mean()) / y.std().clamp_min(1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SaasFullyBayesianSingleTaskGP(x, y, outcome_transform=None)
            fit_fully_bayesian_model_nuts(
                model, warmup_steps=64, num_samples=64, thinning=8, disable_progbar=True, seed=seed
            )
            batch, _ = optimize_acqf(
                qLogExpectedImprovement(model, best_f=y.max()),
                bounds=bounds,
                q=BATCH,
                num_restarts=4,
                raw_samples=256,
                sequential=True,
            )
        for point in batch.numpy():
            points.append(point)
            values.append(loss(point))


def hebo(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """HEBO (Cowen-Rivers et al. 2022) with its own Gaussian process, batches of five."""
    import pandas
    import torch
    from hebo.design_space.design_space import DesignSpace
    from hebo.optimizers.hebo import HEBO

    np.random.seed(seed)  # HEBO draws from the global generator
    torch.manual_seed(seed)
    names = [f"u{i:03d}" for i in range(len(starts[0]))]
    space = DesignSpace().parse([{"name": n, "type": "num", "lb": 0.0, "ub": 1.0} for n in names])
    search = HEBO(space, rand_sample=len(starts) + BATCH, scramble_seed=seed)
    batch = pandas.DataFrame(np.array(starts), columns=names)
    while True:
        losses = [loss(row) for row in batch[names].to_numpy(dtype=float)]
        search.observe_new_data(batch, np.array(losses).reshape(-1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = search.suggest(n_suggestions=BATCH)


def smac(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """SMAC3 with fidelities: Hyperband over 1, 3 and 8 of the eight item blocks, random forests."""
    from ConfigSpace import Configuration, ConfigurationSpace, Float
    from smac import MultiFidelityFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    names = [f"u{i:03d}" for i in range(len(starts[0]))]
    space = ConfigurationSpace(seed=seed)
    space.add([Float(name, (0.0, 1.0), default=0.5) for name in names])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=10**5,
            min_budget=8 / 9,
            max_budget=8,
            seed=seed,
            output_directory=Path(folder),
        )
        known = [Configuration(space, values=dict(zip(names, s.tolist(), strict=True))) for s in starts]
        design = MultiFidelityFacade.get_initial_design(scenario, n_configs=5, additional_configs=known)
        search = MultiFidelityFacade(
            scenario, _unused, initial_design=design, overwrite=True, logging_level=False
        )
        while True:
            info = search.ask()
            genome = np.array([info.config[name] for name in names])
            search.tell(info, TrialValue(cost=loss(genome, round(info.budget or 8))))


def _unused(config: Any, seed: int = 0, budget: float = 8) -> float:
    """SMAC wants a function even of those who score for it."""
    raise AssertionError("SMAC is asked and told")


def random(loss: Loss, starts: Sequence[Genome], seed: int) -> NoReturn:
    """Uniform in the space, from the best start."""
    generator = np.random.default_rng(seed)
    loss(starts[0])
    while True:
        loss(generator.random(len(starts[0])))


RIVALS: dict[str, Rival] = {
    "cma": cma,
    "tpe": tpe,
    "gp": gp,
    "ga": ga,
    "pso": pso,
    "turbo": turbo,
    "saasbo": saasbo,
    "hebo": hebo,
    "smac": smac,
    "random": random,
}
