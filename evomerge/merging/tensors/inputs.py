"""The tensors of a merge and their statistics, from files or from a search's caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy

from evomerge.merging.methods.core_space import LowRankUpdate
from evomerge.merging.methods.declaration import FileKind
from evomerge.merging.methods.selection import Boundary, Spectrum, boundary
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources import measured_files
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.arrays import WeightArray, computable, of_tensor
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.source import Source, copied_place, task_vector
from evomerge.merging.tensors.kernels import Operand

if TYPE_CHECKING:
    from torch import Tensor

TensorKey = tuple[str, str]
"""A model and one of its tensors, by name."""
Difference = tuple[TensorKey, TensorKey | None]
"""A tensor, and the base's tensor that is subtracted from it, if any."""
Gram = list[list[float]]


class Inputs(Protocol):
    """What `merge_tensor` needs. Statistics are passed with a function that computes them if necessary."""

    def operand(self, source: str, tensor: str, base: TensorKey | None) -> Operand:
        """Return a source's tensor in float32 or bfloat16, marked if `base` is still to be subtracted."""
        ...

    def copied(self, recipe: Recipe, tensor: str) -> WeightArray | None:
        """Return what an output tensor is a copy of, see `copied_place`; None for a merged tensor."""
        ...

    def measured(self, kind: FileKind, file: str, tensor: str) -> Tensor | None:
        """Return a tensor of a file of what was measured of a model, in float32."""
        ...

    def updates(self, places: tuple[TensorKey, ...]) -> list[LowRankUpdate | None] | None:
        """Return the factors of adapters at some places; None if a change is no low-rank update."""
        ...

    def gram(self, places: tuple[Difference, ...], compute: Callable[[], Gram]) -> Gram:
        """Return the inner products of all pairs of the tensors (or differences) at some places."""
        ...

    def boundary(self, place: Difference, rank: int, magnitudes: Callable[[], WeightArray]) -> Boundary:
        """Return the boundary above which `rank` elements of a tensor (or difference) lie.

        magnitudes: computes its magnitudes, (n,) float32; the array may be modified.
        """
        ...


class FileInputs:
    """Reads tensors from the files every time and caches nothing: for writing a model once."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def operand(self, source: str, tensor: str, base: TensorKey | None) -> Operand:
        return _operand(self._sources, source, tensor, base, mapped=False)

    def copied(self, recipe: Recipe, tensor: str) -> WeightArray | None:
        return _copied(self._sources, recipe, tensor)

    def measured(self, kind: FileKind, file: str, tensor: str) -> Tensor | None:
        return measured_files.tensor(kind, file, tensor)

    def updates(self, places: tuple[TensorKey, ...]) -> list[LowRankUpdate | None] | None:
        return _updates(self._sources, places)

    def gram(self, places: tuple[Difference, ...], compute: Callable[[], Gram]) -> Gram:
        return compute()

    def boundary(self, place: Difference, rank: int, magnitudes: Callable[[], WeightArray]) -> Boundary:
        return boundary(magnitudes(), rank, reorder=True)


KEPT = 16
"""Candidates after which statistics that none of them needed are forgotten."""


class WarmInputs:
    """Takes tensors from mapped files and caches statistics: for merging many candidates.

    Cached: inner products that methods used (a few numbers per tensor), and the sorted magnitudes of each
    task vector that was trimmed (see `Spectrum`), until no candidate has needed them for a while. With
    `low_memory` those are computed again for every trim.
    Adapter updates stay factored; their product is computed for each candidate that uses it.
    """

    def __init__(self, sources: Mapping[str, Source], *, low_memory: bool = False) -> None:
        self._sources, self._low_memory = sources, low_memory
        self._grams: dict[tuple[Difference, ...], Gram] = {}
        self._spectra: dict[Difference, Spectrum] = {}
        self._used: dict[Difference, int] = {}
        self._candidates = 0
        self._mapped: dict[Difference, Operand] = {}

    @property
    def nbytes(self) -> int:
        """The memory the statistics take."""
        return sum(spectrum.nbytes for spectrum in self._spectra.values())

    def next_candidate(self) -> None:
        """Begin a candidate, and forget magnitudes that the last `KEPT` candidates did not need.

        A search that trims needs all of them for each candidate; where only baselines trim, they would take
        memory for nothing.
        """
        self._candidates += 1
        for place in [place for place, used in self._used.items() if used < self._candidates - KEPT]:
            del self._used[place], self._spectra[place]

    def operand(self, source: str, tensor: str, base: TensorKey | None) -> Operand:
        place = (source, tensor), base
        if place in self._mapped:
            return self._mapped[place]
        operand = _operand(self._sources, source, tensor, base, mapped=True)
        if operand.data.base is not None and isinstance(self._sources[source], Checkpoint):
            self._mapped[place] = operand  # a view of the file: keeping it costs nothing
        return operand

    def copied(self, recipe: Recipe, tensor: str) -> WeightArray | None:
        return _copied(self._sources, recipe, tensor)

    def measured(self, kind: FileKind, file: str, tensor: str) -> Tensor | None:
        return measured_files.tensor(kind, file, tensor)

    def updates(self, places: tuple[TensorKey, ...]) -> list[LowRankUpdate | None] | None:
        return _updates(self._sources, places)

    def gram(self, places: tuple[Difference, ...], compute: Callable[[], Gram]) -> Gram:
        if places not in self._grams:
            self._grams[places] = compute()
        return self._grams[places]

    def boundary(self, place: Difference, rank: int, magnitudes: Callable[[], WeightArray]) -> Boundary:
        if self._low_memory:
            return boundary(magnitudes(), rank, reorder=True)
        if place not in self._spectra:
            self._spectra[place] = Spectrum(magnitudes())
        self._used[place] = self._candidates
        return self._spectra[place].boundary(rank)


def _copied(sources: Mapping[str, Source], recipe: Recipe, tensor: str) -> WeightArray | None:
    place = copied_place(recipe, tensor, sources) if any(s.copied for s in sources.values()) else None
    return None if place is None else sources[place[0]].array(place[1])


def _updates(
    sources: Mapping[str, Source], places: tuple[TensorKey, ...]
) -> list[LowRankUpdate | None] | None:
    found: list[LowRankUpdate | None] = []
    for name, tensor in places:
        adapter = sources[name]
        assert isinstance(adapter, AdaptedCheckpoint), name  # `compatibility` refuses all others
        update = adapter.updates.get(tensor)
        whole = tensor in adapter.replaced or tensor in adapter.computed
        if whole or (update is not None and update.down is None):
            return None
        if update is None:
            found.append(None)
            continue
        up, down = adapter.factors(tensor)
        found.append((down.T, up.T) if update.transposed else (up, down))
    return found


def _operand(
    sources: Mapping[str, Source], source: str, tensor: str, base: TensorKey | None, *, mapped: bool
) -> Operand:
    """Return a model's tensor, or a task vector: as a difference to be computed, or an adapter's update."""
    model = sources[source]
    if base is None or base[1] != tensor or not isinstance(model, AdaptedCheckpoint):
        return Operand(computable(model.array(tensor, mapped=mapped)), base is not None)
    vector = task_vector(model, sources[base[0]], tensor)
    if vector is None:
        return Operand(numpy.zeros(model.headers[tensor].shape, dtype=numpy.float32), False)
    return Operand(of_tensor(vector), False)
