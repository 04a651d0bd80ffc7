"""Open the models a merge reads: a folder, a hub id, an adapter on either, or an adapter folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from evomerge.errors import ModelError
from evomerge.files import expanded
from evomerge.merging.recipe import MATCHED, STORED, Recipe, tokenizer_of
from evomerge.merging.sources import chat
from evomerge.merging.sources.adapter import is_adapter, open_adapter, split_location
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.experts import match
from evomerge.merging.sources.hub import folder_of, split_id
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.untied import untie
from evomerge.merging.sources.vocabulary import align, differ


def open_source(location: str, *, base: str | None = None) -> Source:
    """Open a model; only its JSON files and headers are read.

    Args:
        location: a model folder, a hub id (with `@revision`), an adapter, or `model+adapter`.
        base: location of the model to which an adapter folder is applied, if the base that its config names
            can't be found.

    Raises:
        ModelError: the model is missing, damaged or not supported.
    """
    model, adapter = split_location(location)
    if adapter is not None:
        folder = folder_of(adapter) if split_id(adapter) else expanded(adapter)
        return open_adapter(Checkpoint.open(model), folder, location)
    folder = folder_of(location)
    if is_adapter(folder):
        return open_adapter(None, folder, location, fallback=base)
    return Checkpoint.within(folder, location)


def open_sources(
    models: Mapping[str, str], base: str | None, *, tokenizer: str = "", experts: str = STORED
) -> dict[str, Source]:
    """Open all models by name, with embedding rows matched by token.

    Args:
        models: name -> location.
        base: the name of the base model, to which adapter folders without an available base are applied.
        tokenizer: as in a Recipe. Where vocabularies differ, embedding rows follow this one's; see
            `vocabulary`.
        experts: as in a Recipe; `matched` reads samples of the experts' weights.

    Raises:
        ModelError: a model can't be opened, or rows can't be matched.
        ConfigError: `tokenizer` is not valid.
    """
    below = models[base] if base is not None else None
    at = {location: open_source(location, base=below) for location in dict.fromkeys(models.values())}
    opened = {name: at[location] for name, location in models.items()}
    chosen = tokenizer_of(tokenizer, base, models)
    untied = untie(opened)
    ordered = match(untied, base) if experts == MATCHED else untied
    return align(ordered, tokenizer=chosen, base=base, asked=bool(tokenizer))


def open_used(recipe: Recipe) -> dict[str, Source]:
    """Open the models that a recipe reads, and the one whose tokenizer and config it takes.

    Raises what `open_sources` does.
    """
    used = dict.fromkeys((*recipe.used_models(), recipe.pattern))
    below = recipe.models[recipe.base] if recipe.base is not None else None
    at = {
        place: open_source(place, base=below) for place in dict.fromkeys(map(recipe.models.__getitem__, used))
    }
    opened = _untied_like_all(recipe, {name: at[recipe.models[name]] for name in used}, below)
    moved = recipe.tokenizer != recipe.pattern or recipe.pad_rows or recipe.tokens
    if not moved and not differ(opened, recipe.pattern):
        return _matched(recipe, opened, below)
    # Models that are not merged may still provide rows that others lack, so all are opened.
    every = {name: opened.get(name) or open_source(at, base=below) for name, at in recipe.models.items()}
    aligned = align(
        _matched(recipe, untie(every), below),
        tokenizer=recipe.tokenizer,
        base=recipe.base,
        asked=recipe.asked,
        pad_rows=recipe.pad_rows,
        tokens=recipe.tokens,
    )
    return {name: aligned[name] for name in used}


def with_chat_models(recipe: Recipe, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return opened models and those among which the recipe's `chat_template` chooses, in its order."""
    below = recipe.models[recipe.base] if recipe.base is not None else None
    wanted = chat.needed(recipe)
    return {
        name: sources[name] if name in sources else open_source(place, base=below)
        for name, place in recipe.models.items()
        if name in sources or name in wanted
    }


def _matched(recipe: Recipe, opened: dict[str, Source], below: str | None) -> dict[str, Source]:
    """Return the models with their experts in the order that the recipe asks for."""
    if recipe.experts != MATCHED:
        return opened
    first = recipe.base or next(iter(recipe.models))
    reference = opened.get(first) or open_source(recipe.models[first], base=below)
    ordered = match({first: reference, **opened}, first)
    return {name: ordered[name] for name in opened}


def _untied_like_all(recipe: Recipe, opened: dict[str, Source], below: str | None) -> dict[str, Source]:
    """Return the opened models, untied if any of the recipe's models is, so that all its merges have a head.

    Models that are neither read nor on this machine don't count.
    """
    every = dict(opened)
    for name in recipe.models.keys() - opened.keys():
        with contextlib.suppress(ModelError):
            every[name] = open_source(recipe.models[name], base=below)
    untied = untie(every)
    return {name: untied[name] for name in opened}
