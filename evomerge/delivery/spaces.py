"""Search spaces (`evomerge spaces`): the presets, and the genes of one for a config's or example models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from evomerge.config import RunConfig, load_space
from evomerge.delivery import style
from evomerge.errors import ConfigError
from evomerge.merging import methods
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.running.store import BASE
from evomerge.schema import preset_folder
from evomerge.search.spaces.kinds import AnySpace, AnySpec, apply
from evomerge.search.spaces.layer_path import LayerPathSpace, LayerPathSpec
from evomerge.search.spaces.merge_space import Gene, SearchSpace, SpaceSpec

EXAMPLE_LAYERS, EXAMPLE_SOURCES = 32, ("a", "b", "c")
_LAYER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
EXAMPLE_TENSORS = (
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(f"model.layers.{i}.{part}.weight" for i in range(EXAMPLE_LAYERS) for part in _LAYER),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models that a search space is applied to.

    template: a recipe over them. tensors: names of each model's tensors. text: the models in words.
    """

    template: Recipe
    sources: tuple[str, ...]
    tensors: Mapping[str, Sequence[str]]
    text: str

    @classmethod
    def of(cls, config: Path) -> Models:
        """Open the models of a run config, reading headers only."""
        from evomerge.merging.sources.opening import open_sources

        run = RunConfig.load(config)
        sources = tuple(run.models.sources)
        opened = open_sources(run.locations, BASE, tokenizer=run.tokenizer, experts=run.models.experts)
        template = Recipe(
            models=run.locations,
            groups=(TensorGroup(method="linear", sources=sources),),
            base=BASE,
            fisher=run.models.fisher,
            gram=run.models.gram,
        )
        return cls(
            template=template,
            sources=sources,
            tensors={name: tuple(source.headers) for name, source in opened.items()},
            text=f"{', '.join(sources)} of {config}",
        )

    @classmethod
    def example(cls, spec: AnySpec) -> Models:
        """Return made-up models: three sources, or as many as the preset's methods take."""
        sources = EXAMPLE_SOURCES[: None if isinstance(spec, LayerPathSpec) else _most(spec)]
        template = Recipe(
            models={name: name for name in (BASE, *EXAMPLE_SOURCES)},
            groups=(TensorGroup(method="linear", sources=sources),),
            base=BASE,
            fisher={name: name for name in sources},
            gram={name: name for name in sources},
        )
        return cls(
            template=template,
            sources=sources,
            tensors=dict.fromkeys((BASE, *sources), EXAMPLE_TENSORS),
            text=f"{len(sources)} sources of {EXAMPLE_LAYERS} layers, as an example",
        )

    def space(self, spec: AnySpec) -> AnySpace:
        """Apply a preset to these models."""
        return apply(spec, template=self.template, sources=self.sources, tensors=self.tensors)


def presets(config: Path | None) -> list[dict[str, Any]]:
    """Return every packaged preset as plain data.

    Args:
        config: count the genes for the models of this run config; None counts them for example models.

    Returns:
        One dict per preset, by name; `problem` has the reason if the preset does not fit the models.
    """
    models = None if config is None else Models.of(config)
    rows = []
    for name in sorted(path.stem for path in preset_folder("search_spaces").glob("*.yaml")):
        spec = load_space(name)
        applied_to = models or Models.example(spec)
        row: dict[str, Any] = {"name": name, "about": spec.about, "methods": list(_methods(spec))}
        try:
            row |= {"dimension": applied_to.space(spec).dimension, "problem": None}
        except ConfigError as error:
            row |= {"dimension": None, "problem": str(error)}
        rows.append({**row, "sources": len(applied_to.sources)})
    return rows


def presets_text(rows: Sequence[dict[str, Any]], config: Path | None) -> RenderableType:
    """Return the presets as a table for a rich console; arguments from and as in `presets`."""
    table = style.table(
        style.words("preset"), style.numbers("genes"), style.words("methods"), style.words("purpose")
    )
    for row in rows:
        genes = "-" if row["dimension"] is None else str(row["dimension"])
        problem = "" if row["problem"] is None else row["problem"].splitlines()[0].partition(": ")[2]
        purpose = row["about"] + (f" [{problem}]" if problem else "")
        table.add_row(row["name"], genes, ", ".join(row["methods"]), Text(purpose))
    counted = (
        f"genes: for the models of {config}"
        if config is not None
        else f"genes: for {EXAMPLE_LAYERS} layers and {len(EXAMPLE_SOURCES)} sources (2 where a method takes "
        "no more); to count them for your models: --models CONFIG.yaml"
    )
    return Group(table, Text(counted), Text("to print the genes of one: evomerge spaces show NAME"))


def as_data(name: str, config: Path | None) -> dict[str, Any]:
    """Return one search space as plain data (`spaces show --json`).

    Args:
        name: a preset's name, or the path of a file of the same form.
        config: apply it to the models of this run config; None applies it to example models.

    Raises:
        ConfigError: there is no such space, or it does not fit the models.
    """
    spec = load_space(name)
    models = Models.example(spec) if config is None else Models.of(config)
    space = models.space(spec)
    return {
        "name": spec.name,
        "about": spec.about,
        "models": models.text,
        "sources": list(space.sources),
        "methods": list(_methods(spec)),
        "dimension": space.dimension,
        "summary": space.describe(),
        "notes": list(space.notes) if isinstance(space, SearchSpace) else [],
        "genes": _genes(space),
    }


def text(data: dict[str, Any]) -> RenderableType:
    """Return the data of `as_data` as a table for a rich console."""
    headers = ("gene", "kind", "values", "source", "applies to", "active if")
    table = style.table(*(style.words(header) for header in headers))
    for gene in data["genes"]:
        where = gene["group"] or "everywhere"
        if gene["point"]:
            where += f", point {gene['point'][0]} of {gene['point'][1]}"
        label = gene["parameter"] if gene["point"] is None else f"{gene['parameter']} (curve)"
        table.add_row(label, gene["kind"], gene["values"], gene["source"] or "", where, gene["condition"])
    head = f"{data['summary']}\n{data['about']}\nmodels: {data['models']}"
    return Group(Text(head), table, *(Text(f"note: {note}") for note in data["notes"]))


def _most(spec: SpaceSpec) -> int:
    """Return how many sources all methods of a preset take, at most as many as the example has."""
    return min(methods.get(name).max_sources or len(EXAMPLE_SOURCES) for name in spec.method.choices)


def _methods(spec: AnySpec) -> tuple[str, ...]:
    return ("passthrough",) if isinstance(spec, LayerPathSpec) else tuple(spec.method.choices)


def _genes(space: AnySpace) -> list[dict[str, Any]]:
    if isinstance(space, LayerPathSpace):
        return _path_genes(space)
    return [_gene(space, gene) for gene in space.genes]


def _path_genes(space: LayerPathSpace) -> list[dict[str, Any]]:
    """Return the genes of a layer path; a label is `slot: parameter`."""
    rows = []
    for label, values, coordinate in zip(space.labels, space.values, space.coordinates, strict=True):
        group, _, parameter = label.partition(": ")
        real, optional = coordinate.levels is None, group.startswith("slot") and parameter != "used"
        kind = "real" if real else "integer" if coordinate.ordered else "choice"
        rows.append(
            {
                "name": label,
                "parameter": parameter,
                "kind": "flag" if parameter == "used" else kind,
                "values": values,
                "levels": coordinate.levels,
                "ordered": coordinate.ordered,
                "source": None,
                "group": group,
                "point": None,
                "methods": ["passthrough"],
                "condition": f"{group} is used" if optional else "",
            }
        )
    return rows


def _gene(space: SearchSpace, gene: Gene) -> dict[str, Any]:
    coordinate = gene.domain.coordinate
    return {
        "name": gene.name,
        "parameter": gene.parameter,
        "kind": gene.domain.kind,
        "values": gene.domain.text(),
        "levels": coordinate.levels,
        "ordered": coordinate.ordered,
        "source": gene.source,
        "group": gene.group,
        "point": None if gene.point is None else list(gene.point),
        "methods": list(gene.methods or space.spec.method.choices),
        "condition": space.condition(gene),
    }
