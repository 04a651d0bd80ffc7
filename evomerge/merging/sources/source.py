"""The interface of a merge's sources: tensors by name, from checkpoints or adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.arrays import WeightArray
from evomerge.merging.sources.checkpoint import TensorNames
from evomerge.merging.sources.tensorfile import Header

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """What the engine needs of a model: facts without reading weights, and tensors by name.

    `folder` holds config and tokenizer; `fingerprint` changes if the files change. `headers` are those of the
    weights, `copied` those of whole numbers and truth values, which are copied and not merged.
    """

    location: str
    folder: Path
    config: dict[str, Any]
    headers: Mapping[str, Header]
    copied: Mapping[str, Header]

    @property
    def tied(self) -> bool: ...
    @property
    def layout(self) -> TensorNames: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def vocabulary(self) -> Mapping[str, int] | None: ...
    @property
    def fingerprint(self) -> str: ...
    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32; callers must not modify it."""
        ...

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return a tensor in its stored type (see `arrays`), mapped from its file if possible."""
        ...


def copied_place(recipe: Recipe, tensor: str, sources: Mapping[str, Source]) -> tuple[str, str] | None:
    """Return the model, and its tensor, of which an output tensor is a copy; None for a merged tensor.

    Whole numbers and truth values come from the model that gives the config; from its first source where a
    group copies one model, and in a recipe of stacked layers.
    """
    group = recipe.group_for(tensor)
    places = [(recipe.pattern, tensor)]
    if recipe.stacked or group.copied_source is not None:
        places.insert(0, group.reads(tensor)[0])
    return next((place for place in places if place[1] in sources[place[0]].copied), None)


def same_base(source: Source, other: Source) -> bool:
    """Say whether two models, without their adapters, are the same folder."""
    return _resolved(source.folder) == _resolved(other.folder)


@functools.cache
def _resolved(folder: Path) -> Path:
    return folder.resolve()  # cached, because it is needed for every tensor of every candidate


def task_vector(
    source: Source, base: Source, name: str, origin: Callable[[], Tensor] | None = None
) -> Tensor | None:
    """Return source - base of one tensor in float32, or None if it is zero without reading anything.

    An adapter on the base's own files has the task vector scale * B A, computed from its factors (adding
    them to the base and subtracting the base again would round), and none for tensors it doesn't change. An
    adapter on another model has that model's task vector plus scale * B A. All others are differences. Every
    user of task vectors calls this function, so all get the same bits.

    origin: returns the base's tensor, if the caller has it; called only if the base is needed.
    """
    origin = origin or functools.partial(base.tensor, name)
    if isinstance(base, AdaptedCheckpoint):
        return source.tensor(name) - origin()
    same = same_base(source, base) and not hasattr(source, "source")  # a wrapper may hold an adapter
    if not isinstance(source, AdaptedCheckpoint):
        return None if same else source.tensor(name) - origin()
    if name in source.replaced or name in source.computed:
        return source.tensor(name) - origin()
    update = source.update(name)
    if same:
        return update
    moved = source.base.tensor(name) - origin()
    return moved if update is None else moved + update
