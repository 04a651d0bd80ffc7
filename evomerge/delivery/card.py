"""The model card of an exported recipe: Markdown with the hub's YAML header."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from evomerge.delivery import objectives
from evomerge.delivery.rescore import ScoredAdapter
from evomerge.delivery.style import FILTERS
from evomerge.delivery.summary import Summary, kept_sentence
from evomerge.merging.recipe import Recipe
from evomerge.running import forward
from evomerge.running.store import facts
from evomerge.search.ports import Named
from evomerge.text import in_texts, one_line, printable


def card(
    summary: Summary, chosen: Named, *, adapter: ScoredAdapter | None = None, equal: bool | None = None
) -> str:
    """Return the model card of one recipe of a run.

    Args:
        summary: of the run.
        chosen: the exported recipe.
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
        header=_header(recipe, adapter),
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


def _header(recipe: Recipe, adapter: ScoredAdapter | None) -> Markdown:
    """Return the YAML header, as the hub reads it."""
    data: dict[str, Any] = {
        "library_name": "transformers" if adapter is None else "peft",
        "base_model": list(recipe.models.values()) if adapter is None else adapter.report.base,
        "tags": ["merge", *(["lora"] if adapter is not None else []), "evomerge"],
    }
    return Markdown(yaml.safe_dump(in_texts(printable, data), sort_keys=False).strip())
