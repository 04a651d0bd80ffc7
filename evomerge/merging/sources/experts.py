"""Mixtures of experts whose experts stand in another order: they are matched by their weights before merging.

Fine-tunes of one base keep the order of its experts. Models that were trained apart, or made of dense models,
need not: their expert 3 may do what the base's expert 5 does, and a mean of both does neither. `match` finds
for every layer the order in which a model's experts are most like the base's (the largest sum of cosine
similarities: the assignment problem, Kuhn 1955), and wraps the model in a `Matched` source with that order.
The router's rows move with the experts, so the model computes what it did.

Experts are found by name: tensors `....experts.N....`, and tensors whose first axis is the experts, below
`....experts.` or beside a router. Where routing is limited to groups of experts (`n_group`), experts stay in
their group.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import ModelError
from evomerge.merging.sources.arrays import WeightArray, widened
from evomerge.merging.sources.checkpoint import TensorNames
from evomerge.merging.sources.model_config import text_part
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.tensorfile import Header

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE = 4096
"""Elements of an expert's tensor that are compared."""
ROUTERS = re.compile(
    r"\.((gate|router)(\.(gate|layer|classifier|wg))?\.(weight|bias)|(\w+\.)*e_score_correction_bias|expert_bias)$"
)
"""Ends of the names of tensors with one row per expert, which choose experts."""
_EXPERT = re.compile(r"^(.*\.experts)\.(\d{1,6})\.(.+)$")
_JOINED = re.compile(r"^(.*\.experts)\.([^.]+(?:\.(?:weight|bias))?)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of one layer.

    tensors: expert -> ending -> tensor. joined: tensors of all experts at once. routers: tensors with one row
    per expert.
    """

    count: int
    tensors: Mapping[int, Mapping[str, str]]
    joined: tuple[str, ...]
    routers: tuple[str, ...]


def experts_of(headers: Mapping[str, Header]) -> dict[str, Experts]:
    """Return the start of the experts' names in each layer -> the experts."""
    single: dict[str, dict[int, dict[str, str]]] = {}
    joined: dict[str, list[str]] = {}
    for name in headers:
        if match := _EXPERT.match(name):
            single.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
        elif (match := _JOINED.match(name)) and len(headers[name].shape) >= 2:
            joined.setdefault(match[1], []).append(name)
        elif len(headers[name].shape) == 3 and ".experts." not in name:  # joined, beside a router
            joined.setdefault(f"{name.rpartition('.')[0].rpartition('.')[0]}.experts", []).append(name)
    found = {}
    for start in dict.fromkeys((*single, *joined)):
        tensors = single.get(start, {})
        count = len(tensors) or headers[joined[start][0]].shape[0]
        layer = start.removesuffix("experts")
        routers = tuple(
            name
            for name, header in headers.items()
            if name.startswith(layer) and ROUTERS.search(name) and header.shape[:1] == (count,)
        )
        whole = tuple(name for name in joined.get(start, ()) if headers[name].shape[0] == count)
        if not tensors and not routers and not any(name.startswith(f"{start}.") for name in whole):
            continue  # three dimensions of another kind, e.g. of a convolution
        found[start] = Experts(count=count, tensors=tensors, joined=whole, routers=routers)
    return found


def match(sources: Mapping[str, Source], base: str | None) -> dict[str, Source]:
    """Return the models with their experts in the order of the base's (without a base: the first model's).

    Raises ModelError where experts stand in another order and no router is found that could follow them.
    """
    reference = sources[base] if base is not None else next(iter(sources.values()))
    layers = experts_of(reference.headers)
    if not layers:
        return dict(sources)
    groups = int(text_part(reference.config).get("n_group") or 1)
    found: dict[str, Source] = {}
    for name, source in sources.items():
        orders = {} if source is reference else _orders(name, source, reference, layers, groups)
        found[name] = Matched(name, source, layers, orders) if orders else source
    return found


def _orders(
    name: str, source: Source, reference: Source, layers: Mapping[str, Experts], groups: int
) -> dict[str, NDArray[np.int64]]:
    """Return layer -> the source's expert for each of the reference's, for layers whose order differs."""
    from scipy.optimize import linear_sum_assignment

    orders = {}
    for start, experts in layers.items():
        if any(tensor not in source.headers for tensor in _names(experts)):
            continue  # refused by `compatibility.check`
        if any(name.startswith(start.removesuffix("experts")) for name in reference.copied):
            continue  # a table of expert numbers chooses there, which stays as it is
        ours, theirs = (_directions(model, experts) for model in (source, reference))
        likeness = theirs @ ours.T
        if groups > 1:
            group = np.arange(experts.count) // max(experts.count // groups, 1)
            likeness = np.where(group[:, None] == group[None, :], likeness, -1e9)
        order = linear_sum_assignment(-likeness)[1].astype(np.int64)
        if np.array_equal(order, np.arange(experts.count)):
            continue
        if not experts.routers:
            raise ModelError(
                f"model {name!r}: the experts of {start} stand in another order, and no router follows them",
                expected="a tensor with one row per expert, such as gate.weight",
                fix="leave the experts as they are stored",
            )
        orders[start] = order
    return orders


def _names(experts: Experts) -> Iterable[str]:
    yield from (name for parts in experts.tensors.values() for name in parts.values())
    yield from (*experts.joined, *experts.routers)


def _directions(source: Source, experts: Experts) -> NDArray[np.float64]:
    """Return samples of every expert's weights as unit vectors, shape (experts, elements)."""
    rows: list[list[NDArray[np.float64]]] = [[] for _ in range(experts.count)]
    for number, parts in enumerate(experts.tensors[expert] for expert in sorted(experts.tensors)):
        for _, name in sorted(parts.items()):
            rows[number].append(_sample(source.array(name)))
    for name in experts.joined:
        array = source.array(name)
        for number in range(experts.count):
            rows[number].append(_sample(array[number]))
    vectors = np.stack([np.concatenate(row) for row in rows])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-30), dtype=np.float64)


def _sample(array: WeightArray) -> NDArray[np.float64]:
    flat = array.reshape(-1)
    step = max(len(flat) // SAMPLE, 1)
    return np.asarray(widened(flat[::step][:SAMPLE]), dtype=np.float64)


class Matched:
    """A source with the experts of some layers in another order; everything else is the original source's.

    orders: start of the experts' names -> the source's expert at each place. note: a remark for the user.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        layers: Mapping[str, Experts],
        orders: Mapping[str, NDArray[np.int64]],
    ) -> None:
        self.source, self.location, self.folder = source, source.location, source.folder
        self.config, self.headers, self.copied = source.config, source.headers, source.copied
        moved = sum(int((order != np.arange(len(order))).sum()) for order in orders.values())
        self.note = f"experts matched by their weights: {moved} of {name} move, in {len(orders)} layers"
        self._renamed: dict[str, str] = {}
        self._rows: dict[str, NDArray[np.int64]] = {}
        for start, order in orders.items():
            experts = layers[start]
            numbers = sorted(experts.tensors)
            for place, own in zip(numbers, order[: len(numbers)], strict=True):
                for ending, tensor in experts.tensors[place].items():
                    self._renamed[tensor] = experts.tensors[numbers[own]][ending]
            self._rows |= dict.fromkeys((*experts.joined, *experts.routers), order)
        text = json.dumps({start: order.tolist() for start, order in orders.items()}, sort_keys=True)
        self._mark = hashlib.sha256(text.encode()).hexdigest()

    @property
    def tied(self) -> bool:
        return self.source.tied

    @property
    def layout(self) -> TensorNames:
        return self.source.layout

    @property
    def num_layers(self) -> int:
        return self.source.num_layers

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        return self.source.vocabulary

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's fingerprint and the orders."""
        return hashlib.sha256(f"{self.source.fingerprint} {self._mark}".encode()).hexdigest()

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return a tensor in its stored type, its experts in the new order. Don't modify it."""
        array = self.source.array(self._renamed.get(name, name), mapped=mapped)
        return array[self._rows[name]] if name in self._rows else array

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32, its experts in the new order. Don't modify it."""
        import torch

        tensor = self.source.tensor(self._renamed.get(name, name))
        return tensor[torch.from_numpy(self._rows[name])] if name in self._rows else tensor
