"""The model card of an exported recipe: Markdown with the hub's YAML header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from evomerge.delivery import objectives
from evomerge.delivery.origins import Origin, licence
from evomerge.delivery.rescore import ScoredAdapter
from evomerge.delivery.style import FILTERS
from evomerge.delivery.summary import Row, Summary, kept_sentence
from evomerge.merging.recipe import Recipe
from evomerge.running import forward
from evomerge.running.store import facts
from evomerge.search.ports import Named
from evomerge.text import in_texts, one_line, printable


def card(
    summary: Summary,
    chosen: Named,
    models: Mapping[str, Origin],
    *,
    adapter: ScoredAdapter | None = None,
    equal: bool | None = None,
) -> str:
    """Return the model card of one recipe of a run.

    Args:
        summary: of the run.
        chosen: the exported recipe.
        models: its models by name, as `origins` returns them.
        adapter: what was exported, if it is an adapter and not the full model.
        equal: whether the exported weights are those that were scored on `test`; None where no weights were.

    Returns:
        The text of README.md.
    """
    store, recipe = summary.store, chosen.recipe
    rows = summary.rows()
    row = next((row for row in rows if row.recipe == recipe.hash), None)
    best, front = summary.best_baseline(rows), objectives.front(summary)
    shown = [row for row in rows if row.role in ("base", "parent")]
    shown += [extra for extra in (best, row) if extra is not None and extra not in shown]
    points = front.searched if front is not None else []
    # No autoescape, because this is Markdown: `_escaped` does that.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_escaped
    )
    environment.filters |= FILTERS | {"code": code}
    template = files("evomerge.delivery").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        header=_header(summary, recipe, models, row, adapter),
        models=models,
        below=None if adapter is None else _below(models, adapter),
        chosen=chosen,
        adapter=adapter,
        equal=equal,
        recipe=recipe,
        is_winner=summary.winner is not None and recipe.hash == summary.winner.recipe.hash,
        rows=shown,
        tasks=[task.task for task in summary.shown_tasks],
        verdict=summary.verdict(rows),
        weakest=summary.weakest(rows),
        kept=kept_sentence(summary.shares(rows)),
        constraints=objectives.constraints(summary),
        front=front,
        generates=any(row.tokens is not None for row in shown),
        lengths=objectives.lengths(summary),
        point=next((point for point in points if point.recipe == recipe.hash), None),
        suite=summary.suite,
        seed=facts.CONFIG.require(store)["seed"],
        versions=store.versions(),
        passes=forward.stored(store),
        methods=sorted({group.method for group in recipe.groups}),
    )


class Markdown(str):
    """Text that is Markdown already."""


def code(text: str, *, cell: bool = False) -> Markdown:
    """Return a text as a code span, with a fence that is longer than any in the text.

    cell: whether it stands in a table.

    >>> print(code("a`b|c", cell=True))
    ``a`b\\|c``
    """
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    text = text.replace("|", "\\|") if cell else text
    return Markdown(f"{fence}{space}{text}{space}{fence}")


def _escaped(value: Any) -> Any:
    """Return a value of the template, its text with everything escaped that Markdown would obey."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return re.sub(r"([\\`*<>|&]|\](?=[(\[]))", r"\\\1", one_line(value))


def _below(models: Mapping[str, Origin], adapter: ScoredAdapter) -> Origin | None:
    """Return the model that an adapter is for."""
    return next((model for model in models.values() if model.location == adapter.report.base), None)


def _header(
    summary: Summary,
    recipe: Recipe,
    models: Mapping[str, Origin],
    row: Row | None,
    adapter: ScoredAdapter | None,
) -> Markdown:
    """Return the YAML header, as the hub reads it."""
    read = [models[name] for name in recipe.used_models()]
    below = read if adapter is None else [model for model in [_below(models, adapter)] if model]
    data: dict[str, Any] = {
        "library_name": "transformers" if adapter is None else "peft",
        "pipeline_tag": "text-generation",
        "base_model": list(dict.fromkeys(id_ for model in below for id_ in model.ids)),
        "base_model_relation": "merge" if adapter is None else "adapter",
        **licence(read)[0],
        "tags": ["merge", *(["lora"] if adapter is not None else []), "evomerge"],
    }
    if not data["base_model"]:
        del data["base_model"], data["base_model_relation"]
    if row is not None:
        scores = {name: score for name, _, score in adapter.rows()} if adapter is not None else {}
        values = {name: scores.get(name, task.estimate) for name, task in row.tasks.items()}
        metrics = {task.task: task.metric.partition(",")[0] for task in summary.shown_tasks}
        results = [_result(name, metrics[name], float(value)) for name, value in values.items()]
        data["model-index"] = [{"name": f"merge-{recipe.hash[:12]}", "results": results}]
    return Markdown(yaml.safe_dump(in_texts(printable, data), sort_keys=False).strip())


def _result(task: str, metric: str, value: float) -> dict[str, Any]:
    """Return one score on `test` as the hub's `model-index` has it."""
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"name": task, "type": task, "split": "test"},
        "metrics": [{"type": metric, "name": metric, "value": value}],
    }
