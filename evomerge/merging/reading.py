"""Read a recipe file, in evomerge's own format or in mergekit's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.merging.chat_templates import with_text
from evomerge.merging.mergekit import reader
from evomerge.merging.recipe import Recipe
from evomerge.schema import load_yaml


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a recipe.yaml or of a mergekit YAML, which has the key `merge_method`.

    Args:
        path: the file. Relative model paths in it start at its folder if they exist there, else at the
            current folder.

    Raises:
        ConfigError: the file is missing or not valid; the message names it.
    """
    path = Path(path)
    data = load_yaml(path)
    try:
        if "merge_method" in data:
            return reader.from_data(data, root=path.parent)
        template, models = data.get("chat_template"), data.get("models")
        if isinstance(template, str):
            data["chat_template"] = with_text(
                template, path.parent, models if isinstance(models, dict) else ()
            )
        recipe = Recipe.from_data(data)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error.what}", expected=error.expected, got=error.got, fix=error.fix
        ) from None
    located = {name: reader.resolved(place, path.parent) for name, place in recipe.models.items()}
    fishers = {name: reader.resolved(place, path.parent) for name, place in recipe.fisher.items()}
    return dataclasses.replace(recipe, models=located, fisher=fishers)
