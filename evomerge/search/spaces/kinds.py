"""The kinds of search spaces: which one some YAML describes, and how each is applied to models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError, nearest
from evomerge.merging.recipe import Recipe
from evomerge.schema import parse
from evomerge.search.spaces.domain import Choices, Continuous, Domain, Whole
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


def gene_table(space: AnySpace) -> list[dict[str, Any]]:
    """Return the genes of a space as plain data, in genome order, for tables of a run's candidates.

    Returns:
        One dict per gene: `name`, `kind` (real, log, integer, choice or flag), and `low` and `high`, or
        `choices`.
    """
    if isinstance(space, LayerPathSpace):
        return [
            {"name": label, "kind": "real", "low": space.spec.scale.low, "high": space.spec.scale.high}
            if coordinate.levels is None and space.spec.scale is not None
            else {"name": label, "kind": "choice", "choices": values.split(", ")}
            for label, values, coordinate in zip(space.labels, space.values, space.coordinates, strict=True)
        ]
    return [{"name": gene.name, "kind": gene.domain.kind, **_bounds(gene.domain)} for gene in space.genes]


def gene_value(gene: Mapping[str, Any], u: float) -> float | int | bool | str:
    """Return the value of a gene of `gene_table` at a point of [0, 1].

    >>> gene_value({"name": "weight", "kind": "real", "low": 0.0, "high": 2.0}, 0.25)
    0.5
    >>> gene_value({"name": "method", "kind": "choice", "choices": ["ties", "linear"]}, 0.75)
    'linear'
    """
    if "choices" in gene:
        return Choices(values=tuple(gene["choices"])).value(u)
    if gene["kind"] == "integer":
        return Whole(low=gene["low"], high=gene["high"]).value(u)
    return Continuous(low=gene["low"], high=gene["high"], log=gene["kind"] == "log").value(u)


def _bounds(domain: Domain) -> dict[str, Any]:
    if isinstance(domain, Choices):
        return {"choices": list(domain.values)}
    assert isinstance(domain, Continuous | Whole)
    return {"low": domain.low, "high": domain.high}
