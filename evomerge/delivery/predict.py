"""Prediction (`evomerge predict`): the score of a merge before it is made, from a run's store alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.course import Course, SearchScore
from evomerge.delivery.style import bounds, of_blocks, percent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.prepare import Prepared
from evomerge.running import warm_start
from evomerge.running.store import StoreReader, facts
from evomerge.search import baselines
from evomerge.search.spaces.movement import stretched
from evomerge.search.spaces.space import Genome
from evomerge.search.surrogate import prediction
from evomerge.search.surrogate.guide import TRUSTED
from evomerge.search.surrogate.prediction import Example, PredictedScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted score of a recipe on `search`, and measured scores to compare it with.

    measured: the recipe's own score, if it is scored already; the forecast does not use it. baseline: name of
    the run's best baseline on `search`. ranked: Spearman's rank correlation of the run's surrogate on unseen
    candidates, None where there was none. blocks: number of item blocks of `search`.
    """

    recipe: str
    forecast: PredictedScore
    measured: SearchScore | None
    baseline: str | None
    baseline_mean: float | None
    baseline_tasks: dict[str, float]
    ranked: float | None
    blocks: int


def find(store: StoreReader, prepared: Prepared, name: str) -> Recipe:
    """Return the recipe of a file or of the start of a hash, over the run's models.

    Raises:
        ConfigError: it is neither, or its models are not the run's.
    """
    if Path(name).is_file():
        return warm_start.over(read_recipe(name), prepared.template, name, prepared.inputs)
    if len(name) >= 6 and set(name) <= set("0123456789abcdef"):
        return store.recipe(name)
    raise ConfigError(
        f"{name}: no such recipe",
        expected="a recipe.yaml, a mergekit YAML, or 6 or more digits of a recipe hash of the run",
        fix="check the path",
    )


def predict(summary: Summary, prepared: Prepared, name: str) -> Prediction:
    """Predict a recipe's score on `search` from all scores of the run there except its own.

    Args:
        summary: of the run.
        prepared: the run's config, prepared.
        name: a recipe.yaml, a mergekit YAML, or the start of a recipe hash.

    Returns:
        The forecast; normalised scores, 0 = base, 1 = specialists.

    Raises:
        ConfigError: the recipe is outside the run's search space.
        StoreError: the models changed since the run, or base and parents are not scored yet.
        UserError: too few recipes are scored.
    """
    store, course = summary.store, Course(summary)
    summary.run.refuse_changed(prepared.model_facts)
    normaliser = summary.normaliser("search")
    if normaliser is None:
        raise StoreError(
            f"{store.folder}: base and parents are not scored yet",
            fix=f"continue the run: evomerge resume {store.folder}",
        )
    examples = scored(summary, course, prepared)
    recipe, genome = _encoded(name, prepared, course, examples, find(store, prepared, name))
    forecast = prediction.predict_score(
        genome,
        [e for e in examples if e.recipe != recipe.hash and e.genome.tobytes() != genome.tobytes()],
        coordinates=stretched(prepared.space.coordinates, facts.MOVEMENTS.get(store)),
        normaliser=normaliser,
        base=course.parts(summary.parents[0].recipe.hash),
    )
    convergence = course.convergence()
    baseline = next((b for b in summary.baselines if b.name == convergence.best_baseline_name), None)
    baseline_score = None if baseline is None else course.score(baseline.recipe.hash)
    correlations = [state.correlation for state in store.guide() if state.correlation is not None]
    return Prediction(
        recipe=recipe.hash,
        forecast=forecast,
        measured=course.score(recipe.hash),
        baseline=convergence.best_baseline_name,
        baseline_mean=convergence.best_baseline,
        baseline_tasks=baseline_score.tasks if baseline_score else {},
        ranked=correlations[-1] if correlations else None,
        blocks=course.blocks,
    )


def _encoded(
    name: str, prepared: Prepared, course: Course, examples: list[Example], recipe: Recipe
) -> tuple[Recipe, Genome]:
    """Return the recipe in the form in which it is scored, if it is, and its genome."""
    genome = prepared.space.encode(recipe)
    if genome is None:
        genome = next((e.genome for e in examples if e.recipe == recipe.hash), None)
    elif not course.parts(recipe.hash):
        rewritten = prepared.space.decode(genome)  # the same merge in the space's form, not mergekit's
        recipe = rewritten if course.parts(rewritten.hash) else recipe
    if genome is None:
        raise ConfigError(
            f"{name}: outside the run's search space, so it can't be predicted",
            expected=f"a recipe that {prepared.space.describe()} can express",
            fix="score it: start a run from it (warm_start.recipes), or evaluate the merged model",
        )
    return recipe, genome


def scored(summary: Summary, course: Course, prepared: Prepared) -> list[Example]:
    """Return all scored recipes that the search space can express, named ones first."""
    store = summary.store
    genomes: dict[str, Genome] = {}
    finalists = store.entries("finalist")
    for named in (*summary.parents, *summary.baselines, *summary.starts, *finalists):
        genome = prepared.space.encode(named.recipe)
        if genome is None and named in summary.parents:
            rewritten = baselines.as_task_vectors(prepared.template, prepared.space.sources, named.name)
            genome = prepared.space.encode(rewritten)
        if genome is not None:
            genomes.setdefault(named.recipe.hash, genome)
    for generation in store.generations():
        for genome, recipe in zip(generation.genomes, generation.recipes, strict=True):
            genomes.setdefault(recipe, genome)
    examples = []
    for recipe, genome in genomes.items():
        parts = {part.blocks[0]: part for part in course.parts(recipe)}
        if parts:
            examples.append(Example(recipe=recipe, genome=genome, parts=parts))
    return examples


def text(predicted: Prediction) -> RenderableType:
    """Return the prediction as a table and sentences for a rich console."""
    forecast, measured, baseline = predicted.forecast, predicted.measured, predicted.baseline
    columns = [style.words(""), style.numbers("predicted")]
    if measured is not None:
        columns.append(style.numbers("measured" + of_blocks(measured.blocks, predicted.blocks), wrap=True))
    if baseline is not None:
        columns.append(style.numbers(f"best baseline ({baseline})", wrap=True))
    table = style.table(*columns, title="mean normalised score on `search`: 0 = base, 100 = specialists")
    half = (forecast.high - forecast.low) / 2
    for name in ("mean", *forecast.tasks):
        mean = name == "mean"
        score = f"{percent(forecast.mean)} ±{percent(half)}" if mean else percent(forecast.tasks[name])
        cells = [score if forecast.known else percent(None)]
        if measured is not None:
            cells.append(percent(measured.mean if mean else measured.tasks[name]))
        if baseline is not None:
            cells.append(percent(predicted.baseline_mean if mean else predicted.baseline_tasks.get(name)))
        table.add_row(name, *cells, style="bold" if mean else "")
    return Group(table, Text(), *(Text(line) for line in _sentences(predicted)))


def _sentences(predicted: Prediction) -> list[str]:
    forecast = predicted.forecast
    learnt = f"{forecast.learnt} recipes{of_blocks(len(forecast.blocks), predicted.blocks)}"
    if not forecast.known:
        return [
            f"recipe {predicted.recipe[:12]}: nothing near it was scored, "
            "so the model knows nothing about this merge",
            f"the nearest {learnt} have {percent(forecast.lowest)} to {percent(forecast.highest)} points; "
            "this one may lie outside: only scoring it can tell",
        ]
    lines = [
        f"predicted for recipe {predicted.recipe[:12]}: {percent(forecast.mean)} points, "
        f"95 % interval {bounds(forecast.low, forecast.high)}"
    ]
    if predicted.baseline_mean is not None:
        lines.append(_against_baseline(forecast, predicted.baseline_mean))
    if forecast.retention is not None:
        lines.append(f"retention: {percent(forecast.retention)} % of the base's")
    lines.append(
        f"fitted to {learnt}; cross-validated (each from those as far away): "
        f"typical error {percent(forecast.error)} points, rank correlation {forecast.correlation:.2f}"
    )
    if predicted.ranked is not None:
        ignored = f", below the {TRUSTED:g} at which the search uses it" if predicted.ranked < TRUSTED else ""
        lines.append(
            f"the run's surrogate: rank correlation {predicted.ranked:.2f} on unseen candidates{ignored}"
        )
    return lines


def as_data(predicted: Prediction) -> dict[str, Any]:
    """Return the prediction as plain data (`predict --json`), scores as in `predict`, None if not known."""
    forecast, measured = predicted.forecast, predicted.measured
    known = forecast.known
    return {
        "recipe": predicted.recipe,
        "split": "search",
        "known": known,
        "mean": forecast.mean if known else None,
        "low": forecast.low if known else None,
        "high": forecast.high if known else None,
        "tasks": forecast.tasks if known else None,
        "values": forecast.values if known else None,
        "retention": forecast.retention if known else None,
        "measured": None
        if measured is None
        else {
            "mean": measured.mean,
            "tasks": measured.tasks,
            "blocks": measured.blocks,
            "of": predicted.blocks,
        },
        "best_baseline": predicted.baseline,
        "best_baseline_mean": predicted.baseline_mean,
        "best_baseline_tasks": predicted.baseline_tasks,
        "recipes": forecast.learnt,
        "blocks": list(forecast.blocks),
        "uncertainty": forecast.uncertainty,
        "left_out": {"error": forecast.error, "correlation": forecast.correlation},
        "learnt_from": {"lowest": forecast.lowest, "highest": forecast.highest},
        "correlation_of_the_run": predicted.ranked,
    }


def _against_baseline(forecast: PredictedScore, baseline: float) -> str:
    if forecast.low > baseline:
        return "predicted to be better than the best baseline (the interval lies above it)"
    if forecast.high < baseline:
        return "predicted to be worse than the best baseline (the interval lies below it)"
    return "the interval contains the best baseline: only scoring the recipe can tell which is better"
