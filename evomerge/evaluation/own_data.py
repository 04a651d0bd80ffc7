"""Own data: a JSONL or CSV file of prompts and answers as items of a task, read strictly, without lm-eval.

A mistake names the line. Each item gets its split by a hash of its prompt, so that new rows move no others.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import regex
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.scores import SPLITS, Split
from evomerge.files import read_regular
from evomerge.schema import parse_json

METRICS = ("exact", "contains", "regex", "number", "json", "choice")
"""How an answer is compared with the right one."""

SHARES: Mapping[Split, float] = {"search": 0.5, "select": 0.2, "test": 0.3}
"""The part of the items that each split gets by the hash of their prompts."""

LARGEST_DATA = 2_000_000_000
"""Bytes of a data file."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_SECONDS = 1.0
"""What matching one regular expression may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where an item's parts come from: names of columns, or jinja texts over them; choices: a column."""

    prompt: str
    answer: str
    choices: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnItem:
    """One item. line: of the file. row: all of its columns. answer: as text; of a choice, the choice."""

    line: int
    prompt: str
    answer: str
    row: Mapping[str, Any]
    choices: tuple[str, ...] = ()

    @property
    def split(self) -> Split:
        """The split that the hash of the prompt gives."""
        position = int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:8], "big") / 2**64
        for split, end in zip(SHARES, itertools.accumulate(SHARES.values()), strict=True):
            if position < end:
                return split
        return SPLITS[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """The items of a file. repeated: rows that were left out, because an earlier one asks the same."""

    items: tuple[OwnItem, ...]
    repeated: int

    def counts(self) -> dict[Split, int]:
        """Return the number of items of each split."""
        return {split: sum(item.split == split for item in self.items) for split in SPLITS}


def read(path: Path, columns: Columns, metric: str) -> OwnData:
    """Read the items of a file.

    Args:
        path: a .jsonl or .csv file.
        columns: where prompt, answer and choices stand.
        metric: one of METRICS, or another name where a scorer compares the answers.

    Raises:
        ConfigError: the file can't be read or has no items, or a row has a mistake; it names the line.
    """
    prompt, answer = _Part(columns.prompt, path, "prompt"), _Part(columns.answer, path, "answer")
    items: dict[tuple[str, tuple[str, ...]], OwnItem] = {}
    ids: dict[str, int] = {}
    repeated = 0
    for line, row in _rows(path):
        if row.get("id") not in (None, ""):
            first = ids.setdefault(_text(row["id"]), line)
            if first != line:
                raise ConfigError(
                    f"{path}: line {line}: the id {_text(row['id'])!r} is that of line {first}, too"
                )
        question = prompt.of(row, line)
        choices = _choices(path, line, row, columns.choices) if columns.choices else ()
        right = answer.value(row, line)
        text = _chosen(path, line, right, choices) if choices else answer.as_text(right, line)
        _check_answer(path, line, text, metric)
        item = OwnItem(line=line, prompt=question, answer=text, row=row, choices=choices)
        earlier = items.setdefault((question, choices), item)
        if earlier.answer != text:
            raise ConfigError(
                f"{path}: lines {earlier.line} and {line} ask the same and have different answers",
                got=f"{earlier.answer[:80]!r} and {text[:80]!r}",
                fix="remove one of them, or add to the prompt what makes them differ",
            )
        repeated += earlier is not item
    if not items:
        raise ConfigError(f"{path}: no items", expected="one row for each item")
    return OwnData(items=tuple(items.values()), repeated=repeated)


def scorer(metric: str) -> Callable[[str, str], dict[str, float]]:
    """Return what compares a generated answer with the right one: (answer, right one) -> metric -> value."""
    return {"exact": _exact, "contains": _contains, "regex": _regex, "number": _number, "json": _json}[metric]


def _exact(answer: str, right: str) -> dict[str, float]:
    return {"exact": float(answer.strip() == right.strip())}


def _contains(answer: str, right: str) -> dict[str, float]:
    return {"contains": float(" ".join(right.split()).casefold() in " ".join(answer.split()).casefold())}


def _regex(answer: str, right: str) -> dict[str, float]:
    try:
        return {"regex": float(regex.search(right, answer, timeout=_SECONDS) is not None)}
    except TimeoutError:
        return {"regex": 0.0}


def _number(answer: str, right: str) -> dict[str, float]:
    numbers = _NUMBER.findall(answer)
    equal = bool(numbers) and math.isclose(_float(numbers[-1]), _float(right), rel_tol=1e-6, abs_tol=1e-9)
    return {"number": float(equal)}


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _json(answer: str, right: str) -> dict[str, float]:
    from evomerge.evaluation.json_answers import score_value

    values = score_value(answer, json.loads(right))
    return {"json": values["partial"], **{f"json_{name}": value for name, value in values.items()}}


def _check_answer(path: Path, line: int, text: str, metric: str) -> None:
    """Refuse a right answer that its metric can't compare with."""
    try:
        if metric == "regex":
            regex.compile(text)
        elif metric == "number" and not _NUMBER.fullmatch(text.strip()):
            raise ValueError(f"{text[:80]!r} is no number")
        elif metric == "json":
            parse_json(text.encode())
    except (ValueError, regex.error) as error:
        raise ConfigError(
            f"{path}: line {line}: the answer does not fit the metric {metric}", got=str(error)
        ) from None


def _choices(path: Path, line: int, row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = _column(path, line, row, column)
    choices = value.split("|") if isinstance(value, str) else value if isinstance(value, list) else []
    texts = tuple(_text(choice).strip() for choice in choices)
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise ConfigError(
            f"{path}: line {line}: the choices in {column!r}",
            expected="two or more different texts, in a list, or separated by | in a CSV file",
            got=repr(value)[:80],
        )
    return texts


def _chosen(path: Path, line: int, right: Any, choices: Sequence[str]) -> str:
    """Return the right choice, which an answer gives as its text, its letter or its index from 0."""
    text = _text(right).strip()
    if text in choices and not isinstance(right, int):
        return text
    if re.fullmatch(r"\d{1,6}", text) and int(text) < len(choices):
        return choices[int(text)]
    if text in _LETTERS[: len(choices)] and len(text) == 1:
        return choices[_LETTERS.index(text)]
    raise ConfigError(
        f"{path}: line {line}: the answer is none of the choices",
        expected=f"one of {', '.join(map(repr, choices))[:200]}, its letter (A ...) or its index (0 ...)",
        got=repr(right)[:80],
    )


class _Part:
    """A column, or a jinja text over all columns."""

    def __init__(self, source: str, path: Path, name: str) -> None:
        self._source, self._path, self._name = source, path, name
        self._template: jinja2.Template | None = None
        if "{{" in source or "{%" in source:
            environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
            try:
                self._template = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ConfigError(f"{path}: {name}: not a valid jinja text", got=str(error)) from None

    def value(self, row: Mapping[str, Any], line: int) -> Any:
        """Return the column's value, or the text."""
        if self._template is None:
            return _column(self._path, line, row, self._source)
        try:
            return self._template.render(row)
        except Exception as error:
            raise ConfigError(
                f"{self._path}: line {line}: {self._name} can't be rendered",
                got=f"{type(error).__name__}: {error}",
                fix=f"Columns: {', '.join(map(str, row))}",
            ) from None

    def as_text(self, value: Any, line: int) -> str:
        """Return a value as text; refuse an empty one."""
        if not (text := _text(value)).strip():
            raise ConfigError(f"{self._path}: line {line}: the {self._name} is empty")
        return text

    def of(self, row: Mapping[str, Any], line: int) -> str:
        """Return the text of a row's part."""
        return self.as_text(self.value(row, line), line)


def _column(path: Path, line: int, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ConfigError(f"{path}: line {line}: no column {name!r}", fix=nearest(name, list(row)))
    return row[name]


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def columns_of(path: Path) -> list[str]:
    """Return the names of a data file's columns, as its first row has them; raise ConfigError without any."""
    for _, row in _rows(path):
        return list(row)
    raise ConfigError(f"{path}: no rows", expected="one item per row")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the line and the columns of each row."""
    if path.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{path}: unknown kind of data file", expected="a file named *.jsonl or *.csv")
    try:
        text = read_regular(path, LARGEST_DATA).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text", got=str(error)) from None
    yield from _jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text)


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = parse_json(content.encode())
        except ValueError as error:
            raise ConfigError(f"{path}: line {line}: not valid JSON", got=str(error)) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}: line {line}: not an object", expected='{"column": value, ...}', got=content[:80]
            )
        yield line, row


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
                if twice := [name for name in names if names.count(name) > 1]:
                    raise ConfigError(f"{path}: line {reader.line_num}: the column {twice[0]!r} stands twice")
                continue
            if len(cells) != len(names):
                raise ConfigError(
                    f"{path}: line {reader.line_num}: {len(cells)} cells",
                    expected=f"{len(names)}, as in the first line",
                )
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: not valid CSV", got=str(error)) from None
