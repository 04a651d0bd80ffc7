"""The kinds of search spaces: which one some YAML describes, and how each is applied to models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError, nearest
from evomerge.merging.recipe import Recipe
from evomerge.schema import parse
from evomerge.search.spaces.layer_path import LayerPathSpace, LayerPathSpec
from evomerge.search.spaces.merge_space import SearchSpace, SpaceSpec

AnySpec = SpaceSpec | LayerPathSpec
"""A search space as written, of either kind."""
AnySpace = SearchSpace | LayerPathSpace
"""A search space applied to models, of either kind."""


def parse_space(data: Mapping[str, Any], where: str) -> AnySpec:
    """Parse a search space from plain data; `kind` names the kind, merge spaces have none."""
    if "kind" not in data:
        return parse(SpaceSpec, data, where)
    if data["kind"] != "layer_path":
        raise ConfigError(
            f"{where}: unknown kind {data['kind']!r}", fix=nearest(str(data["kind"]), ["layer_path"])
        )
    return parse(LayerPathSpec, data, where)


def apply(
    spec: AnySpec, *, template: Recipe, sources: Sequence[str], tensors: Mapping[str, Sequence[str]]
) -> AnySpace:
    """Apply a search space to models.

    template: a recipe with the models and the base. tensors: the names of the tensors of each model, the
    base among them. Raises ConfigError where the two do not fit.
    """
    if isinstance(spec, LayerPathSpec):
        return LayerPathSpace(spec, template=template, sources=sources, tensors=tensors)
    assert template.base is not None
    return SearchSpace(spec, template=template, sources=sources, tensors=tensors[template.base])
