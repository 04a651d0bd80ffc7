"""Write the generated reference pages: python docs/generate.py

docs/config.md comes from the pydantic models of run config, suite and search space, docs/commands.md from the
command line, docs/methods.md from the declarations of the merge methods and from benchmarks/methods.md. A
test fails while a page is stale.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.models import OptionInfo

from evomerge.evaluation.asking import Asking

FOLDER = Path(__file__).parent

CLI = "evomerge.cli:app"
METHODS = "evomerge.merging.methods.declaration:markdown"
COMPARISON = FOLDER.parent / "benchmarks" / "methods.md"

RUN_CONFIG = (
    ("Run config", "evomerge.config:RunConfig", "your_models.md"),
    ("models", "evomerge.config:ModelsSpec", "adapters.md"),
    ("optimizer", "evomerge.search.optimizers:OptimizerSpec", "search.md"),
    ("objective", "evomerge.search.objective:ObjectiveSpec", "objectives.md"),
    ("objective.constraints", "evomerge.search.objective:ConstraintsSpec", "objectives.md"),
    ("verdict", "evomerge.config:VerdictSpec", "verdicts.md"),
    ("budget", "evomerge.running.budget:BudgetSpec", "budgets.md"),
    ("budget.cost", "evomerge.running.budget:CostSpec", "budgets.md"),
    ("executor", "evomerge.running.executors:ExecutorSpec", "executors.md"),
    ("racing", "evomerge.search.racing:RacingSpec", "search.md"),
    ("surrogate", "evomerge.search.surrogate.guide:SurrogateSpec", "search.md"),
    ("warm_start", "evomerge.search.warm_start:WarmStartSpec", "search.md"),
    ("warm_start.gradients", "evomerge.search.warm_start:GradientSpec", "search.md"),
    ("tracking", "evomerge.config:TrackerSpec", "tracking.md"),
)
SUITE = (
    ("Suite", "evomerge.evaluation.suite:Suite", "your_models.md"),
    ("tasks", "evomerge.evaluation.suite:SuiteTask", "your_models.md"),
    ("judge", "evomerge.evaluation.judge_spec:JudgeSpec", "your_data.md"),
    ("tasks.splits", "evomerge.evaluation.suite:Splits", "your_models.md"),
    ("drawn items", "evomerge.evaluation.suite:DrawnItems", "suites.md"),
    ("asking", "evomerge.evaluation.asking:Asking", "evaluation.md"),
    ("gen_kwargs", "evomerge.evaluation.asking:GenerationSpec", "evaluation.md"),
    ("filters", "evomerge.evaluation.asking:FilterSpec", "evaluation.md"),
)
SPACE = (
    ("Search space", "evomerge.search.spaces.preset:SpaceSpec", "search_spaces.md"),
    ("method", "evomerge.search.spaces.preset:MethodSpec", "search_spaces.md"),
    ("subset", "evomerge.search.spaces.preset:SubsetSpec", "search_spaces.md"),
    ("genes", "evomerge.search.spaces.preset:GeneSpec", "search_spaces.md"),
    ("genes.curve", "evomerge.search.spaces.preset:CurveSpec", "search_spaces.md"),
    ("Layer path", "evomerge.search.spaces.layer_path:LayerPathSpec", "layer_paths.md"),
    ("scale", "evomerge.search.spaces.layer_path:ScaleSpec", "layer_paths.md"),
)
GATE = (("Gate", "evomerge.delivery.gate:GateRules", "verdicts.md"),)
"""Heading (a key of the file, or a kind of file), model, and the page that explains it."""

Section = tuple[str, str, str]
NONE = "-"
"""Shown where a key has no default or no range."""


def config_page() -> str:
    """Return docs/config.md: every key of the four kinds of files, with type, default, range and meaning."""
    headings = {
        place(model): heading for part in (RUN_CONFIG, SUITE, SPACE, GATE) for heading, model, _ in part
    }
    lines = [
        "# Config reference",
        "",
        "Generated from the code by `python docs/generate.py`; do not edit.",
        "",
        "Every key of a run config, suite, search space and gate. Unknown keys are errors that name the",
        f"nearest valid key. `{NONE}` stands for no default or no range. A section that can be `off` can be",
        "`on`: all its defaults. A run config and a suite with comments: [your_models.md](your_models.md).",
    ]
    parts = (("Run config", RUN_CONFIG), ("Suite", SUITE), ("Search space", SPACE), ("Gate", GATE))
    for title, sections in parts:
        lines += ["", f"## {title}"]
        for heading, model, page in sections:
            lines += _section(heading, place(model), page, headings, top=heading == title)
    return "\n".join(lines) + "\n"


def _section(
    heading: str, model: type[BaseModel], page: str, headings: dict[type[BaseModel], str], *, top: bool
) -> Iterator[str]:
    if not top:
        yield from ("", f"### {_title(heading)}")
    yield from ("", f"{_about(model)} Explained in [{page}]({page}).", "")
    yield "| key | type | default | range | meaning |"
    yield "|---|---|---|---|---|"
    of_asking = model is not Asking and model.model_fields.keys() >= Asking.model_fields.keys()
    inherited = Asking.model_fields if of_asking else ()  # they have a section of their own
    for name, field in model.model_fields.items():
        if name in inherited:
            continue
        assert field.description, f"{model.__name__}.{name} has no docstring"
        cells = (
            f"`{field.alias or name}`",
            _type(field.annotation, headings),
            _default(field),
            _range(field.metadata),
            " ".join(field.description.split()),
        )
        yield _row(cells)


def _title(heading: str) -> str:
    return heading if " " in heading or heading.istitle() else f"`{heading}`"


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as MkDocs makes it."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _about(model: type[BaseModel]) -> str:
    paragraphs = inspect.cleandoc(model.__doc__ or "").split("\n\n")
    end = next((i for i, p in enumerate(paragraphs) if p.startswith((">>>", "Raises:", "Made by"))), None)
    return "\n\n".join(" ".join(p.split()) for p in paragraphs[:end])


def _type(annotation: Any, headings: dict[type[BaseModel], str]) -> str:
    """Return a type in words; a model is a link to its section."""

    def shown(inner: Any) -> str:
        return _type(inner, headings)

    simple = {
        Any: "any value",
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Path: "path",
    }
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in simple:
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        heading = headings[annotation]
        return f"[{_title(heading)}](#{anchor(heading)})"
    if origin is Annotated:
        limits = _range(arguments[1:])
        return shown(arguments[0]) + ("" if limits == NONE else f" {limits}")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(shown(a) for a in arguments if a is not types.NoneType))
    if origin is dict:
        return f"mapping: name to {shown(arguments[1])}"
    if origin is tuple and arguments[-1] is not ...:
        return f"[{', '.join(shown(a) for a in arguments)}]"
    assert origin is tuple, annotation
    return f"list of {shown(arguments[0])}"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "its defaults" if isinstance(field.default_factory(), BaseModel) else NONE
    value = field.default
    return NONE if value in (None, "", (), {}) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(metadata: Sequence[Any]) -> str:
    """Return the limits that pydantic keeps of a field, as in ">= 0, <= 1"."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    if any(getattr(limit, "min_length", None) for limit in metadata):
        found.append("not empty")
    return ", ".join(found) or NONE


def commands_page() -> str:
    """Return docs/commands.md: every command with its arguments and options."""
    lines = [
        "# Command reference",
        "",
        "Generated from the code by `python docs/generate.py`; do not edit.",
        "",
        "Every command takes `--quiet` (`-q`: print nothing but errors) and `--json` (print one JSON",
        "document instead of text). A mistake in the input prints one message and exits with code 2. Ctrl-C",
        "exits with 130, SIGTERM with 143 and SIGHUP with 129; during a run all three print the command that",
        "continues it. They end `serve` and `dashboard` as these are meant to end, with 0.",
        "`evomerge --version` prints the version. The order in which commands are used:",
        "[getting_started.md](getting_started.md).",
    ]
    for name, callback in commands(place(CLI)):
        lines += _command(name, callback)
    return "\n".join(lines) + "\n"


def commands(app: Any, prefix: str = "evomerge") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every command of a typer app, its full name and its function; groups after plain commands."""
    for command in app.registered_commands:
        yield f"{prefix} {command.name}", command.callback
    for group in app.registered_groups:
        inner = group.typer_instance
        if inner.registered_callback is not None:
            yield f"{prefix} {group.name}", inner.registered_callback.callback
        yield from commands(inner, f"{prefix} {group.name}")


def _command(name: str, callback: Callable[..., Any]) -> Iterator[str]:
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, ...]] = []
    for parameter in inspect.signature(callback).parameters.values():
        if get_origin(parameter.annotation) is not Annotated or parameter.name in ("quiet", "json_"):
            continue
        kind, info = get_args(parameter.annotation)
        if not isinstance(info, OptionInfo):
            metavar = info.metavar if "list" not in str(kind) else f"{info.metavar.removesuffix('...')}..."
            optional = parameter.default is not inspect.Parameter.empty
            arguments.append((f"[{metavar}]" if optional else metavar, info.help))
            continue
        names = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
        flag = ", ".join(names or [f"--{parameter.name.replace('_', '-')}"])
        value = "" if kind is bool else f" {info.metavar or _value(kind)}"
        limit = "" if info.min is None else f"; at least {info.min:g}"
        options.append((f"`{flag}{value}`", _shown(parameter.default), info.help.rstrip(".?") + limit + "."))
    usage = " ".join([name, *(metavar for metavar, _ in arguments), *(["[OPTIONS]"] if options else [])])
    about = " ".join(inspect.cleandoc(callback.__doc__ or "").split())
    yield from ("", f"## {name}", "", about, "", "```text", usage, "```")
    if arguments:
        yield from ("", "| argument | meaning |", "|---|---|")
        yield from (_row((f"`{metavar}`", help_)) for metavar, help_ in arguments)
    if options:
        yield from ("", "| option | default | meaning |", "|---|---|---|")
        yield from map(_row, options)


def _shown(default: object) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    return NONE if default is None or default is False else f"`{default}`"


def _value(kind: Any) -> str:
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return next(names[each] for each in (kind, *get_args(kind)) if each in names)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def place(name: str) -> Any:
    """Import what `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def methods_page() -> str:
    """Return docs/methods.md: every method, then how they compare."""
    declared: str = place(METHODS)()
    return f"{declared}\n{COMPARISON.read_text(encoding='utf-8')}"


def pages() -> dict[str, str]:
    """Return the generated pages: file name -> contents."""
    return {"config.md": config_page(), "commands.md": commands_page(), "methods.md": methods_page()}


if __name__ == "__main__":
    for page, text in pages().items():
        (FOLDER / page).write_text(text, encoding="utf-8")
