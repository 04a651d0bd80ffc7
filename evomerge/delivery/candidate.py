"""One candidate of a run: its recipe, where it came from, how it was scored, and item by item if asked."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import export
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.scores import SPLITS, Failure, Scores, Split, joined
from evomerge.prepare import prepare
from evomerge.running.store import ID, StoreReader
from evomerge.stored import StoredRun

_WIDTH = 60
"""Characters of an item's text that the table shows."""


def as_data(
    summary: Summary, asked: str, *, items: str | None = None, split: Split | None = None
) -> dict[str, Any]:
    """Return all that a run knows of a candidate as plain data.

    asked: the start of its recipe's hash, or a row of the report. items: a task whose items are wanted, with
    their texts. split: where; None takes the last one it was scored on.
    Raises ConfigError where there is no such candidate, task or split.
    """
    store = summary.store
    candidate = export.find(summary, asked)
    hash_ = candidate.recipe.hash
    splits = {part: data for part in SPLITS if (data := _on_split(store, hash_, part)) is not None}
    roles = ("base", "parent", "baseline", "start", "descent", "finalist", "winner")
    data = {
        "id": hash_[:ID],
        "hash": hash_,
        "recipe": candidate.recipe.to_data(),
        "yaml": candidate.recipe.to_yaml(),
        "names": [
            {"role": role, "name": named.name}
            for role in roles
            for named in store.entries(role)
            if named.recipe.hash == hash_
        ],
        "asked": [
            {
                "generation": generation.number,
                "candidate": row,
                "genome": generation.genomes[row].tolist(),
                "losses": None if generation.losses is None else generation.losses[row].tolist(),
            }
            for generation in store.generations()
            for row, recipe in enumerate(generation.recipes)
            if recipe == hash_
        ],
        "splits": splits,
    }
    if items is not None:
        data["items"] = _items(summary.run, hash_, items, split, splits)
    return data


def _on_split(store: StoreReader, hash_: str, split: Split) -> dict[str, Any] | None:
    parts = _parts(store, hash_, split)
    failure = next((f for recipe, where, f in store.failures() if (recipe, where) == (hash_, split)), None)
    if not parts and failure is None:
        return None
    timing = store.timings(split).get(hash_)
    return {
        "blocks": [block for part in parts for block in part.blocks],
        "of": store.blocks(split),
        "tasks": {
            task.task: {"mean": task.mean, "items": len(task.metric)}
            for task in (joined(parts) if parts else ())
        },
        "failure": None if failure is None else {"kind": failure.kind, "reason": failure.reason},
        "seconds": None
        if timing is None
        else {"total": timing.total, "merge": timing.merge, "forward": timing.forward},
        "worker": None if timing is None else timing.worker,
    }


def _parts(store: StoreReader, hash_: str, split: Split) -> list[Scores]:
    """Return the scores of a candidate, block by block."""
    results = (store.result(hash_, split, block) for block in range(store.blocks(split)))
    return [part for part in results if part is not None and not isinstance(part, Failure)]


def _items(
    run: StoredRun, hash_: str, task: str, split: Split | None, splits: dict[Split, Any]
) -> dict[str, Any]:
    tasks = [entry.task for entry in run.suite.tasks]
    if task not in tasks:
        raise ConfigError(f"--items {task}: no such task in this run", fix=nearest(task, tasks))
    scored = [place for place, data in splits.items() if task in data["tasks"]]
    chosen = split or (scored[-1] if scored else None)
    if chosen is None or chosen not in scored:
        raise ConfigError(
            f"{hash_[:ID]} has no scores of {task} on {chosen or 'any split'}",
            expected=f"a split among {', '.join(scored)}" if scored else "a candidate that was scored",
        )
    texts = _texts(run, task, chosen)
    rows = []
    for part in _parts(run.store, hash_, chosen):
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
    """Return of every item of a task, block by block, what the model was asked and offered as answers."""
    from evomerge.evaluation.harness import Harness
    from evomerge.merging.sources.opening import open_sources
    from evomerge.merging.sources.vocabulary import open_tokenizer

    worker = prepare(run.config()).worker
    sources = open_sources(worker.models, worker.base, tokenizer=worker.tokenizer)
    harness = Harness(
        worker.suite,
        tokenizer=open_tokenizer(sources[worker.base]),
        batch_size=worker.batch_size,
        max_length=worker.max_length,
        blocks=worker.blocks,
        block_seed=worker.block_seed,
    )
    blocks = []
    for block in worker.blocks_of(split):
        (items,) = (task_items for task_items in harness.items(split, block).tasks if task_items.name == task)
        blocks.append(
            [
                {
                    "prompt": str(group[0].args[0]),
                    "answers": [str(one.args[1]) for one in group if len(one.args) > 1 and not items.texts]
                    if items.pairs
                    else [],
                    "right": list(items.gold[number]) if items.gold else None,
                }
                for number, group in enumerate(items.groups)
            ]
        )
    return blocks


def text(data: dict[str, Any]) -> RenderableType:
    """Return it for people."""
    lines = [f"candidate {data['id']} (recipe {data['hash']})"]
    lines += [f"  {each['role']}: {each['name']}" for each in data["names"]]
    for each in data["asked"]:
        losses = "" if each["losses"] is None else f", loss {', '.join(f'{x:.4f}' for x in each['losses'])}"
        lines.append(f"  generation {each['generation']}, candidate {each['candidate']}{losses}")
    for split, found in data["splits"].items():
        part = f"blocks {', '.join(map(str, found['blocks']))} of {found['of']}"
        lines.append(f"  {split}" + (f" ({part})" if len(found["blocks"]) < found["of"] else ""))
        lines += [
            f"    {task}: {scores['mean']:.4f} on {scores['items']} items"
            for task, scores in found["tasks"].items()
        ]
        if found["seconds"] is not None:
            seconds = found["seconds"]
            lines.append(
                f"    {seconds['total']:.2f} s on worker {found['worker']} "
                f"(merging {seconds['merge']:.2f}, forward {seconds['forward']:.2f})"
            )
        if found["failure"] is not None:
            lines.append(f"    failed: {found['failure']['reason']} ({found['failure']['kind']})")
    parts: list[RenderableType] = [Text("\n".join(lines)), Text(data["yaml"])]
    if "items" in data:
        parts.append(_table(data["items"]))
    return Group(*parts)


def _table(items: dict[str, Any]) -> Table:
    table = Table(title=f"{items['task']} on {items['split']}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("block", "item", "metric", "smooth", "margin"):
        table.add_column(name, justify="right")
    table.add_column("prompt")
    table.add_column("answers (right ones in brackets)")
    for row in items["rows"]:
        right = row["right"] or []
        answers = [f"[{a.strip()}]" if i in right else a.strip() for i, a in enumerate(row["answers"])]
        table.add_row(
            str(row["block"]),
            str(row["item"]),
            *("" if row[name] is None else f"{row[name]:.3f}" for name in ("metric", "smooth", "margin")),
            Text(_short(row["prompt"])),
            Text(_short(" / ".join(answers))),
        )
    return table


def _short(words: str) -> str:
    words = words.replace("\n", "\\n")
    return words if len(words) <= _WIDTH else f"... {words[4 - _WIDTH :]}"
