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


LARGEST_INTEGER = 2**64
"""Integers of this size and more are refused: no setting needs them, and Python prints no very long ones."""
EXPANDED = 100_000
"""Values that the aliases of a file may add to those that are written out."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, in which every mistake is a yaml.YAMLError with its line.

    Duplicate keys, keys that are lists or mappings, aliases that contain themselves or expand to very many
    values, very large integers, and text that a tag or a date format can't convert are errors.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check_aliases(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError):
            raise _mistake(f"{_excerpt(node)} is no valid {node.tag.rpartition(':')[2]}", node) from None
        if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise _mistake(f"{_excerpt(node)} is an integer of more than 64 bits", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _mistake(f"{_excerpt(node)} is not a mapping", node)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys may be overridden
            if not isinstance(key_node, yaml.ScalarNode):
                raise _mistake("a key is a list or a mapping; in braces, quote it", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _mistake(f"duplicate key {key!r}", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(  # numbers in YAML 1.2; PyYAML reads 1e-9 as text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class PythonName(str):
    """Text with lm-eval's tag `!function`: the name of Python code, which is not imported here."""


class _TaskLoader(_StrictLoader):
    """The strict loader for lm-eval's task files, whose tag `!function` names Python code; it stays text."""


_TaskLoader.add_constructor("!function", lambda _, node: PythonName(node.value))


def _mistake(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _excerpt(node: yaml.Node) -> str:
    """Return a value as written, shortened."""
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return repr(node.value if len(node.value) <= 40 else f"{node.value[:40]}...")


def _check_aliases(root: yaml.Node) -> None:
    """Refuse aliases that contain themselves, or that expand to very many values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise _mistake("an alias contains itself", node)
        open_nodes.add(id(node))
        children: Sequence[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(map(size, children))
        open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > len(sizes) + EXPANDED:
        raise _mistake(f"its aliases expand to {size(root):,} values", root)


def parse_yaml(text: str, *, task_file: bool = False) -> Any:
    """Read YAML strictly and without code execution; every mistake is a yaml.YAMLError of one line.

    task_file: whether lm-eval's tag `!function` may occur.

    >>> parse_yaml("a: 1e-3")
    {'a': 0.001}
    """
    try:
        return yaml.load(text, Loader=_TaskLoader if task_file else _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise yaml.YAMLError(place + what) from None


def load_yaml(path: Path, *, task_file: bool = False) -> dict[str, Any]:
    """Read one YAML mapping, or raise ConfigError naming the file and the line.

    task_file: as in `parse_yaml`.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), task_file=task_file)
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
