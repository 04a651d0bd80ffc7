"""Strict YAML: pydantic models with errors in evomerge's form, and the lookup of presets.

Every file that users write (run config, search space, suite) is parsed here. Unknown keys are errors that
name the nearest valid key, and all problems of a file are listed at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from evomerge.errors import ConfigError, nearest

PresetKind = Literal["search_spaces", "benchmarks/suites"]


class Strict(BaseModel):
    """Base of all parsed files: unknown keys are refused and values are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # docs/config.md is generated from them
    )


T = TypeVar("T", bound=BaseModel)


def parse(model: type[T], data: object, where: str) -> T:
    """Validate plain data; raise ConfigError that lists every problem with its place in the file.

    where: the file's name in the message.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: not a mapping", expected="keys and values", got=type(data).__name__)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_sentence(model, problem) for problem in _furthest(error.errors())]
        head = f"{where}: {problems[0]}" if len(problems) == 1 else f"{where}: {len(problems)} problems"
        raise ConfigError("\n  - ".join([head, *(problems if len(problems) > 1 else [])])) from None


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader with duplicate keys as errors; by itself it silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys may be overridden
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(  # numbers in YAML 1.2; PyYAML reads 1e-9 as text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Read YAML without code execution and without duplicate keys. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping, or raise ConfigError naming the file and the line."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read", got=str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML", got=" ".join(str(error).split())) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping", expected="keys and values", got=type(data).__name__)
    return data


def preset_folder(kind: PresetKind) -> Path:
    """Return the folder of the packaged presets, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "presets" / kind
    return packaged if packaged.is_dir() else package.parent / kind


def find_preset(kind: PresetKind, name: str, *, beside: Path | None = None) -> Path:
    """Return the YAML file for a path, or else for the name of a packaged preset.

    Relative paths start at `beside` (the folder of the file that names them), else at the current folder.
    Raises ConfigError.
    """
    folders = [Path()] if beside is None else [beside, Path()]
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
    packaged = preset_folder(kind) / f"{name}.yaml"
    if "/" not in name and packaged.is_file():
        return packaged
    valid = sorted(p.stem for p in preset_folder(kind).glob("*.yaml"))
    raise ConfigError(
        f"{name!r} is neither a file nor one of the packaged {kind.rpartition('/')[2].replace('_', ' ')}",
        fix=nearest(name, valid),
    )


_MEMBER = re.compile(r"\w+Spec|(literal|dict|tuple)\[.*\]|str|float")
"""Parts of pydantic's error locations that name the tried member of a union."""


def _furthest(problems: Sequence[Any]) -> list[Any]:
    """Keep only the problems of the union member that matched the data furthest."""
    best: dict[tuple[Any, ...], tuple[tuple[int, bool], str]] = {}
    placed = []
    for problem in problems:
        place = problem["loc"]
        at = next((i for i, part in enumerate(place) if _MEMBER.fullmatch(str(part))), None)
        placed.append((place[:at], None if at is None else str(place[at]), problem))
        if at is not None:
            rank = (len(place), not problem["type"].endswith("_type"))
            best[place[:at]] = max(best.get(place[:at], (rank, str(place[at]))), (rank, str(place[at])))
    return [problem for union, member, problem in placed if member is None or best[union][1] == member]


def _sentence(model: type[BaseModel], problem: Any) -> str:
    place = [str(part) for part in problem["loc"] if not _MEMBER.fullmatch(str(part))]
    if problem["type"] == "extra_forbidden":
        owner: Any = _model_at(model, place[:-1])
        hint = f" ({nearest(place[-1], owner.model_fields)})" if owner is not None else ""
        return f"unknown key {'.'.join(place)!r}{hint}"
    if problem["type"] == "missing":
        return f"missing key {'.'.join(place)!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = problem.get("input")
    shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) else ""
    return f"{'.'.join(place) or 'file'}: {message}{shown}"


def _model_at(model: type[BaseModel], place: list[str]) -> type[BaseModel] | None:
    """Follow a location into nested models, as far as annotations allow."""
    current: Any = model
    for part in place:
        fields = getattr(current, "model_fields", None)
        if fields is None or part not in fields:
            if part.isdigit() or fields is None:
                continue
            return None
        current = _inner_model(fields[part].annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (inner := _inner_model(argument)) is not None:
            return inner
    return None
