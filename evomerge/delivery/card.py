"""The model card of an exported recipe: Markdown with the hub's YAML header."""

from __future__ import annotations

from importlib.resources import files

import jinja2

from evomerge.delivery import objectives
from evomerge.delivery.rescore import ScoredAdapter
from evomerge.delivery.style import FILTERS
from evomerge.delivery.summary import Summary, kept_sentence
from evomerge.running import forward
from evomerge.running.store import facts
from evomerge.search.ports import Named


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
    # No autoescape: this is Markdown, and < or & in a path must stay what they are.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= FILTERS
    template = files("evomerge.delivery").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
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
        point=next((point for point in points if point.recipe == recipe.hash), None),
        suite=summary.suite,
        seed=facts.CONFIG.require(store)["seed"],
        versions=store.versions(),
        passes=forward.stored(store),
        methods=sorted({group.method for group in recipe.groups}),
    )
