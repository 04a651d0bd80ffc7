"""Layer paths: which layers of which models a stack takes, in which order, as a box of genes.

The genome of a data-flow merge (Akiba et al. 2024, Evolutionary optimization of model merging recipes,
arXiv:2403.13187, section 3.2). There, an indicator says of each layer of all models, written one after the
other r times, whether it is taken. Here the path has slots instead. Every slot has a place along the models'
depth; it is used or skipped, and if it is used, chooses a model and a block of layers near its place. So the
depth is bounded, layers stay near where they were trained, one gene changes one slot, and every parent's own
stack is a genome. Residual scales (the paper's W) multiply what a slot's attention and MLP add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from evomerge.errors import ConfigError
from evomerge.merging.modules import layer_of, shifted
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.recipe_data import LAYERS
from evomerge.schema import Strict
from evomerge.search.spaces.space import Coordinate, Genome, check_dimension

OUTPUTS = {
    "attn": ("o_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "out_proj"),
    "mlp": ("down_proj", "mlp.c_proj", "dense_4h_to_h", "mlp.fc2", ".w2."),
}
"""Parts of the names of the tensors a layer's attention and MLP end with, whatever the family."""
NORMALISED = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norms behind those tensors: in layers that have them, scaling the tensors changes nothing."""
CUTS = (0.5, 0.75, 0.25)
"""Depths at which hand-made stacks go from one model to another."""
UNDECIDED = 0.5
"""The canonical value of a coordinate that has no effect."""


class ScaleSpec(Strict):
    """The range of the residual scales; 1 leaves a layer as it is."""

    low: float = Field(ge=-1000)
    """Lower bound, at most 1."""
    high: float = Field(le=1000)
    """Upper bound, at least 1."""

    @model_validator(mode="after")
    def _around_one(self) -> ScaleSpec:
        if not self.low <= 1 <= self.high or self.low == self.high:
            raise ValueError(f"a scale's range needs low <= 1 <= high, got {self.low:g} to {self.high:g}")
        return self

    def value(self, u: float) -> float:
        """Map [0, 1] to [low, high], rounded to six digits."""
        return min(max(float(f"{self.low + u * (self.high - self.low):.6g}"), self.low), self.high)

    def unit(self, value: float) -> float:
        """Map [low, high] to [0, 1], the inverse of `value`."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


class LayerPathSpec(Strict):
    """A layer-path preset as written (`kind: layer_path`)."""

    kind: Literal["layer_path"]
    """Marks a layer path; an ordinary space has no `kind`."""
    name: str
    """Name of the space."""
    about: str
    """One line for people."""
    base: bool = False
    """Whether the base's own layers may be taken."""
    block: int = Field(default=1, ge=1, le=LAYERS)
    """Successive layers that stay together."""
    shortest: float = Field(default=0.75, gt=0, le=8)
    """Least depth, as a multiple of the base's (counted in blocks); at most `longest`."""
    longest: float = Field(default=1.25, gt=0, le=8)
    """Greatest depth, likewise."""
    reach: int = Field(default=1, ge=0, le=LAYERS)
    """How many blocks a slot's choice may lie before or behind its place."""
    scale: ScaleSpec | None = None
    """Range of the residual scales of attention and MLP of each slot; without it, layers are not scaled."""

    @model_validator(mode="after")
    def _ordered(self) -> LayerPathSpec:
        if self.shortest > self.longest:
            raise ValueError(f"shortest is above longest, got {self.shortest:g} and {self.longest:g}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One used slot: a block of a model, and the scales of what its attention and MLP add."""

    model: str
    block: int
    attn: float = 1.0
    mlp: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """A place of the path: the blocks it can choose from, and the positions of its coordinates."""

    place: int
    blocks: tuple[int, ...]
    use: int
    model: int | None
    block: int | None
    scales: tuple[int, ...]


class LayerPathSpace:
    """The layer paths of one run: a preset applied to the models at hand.

    tensors: for each model that may give layers, the names of its tensors. template: a recipe with the
    run's models, base, dtype, tokenizer and seed; its groups are replaced.
    Raises ConfigError where the models differ in depth, or scales would have nothing to scale.
    """

    def __init__(
        self,
        spec: LayerPathSpec,
        *,
        template: Recipe,
        sources: Sequence[str],
        tensors: Mapping[str, Sequence[str]],
    ) -> None:
        self.spec = spec
        self.sources = tuple(sources)
        assert template.base is not None
        self.models = (*self.sources, template.base) if spec.base else self.sources
        self._template = template
        self._outside = [
            name
            for name in tensors[template.base]
            if layer_of(name) is None and not any(group.matches(name) for group in template.kept)
        ]
        self._layers = {model: _by_layer(tensors[model]) for model in (*self.models, template.base)}
        self.num_layers = len(self._layers[template.base])
        self._check_models()
        self._outputs = self._find_outputs() if spec.scale is not None else {}
        self.num_blocks = math.ceil(self.num_layers / spec.block)
        self._least = max(1, math.ceil(spec.shortest * self.num_blocks - 1e-9))
        slots = math.floor(spec.longest * self.num_blocks + 1e-9)
        if slots < self._least:
            raise ConfigError(
                f"layer path {spec.name}: no number of blocks lies between shortest and longest",
                expected=f"a whole number from {spec.shortest:g} to {spec.longest:g} x {self.num_blocks}",
                fix="widen the range, or make blocks smaller",
            )
        self._coordinates: list[Coordinate] = []
        self._labels: list[str] = []
        self._values: list[str] = []
        self._slots = tuple(self._slot(i, i * self.num_blocks // slots) for i in range(slots))
        self._outer = self._choice("embeddings, final norm and head: model", self.models, ordered=False)
        check_dimension(f"layer path {spec.name}", self.dimension, "make blocks larger")

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return len(self._coordinates)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """The kind of every coordinate, in genome order."""
        return tuple(self._coordinates)

    @property
    def labels(self) -> tuple[str, ...]:
        """What every coordinate decides, in genome order."""
        return tuple(self._labels)

    @property
    def values(self) -> tuple[str, ...]:
        """What every coordinate chooses from, for people."""
        return tuple(self._values)

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome, shape (dimension,), values in [0, 1].

        Where fewer slots are used than the shortest path needs, the first skipped ones are used, too.
        """
        u = np.asarray(genome, dtype=np.float64)
        if u.shape != (self.dimension,) or not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"a genome of this space has shape ({self.dimension},) and values in [0, 1]")
        used = [self._level(u, slot.use) == 1 for slot in self._slots]
        for i in range(len(used)):
            used[i] = used[i] or sum(used) < self._least
        steps = [self._step(slot, u) for slot, taken in zip(self._slots, used, strict=True) if taken]
        return self.recipe(steps, self.models[self._level(u, self._outer)])

    def encode(self, recipe: Recipe) -> Genome | None:
        """Return the canonical genome of a recipe that stacks, or is, layers as they are; else None.

        Of all ways to lay the path into slots it is the one whose layers lie nearest to their slots'
        places, and of those the one that uses the earliest slots.
        """
        if recipe.groups[: len(self._template.kept)] != self._template.kept:
            return None  # the modules that this run keeps are made in another way
        steps, outer = self._read(recipe), self._read_outside(recipe)
        slots = None if steps is None else self._laid(steps)
        if steps is None or slots is None or outer not in self.models:
            return None
        u = np.full(self.dimension, UNDECIDED)
        for slot in self._slots:
            u[slot.use] = self._middle(slot.use, 0)
        for step, slot in zip(steps, slots, strict=True):
            u[slot.use] = self._middle(slot.use, 1)
            if slot.model is not None:
                u[slot.model] = self._middle(slot.model, self.models.index(step.model))
            if slot.block is not None:
                u[slot.block] = self._middle(slot.block, slot.blocks.index(step.block))
            if self.spec.scale is not None:
                u[list(slot.scales)] = [self.spec.scale.unit(step.attn), self.spec.scale.unit(step.mlp)]
        if self._outer is not None:
            u[self._outer] = self._middle(self._outer, self.models.index(outer))
        return u

    def describe(self) -> str:
        """Return one line for people: dimension, slots and bounds."""
        least, most = self._least * self.spec.block, len(self._slots) * self.spec.block
        return (
            f"{self.spec.name}: {self.dimension} genes, paths of {least} to {most} layers through "
            f"{len(self.models)} models of {self.num_layers}"
        )

    def recipe(self, steps: Sequence[Step], outside: str) -> Recipe:
        """Return the stack of some steps; embeddings, final norm and head are those of `outside`."""
        layers = [
            (step.model, layer, step.attn, step.mlp)
            for step in steps
            for layer in self._layers_of(step.block)
        ]
        runs = groupby(
            range(len(layers)), lambda i: (layers[i][0], layers[i][1] - i, layers[i][2], layers[i][3])
        )
        groups = [group for key, run in runs for group in self._groups(*key, tuple(run))]
        groups.append(TensorGroup(method="passthrough", sources=(outside,), layers=OUTSIDE))
        return self._template.with_groups(groups, num_layers=len(layers))

    def stacks(self, models: Sequence[str], most: int) -> list[tuple[str, Recipe]]:
        """Return names and recipes of hand-made stacks: the lower layers of one model, the upper of another.

        Cut in the middle, then lower and higher; pairs of the first models come first. models: names, the
        best first. Those that are no path of this space are left out.
        """
        pairs = [(a, b) for a in range(len(models)) for b in range(len(models)) if a != b]
        cuts = dict.fromkeys(round(part * self.num_blocks) for part in CUTS)
        found = []
        for low, high in sorted(pairs, key=lambda pair: (sum(pair), pair)):
            for cut in (cut for cut in cuts if 0 < cut < self.num_blocks):
                taken = (models[low] if block < cut else models[high] for block in range(self.num_blocks))
                steps = [Step(model=model, block=block) for block, model in enumerate(taken)]
                recipe = self.recipe(steps, models[high])
                name = f"{models[low]} up to layer {cut * self.spec.block - 1}, then {models[high]}"
                found.append((name, recipe))
        return [(name, recipe) for name, recipe in found if self.encode(recipe) is not None][:most]

    def _groups(
        self, model: str, shift: int, attn: float, mlp: float, layers: tuple[int, ...]
    ) -> Iterator[TensorGroup]:
        for part, scale in (("attn", attn), ("mlp", mlp)):
            if scale != 1:
                yield TensorGroup(
                    method="passthrough",
                    sources=(model,),
                    layers=layers,
                    match=self._outputs[part],
                    shift=(shift,),
                    parameters={"scale": scale},
                )
        yield TensorGroup(method="passthrough", sources=(model,), layers=layers, shift=(shift,))

    # The coordinates ---------------------------------------------------------------------------------

    def _choice(self, label: str, values: Sequence[str], *, ordered: bool) -> int | None:
        """Add a discrete coordinate and return its position; None where there is nothing to choose."""
        if len(values) < 2:
            return None
        self._coordinates.append(Coordinate(levels=len(values), ordered=ordered))
        self._labels.append(label)
        self._values.append(", ".join(values))
        return len(self._coordinates) - 1

    def _slot(self, number: int, place: int) -> _Slot:
        reach = self.spec.reach
        blocks = tuple(range(max(0, place - reach), min(self.num_blocks - 1, place + reach) + 1))
        use = self._choice(f"slot {number}: used", ("no", "yes"), ordered=True)
        assert use is not None
        model = self._choice(f"slot {number}: model", self.models, ordered=False)
        block = self._choice(f"slot {number}: layers", [self._shown(b) for b in blocks], ordered=True)
        first = len(self._coordinates)
        parts = () if self.spec.scale is None else tuple(OUTPUTS)
        self._coordinates += [Coordinate() for _ in parts]
        self._labels += [f"slot {number}: scale of {part}" for part in parts]
        if self.spec.scale is not None:
            self._values += [f"{self.spec.scale.low:g} ... {self.spec.scale.high:g}"] * len(parts)
        scales = tuple(range(first, first + len(parts)))
        return _Slot(place=place, blocks=blocks, use=use, model=model, block=block, scales=scales)

    def _level(self, u: Genome, position: int | None) -> int:
        return 0 if position is None else self._coordinates[position].level(float(u[position]))

    def _middle(self, position: int, level: int) -> float:
        return self._coordinates[position].middle(level)

    def _step(self, slot: _Slot, u: Genome) -> Step:
        model, block = self.models[self._level(u, slot.model)], slot.blocks[self._level(u, slot.block)]
        if self.spec.scale is None:
            return Step(model=model, block=block)
        attn, mlp = (self.spec.scale.value(float(u[position])) for position in slot.scales)
        return Step(model=model, block=block, attn=attn, mlp=mlp)

    def _shown(self, block: int) -> str:
        """A block for people: its layers, from 0."""
        layers = self._layers_of(block)
        return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"

    def _layers_of(self, block: int) -> range:
        return range(block * self.spec.block, min((block + 1) * self.spec.block, self.num_layers))

    # Reading a recipe --------------------------------------------------------------------------------

    def _laid(self, steps: Sequence[Step]) -> list[_Slot] | None:
        """Return the slot of every step, in order; None where they do not fit into the slots."""
        if not self._least <= len(steps) <= len(self._slots):
            return None
        count, slots = len(steps), self._slots

        def cost(k: int, i: int) -> float:
            block = steps[k].block
            return abs(block - slots[i].place) if block in slots[i].blocks else math.inf

        # best[k][i]: least cost of laying the steps from k on into the slots from i on
        best = [[math.inf] * (len(slots) + 1) for _ in range(count)] + [[0.0] * (len(slots) + 1)]
        for k in reversed(range(count)):
            for i in reversed(range(len(slots))):
                best[k][i] = min(best[k][i + 1], cost(k, i) + best[k + 1][i + 1])
        if math.isinf(best[0][0]):
            return None
        found: list[_Slot] = []
        for i, slot in enumerate(slots):
            k = len(found)
            if k < count and cost(k, i) + best[k + 1][i + 1] == best[k][i]:
                found.append(slot)
        return found

    def _read(self, recipe: Recipe) -> list[Step] | None:
        """Return the path a recipe takes, or None where it is none of this space."""
        count = self.num_layers if recipe.num_layers is None else recipe.num_layers
        steps: list[Step] = []
        layer = 0
        while layer < count:
            first = self._read_layer(recipe, layer)
            if first is None or first[1] % self.spec.block:
                return None
            model, own, attn, mlp = first
            block = own // self.spec.block
            for i, other in enumerate(self._layers_of(block)):
                if layer + i >= count or self._read_layer(recipe, layer + i) != (model, other, attn, mlp):
                    return None
            layer += len(self._layers_of(block))
            steps.append(Step(model=model, block=block, attn=attn, mlp=mlp))
        return steps

    def _read_layer(self, recipe: Recipe, layer: int) -> tuple[str, int, float, float] | None:
        """Return (model, its layer, scale of attention, of the MLP) of a layer of the result, or None."""
        maker = next((g for g in recipe.groups if g.layers is None or layer in g.layers), None)
        if maker is None or maker.sources[0] not in self.models:
            return None
        model, shift = maker.sources[0], maker.shifts[0]
        own = layer + shift
        if own not in self._layers[model]:
            return None
        scales: dict[str, set[float]] = {"attn": set(), "mlp": set(), "": set()}
        for tensor in self._layers[model][own]:
            copy = _scaled_copy(recipe, shifted(tensor, -shift))
            if copy is None or copy[:2] != (model, shift):
                return None
            part = next((p for p, ends in self._outputs.items() if any(end in tensor for end in ends)), "")
            scales[part].add(copy[2])
        if scales[""] != {1.0} or any(len(found) > 1 for found in scales.values()):
            return None
        attn, mlp = (next(iter(scales[part]), 1.0) for part in OUTPUTS)
        spec = self.spec.scale
        if spec is not None and any(spec.value(spec.unit(scale)) != scale for scale in (attn, mlp)):
            return None
        return model, own, attn, mlp

    def _read_outside(self, recipe: Recipe) -> str | None:
        """Return the model whose embeddings, norm and head a recipe takes as they are, or None."""
        copies = [_scaled_copy(recipe, tensor) for tensor in self._outside]
        models = {None if copy is None or copy[2] != 1 else copy[0] for copy in copies}
        return models.pop() if len(models) == 1 else None

    # Checks ------------------------------------------------------------------------------------------

    def _check_models(self) -> None:
        for model, layers in self._layers.items():
            if len(layers) != self.num_layers:
                raise ConfigError(
                    f"layer path {self.spec.name}: {model} has another number of layers than the base",
                    expected=str(self.num_layers),
                    got=str(len(layers)),
                    fix="take models of one depth",
                )

    def _find_outputs(self) -> dict[str, tuple[str, ...]]:
        """Return the names of `OUTPUTS` these models have; every layer must have both kinds."""
        names = [tensor for layers in self._layers.values() for layer in layers.values() for tensor in layer]
        behind = [name for name in names if any(norm in name for norm in NORMALISED)]
        found = {
            part: tuple(end for end in ends if any(end in name for name in names))
            for part, ends in OUTPUTS.items()
        }
        bare = [
            f"layer {number} of {model} has no {part}"
            for model, layers in self._layers.items()
            for number, layer in layers.items()
            for part, ends in found.items()
            if not any(end in tensor for tensor in layer for end in ends)
        ]
        if behind or bare:
            raise ConfigError(
                f"layer path {self.spec.name}: these layers can't be scaled",
                expected="an attention and an MLP that end with a projection",
                got=f"a norm behind it, {behind[0]!r}" if behind else bare[0],
                fix="leave `scale` out of the search space",
            )
        return found


def depth(recipe: Recipe, layers: int) -> float:
    """Return the number of a recipe's layers relative to those of the base.

    >>> group = TensorGroup(method="passthrough", sources=("a",))
    >>> depth(Recipe(models={"a": "a"}, groups=(group,), num_layers=6), layers=4)
    1.5
    """
    return 1.0 if recipe.num_layers is None else recipe.num_layers / layers


def _scaled_copy(recipe: Recipe, tensor: str) -> tuple[str, int, float] | None:
    """Return (model, shift, scale) where a tensor of the result is a model's, times a scale; else None."""
    try:
        group = recipe.group_for(tensor)
    except ConfigError:
        return None
    if group.method == "passthrough":
        return group.sources[0], group.shifts[0], group.per_source("scale")[0]
    return None if group.copied_source is None else (group.copied_source, group.shifts[0], 1.0)


def _by_layer(tensors: Sequence[str]) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for tensor in tensors:
        if (layer := layer_of(tensor)) is not None:
            layers.setdefault(layer, []).append(tensor)
    return layers
