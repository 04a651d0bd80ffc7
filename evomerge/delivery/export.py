"""Export: the winner (or any other recipe of a run) as a model folder, an adapter, or a text file.

A model folder holds the weights that the run scored, bit for bit, with config and tokenizer, the recipe, the
same merge as mergekit YAML if mergekit can express it, and a model card. An adapter approximates the scored
merge, so it is loaded back and scored before it is written under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.delivery import objectives
from evomerge.delivery.card import card
from evomerge.delivery.origins import Origin, licence, origins, published, with_published
from evomerge.delivery.rescore import ScoredAdapter, rescore, scores_on_test
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, DiskError, StoreError, UserError, nearest
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import Scores
from evomerge.files import drafted_file
from evomerge.merging import mergekit
from evomerge.merging.compatibility import with_fingerprints
from evomerge.merging.export import writer
from evomerge.merging.export.adapter import AdapterReport, write_adapter
from evomerge.merging.export.folder import folder_notes
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_source, open_used
from evomerge.merging.tensors.digest import folder_digest
from evomerge.prepare import prepare
from evomerge.running import forward
from evomerge.running.batches import scoring_alike
from evomerge.running.store import StoreReader, facts
from evomerge.search.ports import Named


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A model folder that was written, and its recipe.

    no_mergekit: why there is no mergekit YAML in it; None if there is. equal: whether its weights are those
    that the run scored on `test`, in every bit; None for a recipe that was not scored there. notes: on
    licences and the files beside the weights.
    """

    folder: Path
    pick: Named
    no_mergekit: str | None
    equal: bool | None
    notes: tuple[str, ...] = ()


def export(
    summary: Summary,
    out: Path,
    *,
    pick: str = "winner",
    accept_difference: bool = False,
    max_shard_bytes: int | None = None,
) -> Exported:
    """Write one recipe of a run as a Hugging Face model folder.

    What was written is compared with the digest of the weights that were scored on `test`.

    Args:
        summary: of the run.
        out: the folder to write; it must not exist or be empty.
        pick: "winner", "best-baseline", "knee", "best:TASK", "weights:TASK=0.7,OTHER=0.3", the name of a row
            of the report, or the start of a recipe hash.
        accept_difference: write weights that differ from the scored ones; the model card says so.
        max_shard_bytes: the largest size of one weight file; None means that of `writer.write`.

    Raises:
        ConfigError: no recipe of the run is called so.
        StoreError: the run has no such recipe yet, model files changed since it began, or the weights differ
            from the scored ones.
        ModelError: a model is not where the run had it.
        DiskError: `out` has files, or the disk has no room.
    """
    chosen = find(summary, pick)
    summary.run.check_models()
    models = _origins(summary, chosen.recipe)
    extra: dict[str, str] = {}
    no_mergekit = None
    try:
        extra["mergekit.yaml"] = with_published(mergekit.write(chosen.recipe), models.values())
    except ConfigError as error:
        no_mergekit = error.what
    equal: list[bool | None] = []

    def finish(folder: Path) -> dict[str, str]:
        equal.append(_equal(summary.store, chosen.recipe, folder))
        if equal[0] is False and not accept_difference:
            raise _other_weights(summary.store, chosen)
        extra["README.md"] = card(summary, chosen, models, equal=equal[0])
        return extra | _recipe_file(folder, models)

    sources = open_used(chosen.recipe)
    notes = (*folder_notes(chosen.recipe, sources), *_licence_notes(chosen.recipe, models))
    largest = max_shard_bytes or writer.MAX_SHARD_BYTES
    writer.write(chosen.recipe, out, sources=sources, finish=finish, max_shard_bytes=largest)
    return Exported(folder=out, pick=chosen, no_mergekit=no_mergekit, equal=equal[0], notes=notes)


def _origins(summary: Summary, recipe: Recipe) -> dict[str, Origin]:
    return origins(recipe, summary.run.config().models.hub)


def _licence_notes(recipe: Recipe, models: Mapping[str, Origin]) -> tuple[str, ...]:
    _, note = licence(models[name] for name in recipe.used_models())
    return () if note is None else (note,)


def _recipe_file(folder: Path, models: Mapping[str, Origin]) -> dict[str, str]:
    """Return the recipe.yaml of an exported folder, with hub ids where they are known."""
    recipe = Recipe.from_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return {"recipe.yaml": published(recipe, models).to_yaml()}


def _equal(store: StoreReader, recipe: Recipe, folder: Path) -> bool | None:
    """Say whether a folder's weights are those that were scored on `test`; None where none were."""
    scored = facts.WEIGHTS.of(recipe.hash).get(store)
    if scored is None:
        return None
    dtype, _, _ = scored.partition(" ")
    return folder_digest(folder, dtype) == scored


def _other_weights(store: StoreReader, chosen: Named) -> StoreError:
    changes = forward.changes(store.versions(), forward.versions())
    return StoreError(
        f"{store.folder}: the weights of {chosen.name} differ from those that were scored on `test`",
        expected="the same in every bit",
        got="model files that changed in a way their fingerprints do not show"
        if changes is None
        else f"a merge in another environment ({changes}), or model files that changed",
        fix="put the old files back"
        + ("" if changes is None else " or export on the machine of the run")
        + "; or write these weights with --accept-difference, which the model card will say",
    )


def export_adapter(
    summary: Summary,
    out: Path,
    *,
    pick: str = "winner",
    rank: int | None = None,
    keep_rest: bool = False,
    permissions: Permissions = NOTHING,
) -> ScoredAdapter:
    """Write one recipe of a run as a LoRA adapter on the run's base, and score it on the test items.

    It is scored as peft loads it, with the run's own worker settings.

    Args:
        summary: of the run.
        out: the folder to write; it must not exist or be empty.
        pick: as in `export`.
        rank: the rank of every layer's change, if it can't be exact; see `write_adapter`.
        keep_rest: store in full what a LoRA can't represent; see `write_adapter`.
        permissions: which code of the run's tasks may run.

    Raises:
        ConfigError, StoreError, DiskError: as in `export`.
        UserError: the merge can't be scored.
        ModelError: the merge can't be an adapter; see `write_adapter`.
    """
    chosen = find(summary, pick)
    writer.new_folder(out)
    prepared = prepare(summary.run.config().permitting(permissions))
    summary.run.refuse_changed(prepared.model_facts)
    worker = scoring_alike(prepared.worker, summary.store, "test")
    models = _origins(summary, chosen.recipe)
    scored: list[ScoredAdapter] = []

    def finish(folder: Path, report: AdapterReport) -> dict[str, str]:
        merge = scores_on_test(summary.store, chosen.recipe, worker)
        adapter = rescore(folder, worker, "test", base=open_source(report.base).folder)
        scored.append(
            ScoredAdapter(
                folder=out,
                pick=chosen,
                report=report,
                keep_rest=keep_rest,
                merge=merge,
                adapter=adapter,
                notes=_licence_notes(chosen.recipe, models),
            )
        )
        text = card(summary, chosen, models, adapter=scored[0])
        return {"README.md": text, **_recipe_file(folder, models)}

    below = models.get(chosen.recipe.base or "")
    base_id = None if below is None else below.published
    write_adapter(chosen.recipe, out, rank=rank, keep_rest=keep_rest, base_id=base_id, finish=finish)
    return scored[0]


def export_text(summary: Summary, out: Path, *, pick: str = "winner", form: str = "recipe") -> Named:
    """Write one recipe of a run as a YAML file, and return it.

    Args:
        summary: of the run.
        out: the file to write; its name ends in .yaml.
        pick: as in `export`.
        form: "recipe" (with the fingerprints of its models) or "mergekit".

    Raises:
        ConfigError, StoreError, ModelError, DiskError: as in `export`; mergekit can't express the recipe.
    """
    chosen = find(summary, pick)
    summary.run.check_models()
    models = _origins(summary, chosen.recipe)
    if form == "mergekit":
        write_text(out, with_published(mergekit.write(chosen.recipe), models.values()))
    else:
        recipe = with_fingerprints(chosen.recipe, open_used(chosen.recipe))
        write_text(out, published(recipe, models).to_yaml())
    return chosen


def write_text(out: Path, text: str) -> None:
    """Write a new YAML file, complete or not at all.

    Raises:
        ConfigError: its name does not end in .yaml or .yml.
        DiskError: it exists, or the disk can't take it.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{out}: this form is one YAML file, not a folder",
            expected="a name that ends in .yaml",
            fix=f"write to {out}.yaml",
        )
    if out.exists():
        raise DiskError(f"{out}: already exists", fix="choose another name or remove it yourself")
    with drafted_file(out) as draft:
        draft.write_text(text, encoding="utf-8")


def find(summary: Summary, pick: str) -> Named:
    """Return the recipe that `pick` names, as described in `export`.

    Raises:
        ConfigError: no recipe of the run is called so.
        StoreError: the run has no such recipe yet.
    """
    store = summary.store
    if pick == "winner":
        if summary.winner is None:
            raise StoreError(
                f"{store.folder}: no winner yet",
                fix=f"finish the run (evomerge resume {store.folder}), or --pick a baseline or a recipe hash",
            )
        return summary.winner
    by_name = {named.name: named for named in summary.named}
    if pick == "best-baseline":
        best = summary.best_baseline(summary.rows())
        if best is None:
            raise StoreError(
                f"{store.folder}: `test` is not scored yet",
                fix=f"finish the run: evomerge resume {store.folder}",
            )
        return by_name[best.name]
    if pick in by_name:
        return by_name[pick]
    if pick == "knee" or pick.startswith(("best:", "weights:")):
        return objectives.picked(summary, pick)
    if len(pick) >= 6 and set(pick) <= set("0123456789abcdef"):
        recipe = store.recipe(pick)
        return Named(name=f"recipe {recipe.hash[:12]}", recipe=recipe)
    raise ConfigError(
        f"no recipe of this run is called {pick!r}",
        expected=f"winner, best-baseline, {', '.join(objectives.PICKS)}, a row of the report, "
        "or 6 or more digits of a recipe hash",
        fix=nearest(pick, ["winner", "best-baseline", "knee", *by_name]),
    )


def check_winner(summary: Summary) -> Path:
    """Export a run's winner into the run folder, load it back, and compare its scores on `test`.

    Returns:
        The model's folder.

    Raises:
        UserError: an item's score differs from the stored one.
    """
    store, winner = summary.store, summary.winner
    if winner is None:
        raise UserError(f"{store.folder}: has no winner yet", fix="finish the run: evomerge resume")
    model = store.folder / f"model-{winner.recipe.hash[:8]}"
    if not model.exists():
        export(summary, model)
    scores = store.result(winner.recipe.hash, "test")
    assert isinstance(scores, Scores)
    worker = scoring_alike(prepare(summary.run.config()).worker, store, "test")
    if not rescore(model, worker, "test").same_as(scores):
        raise UserError(
            f"{model}: the exported model's scores differ from the winner's",
            fix="please report this as a bug",
        )
    return model
