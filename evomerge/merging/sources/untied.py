"""Tied models beside untied ones: a tied model gets a head of its own, equal to its embeddings.

A merge of both kinds has a head, which is merged like any other tensor. `untie` wraps the tied models in an
`Untied` source, so that all have the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.merging.sources.arrays import WeightArray
from evomerge.merging.sources.checkpoint import HEADS, TensorNames, is_embedding, natural_order, with_tying
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.tensorfile import Header

if TYPE_CHECKING:
    from torch import Tensor


def untie(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the models with a head for each, if some have one and others are tied; else as they are."""
    heads = {name for source in sources.values() for name in source.headers if name.endswith(HEADS)}
    tied = {name: source for name, source in sources.items() if source.tied}
    if len(heads) != 1 or not tied or len(tied) == len(sources):
        return dict(sources)
    (head,) = heads
    wrapped = {name: Untied(name, source, head) for name, source in tied.items() if _embedding(source)}
    return {name: wrapped.get(name, source) for name, source in sources.items()}


def _embedding(source: Source) -> str | None:
    return next((name for name in source.headers if is_embedding(name)), None)


class Untied:
    """A tied source with its embeddings as a head; everything else is the original source's.

    note: a remark for the user.
    """

    def __init__(self, name: str, source: Source, head: str) -> None:
        embedding = _embedding(source)
        assert embedding is not None
        self.source, self._head, self._embedding = source, head, embedding
        self.note = f"{name} has its head tied to its embeddings; the merge has a head, from a copy of them"
        self.location, self.folder = source.location, source.folder
        self.config = with_tying(source.config, tied=False)
        headers = {**source.headers, head: source.headers[embedding]}
        self.headers: Mapping[str, Header] = {key: headers[key] for key in sorted(headers, key=natural_order)}
        self.copied = source.copied
        self.layout = TensorNames.of(tuple(self.headers))

    @property
    def tied(self) -> bool:
        return False

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        return self.source.vocabulary

    @property
    def fingerprint(self) -> str:
        """The original source's, because its files determine the head."""
        return self.source.fingerprint

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return a tensor as the original source does; the head is its embeddings."""
        return self.source.array(self._embedding if name == self._head else name, mapped=mapped)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32. Don't modify it."""
        return self.source.tensor(self._embedding if name == self._head else name)
