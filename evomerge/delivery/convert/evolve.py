"""A mergekit-evolve config as a run config: its genome is the search space, its tasks are the suite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from evomerge.delivery.convert.draft import (
    Draft,
    apart,
    filters,
    genes,
    layers_of,
    location,
    method_of,
    named,
    splits,
    tasks_dir,
    without_unknown,
)
from evomerge.errors import ConfigError
from evomerge.evaluation.suite import LOGLIKELIHOOD
from evomerge.merging.methods import Method
from evomerge.schema import LARGEST_COUNT, Strict, parse

TOOL = "mergekit-evolve"
EVALUATIONS = 100
"""Its `--max-fevals`, unless given."""
POINTS = 4
"""Control points of a curve where the number of layers is not known; and the fewest and most there can be."""
FEWEST, MOST = 2, 20
NO_EFFECT = ("int8_mask",)
"""Keys of merges that change no weight."""
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of tasks that measure the likelihood of texts."""


class TaskEntry(Strict):
    """One entry of `tasks`."""

    name: str = Field(min_length=1)
    weight: float | None = 1.0
    metric: str | None = "acc,none"


class Genome(Strict):
    """The section `genome`."""

    models: list[Any] = Field(min_length=1)
    merge_method: str
    base_model: Any = None
    tokenizer_source: Any = None
    layer_granularity: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    normalize: bool | None = None
    allow_negative_weights: bool | None = False
    smooth: bool | None = False
    filters: list[str] | None = None


class EvolveFile(Strict):
    """A file of mergekit-evolve, with the keys that have a meaning."""

    genome: dict[str, Any]
    tasks: list[Any] = Field(default_factory=list)
    limit: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    num_fewshot: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    shuffle: bool | None = False
    random_init: bool | None = False
    apply_chat_template: bool | str | None = False
    fewshot_as_multiturn: bool | None = False
    task_search_path: Any = None


def convert(data: Mapping[str, Any], draft: Draft) -> None:
    """Enter a file into a draft.

    Raises:
        ConfigError: the file is not valid, or something of it has no counterpart.
    """
    known = without_unknown(data, EvolveFile.model_fields, "", draft, TOOL)
    file = parse(EvolveFile, known, draft.kind)
    inner = {key: value for key, value in file.genome.items() if key not in NO_EFFECT}
    inner = without_unknown(inner, Genome.model_fields, "genome.", draft, TOOL)
    genome = parse(Genome, inner, f"{draft.kind}: genome")
    method = method_of(genome.merge_method, draft)
    method, names = _models(genome, method, draft)
    draft.document["space"] = _space(genome, method, draft)
    _tokenizer(genome, names, draft)
    draft.suite("" if draft.has_suite else _suite(file, draft))
    if draft.has_suite and file.tasks:
        draft.note("the file's tasks are replaced by the suite that was given")
    draft.document["budget"] = {"evaluations": draft.options.evaluations or EVALUATIONS}
    if draft.options.evaluations is None:
        draft.note(
            f"{EVALUATIONS} evaluations, as {TOOL} does without --max-fevals; another number: --evaluations N"
        )
    if file.random_init:
        draft.note("`random_init` is left out: a search begins at the best hand-made merge")
    if file.shuffle:
        draft.note("`shuffle` is left out: items are always drawn, by the seed")


def _models(genome: Genome, method: Method, draft: Draft) -> tuple[Method, dict[str, str]]:
    """Enter base and sources; return the method that merges them, and name -> location of the sources."""
    where = f"{draft.kind}: genome"
    places = [location(model, f"{where}.models", draft) for model in genome.models]
    named_base = genome.base_model
    base = None if named_base is None else location(named_base, f"{where}.base_model", draft)
    if method.name == "slerp":
        places = list(dict.fromkeys([*([] if base is None else [base]), *places]))
        if len(places) != 2:
            raise ConfigError(
                f"{draft.kind}: slerp merges two models, of which base_model is one",
                expected="base_model and one other model",
                got=", ".join(places),
            )
    base = draft.options.base or base
    if base is None:
        if method.needs_base:
            raise ConfigError(
                f"{where}: {method.name} works on task vectors and needs a base model",
                fix="add base_model to the file, or give --base MODEL",
            )
        base = places[0]
        draft.note(f"scores are measured from a base, which the file does not name: {base} takes that part")
    method, places = apart(places, base, method, draft)
    names = named(places)
    draft.models(base, names)
    return method, names


def _space(genome: Genome, method: Method, draft: Draft) -> dict[str, Any]:
    layers = genome.layer_granularity or "all"
    varied = genes(
        method,
        ("weight", "density", "t"),
        negative=bool(genome.allow_negative_weights),
        shares=method.name != genome.merge_method,
    )
    if not varied:
        raise ConfigError(f"{draft.kind}: {method.name} has no weight, density or t to search")
    if genome.smooth and layers != "all":
        points = _points(genome, draft)
        layers = 1
        for gene in varied.values():
            gene["curve"] = {"points": points, "kind": "linear"}
    elif genome.smooth:
        draft.note("`smooth` has no effect without layer_granularity")
    space: dict[str, Any] = {
        "name": "converted",
        "about": f"the genome of a {TOOL} config",
        "method": method.name,
        "layers": layers,
    }
    if genome.filters:
        space |= {"modules": filters(genome.filters), "outside": filters(genome.filters)}
    space["genes"] = varied
    if genome.normalize and method.name != genome.merge_method:
        pass  # weights of task vectors are shares, which add up to 1 with that of the base
    elif genome.normalize is not None and "normalize" in method.parameters:
        space["fixed"] = {"normalize": genome.normalize}
    elif genome.normalize is not None:
        draft.note(f"`normalize` is left out: {method.name} has no such parameter")
    bounds = ", ".join(f"{name} {gene['low']:g} to {gene['high']:g}" for name, gene in varied.items())
    draft.note(f"genes have bounds, which {TOOL} lacks: {bounds}")
    if layers != "all":
        draft.note(
            f"embeddings, final norm and head have values of their own; {TOOL} gives them those of the first "
            "and last layers"
        )
    if method.name.startswith("dare"):
        draft.note("DARE rescales by 1 / density, as in its paper, and its masks are part of the recipe")
    return space


def _points(genome: Genome, draft: Draft) -> int:
    """Return the number of control points that stand for mergekit's groups of layers."""
    assert genome.layer_granularity
    sources = draft.document["models"]["sources"].values()
    found = (layers_of(location(place, "models", draft)) for place in [*genome.models, *sources])
    layers = next((count for count in found if count), None)
    if layers is None:
        draft.note(
            f"smooth: the models are not on this machine, so curves have {POINTS} control points; {TOOL} has "
            "the number of layers / layer_granularity"
        )
        return POINTS
    return min(max(layers // genome.layer_granularity, FEWEST), MOST)


def _tokenizer(genome: Genome, names: Mapping[str, str], draft: Draft) -> None:
    source = genome.tokenizer_source
    if source in (None, "base"):
        return
    if source == "union":
        draft.document["tokenizer"] = "union"
        return
    place = location(source, f"{draft.kind}: genome.tokenizer_source", draft)
    by_place = {where: name for name, where in names.items()}
    if place in by_place:
        draft.document["tokenizer"] = by_place[place]
    elif genome.base_model is None or place != location(genome.base_model, "base_model", draft):
        draft.note(f"`tokenizer_source: {place}` is left out: it is none of the models")


def _suite(file: EvolveFile, draft: Draft) -> dict[str, Any]:
    where = f"{draft.kind}: tasks"
    if not file.tasks:
        raise ConfigError(f"{where}: none", fix="give --suite NAME, or --data FILE")
    rows = [{"name": row} if isinstance(row, str) else row for row in file.tasks]
    checked = [
        without_unknown(row, TaskEntry.model_fields, "tasks.", draft, TOOL)
        if isinstance(row, Mapping)
        else row
        for row in rows
    ]
    entries = [parse(TaskEntry, row, where) for row in checked]
    counts = Counter(task.name for task in entries)
    folder = tasks_dir(file.task_search_path, draft)
    suite: dict[str, Any] = {"name": draft.options.out.stem}
    suite |= {} if folder is None else {"tasks_dir": folder}
    suite |= _asking(file, draft)
    suite["tasks"] = [_task(task, counts, file.limit, folder is not None, draft) for task in entries]
    shared = [row["task"] for row in suite["tasks"] if isinstance(row["splits"]["search"], int)]
    known = [row["task"] for row in suite["tasks"] if row["task"] not in shared]
    if shared:
        draft.note(
            f"{TOOL} reports on the items that it searched on; {', '.join(shared)}: other items for search, "
            "select and test are drawn from the split that lm-eval evaluates; their numbers: `splits`"
        )
    if known:
        draft.note(
            f"{', '.join(known)}: searched on other splits than those that results are published on, as in "
            "the packaged suites"
        )
    draft.note(
        "scores of the tasks are put on one scale (0 the base, 1 the best parent) before they are weighted; "
        f"{TOOL} adds raw scores"
    )
    return suite


def _asking(file: EvolveFile, draft: Draft) -> dict[str, Any]:
    """Return how models are asked."""
    template = file.apply_chat_template
    asking: dict[str, Any] = {
        "chat_template": template if isinstance(template, str) else "auto" if template else "off"
    }
    if file.num_fewshot is not None:
        asking["num_fewshot"] = file.num_fewshot
    if file.fewshot_as_multiturn and template:
        asking["fewshot_as_multiturn"] = True
    elif file.fewshot_as_multiturn:
        draft.note("`fewshot_as_multiturn` is left out: there is no chat template")
    return asking


def _task(
    task: TaskEntry, counts: Counter[str], limit: int | None, own: bool, draft: Draft
) -> dict[str, Any]:
    weight = 1.0 if task.weight is None else task.weight
    metric = (task.metric or "acc,none").removesuffix(",none")
    row: dict[str, Any] = {"task": task.name}
    if counts[task.name] > 1:
        row = {"task": f"{task.name}_{re.sub(r'[^A-Za-z0-9]+', '_', metric)}", "of": task.name}
    drawn = splits(task.name, limit, own=own)
    if weight < 0 and metric.partition(",")[0] in PERPLEXITIES:
        draft.note(
            f"{task.name}: less {metric} is better, so it measures retention: the mean log-likelihood of a "
            "token; what losing it costs is objective.retention"
        )
        return {**row, "metric": LOGLIKELIHOOD, "role": "retention", "splits": drawn}
    if weight < 0:
        raise ConfigError(
            f"{draft.kind}: tasks: {task.name} has the weight {weight:g}, so a lower {metric} is better",
            expected="metrics of which more is better",
            fix="name another metric of the task, or leave the task out",
        )
    return {**row, "metric": metric, "weight": weight, "splits": drawn}
