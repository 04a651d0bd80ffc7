"""Export: the winner (or any other recipe of a run) as a model folder for production.

The folder holds the weights the run scored, bit for bit, with config and tokenizer, the recipe, the
same merge as mergekit YAML where that language can say it, and a model card.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from evomerge.delivery.report import percent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError, nearest
from evomerge.evaluation.scores import Scores, Split
from evomerge.merging import engine
from evomerge.running.store import RunStore
from evomerge.running.worker import WorkerSpec
from evomerge.search.baselines import Named


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: the folder, the recipe with its name, and why there is no mergekit YAML, if so."""

    folder: Path
    pick: Named
    no_mergekit: str | None


def export(store: RunStore, summary: Summary, out: Path, *, pick: str = "winner") -> Exported:
    """Write one recipe of a run as a Hugging Face model folder.

    pick: "winner", "best-baseline", the name of a row of the report, or the start of a recipe hash.
    Raises StoreError where there is no such recipe, DiskError where `out` has files or no room.
    """
    chosen = find(store, summary, pick)
    extra = {"README.md": card(store, summary, chosen)}
    no_mergekit = None
    try:
        extra["mergekit.yaml"] = chosen.recipe.to_mergekit_yaml()
    except ConfigError as error:
        no_mergekit = error.what
    engine.write(chosen.recipe, out, extra=extra)
    return Exported(folder=out, pick=chosen, no_mergekit=no_mergekit)


def find(store: RunStore, summary: Summary, pick: str) -> Named:
    """Return the recipe `pick` means; see `export`."""
    if pick == "winner":
        if summary.winner is None:
            raise StoreError(
                f"{store.folder}: no winner yet",
                fix=f"finish the run (evomerge resume {store.folder}), or --pick a baseline or a recipe hash",
            )
        return summary.winner
    named = {n.name: n for n in (*summary.parents, *summary.baselines)}
    if pick == "best-baseline":
        best = summary.best_unsearched(summary.rows())
        if best is None:
            raise StoreError(
                f"{store.folder}: not tested yet", fix=f"finish it: evomerge resume {store.folder}"
            )
        return named[best.name]
    if pick in named:
        return named[pick]
    if len(pick) >= 6 and set(pick) <= set("0123456789abcdef"):
        recipe = store.recipe(pick)
        return Named(name=f"recipe {recipe.hash[:12]}", recipe=recipe)
    raise ConfigError(
        f"nothing in this run is called {pick!r}",
        expected="winner, best-baseline, a row of the report, or 6 or more digits of a recipe hash",
        fix=nearest(pick, ["winner", "best-baseline", *named]),
    )


def card(store: RunStore, summary: Summary, chosen: Named) -> str:
    """Return the model card (Markdown with the hub's YAML header) of one recipe of a run."""
    rows = summary.rows()
    mine = next((row for row in rows if row.recipe == chosen.recipe.hash), None)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": percent}
    template = files("evomerge.delivery").joinpath("card.md.jinja").read_text(encoding="utf-8")
    shown = [row for row in rows if row.role in ("base", "parent")]
    best = summary.best_unsearched(rows)
    shown += [row for row in (best, mine) if row is not None and row not in shown]
    return environment.from_string(template).render(
        chosen=chosen,
        recipe=chosen.recipe,
        is_winner=summary.winner is not None and chosen.recipe.hash == summary.winner.recipe.hash,
        rows=shown,
        mine=mine,
        tasks=[t.task for t in summary.shown_tasks],
        verdict=summary.verdict(rows),
        weakest=summary.weakest(rows),
        suite=summary.suite,
        seed=store.fact("config")["seed"],
        config=store.fact("config"),
        versions=store.versions(),
        methods=sorted({group.method for group in chosen.recipe.groups}),
    )


def rescore(folder: Path, worker: WorkerSpec, split: Split) -> Scores:
    """Load an exported folder the way any user would, and score it on a split.

    With the run's own worker settings the result equals the stored scores bit for bit.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evomerge.evaluation.harness import Harness

    torch.set_num_threads(worker.threads)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, worker.dtype), attn_implementation=worker.attention
    )
    harness = Harness(
        worker.suite,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=worker.batch_size,
        max_length=worker.max_length,
    )
    return harness.evaluate(model.to(worker.device), harness.items(split))
