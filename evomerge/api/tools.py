"""Tools beside runs: models in other formats, measurements for merges, demo models, search spaces, suites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evomerge.api.runs import AnyPath
from evomerge.api.view import View
from evomerge.delivery import new_suite as suites
from evomerge.delivery import spaces as delivery
from evomerge.delivery.new_suite import NewSuite
from evomerge.errors import ConfigError, nearest
from evomerge.merging.analysis import fisher as fisher_information
from evomerge.merging.analysis import gram as gram_matrices
from evomerge.merging.importing.folder import Imported
from evomerge.merging.importing.folder import import_model as import_folder
from evomerge.merging.recipe import DTYPES
from evomerge.running.executors import ExecutorSpec, resolve
from evomerge.zoo.build import build_zoo

__all__ = ["build_zoo", "fisher", "gram", "import_model", "new_suite", "space", "spaces"]

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


def import_model(model: AnyPath, out: AnyPath, *, dtype: str | None = None) -> Imported:
    """Write a quantised, pickled or GGUF model as a folder that can be merged.

    Args:
        model: a model folder, or a .gguf file.
        out: the folder to write, new or empty.
        dtype: of the written weights; None is bfloat16, or as stored.

    Raises:
        UserError: the model can't be read, or the folder not be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}", expected=", ".join(DTYPES), fix=nearest(dtype, DTYPES))
    return import_folder(str(model), Path(out), dtype=dtype)


def fisher(
    model: AnyPath,
    text: AnyPath,
    out: AnyPath,
    *,
    labels: str = "text",
    sequences: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> fisher_information.Estimated:
    """Estimate a model's diagonal Fisher information on a text, for merges with the method `fisher`.

    Args:
        model: a folder, a hub id, or `path+adapter`.
        text: a text file, one sequence per line.
        out: the safetensors file to write.
        labels: "text", or "model" for the model's own draws with `seed`.
        sequences, max_length: use only this many lines, of this many tokens.
        device: auto, cpu, cuda, cuda:N or mps.
        progress: is called with the lines done and the lines in all.
    """
    place, _, _ = resolve(ExecutorSpec(device=device))
    return fisher_information.estimate(
        str(model),
        Path(text),
        Path(out),
        labels=labels,
        sequences=sequences,
        max_length=max_length,
        seed=seed,
        device=place,
        progress=progress,
    )


def gram(
    model: AnyPath,
    text: AnyPath,
    out: AnyPath,
    *,
    sequences: int | None = None,
    max_length: int = 512,
    device: str = "auto",
    progress: Progress | None = None,
) -> gram_matrices.MeasuredInputs:
    """Measure the inputs of a model's linear layers on a text, for merges with the method `regmean`.

    Args:
        model, text, out, sequences, max_length, device, progress: as in `fisher`.
    """
    place, _, _ = resolve(ExecutorSpec(device=device))
    return gram_matrices.measure(
        str(model),
        Path(text),
        Path(out),
        sequences=sequences,
        max_length=max_length,
        device=place,
        progress=progress,
    )


def spaces(config: AnyPath | None = None) -> View:
    """Return the search-space presets; config: count their genes for the models of this run config."""
    place = None if config is None else Path(config)
    rows = delivery.presets(place)
    return View(rows, lambda width: delivery.presets_text(rows, place))


def space(name: str, config: AnyPath | None = None) -> View:
    """Return the genes of a search space.

    Args:
        name: a preset's name, or the path of a YAML file.
        config: apply it to the models of this run config; None to example models.
    """
    data = delivery.as_data(name, None if config is None else Path(config))
    return View(data, lambda width: delivery.text(data))


def new_suite(
    file: AnyPath,
    *,
    prompt: str,
    answer: str,
    choices: str | None = None,
    metric: str | None = None,
    scorer: str | None = None,
    name: str | None = None,
    out: AnyPath | None = None,
) -> NewSuite:
    """Write the suite of a data file, and say what differences its `test` items can show.

    Args:
        file: a .jsonl or .csv file, one item per row.
        prompt, answer, choices, metric, scorer: keys of the suite's task.
        name: of suite and task; None takes the file's.
        out: the YAML to write; None puts it beside the file.
    """
    return suites.write(
        Path(file),
        prompt=prompt,
        answer=answer,
        choices=choices,
        metric=metric,
        scorer=scorer,
        name=name,
        out=None if out is None else Path(out),
    )
