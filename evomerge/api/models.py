"""Models: merge, evaluate, analyze, predict."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from evomerge import pair_gains
from evomerge.api.gates import Gate
from evomerge.api.runs import AnyPath, Run, Written
from evomerge.api.view import View
from evomerge.config import RunConfig
from evomerge.delivery import single
from evomerge.delivery.analyze import page, pairs, terminal
from evomerge.delivery.analyze.heat_map import MEASURES
from evomerge.delivery.export import write_text
from evomerge.delivery.gate import GateRules
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.merging import mergekit
from evomerge.merging.analysis.advice import advise
from evomerge.merging.analysis.interference import measure
from evomerge.merging.compatibility import check
from evomerge.merging.export import writer
from evomerge.merging.export.adapter import write_adapter
from evomerge.merging.export.folder import folder_notes
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_used
from evomerge.merging.stages import merge_stages, read_stages
from evomerge.merging.tensors import kernels
from evomerge.prepare import Prepared, prepare
from evomerge.schema import load_yaml

FORMS = ("model", "adapter", "mergekit")


def merge(
    recipe: AnyPath | Recipe,
    out: AnyPath,
    *,
    form: str = "model",
    rank: int | None = None,
    keep_rest: bool = False,
    max_shard_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Written:
    """Merge models by a recipe.

    Args:
        recipe: a recipe.yaml, a mergekit YAML, or a Recipe.
        out: the folder to write, which must be new or empty; the file, for mergekit YAML.
        form: "model", "adapter" or "mergekit".
        rank, keep_rest, max_shard_bytes: as in `Run.export`.
        say: gets each note when it is known; None keeps them for the result.

    Returns:
        What was written, with notes on what the user should know.

    Raises:
        UserError: the recipe or its models have a mistake, or the disk can't take the result.
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r}: no such form", fix=nearest(form, FORMS))
    place, notes = Path(out), list[str]()

    note = notes.append if say is None else say

    largest = max_shard_bytes or writer.MAX_SHARD_BYTES
    if not isinstance(recipe, Recipe):
        file = Path(recipe)
        if form == "model" and len(stages := read_stages(file)) > 1:
            last = merge_stages(stages, place, root=file.parent, max_shard_bytes=largest, say=note)
            return Written(place=place, name=file.name, recipe=last.hash, notes=tuple(notes))
        recipe = read_recipe(file, say=note)
    if form == "adapter":
        report = write_adapter(recipe, place, rank=rank, keep_rest=keep_rest)
        return Written(place=place, name="", recipe=recipe.hash, adapter=report, notes=tuple(notes))
    if form == "mergekit":
        write_text(place, mergekit.write(recipe))
        return Written(place=place, name="", recipe=recipe.hash, notes=tuple(notes))
    sources = open_used(recipe)
    for text in (*check(recipe, sources), *folder_notes(recipe, sources), *kernels.notes()):
        note(text)
    writer.write(recipe, place, sources=sources, max_shard_bytes=largest)
    return Written(place=place, name="", recipe=recipe.hash, notes=tuple(notes))


class Evaluated(View):
    """The scores of one model. gate: the results of a gate's rules, None where none was asked for."""

    def __init__(self, done: single.Evaluation) -> None:
        super().__init__(done.data, lambda width: single.table(done.data))
        self.gate = None if done.gate is None else Gate(done.gate, done.data["suite"])


def evaluate(
    model: AnyPath,
    suite: str | None = None,
    *,
    split: str = "test",
    run: AnyPath | Run | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    max_length: int | None = None,
    gate: AnyPath | None = None,
    permissions: Permissions = NOTHING,
) -> Evaluated:
    """Score one model on a suite.

    Args:
        model: a folder, a hub id, or `path+adapter`.
        suite: a preset's name or the path of a YAML file; None takes that of `run`.
        split: "search", "select" or "test".
        run: score as this run does: its suite and its settings.
        batch_size, dtype, device, max_length: of the forward passes; None takes the run's, or the default.
        gate: a file of rules for the winner of `run`, against which the model is checked.
        permissions: which code of the tasks may run.

    Returns:
        A view whose data has the mean, its 95 % interval and the number of items per task.

    Raises:
        UserError: model or suite can't be used.
    """
    done = single.evaluate(
        str(model),
        suite,
        split,
        settings=single.Settings(batch_size=batch_size, dtype=dtype, device=device, max_length=max_length),
        run=run.folder if isinstance(run, Run) else None if run is None else Path(run),
        permissions=permissions,
        rules=None if gate is None else GateRules.load(Path(gate)),
    )
    return Evaluated(done)


class Analysis(View):
    """Where fine-tunes agree or conflict, and which method to start from; `save` writes it as a page."""

    def __init__(self, data: Any, draw: Callable[[int], Any], save: Callable[[Path], Path]) -> None:
        super().__init__(data, draw)
        self._save = save

    def save(self, path: str | PathLike[str]) -> Path:
        """Write all maps as one HTML page, and return its path."""
        return self._save(Path(path))


def analyze(
    config: AnyPath,
    *,
    base: str | None = None,
    threshold: float = 1.0,
    top: float = 0.2,
    shown: str = "conflict",
    gain: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Measure where fine-tunes agree or conflict, from their files alone.

    Args:
        config: a run config, recipe.yaml or mergekit YAML that names the models.
        base: the base: a model of the file, or a location; None where the file names it.
        threshold: an element counts as changed above this multiple of its tensor's mean |task vector|.
        top: share of largest elements compared between models.
        shown: the map in the text: "conflict", "cosine", "overlap" or "norm".
        gain: whether to load the models of a run config, too, and to predict what merges of two of them gain.
        progress: is called with the steps done and the steps in all.

    Raises:
        UserError: models can't be read or compared.
    """
    if shown not in MEASURES:
        raise ConfigError(f"unknown map {shown!r}", fix=nearest(shown, MEASURES))
    prepared = _prepared_for_gains(Path(config), base) if gain else None
    models, origin = terminal.read_models(Path(config), base)
    found = measure(models, origin, threshold=threshold, top=top, progress=progress)
    gains = None if prepared is None else pair_gains.foresee(prepared, progress)
    advice = advise(found)
    data = terminal.as_data(found, advice)
    if gains is not None:
        data["gains"] = pairs.as_data(gains)

    def draw(width: int) -> RenderableType:
        shapes = terminal.terminal(found, advice, measure=shown, width=width)
        return shapes if gains is None else Group(shapes, pairs.table(gains))

    return Analysis(data, draw, lambda path: page.write_html(found, advice, path))


def _prepared_for_gains(config: Path, base: str | None) -> Prepared:
    """Return a run config whose models are to be loaded; ConfigError where the file is none."""
    if base is not None or {"groups", "merge_method"} & set(load_yaml(config)):
        raise ConfigError(
            "--gain needs a run config with models and a suite",
            got="--base" if base is not None else str(config),
            fix="evomerge init writes one",
        )
    return prepare(RunConfig.load(config))


def predict(run: AnyPath | Run, recipe: AnyPath) -> View:
    """Predict the score of a merge from a run's scores; see `Run.predict`."""
    return (run if isinstance(run, Run) else Run(run)).predict(recipe)
