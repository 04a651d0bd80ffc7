"""Holds a preset against the declarations of its merge methods: what each gene means, what is fixed.

Which parameters there are, of what kind, within which bounds and for which method follows from the
methods' declarations alone. Every mistake is a ConfigError, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError, nearest
from evomerge.merging import methods
from evomerge.merging.methods import Parameter
from evomerge.merging.methods.declaration import FILES, Value
from evomerge.merging.recipe import Recipe
from evomerge.search.spaces.domain import Choice, Choices, Continuous, Domain, Whole, listed
from evomerge.search.spaces.preset import Axis, CurveSpec, GeneSpec, SpaceSpec

AXES: tuple[Axis, ...] = ("source", "layers", "modules")
METHOD, SWITCH = "method", "on"
"""What the genes that choose a method, and that switch a source on and off, have for a parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Varied:
    """One entry of a preset's `genes`, or its choice of methods, or its switches.

    label: as written. methods: those of the space whose parameter it is. curve: of its values along the
        layers; groups outside the layers have values of their own.
    """

    label: str
    parameter: str
    methods: tuple[str, ...]
    per_source: bool
    per: tuple[Axis, ...]
    domain: Domain
    curve: CurveSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What varies in a preset, and per method what is the same everywhere.

    method, switch: None where there is nothing to choose, and nothing to switch. varied: the entries of
        `genes`, in the order written.
    """

    method: Varied | None
    switch: Varied | None
    varied: tuple[Varied, ...]
    fixed: Mapping[str, Mapping[str, Value]]


def resolve(spec: SpaceSpec) -> Resolved:
    """Return what the entries of `genes` and `fixed` mean, or raise ConfigError."""
    where = f"search space {spec.name}"
    chosen = spec.method.choices
    for name in chosen:
        methods.get(name)
    for label in spec.fixed:
        if label in spec.genes:
            raise ConfigError(f"{where}: {label} is both a gene and fixed", fix="keep one of them")
    written = {label: _owners(label, chosen, where) for label in (*spec.genes, *spec.fixed)}
    fixed: dict[str, dict[str, Value]] = {name: {} for name in chosen}
    varied = []
    for label, (parameter, owners) in written.items():
        mine = tuple(m for m in owners if label == f"{m}.{parameter}" or f"{m}.{parameter}" not in written)
        if not mine:
            raise ConfigError(
                f"{where}: {label} has no effect, every method has an entry of its own", fix="leave it out"
            )
        if label in spec.genes:
            varied.append(_varied(label, parameter, mine, spec.genes[label], where))
            continue
        for name in mine:
            at = f"{where}: fixed" if len(chosen) == 1 else f"{where}: fixed, of {name}"
            fixed[name][parameter] = methods.get(name).parameters[parameter].check(spec.fixed[label], at)
    for entry in varied:
        if entry.curve is not None:
            _check_curve(spec, entry, where)
    return Resolved(
        method=_choice(METHOD, chosen, spec.method.per, per_source=False) if len(chosen) > 1 else None,
        switch=None
        if spec.subset is None
        else _choice(SWITCH, (False, True), ("source", *spec.subset.per), per_source=True),
        varied=tuple(varied),
        fixed=fixed,
    )


def check_methods(spec: SpaceSpec, template: Recipe, sources: Sequence[str]) -> None:
    """Raise ConfigError where a method of the space can't merge these sources."""
    where, count = f"search space {spec.name}", len(sources)
    others = f"leave {{}} out of the methods ({', '.join(spec.method.choices)})"
    for name in spec.method.choices:
        declared = methods.get(name)
        fix = others.format(name) if len(spec.method.choices) > 1 else "choose another search space"
        low, high = declared.min_sources, declared.max_sources
        if count < low or (high is not None and count > high):
            expected = (
                f"exactly {low}" if low == high else f"at least {low}" if high is None else f"at most {high}"
            )
            raise ConfigError(
                f"{where}: wrong number of sources for {name}", expected=expected, got=str(count), fix=fix
            )
        if spec.subset is not None and low > 1:
            raise ConfigError(
                f"{where}: {name} merges at least {low} sources, but `subset` may leave fewer",
                fix=others.format(name) if len(spec.method.choices) > 1 else "leave `subset` out",
            )
        if declared.needs_base and template.base is None:
            raise ConfigError(f"{where}: {name} works on task vectors and needs a base model", fix=fix)
        kind = declared.file
        if kind and (bare := [s for s in sources if s not in template.files(kind)]):
            raise ConfigError(
                f"{where}: {name} weights its sources by their {FILES[kind]}",
                expected=f"a file for each of them, in a run's config under `models: {kind}:`",
                got=f"none for {', '.join(bare)}",
                fix=fix,
            )
    if spec.subset is not None and template.base is None:
        raise ConfigError(
            f"{where}: `subset` needs a base model: what a group is when all sources are off",
            fix="leave `subset` out",
        )


def redundancies(spec: SpaceSpec, resolved: Resolved) -> tuple[str, ...]:
    """Return in which ways different recipes of the space are one model, as sentences.

    Weights of a method that normalises count only in proportion; so do those of methods on whole models
    without a `normalize` flag, all of which take shares. Where nothing is normalised, `lambda` is a factor
    of them.
    """
    vary = {(name, entry.parameter): entry for entry in resolved.varied for name in entry.methods}
    notes_of: dict[str, list[str]] = {}
    for name in spec.method.choices:
        declared = methods.get(name)
        if (name, "weight") not in vary:
            continue
        flag = declared.parameters.get("normalize")
        shares = declared.inputs != "task_vectors"
        if flag is not None:
            shares = bool(resolved.fixed[name].get("normalize", flag.default))
        if (name, "normalize") in vary:
            notes_of.setdefault("where normalize is true, weights count only in proportion", []).append(name)
        elif shares:
            notes_of.setdefault("weights count only in proportion", []).append(name)
        elif (name, "lambda") in vary:
            notes_of.setdefault("only the product of weight and lambda counts", []).append(name)
    notes = [f"{', '.join(names)}: {what}" for what, names in notes_of.items()]
    weights = [entry for (_, parameter), entry in vary.items() if parameter == "weight"]
    if resolved.switch is not None and any(entry.domain.unit(0.0) is not None for entry in weights):
        notes.append("a weight of exactly 0 is as good as a source that is off")
    return tuple(notes)


def _choice(label: str, values: tuple[Choice, ...], per: tuple[Axis, ...], *, per_source: bool) -> Varied:
    return Varied(
        label=label,
        parameter=label,
        methods=(),
        per_source=per_source,
        per=per,
        domain=Choices(values=values),
        curve=None,
    )


def _owners(label: str, chosen: Sequence[str], where: str) -> tuple[str, tuple[str, ...]]:
    """Return the parameter an entry means, and the methods of the space that have it."""
    method, dot, parameter = label.rpartition(".")
    if dot:
        if method not in chosen:
            raise ConfigError(
                f"{where}: {label} is for a method that is not in the space", fix=nearest(method, chosen)
            )
        methods.get(method).parameter(parameter, where)
        return parameter, (method,)
    owners = tuple(name for name in chosen if parameter in methods.get(name).parameters)
    if not owners and len(chosen) == 1:
        methods.get(chosen[0]).parameter(parameter, where)
    if not owners:
        known = dict.fromkeys(p for name in chosen for p in methods.get(name).parameters)
        raise ConfigError(f"{where}: no method has a parameter {parameter!r}", fix=nearest(parameter, known))
    return parameter, owners


def _varied(label: str, parameter: str, owners: tuple[str, ...], spec: GeneSpec, where: str) -> Varied:
    declared = [methods.get(name).parameters[parameter] for name in owners]
    if len({(p.kind, p.per_source) for p in declared}) > 1:
        raise ConfigError(
            f"{where}: {parameter} is not the same thing in {listed(owners)}",
            fix=f"give each its own, as in {owners[0]}.{parameter}",
        )
    kind, per_source = declared[0].kind, declared[0].per_source
    if spec.per and "source" in spec.per and not per_source:
        raise ConfigError(
            f"{where}: {label} has one value for all sources", fix="leave `source` out of `per`"
        )
    return Varied(
        label=label,
        parameter=parameter,
        methods=owners,
        per_source=per_source,
        per=AXES if spec.per is None else spec.per,
        domain=_domain(label, kind, dict(zip(owners, declared, strict=True)), spec, where),
        curve=spec.curve,
    )


def _domain(label: str, kind: str, declared: Mapping[str, Parameter], spec: GeneSpec, where: str) -> Domain:
    """Return the values of a gene, each of them valid for every method it belongs to."""

    def checked(value: Value, key: str) -> Value:
        for name, parameter in declared.items():
            of = f", of {name}" if len(declared) > 1 else ""
            value = parameter.check(value, f"{where}: genes.{label}.{key}{of}")
        return value

    if spec.choices is not None:
        values = tuple(checked(value, "choices") for value in spec.choices)
        if len(set(values)) < len(values):
            raise ConfigError(f"{where}: genes.{label}.choices: the same value stands twice")
        return Choices(values=values)
    if kind == "flag":
        raise ConfigError(
            f"{where}: {label} is a flag, not a real number",
            fix="write `choices: [false, true]`, or move it to `fixed`",
        )
    assert spec.low is not None
    assert spec.high is not None
    low, high = checked(spec.low, "low"), checked(spec.high, "high")
    if kind == "integer":
        if spec.scale == "log" or spec.curve is not None:
            raise ConfigError(
                f"{where}: {label} is a whole number", fix="leave `scale` and `curve` out, or list `choices`"
            )
        return Whole(low=int(low), high=int(high))
    return Continuous(low=float(low), high=float(high), log=spec.scale == "log")


def _check_curve(spec: SpaceSpec, entry: Varied, where: str) -> None:
    """Refuse a curve with gaps: a value that is missing somewhere leaves its control points undetermined."""
    everywhere = set(entry.methods) == set(spec.method.choices)
    for key, axes in (
        ("method", () if everywhere else spec.method.per),
        ("subset", () if spec.subset is None else spec.subset.per),
    ):
        shared = [axis for axis in axes if axis == "layers" or axis not in entry.per]
        if shared and (key == "subset" or len(spec.method.choices) > 1):
            raise ConfigError(
                f"{where}: the curve of {entry.label} would have gaps",
                expected=f"`{key}` that does not differ by {' and '.join(shared)}",
                got=f"per: [{', '.join(axes)}]",
                fix=f"take {' and '.join(shared)} out of `per` of `{key}`, or give {entry.label} no curve",
            )
