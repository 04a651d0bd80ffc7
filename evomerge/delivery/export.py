"""Export: the winner (or any other recipe of a run) as a model folder, an adapter, or a text file.

A model folder holds the weights the run scored, bit for bit, with config and tokenizer, the recipe, the
same merge as mergekit YAML where that language can say it, and a model card. An adapter is another model
than the one that was scored, so it is loaded back and scored before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from rich.table import Table

from evomerge.delivery import objectives
from evomerge.delivery.report import kept_line, percent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, DiskError, StoreError, UserError, nearest
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.files import drafted_file
from evomerge.merging import mergekit
from evomerge.merging.export import writer
from evomerge.merging.export.adapter import AdapterReport, write_adapter
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_source
from evomerge.prepare import prepare
from evomerge.running import forward
from evomerge.running.batches import scoring_alike
from evomerge.running.store import StoreReader, facts
from evomerge.running.worker import Job, Worker, WorkerSpec
from evomerge.search.ports import Named


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: the folder, the recipe with its name, and why there is no mergekit YAML, if so."""

    folder: Path
    pick: Named
    no_mergekit: str | None


def export(summary: Summary, out: Path, *, pick: str = "winner") -> Exported:
    """Write one recipe of a run as a Hugging Face model folder.

    pick: "winner", "best-baseline", "knee", "best:TASK", "weights:TASK=0.7,OTHER=0.3", the name of a row
        of the report, or the start of a recipe hash.
    Raises StoreError where there is no such recipe, DiskError where `out` has files or no room.
    """
    chosen = find(summary, pick)
    extra = {"README.md": card(summary, chosen)}
    no_mergekit = None
    try:
        extra["mergekit.yaml"] = mergekit.write(chosen.recipe)
    except ConfigError as error:
        no_mergekit = error.what
    writer.write(chosen.recipe, out, extra=extra)
    return Exported(folder=out, pick=chosen, no_mergekit=no_mergekit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAdapter:
    """An adapter that was written: what it holds, and its test scores beside the whole merge's."""

    folder: Path
    pick: Named
    report: AdapterReport
    keep_rest: bool
    merge: Scores
    adapter: Scores

    def arguments(self) -> str:
        """Return the options of `evomerge merge` that make this adapter."""
        rank = "" if self.report.exact else f" --rank {self.report.rank}"
        return f" --as adapter{rank}{' --keep-rest' * self.keep_rest}"

    def rows(self) -> list[tuple[str, float, float]]:
        """Return task, mean score of the whole merge, and of the adapter."""
        return [(whole.task, whole.mean, self.adapter[whole.task].mean) for whole in self.merge]


def export_adapter(
    summary: Summary,
    out: Path,
    *,
    pick: str = "winner",
    rank: int | None = None,
    keep_rest: bool = False,
) -> ScoredAdapter:
    """Write one recipe of a run as a LoRA adapter on the run's base, and score it on the test items.

    rank, keep_rest: as in `write_adapter`. It is scored as peft loads it, with the run's own settings.
    Raises what `export` and `write_adapter` do.
    """
    store = summary.store
    chosen = find(summary, pick)
    writer.new_folder(out)
    worker = scoring_alike(prepare(summary.run.config()).worker, store, "test")
    scored: list[ScoredAdapter] = []

    def finish(folder: Path, report: AdapterReport) -> dict[str, str]:
        whole = _test_scores(store, chosen.recipe, worker)
        base = open_source(report.base).folder
        adapter = rescore(folder, worker, "test", base=base)
        scored.append(
            ScoredAdapter(
                folder=out,
                pick=chosen,
                report=report,
                keep_rest=keep_rest,
                merge=whole,
                adapter=adapter,
            )
        )
        return {"README.md": card(summary, chosen, adapter=scored[0])}

    write_adapter(chosen.recipe, out, rank=rank, keep_rest=keep_rest, finish=finish)
    return scored[0]


def _test_scores(store: StoreReader, recipe: Recipe, worker: WorkerSpec) -> Scores:
    stored = store.result(recipe.hash, "test")
    outcome = stored if stored is not None else Worker(worker).run(Job(recipe=recipe, split="test")).outcome
    if isinstance(outcome, Failure):
        raise UserError(f"recipe {recipe.hash[:12]} could not be scored: {outcome.reason}")
    assert isinstance(outcome, Scores)
    return outcome


def comparison(done: ScoredAdapter) -> Table:
    """Return the adapter's scores beside the whole merge's as a table for the terminal."""
    shown = Table(title="test items, mean score", title_justify="left")
    shown.add_column("task")
    for name in ("whole merge", "adapter"):
        shown.add_column(name, justify="right")
    for task, whole, adapter in done.rows():
        shown.add_row(task, f"{whole:.3f}", f"{adapter:.3f}")
    return shown


def write_text(out: Path, text: str) -> None:
    """Write a YAML file under a new name ending in .yaml or .yml, complete or not at all."""
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{out}: one YAML file is written here, not a folder",
            expected="a name that ends in .yaml",
            fix=f"write to {out}.yaml",
        )
    if out.exists():
        raise DiskError(f"{out}: already exists", fix="choose another name or remove it yourself")
    with drafted_file(out) as draft:
        draft.write_text(text, encoding="utf-8")


def find(summary: Summary, pick: str) -> Named:
    """Return the recipe `pick` means; see `export`."""
    store = summary.store
    if pick == "winner":
        if summary.winner is None:
            raise StoreError(
                f"{store.folder}: no winner yet",
                fix=f"finish the run (evomerge resume {store.folder}), or --pick a baseline or a recipe hash",
            )
        return summary.winner
    named = {n.name: n for n in (*summary.parents, *summary.baselines, *summary.starts)}
    if pick == "best-baseline":
        best = summary.best_unsearched(summary.rows())
        if best is None:
            raise StoreError(
                f"{store.folder}: not tested yet", fix=f"finish it: evomerge resume {store.folder}"
            )
        return named[best.name]
    if pick in named:
        return named[pick]
    if pick == "knee" or pick.startswith(("best:", "weights:")):
        return objectives.picked(summary, pick)
    if len(pick) >= 6 and set(pick) <= set("0123456789abcdef"):
        recipe = store.recipe(pick)
        return Named(name=f"recipe {recipe.hash[:12]}", recipe=recipe)
    raise ConfigError(
        f"nothing in this run is called {pick!r}",
        expected=f"winner, best-baseline, {', '.join(objectives.PICKS)}, a row of the report, "
        "or 6 or more digits of a recipe hash",
        fix=nearest(pick, ["winner", "best-baseline", "knee", *named]),
    )


def card(summary: Summary, chosen: Named, *, adapter: ScoredAdapter | None = None) -> str:
    """Return the model card (Markdown with the hub's YAML header) of one recipe of a run.

    adapter: what the recipe was exported as, where that is not the whole model.
    """
    store = summary.store
    rows = summary.rows()
    mine = next((row for row in rows if row.recipe == chosen.recipe.hash), None)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": percent}
    template = files("evomerge.delivery").joinpath("card.md.jinja").read_text(encoding="utf-8")
    shown = [row for row in rows if row.role in ("base", "parent")]
    best, front = summary.best_unsearched(rows), objectives.front(summary)
    shown += [row for row in (best, mine) if row is not None and row not in shown]
    return environment.from_string(template).render(
        chosen=chosen,
        adapter=adapter,
        recipe=chosen.recipe,
        is_winner=summary.winner is not None and chosen.recipe.hash == summary.winner.recipe.hash,
        rows=shown,
        mine=mine,
        tasks=[t.task for t in summary.shown_tasks],
        verdict=summary.verdict(rows),
        weakest=summary.weakest(rows),
        kept=kept_line(summary.shares(rows)),
        constraints=objectives.constraints(summary),
        front=front,
        place=next((p for p in front.searched if p.recipe == chosen.recipe.hash), None) if front else None,
        suite=summary.suite,
        seed=facts.CONFIG.require(store)["seed"],
        config=facts.CONFIG.require(store),
        versions=store.versions(),
        passes=forward.stored(store),
        methods=sorted({group.method for group in chosen.recipe.groups}),
    )


def rescore(folder: Path, worker: WorkerSpec, split: Split, *, base: Path | None = None) -> Scores:
    """Load an exported folder the way any user would, and score it on a split.

    With the run's own worker settings the result of a model folder equals the stored scores bit for bit.
    base: the model's folder, where `folder` holds an adapter on it.
    """
    import warnings

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evomerge.evaluation.harness import Harness

    torch.set_num_threads(worker.threads)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        base or folder, dtype=getattr(torch, worker.dtype), attn_implementation=worker.attention
    )
    if base is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls what transformers deprecates
            model = PeftModel.from_pretrained(model, str(folder))
    harness = Harness(
        worker.suite,
        tokenizer=AutoTokenizer.from_pretrained(base or folder),
        batch_size=worker.batch_size,
        max_length=worker.max_length,
        blocks=worker.blocks,
        block_seed=worker.block_seed,
    )
    return harness.evaluate_split(model.to(worker.device), split)
