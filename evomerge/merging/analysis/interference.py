"""Where fine-tunes of one base agree and where they conflict, measured on their files.

`measure` holds one tensor of the base and of every model in memory at a time (4 bytes per element each, and
as much again while a model's elements are ranked); everything else is counted in blocks. The result for a
tensor is a `Tally`: inner products and counts for all pairs of models. Tallies can be added, so layers,
module kinds and the whole model are sums over tensors.

An element counts as changed by a model if |task vector| > threshold * mean |task vector| of that model and
tensor. So the noise of a dense fine-tune does not count, the few elements of a sparse one do, and a longer
task vector does not count as more changed than a short one: shares compare directions, and norms sizes.

Not covered: the models' skills. No number here predicts which skill a merge keeps, so `advice` only names
where to start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging.compatibility import check_models
from evomerge.merging.modules import layer_of
from evomerge.merging.sources.arrays import to_tensor, widened
from evomerge.merging.sources.experts import experts_of
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.tensorfile import Header

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Bin = TypeVar("Bin", bound=Hashable)

THRESHOLD = 1.0
"""Default threshold: of normally distributed changes 42 % count as changed."""
TOP = 0.2
"""Default share of largest elements that are compared between models: the share that TIES keeps."""
BLOCK = 1 << 16
"""Elements per model counted at a time: a block fits into the cache, and its float32 counts are exact."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tally:
    """Sums and counts over the elements of N task vectors; tallies of several tensors can be added.

    count: number of elements. base: sum of squares of the base.
    products: (N, N) inner products of the task vectors.
    same, opposite: (N, N) numbers of elements that both change, in the same or in opposite directions; the
        diagonal of `same` counts the elements that one model changes.
    top: (N, N) numbers of elements in the top of both; the diagonal is the size of one model's top.
    shares: (4,) numbers of elements changed by no model, by one, by several in the same direction, by
        several in opposite directions.
    """

    count: int
    base: float
    products: Floats
    same: Counts
    opposite: Counts
    top: Counts
    shares: Counts

    @classmethod
    def total(cls, tallies: Iterable[Tally]) -> Tally:
        """Return the sum of one or more tallies."""
        summands = list(tallies)
        return cls(
            count=sum(t.count for t in summands),
            base=math.fsum(t.base for t in summands),
            products=np.sum([t.products for t in summands], axis=0),
            same=np.sum([t.same for t in summands], axis=0),
            opposite=np.sum([t.opposite for t in summands], axis=0),
            top=np.sum([t.top for t in summands], axis=0),
            shares=np.sum([t.shares for t in summands], axis=0),
        )

    @property
    def norms(self) -> Floats:
        """(N,) norms of the task vectors."""
        return np.asarray(np.sqrt(np.diag(self.products)))

    @property
    def relative(self) -> Floats:
        """(N,) norms of the task vectors relative to the base's; infinite if the base is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            lengths = self.norms / math.sqrt(self.base)
        return np.where(self.norms > 0, lengths, 0.0)

    @property
    def cosine(self) -> Floats:
        """(N, N) cosines between the task vectors; 0 for a task vector of zeros."""
        size = np.outer(self.norms, self.norms)
        cosines = np.divide(self.products, size, out=np.zeros_like(size), where=size > 0)
        return np.clip(cosines, -1.0, 1.0)

    @property
    def conflict(self) -> Floats:
        """(N, N) share of opposite directions among the elements that both change; NaN if there are none.

        It is 0.5 for independent task vectors.
        """
        return _share(self.opposite, self.same + self.opposite)

    @property
    def overlap(self) -> Floats:
        """(N, N) Jaccard index of the tops: common elements / elements in either; NaN for empty tops."""
        sizes = np.diag(self.top)
        return _share(self.top, np.add.outer(sizes, sizes) - self.top)

    @property
    def changed(self) -> Floats:
        """(N,) share of the elements that each model changes."""
        return _share(np.diag(self.same), np.full(len(self.same), self.count))

    @property
    def chance_shares(self) -> Floats:
        """(4,) expected `shares`, as fractions of 1, for independent random places and directions.

        Every model changes as many elements as it really does.
        """
        p = np.nan_to_num(self.changed)
        none = float(np.prod(1.0 - p))
        by_one = math.fsum(float(np.prod(np.delete(1.0 - p, i)) * p[i]) for i in range(len(p)))
        one_way = 2.0 * (float(np.prod(1.0 - p / 2.0)) - none - by_one / 2.0)
        shares: Floats = np.array([none, by_one, one_way, 1.0 - none - by_one - one_way]).clip(0.0, 1.0)
        return shares

    @property
    def mean_conflict(self) -> float:
        """Conflict over all pairs of models together; NaN if no element is changed by two models."""
        pairs = np.triu_indices(len(self.products), 1)
        return float(_share(self.opposite[pairs].sum(), (self.same + self.opposite)[pairs].sum()))

    @property
    def mean_cosine(self) -> float:
        """The mean cosine of all pairs of models."""
        return float(self.cosine[np.triu_indices(len(self.products), 1)].mean())

    @property
    def mean_overlap(self) -> float:
        """The mean overlap of all pairs of models; NaN if all tops are empty."""
        overlaps = self.overlap[np.triu_indices(len(self.products), 1)]
        overlaps = overlaps[~np.isnan(overlaps)]
        return float(overlaps.mean()) if len(overlaps) else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """The tallies of all tensors of a set of models, and their sums.

    models: names of the fine-tunes, in the order of every (N, ...) array. tensors: name -> tally.
    routers: the tensors that choose experts.
    """

    base: str
    models: tuple[str, ...]
    locations: Mapping[str, str]
    threshold: float
    top: float
    tensors: Mapping[str, Tally]
    notes: tuple[str, ...] = ()
    routers: frozenset[str] = frozenset()

    @property
    def total(self) -> Tally:
        """The whole model."""
        return Tally.total(self.tensors.values())

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The positions of all pairs of models."""
        return [(i, j) for j in range(len(self.models)) for i in range(j)]

    @property
    def chance_overlap(self) -> float:
        """The expected overlap of two independent tops."""
        return self.top / (2.0 - self.top)

    def by_layer(self) -> dict[int | None, Tally]:
        """Sum by layer; None holds the tensors outside all layers."""
        return self._grouped(layer_of)

    def by_kind(self) -> dict[str, Tally]:
        """Sum by module kind, over all layers; see `kind_of`."""
        return self._grouped(self.kind)

    def kind(self, tensor: str) -> str:
        """Return `kind_of` a tensor, with a mark on those that choose experts."""
        return f"{kind_of(tensor)} (router)" if tensor in self.routers else kind_of(tensor)

    def cells(self) -> dict[tuple[int | None, str], Tally]:
        """Sum by layer and module kind: the cells of the heat map."""
        return self._grouped(lambda tensor: (layer_of(tensor), self.kind(tensor)))

    def _grouped(self, place: Callable[[str], Bin]) -> dict[Bin, Tally]:
        tallies_at: dict[Bin, list[Tally]] = {}
        for tensor, tensor_tally in self.tensors.items():
            tallies_at.setdefault(place(tensor), []).append(tensor_tally)
        return {key: Tally.total(tallies) for key, tallies in tallies_at.items()}


def kind_of(tensor: str) -> str:
    """Return a tensor's name without its layer and `.weight`, with other numbers replaced by a star.

    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("model.norm.weight")
    ('self_attn.q_proj', 'model.norm')
    >>> kind_of("model.layers.3.mlp.experts.5.w1.weight")
    'mlp.experts.*.w1'
    """
    layer = layer_of(tensor)
    name = tensor if layer is None else tensor.partition(f".{layer}.")[2]
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name).removesuffix(".weight")


def measure(
    models: Mapping[str, str],
    base: str,
    *,
    threshold: float = THRESHOLD,
    top: float = TOP,
    sample: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Interference:
    """Measure every tensor of the fine-tunes of one base.

    Args:
        models: name -> location of the base and at least two fine-tunes of it.
        base: the name of the base model.
        threshold: an element counts as changed above this multiple of its tensor's mean |task vector|.
        top: share of largest elements that are compared, in (0, 1].
        sample: measure only tensors with about this many elements together, spread over the model; None
            measures all.
        progress: called after each tensor as `progress(elements done, elements in all)`.

    Raises:
        ConfigError: an unknown base, fewer than two fine-tunes, or settings out of range.
        ModelError: the models do not fit each other, or have weights that are not finite.
    """
    names = _fine_tunes(models, base)
    if not (math.isfinite(threshold) and threshold >= 0.0):
        raise ConfigError("analysis: threshold", expected="a number >= 0", got=f"{threshold:g}")
    if not 0.0 < top <= 1.0:
        raise ConfigError("analysis: top", expected="0 < top <= 1", got=f"{top:g}")
    sources = open_sources(models, base)
    notes = check_models({base: sources[base]} | sources)
    tensors: dict[str, Tally] = {}
    chosen = _sampled(sources[base].headers, sample)
    done, whole = 0, sum(header.count for header in chosen.values())
    for tensor, header in chosen.items():
        origin, vectors = _read(sources, base, names, tensor)
        tensor_tally = tally(origin, vectors, threshold=threshold, top=top)
        _refuse_non_finite(tensor, tensor_tally, base, names)
        tensors[tensor] = tensor_tally
        done += header.count
        if progress is not None:
            progress(done, whole)
    return Interference(
        base=base,
        models=names,
        locations=dict(models),
        threshold=threshold,
        top=top,
        tensors=tensors,
        notes=notes,
        routers=frozenset(
            name for experts in experts_of(sources[base].headers).values() for name in experts.routers
        ),
    )


def _refuse_non_finite(tensor: str, found: Tally, base: str, names: Sequence[str]) -> None:
    if math.isfinite(found.base) and np.isfinite(found.products).all():
        return
    non_finite = [n for n, ok in zip(names, np.isfinite(np.diag(found.products)), strict=True) if not ok]
    raise ModelError(
        f"tensor {tensor!r} has elements that are NaN or infinite",
        got=f"in {base if len(non_finite) != 1 else non_finite[0]}",
        fix="use a sound copy of the model",
    )


def _sampled(headers: Mapping[str, Header], sample: int | None) -> dict[str, Header]:
    """Return tensors with about `sample` elements together, evenly spread in the model's order."""
    whole = sum(header.count for header in headers.values())
    if sample is None or whole <= sample:
        return dict(headers)
    chosen: dict[str, Header] = {}
    passed, taken = 0, 0
    for name, header in headers.items():
        passed += header.count
        if taken + header.count <= sample * passed / whole or not chosen:
            chosen[name] = header
            taken += header.count
    return chosen


def _fine_tunes(models: Mapping[str, str], base: str) -> tuple[str, ...]:
    """Return the names of the models without the base. Raises ConfigError."""
    if base not in models:
        raise ConfigError(f"unknown base model {base!r}", fix=nearest(base, models))
    names = tuple(name for name in models if name != base)
    if len(names) < 2:
        raise ConfigError(
            "an analysis compares fine-tunes of one base",
            expected="a base and at least two other models",
            got=f"base {base!r} and {', '.join(map(repr, names)) or 'no other model'}",
            fix="name more models; --base names the base if a recipe file has none",
        )
    return names


def _read(
    sources: Mapping[str, Source], base: str, names: Sequence[str], tensor: str
) -> tuple[Tensor, list[Tensor]]:
    """Return the base's tensor and the task vectors, read as copies, since mapped files stay in memory."""

    def read(name: str) -> Tensor:
        return to_tensor(widened(sources[name].array(tensor, mapped=False)))

    origin = read(base)
    return origin, [read(name) - origin for name in names]


def tally(
    base: Tensor, vectors: Sequence[Tensor], *, threshold: float = THRESHOLD, top: float = TOP
) -> Tally:
    """Count one tensor: its base and one task vector per model, float32, all of one shape.

    The top of a model holds the elements whose size is at least that of its int(top * n)-th largest element,
    with ties and without zeros.

    >>> import torch
    >>> vectors = [torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, -2.0, 1.0])]
    >>> tally(torch.ones(4), vectors, threshold=0.0).shares.tolist()
    [1, 1, 1, 1]
    """
    import torch

    count, number = base.numel(), len(vectors)
    flat = [vector.reshape(-1) for vector in vectors]
    bounds = [_bounds(vector, threshold, top) for vector in flat]
    least, largest = torch.tensor(bounds, dtype=torch.float32).reshape(number, 2, 1).unbind(1)
    squares, shares = 0.0, np.zeros(4, dtype=np.int64)
    products = np.zeros((number, number))
    net, both, common = (np.zeros((number, number), dtype=np.int64) for _ in range(3))
    origin = base.reshape(-1)
    for start in range(0, count, BLOCK):
        block = torch.stack([vector[start : start + BLOCK] for vector in flat])
        size = block.abs()
        exact = block.double()
        products += (exact @ exact.T).numpy()
        squares += origin[start : start + BLOCK].double().square().sum().item()
        # Matrix products of -1, 0 and 1 count all pairs at once.
        changed = (size > least).float()
        sign = block.sign() * changed
        net += _counted(sign)
        both += _counted(changed)
        common += _counted(((size >= largest) & (size > 0.0)).float())
        by = changed.sum(0)
        several = by > 1.0
        agreed = int((several & (sign.sum(0).abs() == by)).sum())
        by_none, by_one, more = int((by == 0.0).sum()), int((by == 1.0).sum()), int(several.sum())
        shares += np.array([by_none, by_one, agreed, more - agreed])
    return Tally(
        count=count,
        base=squares,
        products=products,
        same=(both + net) // 2,
        opposite=(both - net) // 2,
        top=common,
        shares=shares,
    )


def _bounds(vector: Tensor, threshold: float, top: float) -> tuple[float, float]:
    """Return the |element| above which it counts as changed, and from which on it is in the top."""
    import torch

    count = vector.numel()
    if not count:
        return 0.0, math.inf
    size = vector.abs()
    mean = size.sum(dtype=torch.float64).item() / count
    top_count = int(top * count)
    if not top_count or not math.isfinite(mean):
        return threshold * mean, math.inf
    ranked: NDArray[Any] = size.numpy()
    ranked.partition(count - top_count)  # in place: `abs` made a copy
    return threshold * mean, float(ranked[count - top_count])


def _counted(marks: Tensor) -> Counts:
    return np.asarray((marks @ marks.T).numpy(), dtype=np.int64)


def _share(part: Any, whole: Any) -> Floats:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    shares: Floats = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return shares
