"""A run as an optuna study: for importances of genes, and for optuna's dashboard."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from evomerge.delivery.candidates import CandidateRow, Candidates, GeneOfRun

LEAST = 20
"""Scored candidates below which importances are noise."""


def as_study(table: Candidates, study: optuna.Study) -> optuna.Study:
    """Add a run's candidates to a study that maximises, as trials, and return it.

    With one direction, values are mean normalised scores on `search`, in [0, 1] from base to specialists.
    With several they are minus the losses that the optimizer got, in the order of the objectives. Scores per
    task and the recipe's hash are attributes of the trial.
    """
    names = _names(table)
    fixed = {name: _distribution(gene) for name, gene in zip(names, table.genes, strict=True)}
    several = len(study.directions) > 1
    study.add_trials([_trial(row, _values(row, several), names, fixed, table) for row in table.rows])
    return study


def _values(row: CandidateRow, several: bool) -> list[float] | None:
    """Return the values of a candidate, None where it has none: it failed, or is not scored yet."""
    if row.mean is None:
        return None
    if not several:
        return [row.mean]
    return None if row.losses is None else [-loss for loss in row.losses]


def importances(table: Candidates) -> list[tuple[int, float]]:
    """Return how much each gene decides whether a candidate is among the best, most important first.

    Measured by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) as optuna has it: how far a gene's
    distribution among the best tenth of the candidates lies from that among all.

    Args:
        table: the candidates of a run.

    Returns:
        Numbers of genes with shares that add up to 1; empty with fewer than LEAST scored candidates.
    """
    if len(table.scored) < LEAST or not table.genes:
        return []
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = as_study(table, optuna.create_study(direction="maximize"))
        found = optuna.importance.PedAnovaImportanceEvaluator().evaluate(study)
    finally:
        optuna.logging.set_verbosity(before)
    total = sum(found.values()) or 1.0
    numbers = {name: number for number, name in enumerate(_names(table))}
    return [(numbers[name], share / total) for name, share in found.items()]


def _names(table: Candidates) -> list[str]:
    """Return one name per gene; where two genes share one, their numbers tell them apart."""
    names = [gene.name for gene in table.genes]
    return [
        name if names.count(name) == 1 else f"{name} (gene {number})" for number, name in enumerate(names)
    ]


def _distribution(gene: GeneOfRun) -> BaseDistribution:
    if not gene.facts:
        return FloatDistribution(0.0, 1.0)
    if not gene.number:
        return CategoricalDistribution(gene.facts["choices"])
    if gene.facts["kind"] == "integer":
        return IntDistribution(gene.facts["low"], gene.facts["high"])
    return FloatDistribution(gene.facts["low"], gene.facts["high"], log=gene.facts["kind"] == "log")


def _trial(
    row: CandidateRow,
    values: list[float] | None,
    names: list[str],
    distributions: dict[str, BaseDistribution],
    table: Candidates,
) -> Any:
    states = optuna.trial.TrialState
    missing = states.FAIL if row.failure else states.WAITING if row.losses is None else states.FAIL
    return optuna.trial.create_trial(
        state=missing if values is None else states.COMPLETE,
        values=values,
        params={
            name: gene.value(float(u)) for name, gene, u in zip(names, table.genes, row.genome, strict=True)
        },
        distributions=distributions,
        user_attrs={
            "recipe": row.recipe,
            "generation": row.generation,
            "item blocks": row.blocks,
            **{f"task {task}": value for task, value in row.tasks.items()},
        },
    )
