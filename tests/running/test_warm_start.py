"""Recipes from elsewhere: models are the same if their files are, whatever their names and places."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.merging.compatibility import with_fingerprints
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.opening import open_used
from evomerge.prepare import Prepared, prepare


@pytest.fixture
def started(config: Callable[..., Path], tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare a run that starts from a recipe or from a run; other keywords replace its models."""

    def start(warm: dict[str, Any], **models: Path) -> Prepared:
        changes: dict[str, Any] = {"warm_start": warm}
        if models:
            named = {name: str(place) for name, place in models.items()}
            changes["models"] = {"base": named.pop("base"), "sources": named}
        return prepare(RunConfig.load(config(**changes)))

    return start


def written(path: Path, prints: bool = True, **models: Path) -> dict[str, list[str]]:
    """Write the mean of all models but the first, the base, as a recipe; return what a config says of it."""
    base, *sources = models
    group = TensorGroup(method="task_arithmetic", sources=tuple(sources), parameters={"weight": 0.5})
    recipe = Recipe(models={n: str(p) for n, p in models.items()}, base=base, groups=(group,))
    recipe = with_fingerprints(recipe, open_used(recipe)) if prints else recipe
    path.write_text(recipe.to_yaml())
    return {"recipes": [str(path)]}


@pytest.mark.parametrize("prints", [True, False])
def test_a_copy_of_a_model_under_another_name_is_that_model(
    prints: bool, started: Callable[..., Prepared], tiny_zoo: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_zoo / "reverse", tmp_path / "copy")
    models = {"b": tiny_zoo / "base", "other": tmp_path / "copy", "upper": tiny_zoo / "upper"}
    warm = written(tmp_path / "own.yaml", prints, **models)
    if prints:
        shutil.rmtree(tmp_path / "copy")  # its fingerprint is enough
    (start,) = started(warm).warm.recipes
    assert start.recipe.groups[0].sources == ("reverse", "upper")


@pytest.mark.parametrize("prints", [True, False])
def test_another_model_under_the_same_name_is_refused(
    prints: bool, started: Callable[..., Prepared], tiny_zoo: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_zoo / "upper", tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").unlink()
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": 1}))
    warm = written(tmp_path / "own.yaml", prints, base=tiny_zoo / "base", reverse=tmp_path / "copy")
    with pytest.raises(ConfigError, match="'reverse' is another model than this run's 'reverse'"):
        started(warm)
    recipe = Recipe.from_yaml((tmp_path / "own.yaml").read_text())
    (tmp_path / "own.yaml").write_text(dataclasses.replace(recipe, fingerprints={}).to_yaml())
    shutil.rmtree(tmp_path / "copy")
    (start,) = started(warm).warm.recipes  # taken by its name, as the message says
    assert start.recipe.groups[0].sources == ("reverse",)


def test_models_of_another_run_are_known_by_their_files(
    started: Callable[..., Prepared], finished_run: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_zoo / "upper", tmp_path / "copy")
    plain = started({"run": str(finished_run)}).warm.recipes
    renamed = started(
        {"run": str(finished_run)},
        base=tiny_zoo / "base",
        reverse=tmp_path / "copy",
        upper=tiny_zoo / "reverse",
    ).warm.recipes
    here = {"upper": "reverse", "reverse": "upper", "base": "base"}
    for one, other in zip(plain, renamed, strict=True):
        assert [[here[n] for n in group.sources] for group in one.recipe.groups] == [
            list(group.sources) for group in other.recipe.groups
        ]


def test_a_run_over_other_models_of_the_same_names_is_refused(
    started: Callable[..., Prepared], finished_run: Path, tiny_zoo: Path
) -> None:
    with pytest.raises(ConfigError, match="upper, whose files are others than this run's upper"):
        started(
            {"run": str(finished_run)},
            base=tiny_zoo / "base",
            upper=tiny_zoo / "base",
            reverse=tiny_zoo / "reverse",
        )
