"""The workbench: one live model whose weights are replaced in place, candidate after candidate.

    bench = Workbench({"base": "zoo/base", "code": "zoo/code", "maths": "zoo/maths"}, base="base")
    bench.load(recipe)          # bench.model now has the recipe's weights
    bench.load(next_recipe)     # only tensors whose group changed are merged again

Memory beside the live model: the sources' files, memory-mapped (shared by all processes that map them),
and what trimming by magnitude remembers of each task vector (see `Spectrum`). Weights are rounded to the
recipe's dtype before they go into the live model, whatever it computes in, so what is scored is what
`engine.write` exports.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging import methods
from evomerge.merging.compatibility import check, check_models
from evomerge.merging.engine import merge_tensor, pool
from evomerge.merging.inputs import WarmInputs
from evomerge.merging.recipe import Recipe
from evomerge.merging.source import Source, open_sources

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WORTH_THREADS = 1_000_000
"""Parameters to merge from which on several threads are faster than one."""


class Workbench:
    """Holds the models of a search, opened once, and one live model to score candidates with.

    models, base: names and locations as in a Recipe. tokenizer: the model that gives config and
        tokenizer (default as in a Recipe: the base, else the first).
    device, compute_dtype, attn_implementation: of the live model; none of them changes the weights.
    low_memory: remember nothing of trimmed task vectors; such candidates then take longer.

    Raises ModelError where the models can't be used or do not fit each other.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        base: str | None = None,
        *,
        tokenizer: str = "",
        device: str = "cpu",
        compute_dtype: str = "float32",
        attn_implementation: str | None = None,
        low_memory: bool = False,
    ) -> None:
        for name in filter(None, (base, tokenizer)):
            if name not in models:
                raise ConfigError(f"workbench: unknown model {name!r}", fix=nearest(name, models))
        self.base = base
        self._pattern = tokenizer or base or next(iter(models))
        self.sources = open_sources(models, base)
        pattern = {self._pattern: self.sources[self._pattern]}
        self.notes = check_models(pattern | self.sources)
        self._inputs = WarmInputs(self.sources, low_memory=low_memory)
        self._loaded: dict[str, Hashable] = {}
        self._checked: set[Hashable] = set()
        self.model: PreTrainedModel = _build(self.sources[self._pattern], compute_dtype, attn_implementation)
        self.model.to(device)  # type: ignore[arg-type]
        self._targets = _targets(self.model, self.sources[self._pattern])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model that gives config and tokenizer, opened on first use."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            source = self.sources[self._pattern]
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{source.location}: its tokenizer can't be opened", got=str(error)[:200]
                ) from None
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def nbytes(self) -> int:
        """The memory kept beside the live model and the mapped files, in bytes."""
        return self._inputs.nbytes

    def load(self, recipe: Recipe) -> None:
        """Put a recipe's weights into the live model.

        Tensors whose group, parameters, dtype (and seed, for random methods) are those already loaded
        stay. Raises NonFiniteWeights, and ConfigError for a recipe that does not fit the models; the
        live model is then unspecified until the next successful load.
        """
        if recipe.tokenizer != self._pattern:
            raise ConfigError(
                "workbench: the recipe takes tokenizer and config from another model",
                expected=self._pattern,
                got=recipe.tokenizer,
                fix="open the workbench with tokenizer=" + repr(recipe.tokenizer),
            )
        places = tuple((group.layers, group.match, group.method, group.sources) for group in recipe.groups)
        shape = places, tuple(recipe.fisher.items())
        if shape not in self._checked:
            check(recipe, self.sources)
            self._checked.add(shape)
        keys = {id(group): _key(recipe, position) for position, group in enumerate(recipe.groups)}
        wanted = {name: keys[id(recipe.group_for(name))] for name in self._targets}
        changed = [name for name, key in wanted.items() if self._loaded.get(name) != key]
        for name in changed:
            self._loaded.pop(name, None)
        for name in self._merged(recipe, changed):
            self._loaded[name] = wanted[name]

    def _merged(self, recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
        """Merge tensors into the live model, the largest first on torch's number of threads."""
        import torch

        def merge(name: str) -> str:
            merge_tensor(recipe, name, self._inputs, out=self._targets[name])
            return name

        if torch.get_num_threads() == 1 or sum(self._targets[name].numel() for name in names) < WORTH_THREADS:
            yield from map(merge, names)
            return
        with pool() as threads:
            yield from threads.map(merge, sorted(names, key=lambda name: -self._targets[name].numel()))


def _key(recipe: Recipe, position: int) -> Hashable:
    """Return what determines the bits a group makes of a tensor."""
    group = recipe.groups[position]
    method = methods.get(group.method)
    return (
        group.method,
        group.sources,
        tuple(group.parameters.items()),
        recipe.dtype,
        recipe.base if method.uses_base(recipe.base) else None,
        recipe.seed if method.random else None,
        tuple(recipe.fisher[source] for source in group.sources) if method.fisher else None,
    )


def _build(source: Source, dtype: str, attention: str | None) -> PreTrainedModel:
    """Make the live model without reading or initialising its weights; they are put in later."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
        if (source.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{source.location}: transformers can't build this model",
            got=" ".join(str(error).split())[:300],
            fix="check its config.json; models that need remote code are not supported",
        ) from None
    model.tie_weights()  # skipped with the initialisation
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def _targets(model: PreTrainedModel, source: Source) -> dict[str, Tensor]:
    """Return tensor name -> storage in the live model, for every tensor of the source."""
    live = {name: tensor.data for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    missing = [name for name in live if name not in source.headers and name not in tied]
    extra = [name for name in source.headers if name not in live]
    if missing or extra:
        raise ModelError(
            f"{source.location}: its tensors are not those of {type(model).__name__}",
            expected=_some(missing) or "no other tensors",
            got=_some(extra) or "no such tensors",
            fix="save the model again with a current transformers version",
        )
    for name, header in source.headers.items():
        if tuple(live[name].shape) != header.shape:
            raise ModelError(
                f"{source.location}: tensor {name!r} does not have the shape its config asks for",
                expected=str(list(live[name].shape)),
                got=str(list(header.shape)),
            )
    return {name: live[name] for name in source.headers}


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
