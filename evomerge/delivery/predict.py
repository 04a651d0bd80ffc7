"""What `evomerge predict` says: how good a merge would be, before it is merged, from a run's store alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery.summary import Measured, Summary
from evomerge.errors import ConfigError, StoreError
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.prepare import Prepared
from evomerge.running import warm_start
from evomerge.running.store import StoreReader, facts
from evomerge.search import baselines
from evomerge.search.spaces.space import Genome
from evomerge.search.surrogate import prediction
from evomerge.search.surrogate.guide import TRUSTED
from evomerge.search.surrogate.prediction import Example, PredictedScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A forecast beside what is known.

    measured: of the recipe itself, where it was scored already; the forecast does not know it. baseline: the
    best of the run on `search`. ranked: Spearman's correlation of the run's own surrogate with candidates it
    had not seen, None where there was none. blocks: item blocks of `search`.
    """

    recipe: str
    forecast: PredictedScore
    measured: Measured | None
    baseline: str | None
    baseline_mean: float | None
    baseline_tasks: dict[str, float]
    ranked: float | None
    blocks: int


def find(store: StoreReader, template: Recipe, asked: str) -> Recipe:
    """Return the recipe of a file or of the start of a hash, over the run's models.

    Raises:
        ConfigError: it is neither, or its models are not the run's.
    """
    if Path(asked).is_file():
        return warm_start.over(read_recipe(asked), template, asked)
    if len(asked) >= 6 and set(asked) <= set("0123456789abcdef"):
        return store.recipe(asked)
    raise ConfigError(
        f"{asked}: no such recipe",
        expected="a recipe.yaml, a mergekit YAML, or 6 or more digits of a recipe hash of the run",
        fix="check the path",
    )


def predict(summary: Summary, prepared: Prepared, asked: str) -> Predicted:
    """Predict a recipe's score on `search` from everything the run has scored there, but itself.

    Raises:
        ConfigError: the recipe does not lie in the run's search space.
        StoreError: the models changed since the run, or base and parents were not scored yet.
        UserError: too little was scored.
    """
    store = summary.store
    if facts.FINGERPRINTS.get(store) != prepared.fingerprints:
        raise StoreError(
            f"{store.folder}: model files changed since the run began", fix="put the old files back"
        )
    normaliser = summary.normaliser("search")
    if normaliser is None:
        raise StoreError(
            f"{store.folder}: base and parents are not scored yet",
            fix=f"go on with the run: evomerge resume {store.folder}",
        )
    recipe = find(store, prepared.template, asked)
    genome = prepared.space.encode(recipe)
    examples = scored(summary, prepared)
    own = next((e.genome for e in examples if e.recipe == recipe.hash), None)
    if genome is None and own is None:
        raise ConfigError(
            f"{asked}: not in the run's search space, so nothing is known about it",
            expected=f"a recipe that {prepared.space.describe()} can express",
            fix="score it: start a run from it (warm_start.recipes), or evaluate the merged model",
        )
    if genome is None:
        assert own is not None
        genome = own
    elif not summary.parts(recipe.hash) and summary.parts((same := prepared.space.decode(genome)).hash):
        recipe = same  # written otherwise, as in mergekit's form
    found = prediction.predict_score(
        genome,
        [e for e in examples if e.recipe != recipe.hash and e.genome.tobytes() != genome.tobytes()],
        coordinates=prepared.space.coordinates,
        normaliser=normaliser,
        base=summary.parts(summary.parents[0].recipe.hash),
    )
    progress = summary.progress()
    rival = next((b for b in summary.baselines if b.name == progress.best_baseline_name), None)
    rated = None if rival is None else summary.on_search(rival.recipe.hash)
    correlations = [state.correlation for state in store.guide() if state.correlation is not None]
    return Predicted(
        recipe=recipe.hash,
        forecast=found,
        measured=summary.on_search(recipe.hash),
        baseline=progress.best_baseline_name,
        baseline_mean=progress.best_baseline,
        baseline_tasks=rated.tasks if rated else {},
        ranked=correlations[-1] if correlations else None,
        blocks=store.blocks("search"),
    )


def scored(summary: Summary, prepared: Prepared) -> list[Example]:
    """Return all scored recipes that are points of the space, named ones first."""
    store = summary.store
    points: dict[str, Genome] = {}
    others = (*summary.starts, *store.entries("finalist"))
    for named in (*summary.parents, *summary.baselines, *others):
        genome = prepared.space.encode(named.recipe)
        if genome is None and named in summary.parents:
            same = baselines.as_task_vectors(prepared.template, prepared.space.sources, named.name)
            genome = prepared.space.encode(same)
        if genome is not None:
            points.setdefault(named.recipe.hash, genome)
    for generation in store.generations():
        for row, recipe in zip(generation.genomes, generation.recipes, strict=True):
            points.setdefault(recipe, row)
    found = []
    for recipe, genome in points.items():
        parts = {part.blocks[0]: part for part in summary.parts(recipe)}
        if parts:
            found.append(Example(recipe=recipe, genome=genome, parts=parts))
    return found


def text(found: Predicted) -> RenderableType:
    """Return the prediction for people."""
    guess, seen = found.forecast, found.measured
    table = Table(
        title="mean normalised score on `search`: 0 = base, 100 = specialists",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    columns = ["", "predicted"]
    columns += ["measured" + _share(seen.blocks, found.blocks)] if seen else []
    columns += [f"best baseline ({found.baseline})"] if found.baseline else []
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    half = 50 * (guess.high - guess.low)
    rows: list[tuple[str, str, float | None, float | None]] = [
        (
            "mean",
            f"{_points(guess.mean)} ±{half:.1f}",
            None if seen is None else seen.mean,
            found.baseline_mean,
        )
    ]
    rows += [
        (
            task,
            _points(value),
            None if seen is None else seen.tasks[task],
            found.baseline_tasks.get(task),
        )
        for task, value in guess.tasks.items()
    ]
    for name, predicted, measured, baseline in rows:
        cells = [name, predicted]
        cells += [_points(measured)] if seen else []
        cells += [_points(baseline)] if found.baseline else []
        table.add_row(*cells, style="bold" if name == "mean" else "")
    lines = [
        f"predicted for recipe {found.recipe[:12]}: {_points(guess.mean)} points "
        f"[{_points(guess.low)}, {_points(guess.high)}] with 95 % confidence"
    ]
    if found.baseline_mean is not None:
        lines.append(_against(guess, found.baseline_mean))
    if guess.retention is not None:
        lines.append(f"retention: {100 * guess.retention:.1f} % of the base's")
    lines.append(
        f"learnt from {guess.learnt} recipes{_share(len(guess.blocks), found.blocks)}; each predicted from "
        f"the others: typical error {100 * guess.error:.1f} points, rank correlation {guess.correlation:.2f}"
    )
    if found.ranked is not None:
        weak = ", too low for the search to listen" if found.ranked < TRUSTED else ""
        lines.append(f"the run's surrogate ranked candidates it had not seen with {found.ranked:.2f}{weak}")
    if guess.uncertainty > 0.9:
        lines.append("far from everything scored: this is hardly more than an average of the run")
    return Group(table, Text(), *(Text(line) for line in lines))


def as_data(found: Predicted) -> dict[str, Any]:
    """Return the prediction as plain data, normalised scores from 0, the base, to 1 (`predict --json`)."""
    guess, seen = found.forecast, found.measured
    return {
        "recipe": found.recipe,
        "split": "search",
        "mean": guess.mean,
        "low": guess.low,
        "high": guess.high,
        "tasks": guess.tasks,
        "values": guess.values,
        "retention": guess.retention,
        "measured": None
        if seen is None
        else {"mean": seen.mean, "tasks": seen.tasks, "blocks": seen.blocks, "of": found.blocks},
        "best_baseline": found.baseline,
        "best_baseline_mean": found.baseline_mean,
        "best_baseline_tasks": found.baseline_tasks,
        "recipes": guess.learnt,
        "blocks": list(guess.blocks),
        "uncertainty": guess.uncertainty,
        "left_out": {"error": guess.error, "correlation": guess.correlation},
        "correlation_of_the_run": found.ranked,
    }


def _against(guess: PredictedScore, baseline: float) -> str:
    if guess.low > baseline:
        return "better than the best baseline, as far as this model can tell"
    if guess.high < baseline:
        return "worse than the best baseline, as far as this model can tell"
    return "the best baseline lies inside the interval: only scoring it will tell"


def _share(blocks: int, of: int) -> str:
    return "" if blocks == of else f", {blocks} of {of} item blocks"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"
