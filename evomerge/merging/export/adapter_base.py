"""The base of a merge's adapter: a whole model with the tensors and the vocabulary of the merge."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.errors import ConfigError
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.source import Source, same_base
from evomerge.merging.sources.untied import Untied
from evomerge.merging.sources.vocabulary import Aligned


def base_of(recipe: Recipe, sources: Mapping[str, Source], chosen: str | None) -> tuple[str, Checkpoint]:
    """Return the location of the adapter's base, as the user wrote it, and the opened base.

    chosen: a location in place of the recipe's base. Raises ConfigError for what can't be one.
    """
    location, base = _found(recipe, sources, chosen)
    _check_base(location, base, recipe, sources[recipe.pattern])
    return location, base


def _found(recipe: Recipe, sources: Mapping[str, Source], chosen: str | None) -> tuple[str, Checkpoint]:
    if chosen is not None or recipe.base is not None:
        location = chosen if chosen is not None else recipe.models[recipe.base or ""]
        base = sources.get(recipe.base or "") if chosen is None else None
        opened = open_source(location) if base is None else base
        if isinstance(opened, Untied | Aligned):
            raise ConfigError(
                "an adapter can't be written for this base: "
                + (
                    "its head is tied to its embeddings, and the merge has one of its own"
                    if isinstance(opened, Untied)
                    else "the merge has another vocabulary"
                ),
                expected="a base with the tensors and rows of the merge",
                got=location,
                fix="write a whole model",
            )
        if not isinstance(opened, Checkpoint):
            raise ConfigError(
                "an adapter can't be written for a base that is itself an adapter",
                expected="a whole model as base",
                got=location,
            )
        return location, opened
    adapter_bases = [source.base for source in sources.values() if isinstance(source, AdaptedCheckpoint)]
    if not adapter_bases or not all(same_base(adapter_bases[0], other) for other in adapter_bases):
        raise ConfigError(
            "an adapter needs a base, and this recipe names none",
            fix="set `base` in the recipe to the model from which its sources were fine-tuned",
        )
    below = adapter_bases[0]
    for name, source in sources.items():
        if isinstance(source, Checkpoint) and same_base(source, below):
            return recipe.models[name], source
    return below.location, below


def _check_base(location: str, base: Checkpoint, recipe: Recipe, pattern: Source) -> None:
    """Raise ConfigError for a base that does not have the tensors of the merge."""
    if differing := sorted(base.headers.keys() ^ pattern.headers.keys()):
        raise ConfigError(
            "an adapter can't be written for this base: the merge does not have the same tensors",
            expected=f"a base like {recipe.pattern}",
            got=f"{location}, which differs at {', '.join(differing[:3])}",
            fix="write a whole model",
        )
