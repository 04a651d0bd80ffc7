"""What `evomerge analyze` shows in the terminal and as JSON, and which files it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from evomerge.config import RunConfig, resolve_location
from evomerge.errors import ConfigError
from evomerge.merging.analysis.advice import RULES, Advised, Relation
from evomerge.merging.analysis.interference import Interference, Tally
from evomerge.merging.reading import read_recipe
from evomerge.running.store import BASE
from evomerge.schema import load_yaml

Colour = tuple[int, int, int]
GOOD: Colour = (64, 145, 108)
BAD: Colour = (200, 75, 60)
STRONG: Colour = (47, 111, 237)
_WHITE, _DARK, _LIGHT = (255, 255, 255), "#1d2433", "#ffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number of a cell of the heat map: how it is shown, and where its colours end.

    low, middle, high: values of full `GOOD` (or white), white, and full `BAD` (or `STRONG`).
    """

    name: str
    title: str
    unit: float
    low: float
    middle: float
    high: float
    ends: tuple[Colour, Colour]

    def of(self, tally: Tally) -> float:
        """Return the measure of some elements, NaN where it means nothing."""
        if self.name == "conflict":
            return tally.mean_conflict
        if self.name == "overlap":
            return tally.mean_overlap
        if self.name == "cosine":
            return tally.mean_cosine if tally.norms.any() else math.nan
        return float(tally.relative.mean()) if tally.base else math.nan

    def text(self, value: float) -> str:
        """Return a value for a cell; `-` for NaN."""
        if math.isnan(value):
            return "-"
        digits = 0 if self.unit == 100 and self.name != "norm" else 2 if self.unit == 1 else 1
        return f"{round(self.unit * value, digits) + 0.0:.{digits}f}"

    def colour(self, value: float) -> Colour:
        """Return the background of a value, between white and one of the ends."""
        if math.isnan(value):
            return _WHITE
        end = self.ends[value > self.middle]
        reach = (self.high if value > self.middle else self.low) - self.middle
        part = min(1.0, abs(value - self.middle) / abs(reach)) if reach else 0.0
        red, green, blue = (round(255 + part * (channel - 255)) for channel in end)
        return red, green, blue


def measures(found: Interference) -> dict[str, Measure]:
    """Return the measures of a heat map by name; chance or zero is white."""
    chance = found.chance_overlap
    largest = max((float(t.relative.mean()) for t in found.cells().values() if t.base), default=1.0)
    listed = (
        Measure(
            name="conflict",
            title="conflict: opposite directions among what two models change, %, all pairs; chance 50",
            unit=100,
            low=0.3,
            middle=0.5,
            high=0.7,
            ends=(GOOD, BAD),
        ),
        Measure(
            name="cosine",
            title="mean cosine of the task vectors, all pairs; unrelated 0",
            unit=1,
            low=-0.3,
            middle=0.0,
            high=0.3,
            ends=(BAD, GOOD),
        ),
        Measure(
            name="overlap",
            title=f"overlap of the top {100 * found.top:g} % of elements, Jaccard %, mean of all pairs; "
            f"chance {100 * chance:.0f}",
            unit=100,
            low=0.0,
            middle=chance,
            high=min(1.0, 4 * chance),
            ends=(GOOD, BAD),
        ),
        Measure(
            name="norm",
            title="length of the task vectors, % of the base's, mean of all models",
            unit=100,
            low=0.0,
            middle=0.0,
            high=largest or 1.0,
            ends=(_WHITE, STRONG),
        ),
    )
    return {measure.name: measure for measure in listed}


MEASURES = ("conflict", "cosine", "overlap", "norm")


def read_models(path: Path, base: str | None = None) -> tuple[dict[str, str], str]:
    """Return name -> location of the models a file names, and the base's name.

    path: a run config, a recipe.yaml or a mergekit YAML. base: name or location of the base, instead of
    the file's own.
    """
    data = load_yaml(path)
    if "groups" in data or "merge_method" in data:
        recipe = read_recipe(path)
        sources = dict.fromkeys(source for group in recipe.groups for source in group.sources)
        models = {name: recipe.models[name] for name in recipe.models if name in sources}
        found = recipe.base
        if found is not None:
            models = {found: recipe.models[found]} | models
    else:
        config = RunConfig.load(path)
        models, found = config.locations, BASE
    if base is not None:
        found = base if base in models else BASE
        models = models if base in models else {BASE: resolve_location(base, Path()), **models}
    if found is None:
        raise ConfigError(
            f"{path}: names no base model, and task vectors start at one",
            fix="set `base` (mergekit: `base_model`), or name it with --base",
        )
    return models, found


def terminal(found: Interference, advised: Advised, *, measure: str, width: int) -> RenderableType:
    """Return everything for a rich console of that width: tables, heat map, advice."""
    total = found.total
    parts: list[RenderableType] = [Text(_settings(found), style="dim")]
    parts += [_models(found, total), _pairs(found, total, advised)]
    parts.append(Text(_shares(total)))
    parts += _map(found, measures(found)[measure], width)
    parts.append(Text(f"\n{advised.verdict}: start from {advised.method}, {advised.preset}", style="bold"))
    parts.append(_advice(advised))
    parts += [Text(f"note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def _advice(advised: Advised) -> Table:
    listed = Table.grid(padding=(0, 1))
    for each in advised.advice:
        listed.add_row("-", Text(f"{each.text} [{each.rule}]"))
    listed.add_row("-", Text(CAVEAT, style="dim"))
    return listed


CAVEAT = "files do not say which skills survive: score it, on items nothing was tuned on (evomerge run)"


def _settings(found: Interference) -> str:
    count = found.total.count
    return (
        f"{len(found.models)} models on {found.base}, {count / 1e6:.1f} M parameters. Changed: |task vector| "
        f"> {found.threshold:g} x its mean in the tensor. Top: the largest {100 * found.top:g} % of a tensor."
    )


def _models(found: Interference, total: Tally) -> Table:
    table = _table("model", "norm", "of base %", "changes %")
    for name, norm, relative, changed in zip(
        found.models, total.norms, total.relative, total.changed, strict=True
    ):
        table.add_row(name, f"{norm:.3g}", f"{100 * relative:.1f}", f"{100 * changed:.0f}")
    return table


def _pairs(found: Interference, total: Tally, advised: Advised) -> Table:
    table = _table("pair", "cosine", "both %", "opposite %", "top %", "")
    for i, j in found.pairs:
        both = total.same[i, j] + total.opposite[i, j]
        table.add_row(
            f"{found.models[i]} - {found.models[j]}",
            f"{round(float(total.cosine[i, j]), 3) + 0.0:.3f}",
            f"{100 * both / max(total.count, 1):.0f}",
            _hundred(total.conflict[i, j]),
            _hundred(total.overlap[i, j]),
            advised.relations[i, j],
        )
    table.caption = (
        "both: parameters both change. opposite: in opposite directions, of these (chance 50). "
        f"top: overlap of the largest (chance {100 * found.chance_overlap:.0f})"
    )
    table.caption_justify = "left"
    return table


def _shares(total: Tally) -> str:
    said = zip(SHARES, total.shares / max(total.count, 1), total.chance_shares, strict=True)
    return (
        "parameters: "
        + ", ".join(f"{name} {100 * s:.0f} % ({100 * c:.0f})" for name, s, c in said)
        + ("; in brackets: were places and directions drawn independently")
    )


SHARES = ("untouched", "changed by one", "by several, same direction", "by several, opposite directions")


def grid(found: Interference) -> tuple[list[str], list[str], dict[tuple[int, str], Tally]]:
    """Return module kinds inside layers, their short labels, and the cells (layer, kind) -> tally."""
    cells = {(layer, kind): tally for (layer, kind), tally in found.cells().items() if layer is not None}
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    return kinds, labels(kinds), cells


def outside(found: Interference) -> dict[str, Tally]:
    """Return the tallies of the tensors outside the layers, by kind."""
    return {kind: tally for (layer, kind), tally in found.cells().items() if layer is None}


def labels(kinds: Sequence[str]) -> list[str]:
    """Shorten module kinds to their last parts, as long as they stay apart.

    >>> labels(["self_attn.q_proj", "mlp.gate_proj", "attn.norm", "mlp.norm"])
    ['q', 'gate', 'attn.norm', 'mlp.norm']
    """
    parts = [kind.removesuffix("_proj").replace("_proj.", ".").split(".") for kind in kinds]
    short = []
    for own in parts:
        length = next(
            (n for n in range(1, len(own)) if sum(p[-n:] == own[-n:] for p in parts) == 1), len(own)
        )
        short.append(".".join(own[-length:]))
    return [label.replace("layernorm", "norm").replace("attention", "attn") for label in short]


def _map(found: Interference, measure: Measure, width: int) -> list[RenderableType]:
    """Return the heat map, cut into several tables where the console is too narrow for one."""
    kinds, short, cells = grid(found)
    layers = {layer: tally for layer, tally in found.by_layer().items() if layer is not None}
    columns = found.by_kind()
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
        table = _table("layer", *short[start:stop], "all", title=measure.title if not start else None)
        for layer, whole in layers.items():
            tallies = [cells.get((layer, kind)) for kind in shown]
            table.add_row(str(layer), *(_cell(measure, t) for t in tallies), _cell(measure, whole))
        table.add_section()
        inside = Tally.total(layers.values())
        table.add_row("all", *(_cell(measure, columns[kind]) for kind in shown), _cell(measure, inside))
        parts.append(table)
        start = stop
    rest = outside(found)
    if rest:
        line = Text("outside the layers:")
        for label, tally in zip(labels(list(rest)), rest.values(), strict=True):
            line.append(f"  {label} ").append_text(_cell(measure, tally))
        parts.append(line)
    return parts


def _cell(measure: Measure, tally: Tally | None) -> Text:
    if tally is None:
        return Text("")
    value = measure.of(tally)
    red, green, blue = measure.colour(value)
    ink = _DARK if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else _LIGHT
    style = Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}")
    return Text(f" {measure.text(value):>3} ", style=style)


def _table(first: str, *columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _hundred(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def as_data(found: Interference, advised: Advised) -> dict[str, Any]:
    """Return the analysis as plain data (`analyze --json`); what means nothing is null."""
    total = found.total
    return {
        "base": found.base,
        "models": dict(found.locations),
        "settings": {
            "threshold": found.threshold,
            "changed": "|task vector| > threshold * mean |task vector| of the model in the tensor",
            "top": found.top,
            "chance_overlap": found.chance_overlap,
        },
        "verdict": advised.verdict,
        "method": advised.method,
        "preset": advised.preset,
        "equal_weights": dict(advised.equal_weights),
        "advice": [{"rule": each.rule, "text": each.text} for each in advised.advice],
        "rules": [
            {"name": r.name, "when": r.condition, "limit": r.limit, "then": r.then, "source": r.source}
            for r in RULES.values()
        ],
        "total": _numbers(found, total, advised.relations),
        "layers": {
            "outside" if layer is None else str(layer): _numbers(found, tally)
            for layer, tally in found.by_layer().items()
        },
        "kinds": {kind: _numbers(found, tally) for kind, tally in found.by_kind().items()},
        "tensors": {tensor: _numbers(found, tally) for tensor, tally in found.tensors.items()},
    }


def _numbers(
    found: Interference, tally: Tally, relations: dict[tuple[int, int], Relation] | Any = None
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "parameters": tally.count,
        "models": {
            name: {"norm": norm, "relative": _known(relative), "changed": _known(changed)}
            for name, norm, relative, changed in zip(
                found.models,
                tally.norms.tolist(),
                tally.relative.tolist(),
                tally.changed.tolist(),
                strict=True,
            )
        },
        "shares": dict(zip(("none", "one", "same", "opposite"), _shared(tally), strict=True)),
        "pairs": [
            {
                "models": [found.models[i], found.models[j]],
                "cosine": float(tally.cosine[i, j]),
                "same": int(tally.same[i, j]),
                "opposite": int(tally.opposite[i, j]),
                "conflict": _known(float(tally.conflict[i, j])),
                "overlap": _known(float(tally.overlap[i, j])),
            }
            | ({"relation": relations[i, j]} if relations else {})
            for i, j in found.pairs
        ],
    }
    return data


def _shared(tally: Tally) -> Iterable[float]:
    return [float(share) for share in tally.shares / max(tally.count, 1)]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
