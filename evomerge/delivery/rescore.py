"""Re-scoring: an exported folder, loaded as any user would load it and scored on a split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from evomerge.delivery import style
from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.export.adapter import AdapterReport
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.model_config import model_class
from evomerge.running.store import StoreReader
from evomerge.running.worker import Job, Worker, WorkerSpec
from evomerge.search.ports import Named


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAdapter:
    """An adapter that was written, with its scores on `test` and those of the whole merge.

    folder: where it is. pick: the recipe it was made from. keep_rest: whether it stores in full what a LoRA
    can't represent. notes: for the user.
    """

    folder: Path
    pick: Named
    report: AdapterReport
    keep_rest: bool
    merge: Scores
    adapter: Scores
    notes: tuple[str, ...] = ()

    def arguments(self) -> str:
        """Return the options of `evomerge merge` that make this adapter."""
        rank = "" if self.report.exact else f" --rank {self.report.rank}"
        return f" --as adapter{rank}{' --keep-rest' * self.keep_rest}"

    def rows(self) -> list[tuple[str, float, float]]:
        """Return task, mean raw score of the whole merge, mean raw score of the adapter."""
        return [(scores.task, scores.mean, self.adapter[scores.task].mean) for scores in self.merge]


def comparison(scored: ScoredAdapter) -> Table:
    """Return the adapter's scores beside those of the whole merge, as a table for the terminal."""
    table = style.table(
        style.words("task"),
        style.numbers("whole merge"),
        style.numbers("adapter"),
        title="mean raw score on `test`",
    )
    for task, merge, adapter in scored.rows():
        table.add_row(task, style.decimal(merge), style.decimal(adapter))
    return table


def rescore(folder: Path, worker: WorkerSpec, split: Split, *, base: Path | None = None) -> Scores:
    """Load an exported folder with plain transformers (and peft) and score it on a split.

    With the run's own worker settings the result of a model folder equals the stored scores bit for bit.

    Args:
        folder: a model folder, or an adapter folder if `base` is given.
        worker: how to score: suite, device, dtype, batch size.
        split: which items to score.
        base: the folder of the model that the adapter belongs to.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from evomerge.evaluation.harness import Harness

    torch.set_num_threads(worker.threads)
    config = AutoConfig.from_pretrained(base or folder)
    model: Any = model_class(config).from_pretrained(
        base or folder, dtype=getattr(torch, worker.dtype), attn_implementation=worker.attention
    )
    if base is not None:
        from peft import PeftModel

        if (folder / "generation_config.json").is_file():  # of a recipe with a `chat_template`
            model.generation_config = GenerationConfig.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls functions that transformers deprecates
            model = PeftModel.from_pretrained(model, str(folder))
    harness = Harness(
        worker.suite,
        tokenizer=AutoTokenizer.from_pretrained(
            folder if base is None or (folder / "tokenizer_config.json").is_file() else base
        ),
        batch_size=worker.batch_size,
        max_length=worker.max_length,
        blocks=worker.blocks,
        block_seed=worker.block_seed,
        permissions=worker.permissions,
        stored_text=worker.stored_text,
        sharing=worker.sharing,
    )
    if worker.judgements is not None:
        harness.judged_in(worker.judgements)
    return harness.evaluate_split(model.to(worker.device), split)


def scores_on_test(store: StoreReader, recipe: Recipe, worker: WorkerSpec) -> Scores:
    """Return the scores of a recipe on `test`, from the store or by scoring it now (they are not stored).

    Raises:
        UserError: it can't be scored.
    """
    stored = store.result(recipe.hash, "test")
    outcome = stored if stored is not None else Worker(worker).run(Job(recipe=recipe, split="test")).outcome
    if isinstance(outcome, Failure):
        raise UserError(f"recipe {recipe.hash[:12]} could not be scored: {outcome.reason}")
    assert isinstance(outcome, Scores)
    return outcome
