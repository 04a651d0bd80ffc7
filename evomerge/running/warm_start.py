"""Read a run's warm starts: recipe files and the best candidates of another run over the same models.

Both are read once, when the run begins, and stored in it: resuming needs neither file nor folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.adapter import split_location
from evomerge.merging.sources.hub import is_local
from evomerge.merging.sources.opening import open_source
from evomerge.running.inputs import RunInputs
from evomerge.running.store import BASE, StoreReader, facts
from evomerge.search.ports import Named
from evomerge.search.spaces.space import Space
from evomerge.search.warm_start import GradientSpec, WarmStart, WarmStartSpec, distinct

TAKEN = 5
"""How many recipes are taken from another run: its winner, and the best of the rest."""


def resolve(
    spec: WarmStartSpec, *, space: Space, template: Recipe, folder: Path, inputs: RunInputs
) -> WarmStart:
    """Return the warm starts of a config, from the run in `folder` if there is one already.

    inputs: this run's models, with which those of recipes and of another run are compared.

    Raises ConfigError for recipes over other models, and for a run whose recipes the space can't express.
    """
    automatic = spec.gradients == "auto"
    gradients = GradientSpec() if spec.gradients == "auto" else spec.gradients
    descent = WarmStart(gradients=None if gradients == "off" else gradients, automatic=automatic)
    if StoreReader.exists(folder):
        with StoreReader.read(folder) as store:
            stored = facts.WARM_START.get(store) or []
        return replace(descent, recipes=tuple(_from_data(each, template) for each in stored))
    recipes = [
        Named(
            name=f"recipe {Path(path).name}",
            recipe=over(read_recipe(path), template, f"warm_start.recipes: {path}", inputs),
        )
        for path in spec.recipes
    ]
    if spec.run is not None:
        recipes += _of_run(Path(spec.run), space, template, inputs)
    return replace(descent, recipes=tuple(distinct(recipes)))


def to_data(warm: WarmStart) -> list[dict[str, Any]]:
    """Return the recipes as plain data, without the places of their models."""
    return [
        {"name": start.name, "recipe": start.recipe.to_data() | {"models": None}} for start in warm.recipes
    ]


def _from_data(data: Mapping[str, Any], template: Recipe) -> Named:
    recipe = Recipe.from_data({**data["recipe"], "models": dict(template.models)})
    return Named(name=data["name"], recipe=recipe)


def _of_run(folder: Path, space: Space, template: Recipe, inputs: RunInputs) -> list[Named]:
    """Return a run's winner and best candidates, as far as the space can express them."""
    with StoreReader.read(folder) as store:
        names = _names_here(store, space, inputs)
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
        recipe = _made_here(_renamed(candidate.recipe, names, template), template)
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


def _names_here(store: StoreReader, space: Space, inputs: RunInputs) -> dict[str, str]:
    """Return the names of another run's models -> their names in this run; raise ConfigError.

    Models with equal files are the same, whatever their names and places. Others of the same name are not.
    """
    prints, files = facts.FINGERPRINTS.require(store), facts.MODEL_FILES.get(store) or {}
    names: dict[str, str] = {}
    for name in (BASE, *facts.CONFIG.require(store)["models"]["sources"]):
        same = [
            here
            for here, fingerprint in inputs.fingerprints.items()
            if fingerprint == prints.get(name) or (name in files and files[name] == inputs.files.get(here))
        ]
        if name in same or same:
            names[name] = name if name in same else same[0]
            continue
        other = name in inputs.fingerprints
        raise ConfigError(
            f"warm_start.run: {store.folder} merges other models",
            expected=f"sources among {', '.join(space.sources)}, with the same files",
            got=f"{name}, whose files are others than this run's {name}" if other else name,
            fix=f"export a recipe of {store.folder}, delete its `fingerprints`, and name it under "
            "warm_start.recipes; models are then taken by their names",
        )
    return names


def over(recipe: Recipe, template: Recipe, where: str, inputs: RunInputs) -> Recipe:
    """Return a file's recipe over this run's models: those with the same files, else place, else name.

    A recipe's hash names its models, so recipes over different files must not be taken for each other's.

    where: what an error begins with. inputs: of this run.
    """
    names: dict[str, str] = {}
    for name in recipe.used_models():
        model = _counterpart(name, recipe, template, where, inputs)
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
    return _made_here(_renamed(recipe, names, template), template)


def _counterpart(name: str, recipe: Recipe, template: Recipe, where: str, inputs: RunInputs) -> str | None:
    """Return the name of a recipe's model in this run, None without one; refuse other files."""
    place = recipe.models[name]
    by_place = {_place(known): here for here, known in template.models.items()}
    model = by_place.get(_place(place)) or (name if name in template.models else None)
    written = recipe.fingerprints.get(name)
    found = written or (None if _place(place) in by_place else _fingerprint_at(place, template))
    if found is None:
        return model
    same = [here for here in template.models if found in _fingerprints(here, template, inputs)]
    if not same and model is not None:
        raise ConfigError(
            f"{where}: {name!r} is another model than this run's {model!r}: their files differ",
            expected=template.models[model],
            got=place,
            fix="merge with the files it was written for"
            + (
                "; or delete `fingerprints` from the recipe, to take models by their names" if written else ""
            ),
        )
    return model if model in same or not same else same[0]


def _fingerprints(name: str, template: Recipe, inputs: RunInputs) -> set[str | None]:
    """Return the fingerprints of a model of this run: with rows matched by token, and as it lies on disk."""
    return {inputs.fingerprints.get(name), _fingerprint_at(template.models[name], template)} - {None}


def _fingerprint_at(place: str, template: Recipe) -> str | None:
    """Return the fingerprint of a model on this machine, None if there is none."""
    model, _ = split_location(place)
    if not is_local(model):
        return None
    try:
        return open_source(place, base=template.models[BASE]).fingerprint
    except ModelError:
        return None


def _renamed(recipe: Recipe, names: Mapping[str, str], template: Recipe) -> Recipe:
    """Return a recipe over this run's models. names: its models -> this run's."""
    groups = tuple(
        dataclasses.replace(group, sources=tuple(names[source] for source in group.sources), base=None)
        for group in recipe.groups
    )
    measured: dict[str, Any] = {
        kind: {names[name]: file for name, file in recipe.files(kind).items() if name in names}
        for kind in FILES
    }
    return dataclasses.replace(
        recipe,
        models=dict(template.models),
        groups=groups,
        base=BASE,
        **measured,
        fingerprints={},
        tokens={},
        tokenizer=template.tokenizer,
        experts=template.experts,
        chat_template=template.chat_template,
    )


def _made_here(recipe: Recipe, template: Recipe) -> Recipe:
    """Return a recipe with this run's models, dtype, tokenizer, chat template and seed."""
    return dataclasses.replace(
        recipe,
        models=dict(template.models),
        base=template.base,
        dtype=template.dtype,
        tokenizer=template.tokenizer,
        experts=template.experts,
        chat_template=template.chat_template,
        seed=template.seed,
        pad_rows=0,
        tokens={},
        fingerprints={},
    )


def _place(location: str) -> str:
    """Return a location with the places on the disk in it resolved."""
    parts = location.split("+")
    return "+".join(str(Path(part).resolve()) if Path(part).exists() else part for part in parts)
