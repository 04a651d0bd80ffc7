"""A source of a merge: anything that has tensors by name, whatever files they come from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.arrays import WeightArray
from evomerge.merging.sources.checkpoint import TensorNames
from evomerge.merging.sources.tensorfile import Header

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """What the engine needs of a model: facts without reading weights, and tensors by name.

    `folder` is where config and tokenizer lie; `fingerprint` changes when the files do.
    """

    location: str
    folder: Path
    config: dict[str, Any]
    headers: Mapping[str, Header]

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
        """Return a tensor in the type it has (see `arrays`), mapped from its file if possible."""
        ...


def same_base(source: Source, other: Source) -> bool:
    """Say whether two models, adapters taken off, are one folder, however it was named."""
    return _resolved(source.folder) == _resolved(other.folder)


@functools.cache
def _resolved(folder: Path) -> Path:
    return folder.resolve()  # asked for every tensor of every candidate


def task_vector(
    source: Source, base: Source, name: str, origin: Callable[[], Tensor] | None = None
) -> Tensor | None:
    """Return source - base of one tensor in float32, or None where it is known to be zero unread.

    An adapter on the very files of the base has the task vector scale * B A, computed from its factors
    and not by adding them to the base and taking the base away again; of a tensor it does not touch, none.
    An adapter on another model has that model's task vector plus scale * B A. Everything else is a
    difference. All who need a task vector get it here, so that they get the same bits.

    origin: gives the base's tensor where the caller keeps it; it is called only if the base is needed.
    """
    origin = origin or functools.partial(base.tensor, name)
    if isinstance(base, AdaptedCheckpoint):
        return source.tensor(name) - origin()
    same = same_base(source, base)
    if not isinstance(source, AdaptedCheckpoint):
        return None if same else source.tensor(name) - origin()
    if name in source.replaced:
        return source.tensor(name) - origin()
    update = source.update(name)
    if same:
        return update
    moved = source.base.tensor(name) - origin()
    return moved if update is None else moved + update
