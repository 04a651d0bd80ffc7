"""Read a run's warm starts: recipe files and the best candidates of another run over the same models.

Both are read once, when the run begins, and stored in it: resuming needs neither file nor folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, nearest
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.running.store import BASE, StoreReader, facts
from evomerge.search.ports import Named
from evomerge.search.spaces.space import Space
from evomerge.search.warm_start import WarmStart, WarmStartSpec, distinct

TAKEN = 5
"""How many recipes are taken from another run: its winner, and the best of the rest."""


def resolve(spec: WarmStartSpec, *, space: Space, template: Recipe, folder: Path) -> WarmStart:
    """Return the warm starts of a config, from the run in `folder` if there is one already.

    Raises ConfigError for recipes over other models, and for a run whose recipes the space can't express.
    """
    gradients = None if spec.gradients == "off" else spec.gradients
    if StoreReader.exists(folder):
        with StoreReader.read(folder) as store:
            stored = facts.WARM_START.get(store) or []
        return WarmStart(recipes=tuple(_from_data(each, template) for each in stored), gradients=gradients)
    recipes = [
        Named(
            name=f"recipe {Path(path).name}",
            recipe=over(read_recipe(path), template, f"warm_start.recipes: {path}"),
        )
        for path in spec.recipes
    ]
    if spec.run is not None:
        recipes += _of_run(Path(spec.run), space, template)
    return WarmStart(recipes=tuple(distinct(recipes)), gradients=gradients)


def to_data(warm: WarmStart) -> list[dict[str, Any]]:
    """Return the recipes as plain data, without the places of their models."""
    return [
        {"name": start.name, "recipe": start.recipe.to_data() | {"models": None}} for start in warm.recipes
    ]


def _from_data(data: Mapping[str, Any], template: Recipe) -> Named:
    recipe = Recipe.from_data({**data["recipe"], "models": dict(template.models)})
    return Named(name=data["name"], recipe=recipe)


def _of_run(folder: Path, space: Space, template: Recipe) -> list[Named]:
    """Return a run's winner and best candidates, as far as the space can express them."""
    with StoreReader.read(folder) as store:
        config = facts.CONFIG.require(store)["models"]
        missing = [name for name in config["sources"] if name not in template.models]
        if missing:
            raise ConfigError(
                f"warm_start.run: {folder} merges other models",
                expected=f"sources among {', '.join(space.sources)}",
                got=", ".join(missing),
                fix="give models that are the same the same names in both configs",
            )
        ranked = sorted(
            (float(loss), recipe)
            for generation in store.generations()
            if generation.losses is not None
            for loss, recipe in zip(generation.losses[:, 0], generation.recipes, strict=True)
        )
        candidates = [*store.entries("winner"), *store.entries("start")]
        candidates += [
            Named(name=f"candidate {recipe[:8]}", recipe=store.recipe(recipe)) for _, recipe in ranked[:100]
        ]
    expressed = []
    for candidate in candidates:
        recipe = _made_here(candidate.recipe, template)
        if space.encode(recipe) is not None:
            expressed.append(Named(name=f"{folder.name}: {candidate.name}", recipe=recipe))
    if not expressed:
        raise ConfigError(
            f"warm_start.run: nothing of {folder} lies in this run's search space",
            expected=f"recipes that {space.describe()} can express",
            got=f"{len(candidates)} recipes, none of them"
            if candidates
            else "a run without any candidate yet",
            fix="search the same space, or export a recipe and name it under warm_start.recipes",
        )
    return distinct(expressed)[:TAKEN]


def over(recipe: Recipe, template: Recipe, where: str) -> Recipe:
    """Return a file's recipe over this run's models, which are matched by place, then by name.

    where: what an error begins with.
    """
    names: dict[str, str] = {}
    by_place = {_place(place): name for name, place in template.models.items()}
    for name in recipe.used_models():
        model = by_place.get(_place(recipe.models[name])) or (name if name in template.models else None)
        if model is None:
            raise ConfigError(
                f"{where}: {name!r} is none of this run's models",
                expected=", ".join(f"{n} ({p})" for n, p in template.models.items()),
                got=recipe.models[name],
                fix=nearest(name, template.models),
            )
        names[name] = model
    bases = {names[base] for group in recipe.groups if (base := recipe.base_of(group)) is not None}
    if not bases <= {BASE}:
        raise ConfigError(
            f"{where}: takes task vectors from another base than this run's",
            expected=template.models[BASE],
            got=", ".join(sorted(bases - {BASE})),
            fix="leave it out, or make a run with that base",
        )
    groups = tuple(
        dataclasses.replace(group, sources=tuple(names[source] for source in group.sources), base=None)
        for group in recipe.groups
    )
    measured: dict[str, Any] = {
        kind: {names[name]: file for name, file in recipe.files(kind).items() if name in names}
        for kind in FILES
    }
    return _made_here(
        dataclasses.replace(
            recipe,
            models=dict(template.models),
            groups=groups,
            base=BASE,
            **measured,
            fingerprints={},
            tokenizer=template.tokenizer,
        ),
        template,
    )


def _made_here(recipe: Recipe, template: Recipe) -> Recipe:
    """Return a recipe with this run's models, dtype, tokenizer and seed."""
    return dataclasses.replace(
        recipe,
        models=dict(template.models),
        base=template.base,
        dtype=template.dtype,
        tokenizer=template.tokenizer,
        seed=template.seed,
        fingerprints={},
    )


def _place(location: str) -> str:
    """Return a location with the places on the disk in it resolved."""
    parts = location.split("+")
    return "+".join(str(Path(part).resolve()) if Path(part).exists() else part for part in parts)
