"""Declarations of merge methods: inputs, parameters, bounds and paper, stated once per method.

The declaration drives the validation of recipes and search spaces, the help texts and docs/methods.md.
Nothing here imports torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evomerge.errors import ConfigError, nearest
from evomerge.merging.methods.blend import Blend, TensorStatistics, run

if TYPE_CHECKING:
    from torch import Tensor

Value = float | int | bool
Kind = Literal["models", "task_vectors", "either"]
FileKind = Literal["fisher", "gram"]
FILES: dict[FileKind, str] = {"fisher": "Fisher information", "gram": "Gram matrices"}
"""Kinds of files with what was measured of a model, in words; their names are those of the commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a method.

    `per_source` parameters have one value per source (weights, densities); the others one per group.
    Bounds are inclusive. omitted: recipes leave the parameter out at its default, so that those written
    before it existed keep their hashes.
    """

    name: str
    default: Value
    help: str
    low: float = float("-inf")
    high: float = float("inf")
    kind: Literal["real", "integer", "flag"] = "real"
    per_source: bool = False
    omitted: bool = False

    def check(self, value: object, where: str) -> Value:
        """Return the value in its canonical type, or raise ConfigError naming `where`."""
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise ConfigError(
                    f"{where}: {self.name} is a flag", expected="true or false", got=repr(value)
                )
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}: {self.name} is not a number", expected="a number", got=repr(value))
        if not self.low <= value <= self.high:
            raise ConfigError(
                f"{where}: {self.name} is out of range",
                expected=f"{self.low:g} <= {self.name} <= {self.high:g}",
                got=f"{value:g}",
            )
        if self.kind == "integer":
            if value != int(value):
                raise ConfigError(f"{where}: {self.name} is a whole number", got=repr(value))
            return int(value)
        return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method: a pure function of float32 tensors, and its declaration.

    inputs: what the function's second argument holds, one tensor per source: the sources' weights
        ("models"), their differences from the base ("task_vectors"), or "either": differences if the recipe
        has a base, else weights.
    file: what the function also takes of its sources, as `fishers` or `grams`: a tensor (or None) per source,
        from a file of that kind.
    matrices: whether the function treats the weight matrices of layers in a way of its own. It then also
        takes `inside`: whether the tensor lies in a layer of the text decoder, as embeddings do not.
    factored: whether all sources must be LoRA adapters on the base. For a tensor to which they add low-rank
        updates, the function gets no tensors, but `updates`: (B, A) or None per source.
    blend: returns the method as a `Blend`, or None if it is not one with these parameters.
    deviations: paragraphs that say where the function deviates from its paper, or from mergekit.
    by_rows: rows (the last dimension) are merged independently, so a large tensor may be passed some rows at
        a time; a random method then also takes `first`, the index of their first element in the tensor.
    ordered: whether the order of the sources changes the merge.
    """

    name: str
    function: Callable[..., Tensor]
    blend: Callable[..., Blend | None] | None
    by_rows: bool
    summary: str
    deviations: tuple[str, ...]
    paper: str
    inputs: Kind
    needs_base: bool
    min_sources: int
    max_sources: int | None
    random: bool
    file: FileKind | None
    matrices: bool
    factored: bool
    ordered: bool
    parameters: Mapping[str, Parameter]

    def parameter(self, name: str, where: str) -> Parameter:
        """Return the declared parameter, or raise ConfigError naming the nearest valid one."""
        if name not in self.parameters:
            raise ConfigError(
                f"{where}: method {self.name} has no parameter {name!r}", fix=nearest(name, self.parameters)
            )
        return self.parameters[name]

    def uses_base(self, base: str | None) -> bool:
        """Say whether the method reads the base of a recipe, given that recipe's base."""
        return self.needs_base or (self.inputs == "either" and base is not None)

    def uses_task_vectors(self, base: str | None) -> bool:
        """Say whether the method works on task vectors in a recipe with that base."""
        return self.inputs == "task_vectors" or (self.inputs == "either" and base is not None)


INPUTS: dict[Kind, str] = {
    "models": "the sources' own weights",
    "task_vectors": "the sources' task vectors",
    "either": "the sources' task vectors if the recipe has a base, else on their own weights",
}
ALIASES = {
    "uniform soup (Wortsman et al. 2022, section 2)": "`linear` with equal weights, its default",
    "greedy soup (the same, algorithm 1)": "a baseline of every run, because it needs scores; its recipe is "
    "`linear` over the chosen sources",
    "task-vector addition (Ilharco et al. 2022, section 4)": "`task_arithmetic`, a weight per source",
    "task-vector negation (the same, section 3)": "`task_arithmetic` with negative weights",
    "task-vector scaling": "`task_arithmetic` with one source: its `weight`, or `lambda` for all sources",
    "linear interpolation (LERP)": "`linear` with weights 1 - t and t",
}
"""Merges with a name in the literature that are special cases of the methods here."""
_REGISTRY: dict[str, Method] = {}


def method(
    name: str,
    *parameters: Parameter,
    paper: str,
    inputs: Kind,
    needs_base: bool | None = None,
    sources: tuple[int, int | None] = (1, None),
    random: bool = False,
    file: FileKind | None = None,
    matrices: bool = False,
    factored: bool = False,
    blend: Callable[..., Blend | None] | None = None,
    by_rows: bool = False,
    ordered: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a merge method; the decorated function remains a plain function.

    It is called as `function(base, tensors, **parameters)`. Per-source parameters are tuples in source order,
    and `lambda` is passed as `lambda_`. Random methods also get `keys`, one per source (see `draws`), and
    methods with a `file` get `fishers` or `grams`, one tensor per source, and `matrices` methods `inside`.
    `blend` returns the same merge as data. The first line of the docstring becomes the summary.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = Method(
            name=name,
            function=function,
            blend=blend,
            by_rows=by_rows,
            summary=(function.__doc__ or "").strip().splitlines()[0],
            deviations=_deviations(function.__doc__ or ""),
            paper=paper,
            inputs=inputs,
            needs_base=inputs == "task_vectors" if needs_base is None else needs_base,
            min_sources=sources[0],
            max_sources=sources[1],
            random=random,
            file=file,
            matrices=matrices,
            factored=factored,
            ordered=ordered,
            parameters={p.name: p for p in parameters},
        )
        return function

    return register


def blended(
    name: str, *parameters: Parameter, **declaration: Any
) -> Callable[[Callable[..., Blend]], Callable[..., Any]]:
    """Declare a merge method that returns a `Blend` and computes nothing on tensors.

    The decorated function takes a `Statistics` of the inputs in place of `base, tensors`, and the parameters
    as in `method`. The decorator turns it into a function of base and tensors, like every method.
    """

    def register(blend: Callable[..., Blend]) -> Callable[..., Any]:
        @functools.wraps(blend)
        def function(base: Tensor | None, tensors: Sequence[Tensor], **settings: Any) -> Tensor:
            added = None if declaration["inputs"] == "models" else base
            return run(blend(TensorStatistics(tensors), **settings), added, tensors)

        return method(name, *parameters, blend=blend, **declaration)(function)

    return register


def _deviations(docstring: str) -> tuple[str, ...]:
    """Return the paragraphs of a docstring that say where a method deviates from its paper or mergekit.

    >>> _deviations("Average.\\n\\n    Deviation: of\\n    two.\\n")
    ('Deviation: of two.',)
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))
    return tuple(paragraph for paragraph in paragraphs if paragraph.startswith("Deviation"))


def names() -> tuple[str, ...]:
    """Return the names of all declared methods, sorted."""
    return tuple(sorted(_REGISTRY))


def get(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ConfigError: there is no such method; the message names the nearest valid one.

    >>> get("slerp").min_sources
    2
    """
    if name not in _REGISTRY:
        raise ConfigError(f"unknown merge method {name!r}", fix=nearest(name, names()))
    return _REGISTRY[name]


def markdown() -> str:
    """Return docs/methods.md but for its end: every method with its inputs, parameters and paper."""
    lines = [
        "# Merge methods",
        "",
        "Generated from the code by `python docs/generate.py`; do not edit.",
        "",
        "How the methods compare on two zoos: [at the end](#how-the-methods-compare). What *runs on a GPU* "
        "is merged there [where there is one](devices.md#merging-on-the-gpu), to the same bits.",
        "",
        "Also known as:",
        "",
        *(f"- {name}: {how}." for name, how in ALIASES.items()),
    ]
    for name in names():
        declared = _REGISTRY[name]
        low, high = declared.min_sources, declared.max_sources
        count = f"{low} or more" if high is None else f"exactly {low}" if low == high else f"{low} to {high}"
        count += " source" if high == 1 else " sources"
        needs = INPUTS[declared.inputs]
        lines += [
            "",
            f"## {name}",
            "",
            declared.summary,
            "",
            f"Works on {needs}; {count}"
            f"{'; needs a base' if declared.needs_base else ''}"
            f"{'; draws masks from the recipe seed' if declared.random else ''}"
            f"{'; all must be LoRA adapters on the base' if declared.factored else ''}"
            f"{f'; needs a {declared.file.title()} file per source' if declared.file else ''}"
            f"{'; runs on a GPU' if declared.blend is not None else ''}. "
            f"Paper: {declared.paper}.",
        ]
        if declared.parameters:
            lines += ["", "| parameter | one per | default | range | meaning |", "|---|---|---|---|---|"]
        for p in declared.parameters.values():
            span = "true, false" if p.kind == "flag" else f"{p.low:g} ... {p.high:g}"
            default = str(p.default).lower() if p.kind == "flag" else f"{p.default:g}"
            owner = "source" if p.per_source else "group"
            lines.append(f"| `{p.name}` | {owner} | {default} | {span} | {p.help} |")
        lines += [line for paragraph in declared.deviations for line in ("", paragraph)]
    return "\n".join(lines) + "\n"
