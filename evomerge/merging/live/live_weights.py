"""The place of each checkpoint tensor in a live model, so that its weights can be replaced there.

When transformers loads a model, it renames tensors, and stacks, joins or splits some of them (the experts of
a mixture, for example). These conversions change with its versions, so this module has no table of them. It
runs the installed version's conversions once on tensors whose elements are numbered, and the numbers show
where every element went. Most tensors then are a view of a live parameter.

Memory while opening: about sixteen bytes per element of the largest converted parameter (similar layers are
converted once), and the indices of each `Spread`. Not covered: conversions that compute new values, such as
dequantisation; models that need them are refused.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.modules import NEXT_LAYERS
from evomerge.merging.sources.tensorfile import COPIED, Header
from evomerge.merging.tensors.merge_tensor import Storage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


BLOCK = 2**24
"""Number of elements that are processed at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Storage that is not a view of one parameter: an index for every element.

    parts: (flat live parameter, indices into it, indices into the flattened tensor) with as many of both.
    """

    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def copy_(self, weights: Tensor, /) -> None:
        """Write a tensor's elements to their places, converted to the live type and device."""
        flat = weights.reshape(-1)
        for live, live_places, tensor_places in self.parts:
            moved = flat[tensor_places.to(flat.device).long()].to(device=live.device, dtype=live.dtype)
            live[live_places.to(live.device).long()] = moved


def weights_at(place: Storage, shape: tuple[int, ...]) -> Tensor:
    """Return a copy on the CPU of the live weights at a place, in the checkpoint tensor's shape."""
    import torch

    if isinstance(place, torch.Tensor):
        return place.detach().cpu().reshape(shape)
    assert isinstance(place, Spread)
    first = place.parts[0][0]
    gathered = torch.empty(sum(len(where) for _, _, where in place.parts), dtype=first.dtype)
    for live, live_places, tensor_places in place.parts:
        gathered[tensor_places.long().cpu()] = live[live_places.to(live.device).long()].detach().cpu()
    return gathered.reshape(shape)


def address(place: Storage) -> Hashable:
    """Return a key that is equal for two places only if they are the same memory."""
    import torch

    if isinstance(place, torch.Tensor):
        return place.data_ptr(), tuple(place.shape), place.stride()
    return id(place)


def gradient_at(place: Storage, parameters: Mapping[int, Tensor]) -> Tensor:
    """Return the gradient at a place: float32, on the CPU, in the checkpoint tensor's shape.

    A `Spread` returns a flat tensor. Parameters without a gradient count as zeros, as do buffers.

    parameters: the live parameters by the address of their storage, with their `.grad`.
    """
    import torch

    if isinstance(place, Spread):
        count = sum(len(tensor_places) for _, _, tensor_places in place.parts)
        spread = torch.zeros(count)
        for live, live_places, tensor_places in place.parts:
            spread[tensor_places.long()] = (
                _gradient(live, parameters).reshape(-1)[live_places.to(live.device).long()].cpu()
            )
        return spread
    assert isinstance(place, torch.Tensor)
    gradient = _gradient(place, parameters)
    return gradient.as_strided(place.shape, place.stride(), place.storage_offset()).cpu().contiguous()


def _gradient(live: Tensor, parameters: Mapping[int, Tensor]) -> Tensor:
    import torch

    parameter = parameters.get(live.untyped_storage().data_ptr())
    if parameter is None:  # a buffer, such as the mean of a batch norm
        return torch.zeros(live.untyped_storage().nbytes() // live.itemsize, device=live.device)
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad.to(torch.float32).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A tensor that is a regular part of live parameter number `index` of its group."""

    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameters: Sequence[Tensor]) -> Storage:
        return parameters[self.index].as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scattered:
    """A tensor with an index per element: (parameter number, indices into it, indices into the tensor)."""

    parts: tuple[tuple[int, Tensor, Tensor], ...]

    def of(self, parameters: Sequence[Tensor]) -> Storage:
        return Spread(
            parts=tuple(
                (parameters[index], live_places, tensor_places)
                for index, live_places, tensor_places in self.parts
            )
        )


@dataclass(slots=True, kw_only=True)
class _Group:
    """Checkpoint tensors that are converted together into live parameters.

    converter: transformers' converter; None for a tensor that is only renamed. members: (name, the
    converter's pattern that it matched), in the order of loading.
    """

    converter: Any
    members: list[tuple[str, str]] = field(default_factory=list)


def locate(model: PreTrainedModel, headers: Mapping[str, Header], location: str) -> dict[str, Storage]:
    """Return tensor name -> its place in the live model, for every tensor of a checkpoint that it uses.

    Layers that predict further tokens have no place, nor do tensors that transformers ignores for this class.

    location: the checkpoint's name in messages. Raises ModelError unless every other tensor has its own place
    and every weight of the live model is covered.
    """
    live = {name: tensor.data for name, tensor in model.state_dict().items()}
    groups, extra = _groups(model, headers, live)
    places: dict[str, Storage] = {}
    reached = set(model.all_tied_weights_keys)
    solved: dict[object, list[_View | _Scattered]] = {}
    for first, group in groups.items():
        if group.converter is None:
            name = group.members[0][0]
            _check_shape(headers, location, name, tuple(live[first].shape))
            places[name] = live[first]
            reached.add(first)
            continue
        shapes = [(pattern, headers[name].shape) for name, pattern in group.members]
        single = len(group.converter.target_patterns) == 1
        key = (*shapes, tuple(live[first].shape))
        if single and key in solved:
            names, parts = [first], solved[key]
        else:
            names, parts = _follow(model, headers, location, first, group, live)
            solved |= {key: parts} if single else {}
        parameters = [live[name].view(-1) for name in names]
        places |= {name: part.of(parameters) for (name, _), part in zip(group.members, parts, strict=True)}
        reached.update(names)
    missing = [name for name in live if name not in reached]
    ignored = [re.compile(key) for key in model._keys_to_ignore_on_load_unexpected or ()]
    extra = [
        name
        for name in extra
        if NEXT_LAYERS not in name
        and headers[name].dtype not in COPIED  # numbers that transformers computes, as positions are
        and not any(key.search(name) for key in ignored)
    ]
    if missing or extra:
        raise ModelError(
            f"{location}: its tensors are not those of {type(model).__name__}",
            expected=_some(missing) or "no additional tensors",
            got=_some(extra) or "no tensors for them",
            fix="save the model again with a current transformers version",
        )
    return {name: places[name] for name in headers if name in places}


def _groups(
    model: PreTrainedModel, names: Iterable[str], live: dict[str, Tensor]
) -> tuple[dict[str, _Group], list[str]]:
    """Return first live parameter -> the tensors it is made from, and the names without a parameter."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in mapping if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: conversion for conversion in converters for pattern in conversion.source_patterns}
    groups: dict[str, _Group] = {}
    extra = []
    for name in sorted(names, key=dot_natural_key):  # the order determines the experts' numbers
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, live)
        if target not in live and name in live:
            target, pattern = name, None
        converter = None if pattern is None else by_pattern[pattern]
        if target not in live or (target in groups and (converter is None or not groups[target].converter)):
            extra.append(name)
        else:
            groups.setdefault(target, _Group(converter=converter)).members.append((name, pattern or name))
    return groups, extra


def _follow(
    model: PreTrainedModel,
    headers: Mapping[str, Header],
    location: str,
    first: str,
    group: _Group,
    live: Mapping[str, Tensor],
) -> tuple[list[str], list[_View | _Scattered]]:
    """Return the live parameters that a group fills, and the place of each of its tensors in them."""
    import torch

    converter = copy.deepcopy(group.converter)
    members = [headers[name] for name, _ in group.members]
    bounds = list(itertools.accumulate((header.count for header in members), initial=0))
    whole = torch.int32 if bounds[-1] < 2**31 else torch.int64
    for (name, pattern), header, start in zip(group.members, members, bounds, strict=False):
        numbers = torch.arange(start, start + header.count, dtype=whole).reshape(header.shape)
        converter.add_tensor(first, name, pattern, numbers)
        del numbers  # the converter frees them one by one
    try:
        made = converter.convert(first, model=model, config=model.config)
    except (ValueError, RuntimeError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise _refused(model, location, group, f"{type(error).__name__}: {error}") from None
    arrived = {
        n: (converted[0] if isinstance(converted, list) else converted).contiguous()
        for n, converted in made.items()
    }
    for name, tensor in arrived.items():
        shape = list(live[name].shape) if name in live else "no such weight"
        if list(tensor.shape) != shape or not live[name].is_contiguous():
            raise _refused(model, location, group, f"{name} of shape {list(tensor.shape)}, not {shape}")
    starts = list(itertools.accumulate((tensor.numel() for tensor in arrived.values()), initial=0))
    if starts[-1] != bounds[-1] or any(tensor.dtype != whole for tensor in arrived.values()):
        raise _refused(model, location, group, "values that the conversion computes")
    places = torch.full((bounds[-1],), -1, dtype=whole)
    for tensor, start in zip(arrived.values(), starts, strict=False):
        for block in range(0, tensor.numel(), BLOCK):
            order = tensor.view(-1)[block : block + BLOCK].long()
            if int(order.min()) < 0 or int(order.max()) >= len(places):
                raise _refused(model, location, group, "values that the conversion computes")
            places[order] = torch.arange(start + block, start + block + len(order), dtype=whole)
    if int(places.min()) < 0:
        raise _refused(model, location, group, "values that the conversion computes")
    parts = [
        _part(places[start:end].reshape(header.shape), starts)
        for header, (start, end) in zip(members, itertools.pairwise(bounds), strict=True)
    ]
    return list(arrived), parts


def _part(places: Tensor, starts: Sequence[int]) -> _View | _Scattered:
    """Return the place of a tensor; places: its elements' indices over parameters that begin at `starts`."""
    import torch

    low, high = int(places.min()), int(places.max())
    index = max(i for i, start in enumerate(starts[:-1]) if start <= low)
    stride = []
    regular = torch.full_like(places, low)
    for axis, size in enumerate(places.shape):
        second = tuple(int(other == axis) for other in range(places.dim()))
        step = int(places[second]) - int(places[(0,) * places.dim()]) if size > 1 else 0
        stride.append(step)
        regular += (torch.arange(size) * step).reshape([-1 if o == axis else 1 for o in range(places.dim())])
    if min(stride, default=0) >= 0 and high < starts[index + 1] and torch.equal(regular, places):
        return _View(index=index, size=tuple(places.shape), stride=tuple(stride), offset=low - starts[index])
    flat, parts = places.reshape(-1), []
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        tensor_places = torch.nonzero((flat >= start) & (flat < end)).reshape(-1)
        if len(tensor_places):
            parts.append((index, flat[tensor_places] - start, tensor_places))
    return _Scattered(parts=tuple(parts))


def _check_shape(headers: Mapping[str, Header], location: str, name: str, shape: tuple[int, ...]) -> None:
    if headers[name].shape != shape:
        raise ModelError(
            f"{location}: tensor {name!r} does not have the shape that its config specifies",
            expected=str(list(shape)),
            got=str(list(headers[name].shape)),
        )


def _refused(model: PreTrainedModel, location: str, group: _Group, got: str) -> ModelError:
    return ModelError(
        f"{location}: its tensors can't be written into {type(model).__name__} unchanged",
        expected=f"a place for every element of {_some(name for name, _ in group.members)}",
        got=got[:300],
        fix="load the model with a current transformers version and save_pretrained it again",
    )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
