"""Live models of stacked layers, which share the weights of the source models.

A stacked recipe takes layers of its sources, in any order and number. Each source is held once, as a live
model whose weights are loaded when a recipe first needs them. For each number (and kind) of layers there is
a frame: a model that transformers builds from the result's config, so that cache positions, kinds of
attention and the like are those of the exported model. A frame has no weights: loading a recipe points each
of its parameters at the weights of a source's layer. Only tensors that a recipe changes (output projections
with a `scale`, merged layers) are computed, and kept until the next recipe.

Memory: the weights that the recipes use of each source, in the forward pass's type, and the tensors that the
current recipe changes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, DiskError, ModelError
from evomerge.files import passing_folder, temporary_parent
from evomerge.merging.live.live_weights import Spread, locate
from evomerge.merging.modules import shifted
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.model_config import model_class
from evomerge.merging.sources.source import Source
from evomerge.merging.stacking import output_headers, stacked_config
from evomerge.merging.tensors.merge_tensor import Storage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FRAMES = 32
"""Number of frames kept. A frame takes a few objects per layer, and no weights."""

Merge = Callable[[Recipe, Mapping[str, Storage], Mapping[str, int], Callable[[str], object]], None]
"""Merges tensors of a recipe into places, given their sizes, and reports each finished tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A tensor of the result, or the part of it that lies in one live parameter.

    source, source_tensor: the model and its tensor whose place in the live model the part takes.
    owner: the name of the live parameter at that place.
    """

    name: str
    source: str
    source_tensor: str
    owner: str
    group: TensorGroup


class _Held:
    """A source as a live model: its parameters, and the places of its tensors in them.

    members: live name -> the tensors in that parameter; owners: the inverse.
    """

    def __init__(self, source: Source, model: PreTrainedModel) -> None:
        self.live = _state(model)
        self.headers = {**source.headers, **source.copied}
        self.places = locate(model, self.headers, source.location)
        self.filled: dict[str, str] = {}
        """Loaded tensor -> the type its weights are rounded to."""
        starts = {tensor.untyped_storage().data_ptr(): name for name, tensor in self.live.items()}
        self.owners: dict[str, tuple[str, ...]] = {}
        self.members: dict[str, list[str]] = {}
        for name, place in self.places.items():
            tensors = [part[0] for part in place.parts] if isinstance(place, Spread) else [place]
            owners = dict.fromkeys(starts[tensor.untyped_storage().data_ptr()] for tensor in tensors)  # type: ignore[attr-defined]
            self.owners[name] = tuple(owners)
            for owner in owners:
                self.members.setdefault(owner, []).append(name)

    def note(self, dtype: str) -> Callable[[str], object]:
        """Return a function that records a tensor as loaded, rounded to a type."""
        return lambda name: self.filled.update({name: dtype})

    def place_on(self, name: str, fresh: Mapping[str, Tensor]) -> Storage:
        """Return a tensor's place in other storage (live name -> a tensor like the live one).

        Parts of the tensor in other live parameters are left out.
        """
        place = self.places[name]
        if not isinstance(place, Spread):
            (owner,) = self.owners[name]
            view: Any = place
            offset = view.storage_offset() - self.live[owner].storage_offset()
            return fresh[owner].as_strided(view.size(), view.stride(), offset)
        starts = {self.live[n].untyped_storage().data_ptr(): tensor for n, tensor in fresh.items()}
        return Spread(
            parts=tuple(
                (starts[flat.untyped_storage().data_ptr()].view(-1), live_places, tensor_places)
                for flat, live_places, tensor_places in place.parts
                if flat.untyped_storage().data_ptr() in starts
            )
        )


@dataclass(slots=True, kw_only=True)
class _Frame:
    """A model without weights. slots: live name -> the parameter to point at a source's weights."""

    model: PreTrainedModel
    slots: dict[str, Tensor]
    made: list[str] = field(default_factory=list)

    def release(self) -> None:
        """Free the tensors that were computed for the last recipe."""
        for name in self.made:
            self.slots[name].data = self.slots[name].data.new_empty(0)
        self.made = []


class Rewiring:
    """Builds and reuses the live models of stacked recipes. merge: the workbench's merging function."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        pattern: str,
        device: str,
        compute_dtype: str,
        attn_implementation: str | None,
        generation: Mapping[str, Any] | None,
        merge: Merge,
    ) -> None:
        self._sources, self._pattern, self._merge = sources, sources[pattern], merge
        self._generation = generation
        self._device, self._dtype, self._attention = device, compute_dtype, attn_implementation
        self._held: dict[str, _Held] = {}
        self._frames: dict[str, _Frame] = {}
        self._made: dict[str, tuple[Hashable, Tensor]] = {}
        self._current: _Frame | None = None

    @property
    def nbytes(self) -> int:
        """The memory of the held weights, which all live models share, in bytes."""
        filled = {
            (s, owner) for s, held in self._held.items() for t in held.filled for owner in held.owners[t]
        }
        held = sum(self._held[source].live[owner].nbytes for source, owner in filled)
        return held + sum(tensor.nbytes for _, tensor in self._made.values())

    def load(self, recipe: Recipe, key: Callable[[TensorGroup], Hashable]) -> PreTrainedModel:
        """Return a live model with a recipe's weights; the live model before it loses its weights.

        recipe: already checked. key: returns everything that determines the bits that a group makes.
        Raises NonFiniteWeights, and ModelError if layers can't be combined.
        """
        parts_by_live = self._parts(recipe)
        frame = self._frame(recipe, parts_by_live)
        if self._current is not None:
            self._current.release()
        self._current = frame
        weights = self._share(recipe, parts_by_live)
        frame.made = [live for live in parts_by_live if live not in weights]
        weights |= self._make(recipe, {live: parts_by_live[live] for live in frame.made}, key)
        for live, tensor in weights.items():
            frame.slots[live].data = tensor
        frame.model.to(self._device)  # type: ignore[arg-type]  # for the rotary tables of a new frame
        return frame.model

    def _parts(self, recipe: Recipe) -> dict[str, list[_Part]]:
        """Return live name in the result -> the tensors it consists of."""
        parts_by_live: dict[str, list[_Part]] = {}
        for name in output_headers(recipe, self._sources):
            group = recipe.group_for(name)
            source, shift = group.sources[0], group.shifts[0]
            source_tensor = shifted(name, shift)
            for owner in self._hold(source).owners.get(source_tensor, ()):
                part = _Part(name=name, source=source, source_tensor=source_tensor, owner=owner, group=group)
                parts_by_live.setdefault(shifted(owner, -shift), []).append(part)
        for live, parts in parts_by_live.items():
            first = parts[0]
            members = self._held[first.source].members[first.owner]
            whole = {shifted(name, -first.group.shifts[0]) for name in members}
            if whole != {part.name for part in parts}:
                raise ModelError(
                    f"{live} of the stacked model combines tensors that do not fit together",
                    expected=f"the tensors that form {first.owner} of {first.source}",
                    got=", ".join(sorted(part.name for part in parts)[:3]),
                    fix="take the layer's modules from layers of one kind",
                )
        return parts_by_live

    def _hold(self, source: str) -> _Held:
        if source not in self._held:
            opened = self._sources[source]
            model = build(opened, opened.config, self._dtype, self._attention)
            model.to(self._device)  # type: ignore[arg-type]
            self._held[source] = _Held(opened, model)
        return self._held[source]

    def _frame(self, recipe: Recipe, parts_by_live: Mapping[str, object]) -> _Frame:
        """Return the frame of a recipe's config; the `FRAMES` most recently used ones are kept."""
        config = stacked_config(recipe, self._sources)
        name = json.dumps(config, sort_keys=True)
        frame = self._frames.pop(name, None)
        if frame is None:
            model = build(self._pattern, config, self._dtype, self._attention, self._generation)
            frame = _Frame(model=model, slots=_state(model))
            if len(self._frames) == FRAMES:
                del self._frames[next(iter(self._frames))]
        self._frames[name] = frame
        if set(frame.slots) != set(parts_by_live):  # also of a kept frame: kinds may follow from the number
            differing = sorted(set(frame.slots) ^ set(parts_by_live))
            raise ModelError(
                "the stacked layers do not have the weights of the model that their config describes",
                got=f"differences at {', '.join(differing[:3])}",
                fix="take layers of the kind that the config has at their place",
            )
        return frame

    def _share(self, recipe: Recipe, parts_by_live: Mapping[str, Sequence[_Part]]) -> dict[str, Tensor]:
        """Return live name -> weights of the parameters that are copies of a source's."""
        shared = {}
        needed: dict[str, dict[str, int]] = {}
        for live, parts in parts_by_live.items():
            source, owner = parts[0].source, parts[0].owner
            copied = all(part.group.copied_source == part.source for part in parts)
            if copied and all((part.source, part.owner) == (source, owner) for part in parts):
                shared[live] = self._held[source].live[owner]
                headers = self._held[source].headers
                needed.setdefault(source, {}).update(
                    (part.source_tensor, headers[part.source_tensor].count) for part in parts
                )
        for source, sizes in needed.items():
            held = self._held[source]
            empty = {name: n for name, n in sizes.items() if held.filled.get(name) != recipe.dtype}
            for name in empty:
                held.filled.pop(name, None)
            copies = recipe.with_groups([TensorGroup(method="passthrough", sources=(source,))])
            self._merge(copies, {name: held.places[name] for name in empty}, empty, held.note(recipe.dtype))
        return shared

    def _make(
        self,
        recipe: Recipe,
        parts_by_live: Mapping[str, Sequence[_Part]],
        key: Callable[[TensorGroup], Hashable],
    ) -> dict[str, Tensor]:
        """Return live name -> weights computed for this recipe; those of the last recipe are reused."""
        import torch

        marks = {
            live: tuple((p.name, p.source, p.source_tensor, p.owner, key(p.group)) for p in parts)
            for live, parts in parts_by_live.items()
        }
        reused = {live: made for live, made in self._made.items() if made[0] == marks.get(live)}
        self._made = reused
        fresh = {
            live: torch.empty_like(self._held[parts[0].source].live[parts[0].owner])
            for live, parts in parts_by_live.items()
            if live not in reused
        }
        places: dict[str, Storage] = {}
        sizes: dict[str, int] = {}
        for live in fresh:
            for part in parts_by_live[live]:
                held = self._held[part.source]
                fresh_by_owner = {
                    owner: fresh[new]
                    for owner in held.owners[part.source_tensor]
                    if (new := shifted(owner, -part.group.shifts[0])) in fresh
                }
                places[part.name] = held.place_on(part.source_tensor, fresh_by_owner)
                sizes[part.name] = held.headers[part.source_tensor].count
        self._merge(recipe, places, sizes, lambda name: None)
        self._made = reused | {live: (marks[live], tensor) for live, tensor in fresh.items()}
        return {live: tensor for live, (_, tensor) in self._made.items()}


_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def build(
    source: Source,
    data: Mapping[str, Any],
    dtype: str,
    attention: str | None,
    generation: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build a model from a config without reading or initialising weights, which are loaded later.

    generation: the content of its generation_config.json; None leaves what follows from the config.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig
    from transformers.initialization import no_init_weights

    if attention is not None and not attention.isidentifier():  # transformers would fetch code from the hub
        raise _no_attention(attention, "not a plain name")
    try:
        with passing_folder(temporary_parent(), "evomerge-model") as folder:
            (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if generation is not None:
                (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
                settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        with no_init_weights():
            model: Any = model_class(config).from_config(
                config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=False,
            )
        if generation is not None:
            model.generation_config = settings
    except Exception as error:  # transformers computes with the config before it checks it
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise DiskError(
                f"{temporary_parent()}: can't be written", got=error.strerror, fix="free some disk space"
            ) from None
        if isinstance(error, MemoryError) or "failed to map segment" in str(
            error
        ):  # how the loader of libraries says that memory ran out
            raise MemoryError(str(error)) from None
        if attention is not None and _plain(attention) in _plain(str(error)):
            raise _no_attention(attention, " ".join(str(error).split())[:300]) from None
        raise ModelError(
            f"{source.location}: transformers can't build this model",
            got=" ".join(str(error).split())[:300],
            fix="check its config.json; models that need remote code are not supported",
        ) from None
    model.tie_weights()  # skipped with the initialisation
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def _no_attention(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"executor.attention: {name!r} can't be used here",
        expected="eager or sdpa; flash_attention_2 and others where packages and model allow it",
        got=reason,
        fix="leave it out to let transformers choose",
    )


def _plain(text: str) -> str:
    return text.lower().replace("_", "")


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return live name -> parameter or buffer, with tied ones only once."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
