"""One candidate of a run (`evomerge show`): recipe, origin, scores and times, and single items on request."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import export, samples, style
from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import SPLITS, Scores, Split, joined
from evomerge.running.store import ID, StoreReader
from evomerge.search.ports import Named
from evomerge.text import one_line

_WIDTH = 60
"""Characters of an item's text that the table shows."""
_ROLES = ("base", "parent", "baseline", "start", "descent", "finalist", "unlimited", "winner")


def as_data(
    summary: Summary, pick: str, *, items: str | None = None, split: Split | None = None
) -> dict[str, Any]:
    """Return everything that a run stores about a candidate, as plain data (`show --json`).

    Args:
        summary: of the run.
        pick: the start of the candidate's recipe hash, or a row of the report.
        items: a task whose items are listed, with their texts.
        split: of these items; None takes the last split the candidate was scored on.

    Raises:
        ConfigError: there is no such candidate, task or score.
    """
    store = summary.store
    named = export.find(summary, pick)
    recipe = named.recipe
    splits = {name: data for name in SPLITS if (data := _on_split(store, recipe.hash, name)) is not None}
    data = {
        "id": recipe.hash[:ID],
        "hash": recipe.hash,
        "recipe": recipe.to_data(),
        "yaml": recipe.to_yaml(),
        "names": [
            {"role": role, "name": entry.name}
            for role in _ROLES
            for entry in store.entries(role)
            if entry.recipe.hash == recipe.hash
        ],
        "asked": [
            {
                "generation": generation.number,
                "candidate": row,
                "genome": generation.genomes[row].tolist(),
                "losses": None if generation.losses is None else generation.losses[row].tolist(),
            }
            for generation in store.generations()
            for row, asked in enumerate(generation.recipes)
            if asked == recipe.hash
        ],
        "splits": splits,
    }
    if items is not None:
        data["items"] = _items(summary, named, items, split)
    return data


def _on_split(store: StoreReader, recipe: str, split: Split) -> dict[str, Any] | None:
    parts = _parts(store, recipe, split)
    failures = (f for failed, where, f in store.failures() if (failed, where) == (recipe, split))
    failure = next(failures, None)
    if not parts and failure is None:
        return None
    timing = store.timings(split).get(recipe)
    return {
        "blocks": [block for part in parts for block in part.blocks],
        "of": store.blocks(split),
        "tasks": {
            scores.task: {"mean": scores.mean, "items": len(scores.metric)}
            for scores in (joined(parts) if parts else ())
        },
        "failure": None if failure is None else {"kind": failure.kind, "reason": failure.reason},
        "seconds": None
        if timing is None
        else {"total": timing.total, "merge": timing.merge, "forward": timing.forward},
        "worker": None if timing is None or timing.run is not None else timing.worker,
        "copied_from": None if timing is None else timing.run,
    }


def _parts(store: StoreReader, recipe: str, split: Split) -> list[Scores]:
    """Return the scores of a candidate, one element per scored item block."""
    results = (store.result(recipe, split, block) for block in range(store.blocks(split)))
    return [result for result in results if isinstance(result, Scores)]


def _items(summary: Summary, named: Named, task: str, split: Split | None) -> dict[str, Any]:
    chosen, listed = samples.items(summary, [named], task, split)
    rows = [sample.as_data() for sample in listed]
    return {"task": task, "split": chosen, "rows": [{**row, **row.pop("answers")[0]} for row in rows]}


def text(data: dict[str, Any]) -> RenderableType:
    """Return the data of `as_data` as text and tables for a rich console."""
    lines = [f"candidate {data['id']} (recipe {data['hash']})"]
    lines += [f"  {entry['role']}: {entry['name']}" for entry in data["names"]]
    for asked in data["asked"]:
        losses = ", ".join(f"{loss:.4f}" for loss in asked["losses"] or ())
        loss = f", loss {losses}" if losses else ""
        lines.append(f"  generation {asked['generation']}, candidate {asked['candidate']}{loss}")
    for split, result in data["splits"].items():
        part = f"blocks {', '.join(map(str, result['blocks']))} of {result['of']}"
        lines.append(f"  {split}" + (f" ({part})" if len(result["blocks"]) < result["of"] else ""))
        lines += [
            f"    {task}: {style.decimal(scores['mean'], 4)} on {scores['items']} items"
            for task, scores in result["tasks"].items()
        ]
        if (seconds := result["seconds"]) is not None:
            run = result["copied_from"]
            where = f"on worker {result['worker']}" if run is None else f"in the run {run}, copied from there"
            lines.append(
                f"    {seconds['total']:.2f} s {where} "
                f"(merging {seconds['merge']:.2f} s, forward passes {seconds['forward']:.2f} s)"
            )
        if (failure := result["failure"]) is not None:
            lines.append(f"    failed: {failure['reason']} ({failure['kind']})")
    parts: list[RenderableType] = [Text("\n".join(lines)), Text(data["yaml"])]
    if "items" in data:
        parts.append(_table(data["items"]))
    return Group(*parts)


def _table(items: dict[str, Any]) -> Table:
    table = style.table(
        *(style.numbers(name) for name in ("block", "item", "metric", "smooth", "margin")),
        style.words("prompt"),
        style.words("answers (right ones in brackets)"),
        title=f"{items['task']} on {items['split']}",
    )
    for row in items["rows"]:
        answers = row["choices"] or row["texts"] or []
        answers = [f"[{a.strip()}]" if a in row["right"] else a.strip() for a in answers]
        table.add_row(
            str(row["block"]),
            str(row["item"]),
            *(style.decimal(row[name]) for name in ("metric", "smooth", "margin")),
            Text(_shortened(row["prompt"] or style.MISSING)),
            Text(_shortened(" / ".join(answers))),
        )
    return table


def _shortened(text: str) -> str:
    """Return the end of a text in one line: the end of a prompt is what the model continues."""
    line = one_line(text)
    return line if len(line) <= _WIDTH else f"... {line[4 - _WIDTH :]}"
