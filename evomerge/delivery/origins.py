"""Where the models of an exported recipe come from: hub ids, licences, and places valid on other machines.

A card names models by their hub ids, and no path of the machine it was written on. What a local folder is on
the hub is known from the config's `models: {hub: ...}` or from its place in the hub's cache. Otherwise the
ids in its own files, `_name_or_path` of config.json or `base_model` of its card, say what it derives from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import UserError
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.adapter import AdaptedCheckpoint, split_location
from evomerge.merging.sources.beside import unwrapped
from evomerge.merging.sources.hub import is_local, known_id, split_id
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.source import Source
from evomerge.schema import parse_yaml

FOLDERS = (
    *(
        "checkpoint",
        "checkpoints",
        "ckpt",
        "ckpts",
        "data",
        "experiments",
        "model",
        "models",
        "merged",
        "out",
    ),
    *("output", "outputs", "result", "results", "run", "runs", "saved", "tmp", "trained", "weights", "work"),
)
"""First parts of relative paths that have the form of a hub id."""
LARGEST_CARD = 1_000_000
LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One model of a recipe.

    ids: of the hub, without revisions: the model's own, or those it derives from; an adapter's model first.
    place: what a card shows: a hub id, or the name of a folder. published: its location elsewhere, None for a
    model that is only on this machine. licences: the headers of its cards, empty where they name none.
    """

    name: str
    location: str
    ids: tuple[str, ...]
    place: str
    published: str | None
    licences: tuple[Mapping[str, str], ...]


def origins(recipe: Recipe, hub: Mapping[str, str]) -> dict[str, Origin]:
    """Return name -> origin of a recipe's models; only those that are read are opened.

    hub: name -> hub id, as in the run's config.
    """
    used, below = recipe.used_models(), recipe.models.get(recipe.base or "")
    return {
        name: _origin(name, location, hub.get(name), below if name in used else None, opened=name in used)
        for name, location in recipe.models.items()
    }


def _origin(name: str, location: str, given: str | None, below: str | None, *, opened: bool) -> Origin:
    parts = [part for part in split_location(location) if part]
    known = [known_id(part) for part in parts]
    published = given or ("+".join(filter(None, known)) if all(known) else None)
    files = _parts(open_source(location, base=below)) if opened else []
    ids = [given] if given else [id_ for place, folder in files for id_ in _ids(place, folder)]
    return Origin(
        name=name,
        location=location,
        ids=tuple(dict.fromkeys(split[0] for id_ in ids if id_ and (split := split_id(id_)))),
        place=given or "+".join(id_ or Path(part).name for id_, part in zip(known, parts, strict=True)),
        published=published,
        licences=tuple(_licence(folder) for _, folder in files),
    )


def _parts(source: Source) -> list[tuple[str, Path]]:
    """Return location and folder of a model, and of the adapter on it."""
    inner = unwrapped(source)
    if isinstance(inner, AdaptedCheckpoint):
        return [(inner.base.location, inner.base.folder), (str(inner.adapter), inner.adapter)]
    return [(source.location, source.folder)]


def _ids(location: str, folder: Path) -> list[str]:
    """Return the hub id of a folder, or those of the models that its files say it derives from."""
    if (own := known_id(location) or known_id(str(folder))) is not None:
        return [own]
    header = _card(folder)
    named = _config(folder).get("_name_or_path")
    listed = header.get("base_model")
    for ids in ([named], listed if isinstance(listed, list) else [listed]):
        if valid := [id_ for id_ in ids if isinstance(id_, str) and _is_id(id_)]:
            return valid
    return []


def _is_id(text: str) -> bool:
    return split_id(text) is not None and not is_local(text) and text.partition("/")[0] not in FOLDERS


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        data = parse_yaml((folder / "config.json").read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _card(folder: Path) -> Mapping[str, Any]:
    """Return the YAML header of a folder's model card, empty where there is none that can be read."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            text = file.read(LARGEST_CARD)
        match = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
        data = parse_yaml(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError, UserError):
        return {}
    return data if isinstance(data, dict) else {}


def _licence(folder: Path) -> Mapping[str, str]:
    header = _card(folder)
    named = {key: header[key] for key in LICENCE if isinstance(header.get(key), str) and header[key]}
    return named if "license" in named else {}


def licence(models: Iterable[Origin]) -> tuple[Mapping[str, str], str | None]:
    """Return the licence keys of a merge's card, and a note where its models have several licences.

    All models have one licence: that one. Several: `other`. None known of a model: no keys.
    """
    models = [model for model in models if model.licences]
    headers = [header for model in models for header in model.licences]
    distinct = {tuple(sorted(header.items())) for header in headers if header}
    if len(distinct) > 1:
        named = ", ".join(f"{model.name} {_named(model)}" for model in models)
        return {"license": "other"}, (
            f"the models have different licences ({named}); the card says `license: other`: write the "
            "one that holds for the merge, if they permit one"
        )
    if not headers or {} in headers:
        return {}, None
    return headers[0], None


def _named(model: Origin) -> str:
    names = [header.get("license_name") or header.get("license", "unknown") for header in model.licences]
    return " and ".join(dict.fromkeys(names))


def published(recipe: Recipe, models: Mapping[str, Origin]) -> Recipe:
    """Return the recipe with hub ids in place of locations, where they are known."""
    places = {name: models[name].published or location for name, location in recipe.models.items()}
    return dataclasses.replace(recipe, models=places)


def with_published(text: str, models: Iterable[Origin]) -> str:
    """Return mergekit YAML with hub ids in place of locations, where they are known."""
    places = {model.location: model.published for model in models if model.published}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return places.get(value, value) if isinstance(value, str) else value

    if all(place == location for location, place in places.items()):
        return text
    return yaml.safe_dump(replaced(yaml.safe_load(text)), sort_keys=False, default_flow_style=None)
