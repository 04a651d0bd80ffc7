"""Strict YAML and JSON: pydantic models with errors in evomerge's form, and the lookup of presets.

Every file that users write (run config, search space, suite) and every JSON file of a model is parsed here.
Unknown keys of users' files are errors that name the nearest valid key, and all problems of a file are listed
at once.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from evomerge.errors import ConfigError, ModelError, UserError, nearest
from evomerge.files import expanded, read_regular

try:
    from yaml import CSafeLoader as _YamlLoader
except ImportError:  # PyYAML without libyaml: the same results, three times slower
    from yaml import SafeLoader as _YamlLoader  # type: ignore[assignment]

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

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and not _takes_flags(cls.model_fields[info.field_name].annotation):
            raise ValueError("expected a number or a text, not a flag (a text in quotes may be `yes`)")
        return value


def _takes_flags(annotation: Any) -> bool:
    """Say whether a type admits true and false, or is something that other validators decide about."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return any(isinstance(value, bool) for value in inner) or len(inner) == 1
    if inner:
        return any(map(_takes_flags, inner))
    return annotation not in (int, float, str)


LARGEST_COUNT = 10**9
"""Bound of numbers of candidates, items, generations ...; no machine gets there."""
LARGEST_SEED = 10**18
"""Bound of seeds: SQLite stores integers of 63 bits."""
LARGEST_FACTOR = 1e6
"""Bound of weights, prices and ranges of parameters: products of larger ones overflow in float32."""

T = TypeVar("T", bound=BaseModel)


def parse(model: type[T], data: object, where: str, *, error: type[UserError] = ConfigError) -> T:
    """Validate plain data; raise an error that lists every problem with its place in the file.

    where: the file's name in the message. error: its class.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: not a mapping", expected="keys and values", got=type(data).__name__)
    try:
        return model.model_validate(data)
    except ValidationError as invalid:
        problems = [_sentence(model, problem) for problem in _furthest(invalid.errors())]
        count = len(problems)
        head = f"{where}: {problems[0]}" if count == 1 else f"{where}: {count} problems"
        if count > LISTED:
            problems = [*problems[:LISTED], f"and {count - LISTED} more"]
        raise error("\n  - ".join([head, *(problems if count > 1 else [])])) from None


LISTED = 20
"""Problems of a file that a message lists."""
LARGEST_FILE = 4_000_000
"""Bytes of a YAML file. A recipe with a group of its own for each of 10,000 tensors is smaller, and reading
more takes seconds."""
DEEPEST = 100
"""Levels of lists and mappings inside each other, in YAML and JSON; deeper ones exhaust the stack."""
LARGEST_INTEGER = 2**64
"""Integers of this size and more are refused: no setting needs them, and Python prints no very long ones."""
EXPANDED = 100_000
"""Values that the aliases of a file may add to those that are written out."""


class _StrictLoader(_YamlLoader):
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
                if "\0" in value:
                    raise _mistake(f"{_excerpt(node)} holds a NUL character", node)
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
        _check_depth(text)
        return yaml.load(text, Loader=_TaskLoader if task_file else _StrictLoader)
    except (RecursionError, UnicodeEncodeError) as error:
        deep = isinstance(error, RecursionError)
        raise yaml.YAMLError("nested too deeply" if deep else "text that is not Unicode") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise yaml.YAMLError(place + what) from None


def _check_depth(text: str) -> None:
    """Refuse lists and mappings that are nested too deeply, before the C parser recurses into them."""
    depth = 0
    for event in yaml.parse(text, Loader=_YamlLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else "unknown"
                raise yaml.YAMLError(f"line {line}: nested more than {DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def load_yaml(path: Path, *, task_file: bool = False) -> dict[str, Any]:
    """Read one YAML mapping, or raise ConfigError naming the file and the line.

    task_file: as in `parse_yaml`.
    """
    return _mapping_of(_loaded(path, functools.partial(parse_yaml, task_file=task_file)), str(path))


def load_yaml_documents(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file of one or several mappings with `---` between them; raise ConfigError. Empty ones are
    left out."""
    documents = [data for data in _loaded(path, _parse_documents) if data is not None]
    return [_mapping_of(data, str(path)) for data in documents or [None]]


def _parse_documents(text: str) -> list[Any]:
    """Read several YAML documents, as `parse_yaml` does one."""
    try:
        events = list(yaml.parse(text, Loader=_YamlLoader))
    except yaml.YAMLError:
        return [parse_yaml(text)]  # which says what is wrong
    marks = [event.start_mark for event in events if isinstance(event, yaml.DocumentStartEvent)]
    starts = [mark.index for mark in marks if mark is not None]
    if len(starts) < 2:
        return [parse_yaml(text)]
    ends = [*starts[1:], len(text)]
    lines = [text.count("\n", 0, start) for start in starts]  # so that messages name the file's lines
    return [
        parse_yaml("\n" * line + text[start:end])
        for line, start, end in zip(lines, starts, ends, strict=True)
    ]


def _mapping_of(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a mapping", expected="keys and values", got=type(data).__name__)
    return data


def _loaded(path: Path, parse: Callable[[str], Any]) -> Any:
    """Return what a parser makes of a file's text, or raise ConfigError."""
    try:
        return parse(read_regular(path, LARGEST_FILE).decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text", got=str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML", got=" ".join(str(error).split())) from None


LARGEST_JSON = 16_000_000
"""Bytes of a JSON file of a model, where the reader names no other limit; an index of 100,000 tensors has 9
million."""
LONGEST_NUMBER = 300
"""Digits of a number in JSON; tokenizers of the hub have a `model_max_length` of 31 digits."""


def parse_json(content: bytes, *, infinity: bool = False) -> Any:
    """Read JSON strictly; every mistake is a ValueError whose text says what is wrong, and where.

    NaN, numbers that overflow, duplicate keys, lone surrogates and very deep nesting are mistakes.

    infinity: whether the literals `Infinity` and `-Infinity` may occur.

    >>> parse_json(b'{"a": 1e999}')
    Traceback (most recent call last):
    ValueError: 1e999 is not a finite number (line 1, column 7)
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None

    def mistake(literal: str, problem: str) -> ValueError:
        before = text[: max(text.find(literal), 0)]
        place = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
        shown = literal if len(literal) <= 40 else f"{literal[:40]}..."
        return ValueError(f"{shown} {problem} ({place})")

    def constant(literal: str) -> float:
        if not infinity or literal == "NaN":
            raise mistake(literal, "is not a finite number")
        return float(literal)

    def real(literal: str) -> float:
        if abs(value := float(literal)) == float("inf"):
            raise mistake(literal, "is not a finite number")
        return value

    def whole(literal: str) -> int:
        if len(literal) > LONGEST_NUMBER:
            raise mistake(literal, f"is a number of {len(literal)} digits")
        return int(literal)

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(data := dict(pairs)) < len(pairs):
            (key, _), *_ = (Counter(key for key, _ in pairs) - Counter(list(data))).items()
            raise mistake(json.dumps(key, ensure_ascii=False), "is a duplicate key")
        return data

    try:
        data = json.loads(
            text, parse_constant=constant, parse_float=real, parse_int=whole, object_pairs_hook=mapping
        )
        _check_levels(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            lone = str(error.object)[error.start]
            raise mistake(f"\\u{ord(lone):04x}", "is half of a character (a lone surrogate)") from None
    return data


def _check_levels(data: object) -> None:
    """Raise RecursionError where lists and mappings are nested too deeply."""
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    if level:
        raise RecursionError


def load_json(path: Path, *, limit: int = LARGEST_JSON, infinity: bool = False) -> dict[str, Any]:
    """Read a JSON mapping of a model's folder, or raise ModelError that names the file and the place.

    limit: of the file, in bytes. infinity: as in `parse_json`.
    """
    try:
        data = parse_json(read_regular(path, limit), infinity=infinity)
    except OSError as error:
        raise ModelError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON", got=str(error), fix="download the file again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a mapping", got=type(data).__name__)
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
        path = folder / expanded(name)
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
        fields = owner.model_fields.items() if owner is not None else ()
        names = [field.alias or name for name, field in fields]
        hint = f" ({nearest(place[-1], names)})" if owner is not None else ""
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
