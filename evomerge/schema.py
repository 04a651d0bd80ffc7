"""Strict YAML: pydantic models whose errors read like the rest of ours, and the search for presets.

Every file a user writes (run config, search space, suite) is parsed here: unknown keys are errors that
name the nearest valid key, and every problem of the file is listed at once.
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
    """Validate plain data, or raise ConfigError listing every problem with its place.

    `where` names the file for the message.
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
    """PyYAML's safe loader, which by itself lets the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys any other may replace
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(  # YAML 1.2 and everybody's reading; PyYAML takes 1e-9 for text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Read YAML without code execution and without doubled keys; raise yaml.YAMLError."""
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
    """Return the YAML file a name or path means: a path first, a packaged preset second.

    Relative paths are tried from `beside` (the folder of the file that names them), then from here.
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
"""What pydantic puts into a location for the member of a union that it tried."""


def _furthest(problems: Sequence[Any]) -> list[Any]:
    """Keep, of the problems of a union's members, those of the member that was understood best."""
    best: dict[tuple[Any, ...], tuple[tuple[int, bool], str]] = {}
    found = []
    for problem in problems:
        place = problem["loc"]
        at = next((i for i, part in enumerate(place) if _MEMBER.fullmatch(str(part))), None)
        found.append((place[:at], None if at is None else str(place[at]), problem))
        if at is not None:
            rank = (len(place), not problem["type"].endswith("_type"))
            best[place[:at]] = max(best.get(place[:at], (rank, str(place[at]))), (rank, str(place[at])))
    return [problem for union, member, problem in found if member is None or best[union][1] == member]


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
    """Follow a location into nested models, as far as annotations tell."""
    found: Any = model
    for part in place:
        fields = getattr(found, "model_fields", None)
        if fields is None or part not in fields:
            if part.isdigit() or fields is None:
                continue
            return None
        found = _inner_model(fields[part].annotation)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (inner := _inner_model(argument)) is not None:
            return inner
    return None
