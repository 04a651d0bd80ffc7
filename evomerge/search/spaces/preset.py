"""A search-space preset as written: the YAML form, and what can be said against it without any model.

docs/search_spaces.md describes the form.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evomerge.merging.methods.declaration import Value
from evomerge.merging.recipe_data import LAYERS
from evomerge.schema import LARGEST_FACTOR, Strict
from evomerge.search.spaces.curve import CurveKind

GroupAxis = Literal["layers", "modules"]
Axis = Literal["source", "layers", "modules"]

NARROWEST = 1e-3
"""Of a curve: the range as a share of its larger bound, below which interpolation could not be inverted."""


Bound = Annotated[float, Field(ge=-LARGEST_FACTOR, le=LARGEST_FACTOR)]


class CurveSpec(Strict):
    """Values along the layers that follow from few control points."""

    points: int = Field(ge=2, le=20)
    """Number of control points."""
    kind: CurveKind = "linear"
    """`linear` joins the points by straight lines; `smooth` is a cubic B-spline."""


class GeneSpec(Strict):
    """The range or the choices of one parameter, and along which axes it may differ."""

    low: Bound | None = None
    """Lower bound, included."""
    high: Bound | None = None
    """Upper bound, included."""
    scale: Literal["linear", "log"] = "linear"
    """Scale of a real number's range."""
    choices: tuple[Value, ...] | None = None
    """Values instead of a range: flags or numbers. Ascending numbers count as ordered."""
    per: tuple[Axis, ...] | None = None
    """Axes along which values may differ: `source`, `layers`, `modules`. Default: every axis that the
    parameter and the space have; `[]` is one value for the model."""
    curve: CurveSpec | None = None
    """Few control points along the layers instead of one value per group of layers."""

    @field_validator("choices", mode="before")
    @classmethod
    def _values(cls, choices: object) -> object:
        if choices is None:
            return None
        if not isinstance(choices, list | tuple) or any(
            not isinstance(c, bool | int | float) or not abs(c) <= LARGEST_FACTOR for c in choices
        ):
            raise ValueError(f"a list of numbers or flags, of at most {LARGEST_FACTOR:g}")
        return tuple(choices)

    @model_validator(mode="after")
    def _one_form(self) -> GeneSpec:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.scale == "log" or self.curve is not None:
                raise ValueError("either `choices` or a range (low, high, scale, curve), not both")
            if len(set(self.choices)) < max(len(self.choices), 2):
                raise ValueError("choices must be two or more different values")
            return self
        if self.low is None or self.high is None:
            raise ValueError("missing `low` and `high`, or `choices`")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} and high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"a log scale needs low > 0, got {self.low:g}")
        if self.curve is not None:
            if self.per is not None and "layers" not in self.per:
                raise ValueError("a curve runs along the layers, so `per` must name them")
            if self.high - self.low < NARROWEST * max(abs(self.low), abs(self.high)):
                raise ValueError("the range is too narrow for a curve")
        return self


class MethodSpec(Strict):
    """The merge method, or the methods to choose from. A bare name stands for one method."""

    choices: tuple[str, ...] = Field(min_length=1)
    """Names of methods."""
    per: tuple[GroupAxis, ...] = ("layers", "modules")
    """Axes along which the choice may differ; `[]` is one choice for the model."""

    @model_validator(mode="after")
    def _different(self) -> MethodSpec:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("the same method stands twice")
        return self

    def __str__(self) -> str:
        if len(self.choices) == 1:
            return f"method {self.choices[0]}"
        axes = f" per {' and '.join(self.per)}" if self.per else ""
        return f"methods {', '.join(self.choices)}{axes}"


class SubsetSpec(Strict):
    """A switch per source: whether it takes part in a group at all."""

    per: tuple[GroupAxis, ...] = ("layers", "modules")
    """Axes along which the switches may differ; `[]` is one switch per source for the model."""


def _method(given: object) -> object:
    return {"choices": (given,), "per": ()} if isinstance(given, str) else given


def _layers(given: object) -> object:
    """Accept a number, "all", or ranges; say in one sentence what else is wrong."""
    if given == "all" or (isinstance(given, int) and not isinstance(given, bool) and given >= 1):
        return given
    if not isinstance(given, list | tuple) or not given:
        raise ValueError("layers must be at least 1, 'all', or a list of [first, last]")
    seen: set[int] = set()
    for pair in given:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
            and 0 <= pair[0] <= pair[1] < LAYERS
        ):
            raise ValueError(
                f"a range of layers is [first, last], both included, below {LAYERS}, not {pair!r}"
            )
        if seen & (numbers := set(range(pair[0], pair[1] + 1))):
            raise ValueError(f"layer {min(seen & numbers)} is in two ranges")
        seen |= numbers
    return given


class SpaceSpec(Strict):
    """A search-space preset as written."""

    name: str
    """Name of the space."""
    about: str
    """One line for people."""
    method: Annotated[MethodSpec, BeforeValidator(_method)]
    """A method's name, or the choices of a method gene."""
    subset: SubsetSpec | None = None
    """A switch per source; none by default."""
    layers: Annotated[int | Literal["all"] | tuple[tuple[int, int], ...], BeforeValidator(_layers)] = "all"
    """Layers that share a group: how many in succession, `all`, or the first and last layer of each group."""
    modules: dict[str, tuple[str, ...]] = Field(default={"all": ()}, max_length=1000)
    """Groups within a run of layers: name -> parts of tensor names. The first match wins; `[]` matches the
    rest."""
    outside: dict[str, tuple[str, ...]] = Field(default={"all": ()}, max_length=1000)
    """The same for tensors that are in no layer."""
    genes: dict[str, GeneSpec] = Field(default={})
    """What varies: parameter -> range or choices. `METHOD.PARAMETER` is for one method and precedes the plain
    name."""
    fixed: dict[str, Value] = Field(default={})
    """What does not vary: parameter -> value, named as under `genes`."""

    @model_validator(mode="after")
    def _complete(self) -> SpaceSpec:
        if not self.genes and len(self.method.choices) == 1 and self.subset is None:
            raise ValueError("no genes: there is nothing to search")
        for where, filters in (("modules", self.modules), ("outside", self.outside)):
            if not filters or any(filters[name] == () for name in list(filters)[:-1]):
                raise ValueError(f"{where}: only the last filter may be empty, and there must be one")
        return self
