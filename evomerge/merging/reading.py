"""Read a recipe file, in evomerge's own format or in mergekit's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.merging.chat_templates import with_text
from evomerge.merging.mergekit import reader
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.recipe import Recipe
from evomerge.schema import load_yaml_documents


def read_recipe(path: str | Path, *, say: Callable[[str], None] = lambda _: None) -> Recipe:
    """Return the recipe of a recipe.yaml or of a mergekit YAML, which has the key `merge_method`.

    Args:
        path: the file. Relative model paths in it start at its folder if they exist there, else at the
            current folder.
        say: called with each note for the user, e.g. on keys that are ignored.

    Raises:
        ConfigError: the file is missing or not valid; the message names it.
    """
    path = Path(path)
    documents = load_yaml_documents(path)
    if len(documents) > 1:
        raise ConfigError(
            f"{path}: several merges in one file",
            expected="one YAML document",
            got=f"{len(documents)}, separated by ---",
            fix="`evomerge merge` makes a model of several; elsewhere give each a file of its own",
        )
    data = documents[0]
    try:
        if "merge_method" in data:
            return reader.from_data(data, root=path.parent, say=say)
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
    measured: dict[str, Any] = {
        kind: {name: reader.resolved(place, path.parent) for name, place in recipe.files(kind).items()}
        for kind in FILES
    }
    return dataclasses.replace(recipe, models=located, **measured)
