"""The workbench: one live model whose weights are replaced in place for every candidate.

    bench = Workbench({"base": "zoo/base", "code": "zoo/code", "maths": "zoo/maths"}, base="base")
    bench.load(recipe)          # bench.model now has the recipe's weights
    bench.load(next_recipe)     # only tensors whose group changed are merged again
    bench.load(stacked_recipe)  # bench.model is another model, see `stacked_models`

Memory beside the live model: the sources' files, memory-mapped (shared by all processes that map them), and
the sorted magnitudes of each trimmed task vector (see `Spectrum`). Weights are rounded to the recipe's dtype
before they are written into the live model, in whichever type it computes. So the scored weights are those
that `export.writer.write` writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

from evomerge.errors import ConfigError, nearest
from evomerge.merging import methods
from evomerge.merging.chat_templates import chosen_template
from evomerge.merging.compatibility import check, check_models
from evomerge.merging.live.live_weights import address, gradient_at, locate, weights_at
from evomerge.merging.live.stacked_models import Rewiring, build
from evomerge.merging.methods.declaration import FILES
from evomerge.merging.recipe import STORED, Recipe, TensorGroup, tokenizer_of
from evomerge.merging.sources import chat
from evomerge.merging.sources.arrays import to_tensor
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.vocabulary import Aligned
from evomerge.merging.stacking import output_headers
from evomerge.merging.tensors.derivatives import Derivatives, added, tensor_derivatives
from evomerge.merging.tensors.digest import exact_dtype, weights_digest
from evomerge.merging.tensors.inputs import WarmInputs
from evomerge.merging.tensors.merge_tensor import Storage, merge_array, merge_tensor
from evomerge.merging.tensors.on_device import DeviceMerger, merges_there
from evomerge.merging.tensors.threads import WORTH_THREADS, pool, threads

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Workbench:
    """Open the models of a search once, and hold one live model for scoring candidates.

    Args:
        models: name -> location, as in a Recipe.
        base: the name of the base model, if there is one.
        tokenizer, chat_template, experts: as in a Recipe.
        device: of the live model, e.g. "cuda". It changes no weights.
        compute_dtype: the type of the live model's forward pass. It changes no weights.
        attn_implementation: transformers' name of an attention; None lets it choose.
        low_memory: don't keep the sorted magnitudes of trimmed task vectors. Methods that trim then take
            longer per candidate.
        merge_on: "device" merges on the live model's GPU, "auto" where that can be done (see
            `tensors.on_device`). It changes no weights.

    Attributes:
        model: the live model, with the weights of the last `load`.
        sources: the opened models by name.
        notes: remarks on the models for the user.

    Raises:
        ModelError: the models can't be opened or do not fit each other.
        ConfigError: unknown names.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        base: str | None = None,
        *,
        tokenizer: str = "",
        chat_template: str = "",
        experts: str = STORED,
        device: str = "cpu",
        compute_dtype: str = "float32",
        attn_implementation: str | None = None,
        low_memory: bool = False,
        merge_on: str = "cpu",
    ) -> None:
        if base is not None and base not in models:
            raise ConfigError(f"workbench: unknown model {base!r}", fix=nearest(base, models))
        self.base = base
        self._compute_dtype = compute_dtype
        self._vocabulary = tokenizer_of(tokenizer, base, models)
        self._experts = experts
        self._choice = chosen_template(chat_template, base, models)
        self._pattern = self._vocabulary if self._vocabulary in models else base or next(iter(models))
        self.sources = open_sources(models, base, tokenizer=tokenizer, experts=experts)
        pattern = {self._pattern: self.sources[self._pattern]}
        self.notes = check_models(pattern | self.sources)
        chosen = self.sources[self._pattern]
        self._headers = {**chosen.headers, **chosen.copied}
        elements = sum(header.count for header in chosen.headers.values())
        size = elements * (4 if compute_dtype == "float32" else 2)  # of the live model
        self._inputs = WarmInputs(self.sources, low_memory=low_memory, most=size)
        self._on_device = DeviceMerger(self._inputs, device) if merges_there(merge_on, device) else None
        self._loaded: dict[str, Hashable] = {}
        self._checked: set[Hashable] = set()
        pattern_source = self.sources[self._pattern]
        asked = chat.chosen(self._choice, self._pattern, self.sources)
        generation = chat.chat_of(pattern_source).generation if asked is None else asked.generation
        self._plain = build(
            pattern_source, pattern_source.config, compute_dtype, attn_implementation, generation
        )
        self._plain.to(device)  # type: ignore[arg-type]
        self._targets = locate(self._plain, self._headers, pattern_source.location)
        self._rewiring = Rewiring(
            self.sources,
            pattern=self._pattern,
            device=device,
            compute_dtype=compute_dtype,
            attn_implementation=attn_implementation,
            generation=generation,
            merge=self._merge_here,
        )
        self.model: PreTrainedModel = self._plain
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the recipes use, opened on first use."""
        if self._tokenizer is None:
            self._tokenizer = chat.open_tokenizer(self._choice, self._pattern, self.sources)
        return self._tokenizer

    @property
    def nbytes(self) -> int:
        """The memory kept beside the live model and the mapped files, in bytes."""
        return self._inputs.nbytes + self._rewiring.nbytes

    def give_way(self) -> bool:
        """Free the memory of the device that sources take, for good; say whether that freed anything."""
        return self._on_device is not None and self._on_device.give_way()

    def load(self, recipe: Recipe) -> None:
        """Make `model` a live model with a recipe's weights.

        Tensors whose group, parameters and dtype (for random methods also the seed) are already loaded are
        not merged again. A recipe of stacked layers has a separate live model. After an error the weights of
        the live model are unspecified until the next successful load.

        Args:
            recipe: a recipe of the workbench's models, with its tokenizer.

        Raises:
            NonFiniteWeights: a merged tensor has NaN or infinite elements.
            ConfigError: the recipe does not fit the models or the workbench.
            ModelError: stacked layers can't be combined.
        """
        self._refuse_others(recipe)
        self._inputs.next_candidate()
        if recipe.stacked:
            check(recipe, self.sources)
            keys = {id(group): _key(recipe, position) for position, group in enumerate(recipe.groups)}
            self.model = self._rewiring.load(recipe, lambda group: keys[id(group)])
            return
        made = ((g.layers, g.match, *_made_from(recipe, g)) for g in recipe.groups)
        shape = (*(tuple(recipe.files(kind).items()) for kind in FILES), *made)
        if shape not in self._checked:
            check(recipe, self.sources)
            self._checked.add(shape)
        keys = {id(group): _key(recipe, position) for position, group in enumerate(recipe.groups)}
        wanted_keys = {name: keys[id(recipe.group_for(name))] for name in self._targets}
        changed = [name for name, key in wanted_keys.items() if self._loaded.get(name) != key]
        for name in changed:
            self._loaded.pop(name, None)

        def note(name: str) -> None:
            self._loaded[name] = wanted_keys[name]

        sizes = {name: self._headers[name].count for name in changed}
        self._merge(recipe, {name: self._targets[name] for name in changed}, sizes, note)
        self.model = self._plain

    def _refuse_others(self, recipe: Recipe) -> None:
        """Raise ConfigError for a recipe that needs a workbench with other settings."""
        if recipe.tokenizer != self._vocabulary:
            raise ConfigError(
                "workbench: the recipe's tokenizer is not the workbench's",
                expected=self._vocabulary,
                got=recipe.tokenizer,
                fix="open the workbench with tokenizer=" + repr(recipe.tokenizer),
            )
        if recipe.experts != self._experts:
            raise ConfigError(
                "workbench: the order of the experts in the recipe is not the workbench's",
                expected=self._experts,
                got=recipe.experts,
                fix="open the workbench with the recipe's `experts`",
            )
        if recipe.chat_template != self._choice:
            raise ConfigError(
                "workbench: the recipe's chat_template is not the workbench's",
                fix="open the workbench with the recipe's chat_template",
            )
        rows_differ = any(isinstance(source, Aligned) for source in self.sources.values())
        if rows_differ and (tuple(recipe.models), recipe.base) != (tuple(self.sources), self.base):
            raise ConfigError(
                "workbench: the models' vocabularies differ, so a recipe needs all the workbench's models",
                expected=f"models {', '.join(self.sources)} with base {self.base}",
                got=f"models {', '.join(recipe.models)} with base {recipe.base}",
                fix="give the recipe the workbench's models and base",
            )

    def _merge(
        self,
        recipe: Recipe,
        places: Mapping[str, Storage],
        sizes: Mapping[str, int],
        note: Callable[[str], object],
    ) -> None:
        """Merge tensors into their places, and call `note` with the name of each finished tensor."""
        ordered = {name: places[name] for name in sorted(places, key=lambda name: -sizes[name])}
        if self._on_device is None:
            self._merge_here(recipe, ordered, sizes, note)
            return
        left = dict.fromkeys(self._on_device.merge(recipe, ordered, sizes))
        for name in ordered:
            if name not in left:
                note(name)
        self._merge_here(recipe, {name: places[name] for name in left}, {n: sizes[n] for n in left}, note)

    def _merge_here(
        self,
        recipe: Recipe,
        places: Mapping[str, Storage],
        sizes: Mapping[str, int],
        note: Callable[[str], object],
    ) -> None:
        """Merge tensors on the processor, as `_merge` does."""
        waiting = iter(sorted(places, key=lambda name: -sizes[name]))

        def work() -> None:
            for name in waiting:  # all threads share one iterator, with the largest tensors first
                merge_tensor(recipe, name, self._inputs, out=places[name])
                note(name)

        if threads() == 1 or sum(sizes.values()) < WORTH_THREADS:
            work()
        else:
            with pool() as workers:
                for done in [workers.submit(work) for _ in range(threads())]:
                    done.result()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the live weights by their names in a checkpoint; parts of parameters are views."""
        import torch

        assert self.model is self._plain, "stacked layers have no names in the models' checkpoints"
        for name, place in self._targets.items():
            shape = self._headers[name].shape
            if isinstance(place, torch.Tensor):
                yield name, place.detach().view(shape)
            else:
                yield name, weights_at(place, shape)

    def digest(self, recipe: Recipe) -> str:
        """Return a hash of the live weights that equals that of the exported folder.

        See `tensors.digest`. All weights are read once.

        Args:
            recipe: the recipe that was loaded last.
        """
        places, headers = self._targets, self._headers
        if recipe.stacked:
            headers = output_headers(recipe, self.sources)
            places = locate(self.model, headers, self.sources[self._pattern].location)
        readers = {
            name: functools.partial(weights_at, places[name], header.shape)
            if name in places
            else functools.partial(self._unused, recipe, name)
            for name, header in headers.items()
        }
        return weights_digest(readers, exact_dtype(recipe.dtype, self._compute_dtype))

    def _unused(self, recipe: Recipe, name: str) -> Tensor:
        """Return a merged tensor that the forward pass doesn't use, so that the live model lacks it."""
        return to_tensor(merge_array(recipe, name, self._inputs))

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of every tensor in the models' files, from the `.grad` of the live parameters.

        It is zero for tensors that the forward pass doesn't use, and for buffers.
        """
        import torch

        live = {parameter.untyped_storage().data_ptr(): parameter for parameter in self.model.parameters()}
        return {
            name: gradient_at(self._targets[name], live).view(header.shape)
            if name in self._targets
            else torch.zeros(header.shape)
            for name, header in self.sources[self._pattern].headers.items()
        }

    def derivatives(self, recipe: Recipe) -> list[Derivatives]:
        """Return the loss's derivatives with respect to every group's parameters, after a backward pass.

        They come from the gradients in the live model, see `tensors.derivatives`. Sums over tensors are taken
        in a fixed order.

        Args:
            recipe: the recipe that was loaded last.

        Returns:
            For every group parameter -> one value per source (or a single value); empty for a group that
            makes no tensor, and for methods that can't be differentiated.
        """
        live = {parameter.untyped_storage().data_ptr(): parameter for parameter in self.model.parameters()}
        by_group: dict[int, list[Derivatives]] = {}
        # Tied weights that are stored twice lie in one place, and its gradient counts once.
        owners = {address(place): name for name, place in self._targets.items()}
        for name in sorted(owners.values()):
            if name in self.sources[self._pattern].copied:
                continue
            gradient = gradient_at(self._targets[name], live).view(self._headers[name].shape).numpy()
            of_tensor = tensor_derivatives(recipe, name, gradient, self._inputs)
            if of_tensor is not None:
                by_group.setdefault(id(recipe.group_for(name)), []).append(of_tensor)
        return [added(by_group.get(id(group), [])) for group in recipe.groups]


def _key(recipe: Recipe, position: int) -> Hashable:
    """Return a key of everything that determines the bits of a group's tensors."""
    group = recipe.groups[position]
    method = methods.get(group.method)
    return (
        *_made_from(recipe, group),
        tuple(group.parameters.items()),
        recipe.dtype,
        recipe.seed if method.random else None,
        tuple(recipe.files(method.file)[source] for source in group.sources) if method.file else None,
    )


def _made_from(recipe: Recipe, group: TensorGroup) -> tuple[Hashable, ...]:
    """Return the method of a group and the tensors that it reads."""
    return group.method, group.sources, group.shifts, recipe.base_of(group), group.base_shift
