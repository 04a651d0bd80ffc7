"""A Recipe: everything that determines the weights of a merged model, as plain data.

A recipe names its models, then lists tensor groups. Each output tensor belongs to the first group that
matches it by layer and by name; the group says which method merges which sources with which
parameters. Recipes are immutable, comparable, written as YAML, and hashed canonically. No torch here.

>>> recipe = Recipe(
...     models={"base": "./base", "code": "./code", "maths": "./maths"},
...     base="base",
...     groups=(TensorGroup(method="ties", sources=("code", "maths"), parameters={"density": 0.4}),),
... )
>>> recipe.groups[0].parameters["density"]
(0.4, 0.4)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import yaml

from evomerge.errors import ConfigError, nearest
from evomerge.merging import methods
from evomerge.merging.chat_templates import chosen_template
from evomerge.merging.methods import Method
from evomerge.merging.methods.declaration import FILES, FileKind
from evomerge.merging.modules import layer_of, shifted
from evomerge.merging.recipe_data import (
    LAYERS,
    TokenRow,
    check_keys,
    locations,
    mapping,
    optional_name,
    shifts,
    strings,
    token_rows,
    whole,
)
from evomerge.schema import LARGEST_SEED, parse_yaml

FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16")
OUTSIDE: tuple[int, ...] = ()
"""The `layers` of a group of the tensors outside all layers: embeddings, final norm, head."""

UNION, BASE = "union", "base"
"""Values of `tokenizer` besides model names: the tokens of all models, and the base's vocabulary."""

EXPERTS = STORED, MATCHED = "stored", "matched"
"""Orders of the experts of a mixture: as in the files, or as they are most like the base's."""

Setting = float | int | bool | tuple[float | int | bool, ...]


def tokenizer_of(tokenizer: str, base: str | None, models: Iterable[str]) -> str:
    """Return the name of the model whose vocabulary a merge gets, or `union`.

    "" means the base, or without a base the first model. The name of a model comes before the keywords
    `base` and `union`. Raises ConfigError for an unknown name, and for `base` without a base.

    >>> tokenizer_of("base", "llama", ["llama", "chat"]), tokenizer_of("", None, ["llama", "chat"])
    ('llama', 'llama')
    """
    models = tuple(models)
    if not tokenizer:
        return base or models[0]
    if tokenizer in models or tokenizer == UNION:
        return tokenizer
    if tokenizer == BASE and base is not None:
        return base
    if tokenizer == BASE:
        raise ConfigError(
            "tokenizer: base, but there is no base model", fix="name a model, or write `tokenizer: union`"
        )
    raise ConfigError(
        f"tokenizer names an unknown model {tokenizer!r}",
        fix=nearest(tokenizer, tuple(dict.fromkeys((*models, BASE, UNION)))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Describe how one group of output tensors is merged.

    Args:
        method: name of a merge method, see `evomerge.merging.methods`.
        sources: names of the models that are merged, in the method's order.
        parameters: parameter -> a number, or for a per-source parameter one number per source. A single
            number for a per-source parameter holds for every source. Missing ones take their defaults.
        layers: indices of the result's layers; None means every tensor, `OUTSIDE` those outside the layers.
        match: substrings of tensor names; a tensor's name must contain one of them. () means any name.
        shift: per source, its layer number minus the result's; () means no shift.
        base: the group's own base model; None means the recipe's.
        base_shift: the base's layer number minus the result's.

    Raises:
        ConfigError: unknown methods or parameters, values out of range, or a wrong number of sources.

    >>> group = TensorGroup(method="passthrough", sources=("a",), layers=(4, 5), shift=(-2,))
    >>> group.reads("h.4.mlp.weight"), group.reads("norm.weight")
    ((('a', 'h.2.mlp.weight'),), (('a', 'norm.weight'),))
    """

    method: str
    sources: tuple[str, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    match: tuple[str, ...] = ()
    shift: tuple[int, ...] = ()
    base: str | None = None
    base_shift: int = 0

    def __post_init__(self) -> None:
        declared = methods.get(self.method)
        where = f"group {self.label()!r} ({self.method})"
        if not isinstance(self.sources, tuple) or not self.sources:
            raise ConfigError(f"{where}: no sources", expected="at least one source name")
        count = len(self.sources)
        if count < declared.min_sources or (declared.max_sources or count) < count:
            top = "" if declared.max_sources is None else f" and at most {declared.max_sources}"
            raise ConfigError(
                f"{where}: wrong number of sources",
                expected=f"at least {declared.min_sources}{top}",
                got=str(count),
            )
        object.__setattr__(self, "parameters", self._complete(declared, where))
        if self.shift and len(self.shift) != count:
            raise ConfigError(
                f"{where}: shift needs one value per source",
                expected=f"{count} ({', '.join(self.sources)})",
                got=str(len(self.shift)),
            )
        object.__setattr__(self, "shift", tuple(self.shift) if any(self.shift) else ())

    def _complete(self, declared: Method, where: str) -> Mapping[str, Setting]:
        for name in self.parameters:
            declared.parameter(name, where)
        full: dict[str, Setting] = {}
        for name, parameter in declared.parameters.items():
            setting = self.parameters.get(name, parameter.default)
            if not parameter.per_source:
                full[name] = parameter.check(setting, where)
                continue
            values = setting if isinstance(setting, tuple | list) else (setting,) * len(self.sources)
            if len(values) != len(self.sources):
                raise ConfigError(
                    f"{where}: {name} needs one value per source",
                    expected=f"{len(self.sources)} ({', '.join(self.sources)})",
                    got=str(len(values)),
                )
            full[name] = tuple(parameter.check(value, where) for value in values)
        return MappingProxyType(full)

    def label(self) -> str:
        """Return a short name for messages and plots, e.g. `layers 0-3 mlp`."""
        if self.layers is None:
            place = "all"
        elif not self.layers:
            place = "outside"
        elif len(self.layers) == 1:
            place = f"layer {self.layers[0]}"
        elif self.layers == tuple(range(self.layers[0], self.layers[-1] + 1)):
            place = f"layers {self.layers[0]}-{self.layers[-1]}"
        else:
            place = "layers " + ",".join(map(str, self.layers))
        return " ".join((place, *("|".join(self.match),) * bool(self.match)))

    def matches(self, tensor: str) -> bool:
        """Say whether an output tensor of this name belongs to the group."""
        layer = layer_of(tensor)
        return (
            self.layers is None or (not self.layers if layer is None else layer in self.layers)
        ) and self.matches_name(tensor)

    def matches_name(self, tensor: str) -> bool:
        """Say whether a tensor of the group's layers belongs to the group, by its name."""
        return not self.match or any(part in tensor for part in self.match)

    @property
    def shifts(self) -> tuple[int, ...]:
        """The shift of every source, zeros included."""
        return self.shift or (0,) * len(self.sources)

    def reads(self, tensor: str) -> tuple[tuple[str, str], ...]:
        """Return (source, tensor) for every source: the tensors that an output tensor is made of."""
        return tuple((name, shifted(tensor, by)) for name, by in zip(self.sources, self.shifts, strict=True))

    def per_source(self, name: str) -> tuple[float, ...]:
        """Return the values of a per-source parameter, in the order of `sources`."""
        return cast(tuple[float, ...], self.parameters[name])

    @property
    def copied_source(self) -> str | None:
        """The source of which the group is a plain copy, with its exact bits; None for all other groups.

        Copies are `passthrough` of scale 1, and `linear` of one source whose weight is 1 or, if normalised,
        any number but 0. Shifts don't matter: they only choose the layer that is copied.

        Other groups can have a source's bits too: weights (1, 0) or slerp at t = 0 differ from the source at
        most in the sign of zeros. A task vector of weight 1 differs: base + (x - base) is rounded twice.

        >>> TensorGroup(method="linear", sources=("a",), parameters={"weight": 2.0}).copied_source
        'a'
        """
        if self.method == "passthrough":
            return self.sources[0] if self.per_source("scale") == (1.0,) else None
        if self.method != "linear" or len(self.sources) != 1:
            return None
        (weight,) = self.per_source("weight")
        normalised = bool(self.parameters["normalize"]) and weight != 0.0
        return self.sources[0] if weight == 1.0 or normalised else None

    def _as_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"method": self.method}
        if self.layers is not None:
            data["layers"] = list(self.layers)
        if self.match:
            data["match"] = list(self.match)
        data["sources"] = list(self.sources)
        distinct = len(set(self.sources)) == len(self.sources)
        shown: dict[str, Any] = {}
        declared = methods.get(self.method).parameters
        for name, value in self.parameters.items():
            if declared[name].omitted and value == declared[name].default:
                continue
            if isinstance(value, tuple):
                shown[name] = dict(zip(self.sources, value, strict=True)) if distinct else list(value)
            else:
                shown[name] = value
        if shown:
            data["parameters"] = shown
        if self.shift:
            by_name = {name: by for name, by in zip(self.sources, self.shift, strict=True) if by}
            data["shift"] = by_name if distinct else list(self.shift)
        if self.base is not None:
            data["base"] = self.base
        if self.base_shift:
            data["base_shift"] = self.base_shift
        return data

    @classmethod
    def _from_data(cls, data: Mapping[str, Any], where: str) -> TensorGroup:
        valid = ("method", "sources", "parameters", "layers", "match", "shift", "base", "base_shift")
        check_keys(data, valid, required=("method", "sources"), where=where)
        sources = tuple(strings(data["sources"], f"{where}: sources"))
        parameters: dict[str, Setting] = {}
        for name, value in mapping(data.get("parameters"), f"{where}: parameters").items():
            if isinstance(value, Mapping):
                check_keys(value, sources, required=sources, where=f"{where}: parameters: {name}")
                parameters[name] = tuple(value[source] for source in sources)
            else:
                parameters[name] = tuple(value) if isinstance(value, list) else value
        layers = data.get("layers")
        if layers is not None and (
            not isinstance(layers, list)
            or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < LAYERS for n in layers)
        ):
            raise ConfigError(
                f"{where}: layers",
                expected=f"a list of layer numbers below {LAYERS}, [] for the tensors outside the layers",
                got=repr(layers)[:200],
            )
        return cls(
            method=str(data["method"]),
            sources=sources,
            parameters=parameters,
            layers=None if layers is None else tuple(sorted(set(layers))),
            match=tuple(strings([] if data.get("match") is None else data["match"], f"{where}: match")),
            shift=shifts(data.get("shift"), sources, where),
            base=optional_name(data.get("base"), f"{where}: base"),
            base_shift=whole(data.get("base_shift", 0), f"{where}: base_shift"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Describe a merge completely.

    Args:
        models: name -> location (folder, hub id, or `path+adapter`). Names identify models everywhere else.
        groups: the first group that matches a tensor makes it. A tensor that no group matches is an error.
        base: the name of the base model, which methods on task vectors need.
        dtype: the type the merged weights are stored in; they are rounded to it before they are scored.
        tokenizer: the model whose tokenizer, config and special tokens the result gets, or `base`, or
            `union` (the base's tokens, then all others). Default: the base, without a base the first model.
            Embedding rows are matched by token. Models with different tokens need this to be set.
        chat_template: "" (that of the tokenizer's model), a model's name, `base`, `auto`, a built-in
            template's name, or jinja text; see `chat_templates`.
        seed: of the random masks of DARE-like methods.
        num_layers: of the result; None means as many as its sources have.
        pad_rows: the number of embedding rows is rounded up to a multiple of it; 0 leaves it as it is.
        tokens: token -> where its embedding row comes from, see `TokenRow`; for models that lack the token,
            or for all of them.
        experts: `stored`, or `matched`: experts of a mixture stand in the order in which they are most like
            the base's (without a base: the first model's), see `sources.experts`.
        fisher: name -> file with a model's diagonal Fisher, for every source of a `fisher` group. These
            files are identified by their path, which is therefore part of the hash.
        gram: name -> file with the Gram matrices of a model's inputs, likewise, for `regmean`.
        fingerprints: name -> fingerprint of a model's files, for some or all models. A merge refuses models
            whose files have another one. Not part of the hash, nor of equality.

    Raises:
        ConfigError: unknown names or types, no models or groups, or a missing base or Fisher file.
    """

    models: Mapping[str, str]
    groups: tuple[TensorGroup, ...]
    base: str | None = None
    dtype: str = "bfloat16"
    tokenizer: str = ""
    chat_template: str = ""
    seed: int = 0
    num_layers: int | None = None
    pad_rows: int = 0
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    experts: str = STORED
    fisher: Mapping[str, str] = field(default_factory=dict)
    gram: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)
    kept: tuple[TensorGroup, ...] = field(default=(), compare=False, repr=False)
    """Groups that `with_groups` puts before the new ones. Only the template of a run has any."""
    asked: bool = field(default=False, init=False, compare=False, repr=False)
    """Whether `tokenizer` was set, as it is in every written recipe. Not part of the identity: it decides
    which models are refused, and no merged bits."""
    _hash: str = field(default="", init=False, compare=False, repr=False)
    """The hash, once computed: with hundreds of parameters it takes milliseconds."""
    _by_layer: Mapping[object, Sequence[TensorGroup]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """Layer (None: outside the layers) -> its groups; `any`: of all other layers. Empty until needed."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("recipe: no models")
        if not self.groups:
            raise ConfigError("recipe: no groups")
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))
        object.__setattr__(self, "tokens", MappingProxyType(dict(self.tokens)))
        for kind in FILES:
            object.__setattr__(self, kind, MappingProxyType(dict(self.files(kind))))
            self._check_names(kind, self.files(kind))
        object.__setattr__(self, "fingerprints", MappingProxyType(dict(self.fingerprints)))
        object.__setattr__(self, "asked", bool(self.tokenizer))
        if self.dtype not in DTYPES:
            raise ConfigError(f"recipe: unknown dtype {self.dtype!r}", fix=nearest(str(self.dtype), DTYPES))
        if self.experts not in EXPERTS:
            raise ConfigError(f"recipe: experts: {self.experts!r}", fix=nearest(str(self.experts), EXPERTS))
        self._check_names("base", [self.base])
        for group in self.groups:
            if not self.models.keys() >= {*group.sources, group.base or group.sources[0]}:
                self._check_names(f"group {group.label()!r}", [*group.sources, group.base])
        self._check_names("tokens", [row.model for row in self.tokens.values()])
        self._check_names("fingerprints", self.fingerprints)
        object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer, self.base, self.models))
        template = chosen_template(self.chat_template, self.base, self.models)
        object.__setattr__(self, "chat_template", template)
        for group in self.groups:
            if methods.get(group.method).needs_base and self.base_of(group) is None:
                raise ConfigError(
                    f"recipe: {group.method} works on task vectors and needs a base model",
                    fix="set `base`",
                )
        for kind, what in FILES.items():
            if bare := [name for name in self.used_files(kind) if name not in self.files(kind)]:
                raise ConfigError(
                    f"recipe: a method needs the {what} of its sources",
                    expected=f"one file per source: `{kind}: {{name: file}}`",
                    got=f"none for {', '.join(bare)}",
                    fix=f"evomerge {kind} {self.models[bare[0]]} TEXT OUT",
                )

    @classmethod
    def copy_of(cls, location: str, *, dtype: str) -> Recipe:
        """Return the recipe that copies one model, rounded to `dtype`."""
        return cls(
            models={"model": location},
            groups=(TensorGroup(method="linear", sources=("model",), parameters={"weight": 1.0}),),
            dtype=dtype,
        )

    def with_groups(self, groups: Iterable[TensorGroup], *, num_layers: int | None = None) -> Recipe:
        """Return a recipe of the same models, base, dtype, tokenizer and seed with other groups after `kept`.

        Args:
            groups: the new tensor groups, in order of precedence.
            num_layers: of the new result; None means as many as its sources have.

        Returns:
            The new recipe. It names measured files only if one of its groups uses that kind.

        Raises:
            ConfigError: a group names an unknown model, or needs a base or a Fisher file that is missing.

        >>> copy = Recipe.copy_of("./model", dtype="float32")
        >>> half = TensorGroup(method="passthrough", sources=("model",), parameters={"scale": 0.5})
        >>> copy.with_groups([half]).dtype
        'float32'
        """
        groups = (*self.kept, *groups)
        used = {methods.get(group.method).file for group in groups}
        return Recipe(
            models=self.models,
            groups=groups,
            base=self.base,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            seed=self.seed,
            num_layers=num_layers,
            pad_rows=self.pad_rows,
            tokens=self.tokens,
            experts=self.experts,
            fisher=self.fisher if "fisher" in used else {},
            gram=self.gram if "gram" in used else {},
        )

    def group_for(self, tensor: str) -> TensorGroup:
        """Return the group that makes an output tensor, or raise ConfigError."""
        for group in self.groups_at(layer_of(tensor)):
            if group.matches_name(tensor):
                return group
        raise ConfigError(
            f"recipe: no group matches tensor {tensor!r}", fix="add a last group without layers and match"
        )

    def groups_at(self, layer: int | None) -> Sequence[TensorGroup]:
        """Return the groups that may make tensors of a layer (None: of none), in order of precedence."""
        if not self._by_layer:
            by_layer: dict[object, list[TensorGroup]] = {"any": []}
            for group in self.groups:
                for place in tuple(by_layer) if group.layers is None else group.layers or (None,):
                    by_layer.setdefault(place, by_layer["any"].copy()).append(group)
            object.__setattr__(self, "_by_layer", by_layer)
        return self._by_layer.get(layer, self._by_layer["any"])

    def base_of(self, group: TensorGroup) -> str | None:
        """Return the name of the base model a group reads, or None if its method reads no base."""
        base = self.base if group.base is None else group.base
        return base if methods.get(group.method).uses_base(base) else None

    @property
    def stacked(self) -> bool:
        """Whether the result's layers differ from its sources' in number or in place."""
        shift = any(group.shift or group.base_shift for group in self.groups)
        return self.num_layers is not None or shift

    def _check_names(self, where: str, names: Iterable[str | None]) -> None:
        for name in names:
            if name is not None and name not in self.models:
                raise ConfigError(
                    f"recipe: {where} names an unknown model {name!r}", fix=nearest(name, self.models)
                )

    @property
    def hash(self) -> str:
        """The canonical identity within a run: SHA-256 over what changes the merged bits, 64 hex digits.

        Locations don't count (a moved folder stays the same recipe), nor does the seed where no method
        draws at random. Parameters count with their defaults filled in. Models count by their names, which a
        run ties to their files by its fingerprints. Between runs and files a hash alone says nothing: two
        recipes are the same merge if their hashes and the fingerprints of their used models are equal. So
        `running.warm_start` first gives models with equal files equal names, and `delivery.compare` compares
        the runs' fingerprints.
        """
        if self._hash:
            return self._hash
        data = self.to_data()
        del data["models"]
        data.pop("fingerprints", None)
        if not any(methods.get(group.method).random for group in self.groups):
            del data["seed"]
        for kind in FILES:
            if not self.used_files(kind):
                data.pop(kind, None)
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        object.__setattr__(self, "_hash", hashlib.sha256(canonical.encode()).hexdigest())
        return self._hash

    @property
    def pattern(self) -> str:
        """The name of the model that provides the config and the files beside the weights."""
        return self.tokenizer if self.tokenizer in self.models else self.base or next(iter(self.models))

    def used_models(self) -> tuple[str, ...]:
        """Return the names of the models that are read: the base first, then in the order of `models`."""
        used = {source for group in self.groups for source in group.sources}
        used |= {base for group in self.groups if (base := self.base_of(group))}
        first = [self.base] if self.base in used else []
        return tuple(first + [name for name in self.models if name in used and name != self.base])

    def files(self, kind: FileKind) -> Mapping[str, str]:
        """Return name -> file of what was measured of a model, of one kind."""
        return self.fisher if kind == "fisher" else self.gram

    def used_files(self, kind: FileKind) -> tuple[str, ...]:
        """Return the names of the models whose file of a kind is read, in the order of `models`."""
        used = {source for g in self.groups if methods.get(g.method).file == kind for source in g.sources}
        return tuple(name for name in self.models if name in used)

    def to_data(self) -> dict[str, Any]:
        """Return the recipe as plain data, the inverse of `from_data`."""
        data: dict[str, Any] = {"format": FORMAT, "models": dict(self.models)}
        if self.base is not None:
            data["base"] = self.base
        data |= {"tokenizer": self.tokenizer}
        data |= {"chat_template": self.chat_template} if self.chat_template else {}
        data |= {"dtype": self.dtype, "seed": self.seed}
        if self.num_layers is not None:
            data["num_layers"] = self.num_layers
        if self.pad_rows:
            data["pad_rows"] = self.pad_rows
        if self.tokens:
            data["tokens"] = {token: row.as_data() for token, row in self.tokens.items()}
        if self.experts != STORED:
            data["experts"] = self.experts
        data |= {kind: dict(self.files(kind)) for kind in FILES if self.files(kind)}
        if self.fingerprints:
            data["fingerprints"] = dict(self.fingerprints)
        data["groups"] = [group._as_data() for group in self.groups]
        return data

    @classmethod
    def from_data(cls, data: object) -> Recipe:
        """Build a recipe from plain data, the inverse of `to_data`.

        Raises:
            ConfigError: unknown keys (the error names the nearest valid one), or values that don't fit.
        """
        data = mapping(data, "recipe")
        settings = (
            "base",
            "tokenizer",
            "chat_template",
            "dtype",
            "seed",
            "num_layers",
            "pad_rows",
            "tokens",
            "experts",
            *FILES,
            "fingerprints",
        )
        valid = ("format", "models", *settings, "groups")
        check_keys(data, valid, required=("models", "groups"), where="recipe")
        if data.get("format", FORMAT) != FORMAT:
            raise ConfigError("recipe: format", expected=str(FORMAT), got=repr(data["format"]))
        seed = data.get("seed", 0)
        if whole(seed, "recipe: seed", LARGEST_SEED) < 0:
            raise ConfigError("recipe: seed", expected="a whole number >= 0", got=repr(seed))
        layers = data.get("num_layers")
        if layers is not None and whole(layers, "recipe: num_layers") < 1:
            raise ConfigError("recipe: num_layers", expected="a whole number >= 1", got=repr(layers))
        pad = whole(data.get("pad_rows", 0), "recipe: pad_rows", 2**20)
        if pad < 0:
            raise ConfigError("recipe: pad_rows", expected="a whole number >= 0", got=repr(pad))
        groups = data["groups"]
        if not isinstance(groups, list):
            raise ConfigError("recipe: groups", expected="a list", got=type(groups).__name__)
        return cls(
            models=locations(data["models"], "recipe: models"),
            base=optional_name(data.get("base"), "recipe: base"),
            tokenizer=optional_name(data.get("tokenizer"), "recipe: tokenizer") or "",
            chat_template=optional_name(data.get("chat_template"), "recipe: chat_template") or "",
            dtype=data.get("dtype", "bfloat16"),
            seed=seed,
            num_layers=layers,
            pad_rows=pad,
            tokens=token_rows(data.get("tokens"), "recipe: tokens"),
            experts=data.get("experts", STORED),
            fisher=locations(data.get("fisher"), "recipe: fisher"),
            gram=locations(data.get("gram"), "recipe: gram"),
            fingerprints=locations(data.get("fingerprints"), "recipe: fingerprints"),
            groups=tuple(
                TensorGroup._from_data(mapping(g, f"recipe: groups[{i}]"), f"recipe: groups[{i}]")
                for i, g in enumerate(groups)
            ),
        )

    def to_yaml(self) -> str:
        """Return the recipe as YAML. Reading it back gives the same numbers, bit for bit."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, default_flow_style=None, width=110)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe written by `to_yaml` or by hand. Raises ConfigError."""
        try:
            return cls.from_data(parse_yaml(text))
        except yaml.YAMLError as error:
            raise ConfigError("recipe: not valid YAML", got=str(error)) from None

    def __reduce__(self) -> tuple[object, ...]:  # mapping proxies don't pickle; plain data does
        return Recipe.from_data, (self.to_data(),)
