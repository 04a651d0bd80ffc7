"""The analysis of interference (`evomerge analyze`): input files, terminal tables, plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from evomerge.config import RunConfig, resolve_location
from evomerge.delivery import style
from evomerge.delivery.analyze.heat_map import SHARES, HeatMapMeasure, grid, labels, measures, outside
from evomerge.delivery.style import decimal, numbers, percent, words
from evomerge.errors import ConfigError
from evomerge.merging.analysis.advice import RULES, Advised, Relation
from evomerge.merging.analysis.interference import Interference, Tally
from evomerge.merging.reading import read_recipe
from evomerge.running.store import BASE
from evomerge.schema import load_yaml

CAVEAT = (
    "files do not show which skills a merge keeps: score it on items that nothing was tuned on (evomerge run)"
)
_DARK, _LIGHT = "#1d2433", "#ffffff"


def read_models(path: Path, base: str | None = None) -> tuple[dict[str, str], str]:
    """Return the models that a file names.

    Args:
        path: a run config, a recipe.yaml or a mergekit YAML.
        base: name or location of the base, instead of the file's.

    Returns:
        Name -> location of all models, base included, and the base's name.

    Raises:
        ConfigError: neither the file nor `base` names a base model.
    """
    data = load_yaml(path)
    if "groups" in data or "merge_method" in data:
        recipe = read_recipe(path)
        sources = {source for group in recipe.groups for source in group.sources}
        models = {name: location for name, location in recipe.models.items() if name in sources}
        base_name = recipe.base
        if base_name is not None:
            models = {base_name: recipe.models[base_name]} | models
    else:
        models, base_name = RunConfig.load(path).locations, BASE
    if base is not None:
        base_name = base if base in models else BASE
        if base not in models:
            others = {name: location for name, location in models.items() if name != BASE}
            models = {BASE: resolve_location(base, Path()), **others}
    if base_name is None:
        raise ConfigError(
            f"{path}: names no base model, which task vectors need",
            fix="set `base` (mergekit: `base_model`), or name it with --base",
        )
    return models, base_name


def terminal(interference: Interference, advised: Advised, *, measure: str, width: int) -> RenderableType:
    """Return tables, heat map and advice for a rich console.

    Args:
        interference: the measured interference.
        advised: the advice derived from it.
        measure: what the heat map shows, one of `heat_map.MEASURES`.
        width: of the console, in characters; a wide heat map is cut into several tables.
    """
    total = interference.total
    parts: list[RenderableType] = [Text(_settings(interference), style="dim")]
    parts += [_models(interference, total), _pairs(interference, total, advised)]
    parts.append(Text(_shares(total)))
    parts += _map(interference, measures(interference)[measure], width)
    headline = f"\n{advised.verdict}: start from {advised.method}, search space {advised.preset}"
    parts += [Text(headline, style="bold"), _advice(advised)]
    parts += [Text(f"note: {note}", style="yellow") for note in interference.notes]
    return Group(*parts)


def _advice(advised: Advised) -> Table:
    listed = Table.grid(padding=(0, 1))
    for advice in advised.advice:
        listed.add_row("-", Text(f"{advice.text} [{advice.rule}]"))
    listed.add_row("-", Text(CAVEAT, style="dim"))
    return listed


def _settings(interference: Interference) -> str:
    count = interference.total.count
    return (
        f"{len(interference.models)} models on {interference.base}, {count / 1e6:.1f} M parameters. "
        f"Changed: |task vector| > {interference.threshold:g} x its mean in the tensor. "
        f"Top: the largest {100 * interference.top:g} % of a tensor."
    )


def _models(interference: Interference, total: Tally) -> Table:
    table = style.table(words("model"), numbers("norm"), numbers("% of base"), numbers("changed %"))
    for name, norm, relative, changed in zip(
        interference.models, total.norms, total.relative, total.changed, strict=True
    ):
        table.add_row(name, f"{norm:.3g}", percent(relative), percent(changed, 0))
    return table


def _pairs(interference: Interference, total: Tally, advised: Advised) -> Table:
    table = style.table(
        words("pair"),
        *(numbers(header) for header in ("cosine", "both %", "opposite %", "top %")),
        words("relation"),
        caption="both: parameters that both change. opposite: of these, in opposite directions "
        "(unrelated: 50). "
        f"top: overlap of the largest (unrelated: {percent(interference.chance_overlap, 0)})",
    )
    for i, j in interference.pairs:
        both = total.same[i, j] + total.opposite[i, j]
        table.add_row(
            f"{interference.models[i]} - {interference.models[j]}",
            decimal(total.cosine[i, j]),
            percent(both / max(total.count, 1), 0),
            percent(total.conflict[i, j], 0),
            percent(total.overlap[i, j], 0),
            advised.relations[i, j],
        )
    return table


def _shares(total: Tally) -> str:
    parts = zip(SHARES, total.shares / max(total.count, 1), total.chance_shares, strict=True)
    listed = ", ".join(
        f"{name} {percent(share, 0)} % ({percent(chance, 0)})" for name, share, chance in parts
    )
    return f"parameters: {listed}; in brackets: expected for unrelated task vectors"


def _map(interference: Interference, measure: HeatMapMeasure, width: int) -> list[RenderableType]:
    """Return the heat map, cut into several tables where the console is too narrow for one."""
    kinds, short, cells = grid(interference)
    layers = {layer: t for layer, t in interference.by_layer().items() if layer is not None}
    by_kind = interference.by_kind()
    parts: list[RenderableType] = []
    cell = max((len(_cell(measure, tally)) for tally in (*cells.values(), *layers.values())), default=0)
    widths = [max(len(label), cell) + 2 for label in short]  # a space and a divider each
    start = 0
    while start < len(kinds):
        stop, used = start + 1, len("layer") + cell + 6 + widths[start]
        while stop < len(kinds) and used + widths[stop] <= width:
            used += widths[stop]
            stop += 1
        shown = kinds[start:stop]
        headers = [words("layer"), *(numbers(label) for label in short[start:stop]), numbers("all")]
        table = style.table(*headers, title=None if start else measure.title)
        for layer, whole in layers.items():
            tallies = [cells.get((layer, kind)) for kind in shown]
            table.add_row(str(layer), *(_cell(measure, t) for t in tallies), _cell(measure, whole))
        table.add_section()
        inside = Tally.total(layers.values())
        table.add_row("all", *(_cell(measure, by_kind[kind]) for kind in shown), _cell(measure, inside))
        parts.append(table)
        start = stop
    rest = outside(interference)
    if rest:
        line = Text("outside the layers:")
        for label, tally in zip(labels(list(rest)), rest.values(), strict=True):
            line.append(f"  {label} ").append_text(_cell(measure, tally))
        parts.append(line)
    return parts


def _cell(measure: HeatMapMeasure, tally: Tally | None) -> Text:
    if tally is None:
        return Text("")
    value = measure.of(tally)
    red, green, blue = measure.colour(value)
    ink = _DARK if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else _LIGHT
    background = Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}")
    return Text(f" {measure.text(value):>3} ", style=background)


def as_data(interference: Interference, advised: Advised) -> dict[str, Any]:
    """Return the analysis as plain data (`analyze --json`); what is undefined is None.

    Args:
        interference: the measured interference.
        advised: the advice derived from it.
    """
    return {
        "base": interference.base,
        "models": dict(interference.locations),
        "settings": {
            "threshold": interference.threshold,
            "changed": "|task vector| > threshold * mean |task vector| of the model in the tensor",
            "top": interference.top,
            "chance_overlap": interference.chance_overlap,
        },
        "verdict": advised.verdict,
        "method": advised.method,
        "preset": advised.preset,
        "equal_weights": dict(advised.equal_weights),
        "advice": [{"rule": advice.rule, "text": advice.text} for advice in advised.advice],
        "rules": [
            {"name": r.name, "when": r.condition, "limit": r.limit, "then": r.then, "source": r.source}
            for r in RULES.values()
        ],
        "total": _numbers(interference, interference.total, advised.relations),
        "layers": {
            "outside" if layer is None else str(layer): _numbers(interference, tally)
            for layer, tally in interference.by_layer().items()
        },
        "kinds": {kind: _numbers(interference, tally) for kind, tally in interference.by_kind().items()},
        "tensors": {tensor: _numbers(interference, t) for tensor, t in interference.tensors.items()},
    }


def _numbers(
    interference: Interference, tally: Tally, relations: Mapping[tuple[int, int], Relation] | None = None
) -> dict[str, Any]:
    per_model = zip(
        interference.models,
        tally.norms.tolist(),
        tally.relative.tolist(),
        tally.changed.tolist(),
        strict=True,
    )
    shares = (tally.shares / max(tally.count, 1)).tolist()
    return {
        "parameters": tally.count,
        "models": {
            name: {"norm": norm, "relative": _or_none(relative), "changed": _or_none(changed)}
            for name, norm, relative, changed in per_model
        },
        "shares": dict(zip(("none", "one", "same", "opposite"), shares, strict=True)),
        "pairs": [
            {
                "models": [interference.models[i], interference.models[j]],
                "cosine": float(tally.cosine[i, j]),
                "same": int(tally.same[i, j]),
                "opposite": int(tally.opposite[i, j]),
                "conflict": _or_none(float(tally.conflict[i, j])),
                "overlap": _or_none(float(tally.overlap[i, j])),
            }
            | ({"relation": relations[i, j]} if relations else {})
            for i, j in interference.pairs
        ],
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
