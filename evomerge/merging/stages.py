"""Merges in several stages: a file of several mergekit documents, in which later ones name earlier ones.

Every document but the last has a `name`, which stands for its result wherever a later document names a model.
Each stage is merged to a temporary folder beside the output, which is deleted at the end. The output's
recipe.yaml names the stages, whose recipes lie beside it as recipe-NAME.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.files import passing_folder
from evomerge.merging.compatibility import check
from evomerge.merging.export import writer
from evomerge.merging.mergekit import reader
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_used
from evomerge.schema import load_yaml_documents

PLACES = ("model", "path", "base_model", "tokenizer_source", "source")
"""The keys of a document whose values name models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One document of a file; name: None for the last one, where it has none."""

    name: str | None
    data: Mapping[str, Any]


def read_stages(path: str | Path) -> tuple[Stage, ...]:
    """Return the documents of a file, a single one too; raise ConfigError for what is wrong in any.

    What depends on the models' files is checked when the stages are merged.
    """
    path = Path(path)
    documents = load_yaml_documents(path)
    if len(documents) == 1:
        return (Stage(name=None, data=documents[0]),)
    stages: list[Stage] = []
    for number, data in enumerate(documents, start=1):
        where = f"{path}: document {number} of {len(documents)}"
        if "merge_method" not in data:
            raise ConfigError(
                f"{where} has no merge_method",
                expected="one recipe, or mergekit documents whose results later ones use",
            )
        stages.append(Stage(name=_name(data, where, stages, last=number == len(documents)), data=data))
        try:
            reader.check(data)
        except ConfigError as error:
            raise _at(where, error) from None
    _refuse_later(path, stages)
    return tuple(stages)


def _name(data: Mapping[str, Any], where: str, before: Sequence[Stage], *, last: bool) -> str | None:
    name = data.get("name")
    if name is None and last:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise ConfigError(
            f"{where} needs a name, by which later documents use its result",
            expected="`name:` of letters, digits, `.`, `_` and `-`",
            got="none" if name is None else repr(name)[:80],
        )
    if any(stage.name == name for stage in before):
        raise ConfigError(f"{where} has the name {name!r} of an earlier one", expected="different names")
    return name


def _refuse_later(path: Path, stages: Sequence[Stage]) -> None:
    """Raise ConfigError for a document that uses a later one, or a stage that no document uses."""
    for index, stage in enumerate(stages):
        used = _models(stage.data)
        later = {s.name for s in stages[index:] if s.name is not None}
        if wrong := sorted(used & later):
            raise ConfigError(
                f"{path}: document {index + 1} uses {wrong[0]!r} before it is merged",
                fix="order the documents so that each uses earlier ones only; the last one is the result",
            )
        if stage.name is not None and stage is not stages[-1]:
            after = [_models(other.data) for other in stages[index + 1 :]]
            if not any(stage.name in models for models in after):
                raise ConfigError(
                    f"{path}: no later document uses {stage.name!r}",
                    expected="the last document as the only result",
                    fix="write it into a file of its own",
                )


def _models(data: object) -> set[str]:
    """Return everything that a document names as a model, without adapters."""
    if isinstance(data, Mapping):
        named = {value.partition("+")[0] for key in PLACES if isinstance(value := data.get(key), str)}
        return named.union(*map(_models, data.values()))
    return set().union(*map(_models, data)) if isinstance(data, list) else set()


def merge_stages(
    stages: Sequence[Stage],
    out: str | Path,
    *,
    root: Path,
    max_shard_bytes: int = writer.MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """Merge several stages and write the last one's model folder.

    Args:
        stages: as `read_stages` returns them.
        out: the folder to write, new or empty.
        root: the folder where relative model paths start.
        max_shard_bytes: as in `writer.write`.
        say: called with each note for the user.

    Returns:
        The recipe of the last stage, in which stages are named by their names.

    Raises:
        UserError: as `writer.write` does; its message names the stage.
    """
    out = writer.new_folder(out).absolute()
    recipes: dict[str, Recipe] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with passing_folder(out.parent, f"{out.name}.stages") as folder:
            for stage in stages[:-1]:
                assert stage.name is not None
                say(f"stage {stage.name}")
                recipes[stage.name] = _merge(stage, folder / stage.name, folder, recipes, root, None, say)
            return _merge(stages[-1], out, folder, recipes, root, max_shard_bytes, say)
    except OSError as error:
        raise DiskError(f"{out}: can't be written", got=error.strerror or str(error)) from None


def _merge(
    stage: Stage,
    out: Path,
    folder: Path,
    before: Mapping[str, Recipe],
    root: Path,
    max_shard_bytes: int | None,
    say: Callable[[str], None],
) -> Recipe:
    """Merge one stage into `out`; `folder` holds the earlier ones. max_shard_bytes: None but for the last."""
    saved: list[Recipe] = []

    def finish(draft: Path) -> dict[str, str]:
        recipe = Recipe.from_yaml((draft / "recipe.yaml").read_text(encoding="utf-8"))
        saved.append(_by_name(recipe, folder))
        others = {} if max_shard_bytes is None else before
        texts = {f"recipe-{name}.yaml": other.to_yaml() for name, other in others.items()}
        return texts | {"recipe.yaml": saved[0].to_yaml()}

    try:
        recipe = reader.from_data(_located(stage.data, folder, before), root=root, say=say)
        sources = open_used(recipe)
        for note in check(recipe, sources):
            say(note)
        writer.write(
            recipe,
            out,
            sources=sources,
            finish=finish,
            max_shard_bytes=max_shard_bytes or writer.MAX_SHARD_BYTES,
        )
    except UserError as error:
        if stage.name is None:
            raise
        raise _at(f"stage {stage.name}", error) from None
    return saved[0]


def _located(data: Any, folder: Path, names: Mapping[str, Any], key: str | None = None) -> Any:
    """Return a document with the folders of earlier stages in place of their names."""
    if isinstance(data, Mapping):
        return {k: _located(value, folder, names, k) for k, value in data.items()}
    if isinstance(data, list):
        return [_located(value, folder, names) for value in data]
    if key in PLACES and isinstance(data, str):
        model, plus, adapter = data.partition("+")
        return f"{folder / model}{plus}{adapter}" if model in names else data
    return data


def _by_name(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with the names of stages in place of their folders."""
    models = {name: place.removeprefix(f"{folder}/") for name, place in recipe.models.items()}
    return replace(recipe, models=models)


def _at(where: str, error: UserError) -> UserError:
    return type(error)(f"{where}: {error.what}", expected=error.expected, got=error.got, fix=error.fix)
