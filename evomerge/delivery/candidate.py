"""One candidate of a run (`evomerge show`): recipe, origin, scores and times, and single items on request."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import export, style
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.scores import SPLITS, Scores, Split, joined
from evomerge.prepare import prepare
from evomerge.running.store import ID, StoreReader
from evomerge.running.worker import build_harness
from evomerge.stored import StoredRun

_WIDTH = 60
"""Characters of an item's text that the table shows."""
_ROLES = ("base", "parent", "baseline", "start", "descent", "finalist", "winner")


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
    recipe = export.find(summary, pick).recipe
    splits = {name: data for name in SPLITS if (data := _on_split(store, recipe.hash, name)) is not None}
    data = {
        "id": recipe.hash[:ID],
        "hash": recipe.hash,
        "recipe": recipe.to_data(),
        "yaml": recipe.to_yaml(),
        "names": [
            {"role": role, "name": named.name}
            for role in _ROLES
            for named in store.entries(role)
            if named.recipe.hash == recipe.hash
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
        data["items"] = _items(summary.run, recipe.hash, items, split, splits)
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
        "worker": None if timing is None else timing.worker,
    }


def _parts(store: StoreReader, recipe: str, split: Split) -> list[Scores]:
    """Return the scores of a candidate, one element per scored item block."""
    results = (store.result(recipe, split, block) for block in range(store.blocks(split)))
    return [result for result in results if isinstance(result, Scores)]


def _items(
    run: StoredRun, recipe: str, task: str, split: Split | None, splits: dict[Split, Any]
) -> dict[str, Any]:
    tasks = [entry.task for entry in run.suite.tasks]
    if task not in tasks:
        raise ConfigError(f"--items {task}: no such task in this run", fix=nearest(task, tasks))
    scored = [name for name, data in splits.items() if task in data["tasks"]]
    chosen = split or (scored[-1] if scored else None)
    if chosen is None or chosen not in scored:
        raise ConfigError(
            f"{recipe[:ID]} has no scores of {task} on {chosen or 'any split'}",
            expected=f"a split among {', '.join(scored)}" if scored else "a candidate that was scored",
        )
    texts = _texts(run, task, chosen)
    rows = []
    for part in _parts(run.store, recipe, chosen):
        (block,) = part.blocks
        scores = part[task]
        for item, metric in enumerate(scores.metric.tolist()):
            rows.append(
                {
                    "block": block,
                    "item": item,
                    "metric": metric,
                    "smooth": None if scores.smooth is None else float(scores.smooth[item]),
                    "margin": None if scores.margin is None else float(scores.margin[item]),
                    **texts[block][item],
                }
            )
    return {"task": task, "split": chosen, "rows": rows}


def _texts(run: StoredRun, task: str, split: Split) -> list[list[dict[str, Any]]]:
    """Return prompt, answer choices and right answers of every item of a task, block by block."""
    prepared = prepare(run.config())
    run.refuse_changed(prepared.model_facts)
    worker = prepared.worker
    harness = build_harness(worker)
    blocks = []
    for block in worker.blocks_of(split):
        (items,) = (entry for entry in harness.items(split, block).tasks if entry.name == task)
        choices = items.pairs and not items.texts
        blocks.append(
            [
                {
                    "prompt": str(requests[0].args[0]),
                    "answers": [str(request.args[1]) for request in requests if len(request.args) > 1]
                    if choices
                    else [],
                    "right": list(items.gold[number]) if items.gold else None,
                }
                for number, requests in enumerate(items.groups)
            ]
        )
    return blocks


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
            lines.append(
                f"    {seconds['total']:.2f} s on worker {result['worker']} "
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
        right = row["right"] or []
        answers = [f"[{a.strip()}]" if i in right else a.strip() for i, a in enumerate(row["answers"])]
        table.add_row(
            str(row["block"]),
            str(row["item"]),
            *(style.decimal(row[name]) for name in ("metric", "smooth", "margin")),
            Text(_shortened(row["prompt"])),
            Text(_shortened(" / ".join(answers))),
        )
    return table


def _shortened(text: str) -> str:
    """Return the end of a text in one line: the end of a prompt is what the model continues."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= _WIDTH else f"... {line[4 - _WIDTH :]}"
