"""Open the models a merge reads: a folder, a hub id, an adapter on either, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evomerge.merging.recipe import Recipe, tokenizer_of
from evomerge.merging.sources.adapter import is_adapter, open_adapter, split_location
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.vocabulary import align, differ


def open_source(location: str, *, base: str | None = None) -> Source:
    """Open a model folder, hub id, `path+adapter`, or adapter folder; raise ModelError.

    base: location of the model an adapter folder given alone is applied to, where the one its own
    config names is not there.
    """
    model, adapter = split_location(location)
    if adapter is not None:
        return open_adapter(Checkpoint.open(model), Path(adapter).expanduser(), location)
    if is_adapter(Path(location).expanduser()):
        return open_adapter(None, Path(location).expanduser(), location, fallback=base)
    return Checkpoint.open(location)


def open_sources(models: Mapping[str, str], base: str | None, *, tokenizer: str = "") -> dict[str, Source]:
    """Open all models by name; adapters given alone may rest on the model named `base`.

    tokenizer: as in a Recipe; embedding rows follow its vocabulary where models differ, see `vocabulary`.
    """
    below = models[base] if base is not None else None
    opened = {name: open_source(location, base=below) for name, location in models.items()}
    chosen = tokenizer_of(tokenizer, base, models)
    return align(opened, tokenizer=chosen, base=base, asked=bool(tokenizer))


def open_used(recipe: Recipe) -> dict[str, Source]:
    """Open the models a recipe reads, and the one whose tokenizer and config it takes."""
    used = dict.fromkeys((*recipe.used_models(), recipe.pattern))
    below = recipe.models[recipe.base] if recipe.base is not None else None
    opened = {name: open_source(recipe.models[name], base=below) for name in used}
    if recipe.tokenizer == recipe.pattern and not differ(opened, recipe.pattern):
        return opened
    # Models that are not merged may still give rows that others lack, so all are looked at.
    every = {name: opened.get(name) or open_source(at, base=below) for name, at in recipe.models.items()}
    aligned = align(every, tokenizer=recipe.tokenizer, base=recipe.base, asked=recipe.asked)
    return {name: aligned[name] for name in used}
