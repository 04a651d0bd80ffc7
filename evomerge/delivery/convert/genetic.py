"""A mergenetic config as a run config: SLERP for one model, DARE-TIES for several, as in its scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from evomerge.delivery.convert.draft import (
    TEST,
    Draft,
    apart,
    filters,
    genes,
    location,
    method_of,
    named,
    splits,
    tasks_dir,
    without_unknown,
)
from evomerge.delivery.new_run import OwnTask, entry
from evomerge.errors import ConfigError
from evomerge.merging.methods import Method
from evomerge.running.store import BASE
from evomerge.schema import LARGEST_COUNT, LARGEST_SEED, Strict, parse

TOOL = "mergenetic"
KEYS = ("pop_size", "n_iter", "path_to_store_merged_model", "path_to_store_config")
"""Keys that only its files have."""
SMALLEST = 4
"""The smallest population there is here."""
POINTS = 5
"""Values along the layers, for attention and for MLPs, in its SLERP."""


class GeneticFile(Strict):
    """A file of mergenetic, with the keys of its examples."""

    run_id: str | int | None = None
    base_model: Any
    models: Any
    tasks: Any = None
    datasets: dict[Any, str] | None = None
    langs: list[Any] | str | None = None
    metric: str | None = "acc"
    n_iter: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    pop_size: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    n_samples: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    eval_batch_size: int | None = Field(None, ge=1, le=65536)
    additional_templates_folder: str | None = None
    device: str | None = None
    load_in_4bit: bool | None = False
    bench: str | None = None
    mode: str | None = None
    task_type: str | None = None
    path_to_store_config: str | None = None
    path_to_store_merged_model: str | None = None


def convert(data: Mapping[str, Any], draft: Draft) -> None:
    """Enter a file into a draft.

    Raises:
        ConfigError: the file is not valid, or something of it has no counterpart.
    """
    file = parse(GeneticFile, without_unknown(data, GeneticFile.model_fields, "", draft, TOOL), draft.kind)
    names = _model_names(file, draft)
    method = _method(names, draft)
    graded = method.name == "slerp"
    method, names = _models(file, names, method, draft)
    draft.document["space"] = _slerp(method) if graded else _space(method, draft)
    draft.suite("" if draft.has_suite else _suite(file, names, draft))
    _objectives(draft)
    _budget(file, draft)
    if file.dtype is not None:
        draft.document["dtype"] = file.dtype
    if file.eval_batch_size is not None:
        draft.document["executor"] = {"batch_size": file.eval_batch_size}
    draft.document["seed"] = file.seed or 0
    if file.run_id:
        draft.document["out"] = "runs/" + (
            re.sub(r"[^\w.-]+", "-", str(file.run_id)).strip("-.") or "converted"
        )
    _left_out(file, draft)


def _text(key: object) -> str:
    """Return a key as text; YAML 1.1 reads `no`, the Norwegian language, as false."""
    return {False: "no", True: "yes"}[key] if isinstance(key, bool) else str(key)


def _model_names(file: GeneticFile, draft: Draft) -> dict[str, str]:
    """Return name -> location of the listed models, in the file's order."""
    where, models = f"{draft.kind}: models", file.models
    if isinstance(models, str):
        models = [models]
    if isinstance(models, list) and models:
        return named(location(model, where, draft) for model in models)
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(where, expected="name: model, or a list of models", got=repr(models)[:80])
    names = {_text(key): location(model, where, draft) for key, model in models.items()}
    return {f"{name}-model" if name == BASE else name: place for name, place in names.items()}


def _method(names: Mapping[str, str], draft: Draft) -> Method:
    """Return the method: its files do not say which merger the script makes."""
    if draft.options.method is not None:
        return method_of(draft.options.method, draft)
    name = "slerp" if len(names) == 1 else "dare_ties"
    draft.note(
        f"a {TOOL} file does not say how models are merged; {name}, as in its scripts for "
        f"{'one model' if len(names) == 1 else 'several models'}; another method: --method NAME"
    )
    return method_of(name, draft)


def _models(
    file: GeneticFile, names: dict[str, str], method: Method, draft: Draft
) -> tuple[Method, dict[str, str]]:
    """Enter base and sources; return the method that merges them, and name -> location of the sources."""
    theirs = location(file.base_model, f"{draft.kind}: base_model", draft)
    base = draft.options.base or theirs
    if not method.uses_base(BASE) and theirs not in names.values():
        first = next(iter(named([theirs])))  # whole models are merged, so theirs is one of them
        names = {first if first not in names else f"{first}-base": theirs, **names}
    if method.name == "slerp" and len(names) != 2:
        raise ConfigError(
            f"{draft.kind}: slerp merges two models",
            expected="base_model and one model",
            got=f"{len(names)} models",
        )
    method, places = apart(list(names.values()), base, method, draft)
    names = {name: place for name, place in names.items() if place in places}
    draft.models(base, names)
    return method, names


def _slerp(method: Method) -> dict[str, Any]:
    """Return the space of its SLERP: curves for attention and MLP. method: what carries it out here."""
    curve = {"points": POINTS, "kind": "linear"}
    varied = genes(method, ("weight", "t"), shares=True)
    return {
        "name": "converted",
        "about": f"SLERP as in {TOOL}: {POINTS} points along the layers, for attention and MLP apart",
        "method": method.name,
        "layers": 1,
        "modules": filters(["self_attn", "mlp"]),
        "genes": {name: {**gene, "curve": curve} for name, gene in varied.items()},
    }


def _space(method: Method, draft: Draft) -> dict[str, Any]:
    """Return a space with the same values for the whole model."""
    varied = genes(method, ("weight", "density", "t"))
    if not varied:
        raise ConfigError(f"{draft.kind}: {method.name} has no weight, density or t to search")
    bounds = ", ".join(f"{name} {gene['low']:g} to {gene['high']:g}" for name, gene in varied.items())
    draft.note(f"genes: {bounds}, per model, the same in all layers")
    return {
        "name": "converted",
        "about": f"{method.name} as in {TOOL}, the same values in all layers",
        "method": method.name,
        "genes": varied,
    }


def _suite(file: GeneticFile, names: Mapping[str, str], draft: Draft) -> dict[str, Any]:
    found = _searched(file, draft)
    if not found:
        return {"name": draft.options.out.stem, "tasks": _own_data(file, names, draft)}
    folder = tasks_dir(file.additional_templates_folder, draft)
    own = folder is not None or file.additional_templates_folder is not None
    suite: dict[str, Any] = {"name": draft.options.out.stem, "chat_template": "off"}
    suite |= {} if folder is None else {"tasks_dir": folder}
    metric = (file.metric or "acc").removesuffix(",none")
    rows = []
    for task, specialist in found.items():
        row: dict[str, Any] = {"task": task, "metric": metric}
        row["splits"] = splits(task, file.n_samples or None, own=own)
        rows.append(row | ({"specialist": specialist} if specialist in names else {}))
    for task in dict.fromkeys(_tasks_of(file, "test").values()):
        if task not in found:
            row = {"task": task, "metric": metric, "weight": 0, "splits": {"test": TEST}}
            rows.append(row)
            draft.note(f"{task} is reported, and has no part in search and verdict")
    draft.note(
        "each task has other items for search, select and test, drawn from the split that lm-eval evaluates: "
        "change their numbers under `splits`"
    )
    if file.datasets:
        draft.note("`datasets` is left out: the tasks have their own data")
    return {**suite, "tasks": rows}


def _tasks_of(file: GeneticFile, split: str) -> dict[str, str]:
    tasks = file.tasks.get(split) if isinstance(file.tasks, Mapping) else None
    return {_text(key): str(task) for key, task in tasks.items()} if isinstance(tasks, Mapping) else {}


def _searched(file: GeneticFile, draft: Draft) -> dict[str, str | None]:
    """Return task -> the model that is good at it, of the tasks that are searched on."""
    if isinstance(file.tasks, str | list):
        listed = [file.tasks] if isinstance(file.tasks, str) else file.tasks
        return {str(task): None for task in listed}
    if file.tasks is not None and not _tasks_of(file, "search"):
        raise ConfigError(
            f"{draft.kind}: tasks",
            expected="a list of tasks, or {search: {NAME: TASK}, test: ...}",
            got=repr(file.tasks)[:80],
        )
    found: dict[str, str | None] = {}
    for key, task in _tasks_of(file, "search").items():
        found.setdefault(task, key)
    return found


def _own_data(file: GeneticFile, names: Mapping[str, str], draft: Draft) -> list[dict[str, Any]]:
    """Return the data files as tasks, each file once."""
    if not file.datasets:
        raise ConfigError(f"{draft.kind}: no tasks and no datasets", fix="give --suite NAME, or --data FILE")
    rows: dict[str, dict[str, Any]] = {}
    for key, place in file.datasets.items():
        if place in rows:
            continue
        if not Path(place).is_file():
            raise ConfigError(
                f"{draft.kind}: datasets: {place} is not here",
                fix="start the command where its paths begin; or give --data NAME=FILE, or --suite NAME",
            )
        rows[place] = entry(OwnTask(name=_text(key), file=Path(place)), names, draft.options.out)
    draft.note("columns and metrics of the data files are guessed: look at them under `suite`")
    return list(rows.values())


def _objectives(draft: Draft) -> None:
    suite = draft.document["suite"]
    tasks = [] if isinstance(suite, str) else [row["task"] for row in suite["tasks"] if row.get("weight", 1)]
    if len(tasks) > 1:
        draft.document["objective"] = {"several": tasks}
        draft.note(
            "every task is an objective of its own, as in its scripts; leave `objective` out for one winner "
            "over all tasks"
        )


def _budget(file: GeneticFile, draft: Draft) -> None:
    population, generations = file.pop_size or 0, file.n_iter or 0
    if draft.options.evaluations is not None:
        draft.document["budget"] = {"evaluations": draft.options.evaluations}
    elif population >= SMALLEST and generations:
        draft.document["budget"] = {"generations": generations}
    else:
        draft.document["budget"] = {"evaluations": max(1, population) * max(1, generations)}
    if population >= SMALLEST:
        draft.document["optimizer"] = {"population": population}
    elif draft.options.evaluations is None:
        count = draft.document["budget"]["evaluations"]
        draft.note(f"budget.evaluations is {count} (pop_size x n_iter), which is a trial: --evaluations N")


def _left_out(file: GeneticFile, draft: Draft) -> None:
    if file.mode and file.mode != "mean":
        draft.note(f"`mode: {file.mode}` is left out: scores are measured, not estimated; races save items")
    if file.load_in_4bit:
        draft.note("`load_in_4bit` is left out: models are scored as they are exported")
    if file.device and not re.fullmatch("cuda|cpu|mps", file.device):
        draft.note(
            f"`device: {file.device}` is left out: a run takes all GPUs; `evomerge run --device` names one"
        )
    if any(
        getattr(file, key)
        for key in ("bench", "task_type", "path_to_store_config", "path_to_store_merged_model")
    ):
        draft.note("`bench`, `task_type` and the folders for configs and models have no counterpart")
