"""Data of lm-eval tasks: local files without an item, and ids that stand on several items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.files import open_regular

_TEXTS = {"json": 1, "csv": 2, "text": 1}
"""Value of `dataset_path` -> lines with text that a file with an item has."""
_BINARY = ("parquet", "arrow")


def refuse_empty(kind: object, files: object, folder: Path) -> None:
    """Raise ConfigError where all local files of a dataset split are empty.

    kind: the task's `dataset_path`. files: its `data_files`. folder: where relative names start.
    """
    if kind not in (*_TEXTS, *_BINARY):
        return
    for name, part in files.items() if isinstance(files, Mapping) else [(None, files)]:
        paths = list(_paths(part, folder))
        if paths and all(_is_empty(path, _TEXTS.get(str(kind), 0)) for path in paths):
            split = "" if name is None else f" of the dataset split {name!r}"
            raise ConfigError(
                f"the data file{split} is empty", expected="one row for each item", got=str(paths[0])
            )


def _paths(files: object, folder: Path) -> Iterator[Path]:
    """Yield the local files that `data_files` names."""
    if isinstance(files, Sequence) and not isinstance(files, str):
        for each in files:
            yield from _paths(each, folder)
    elif isinstance(files, str) and files and "://" not in files:
        try:
            path = folder / files
            yield from [path] if path.is_file() else (p for p in folder.glob(files) if p.is_file())
        except (OSError, ValueError, NotImplementedError):  # lm-eval's reader says why
            return


def _is_empty(path: Path, lines: int) -> bool:
    """Whether a file has fewer lines with text; 0: no byte."""
    try:
        with open_regular(path) as file:
            if lines == 0 or path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
                return not file.read(1)
            found = 0
            for line in file:
                found += bool(line.strip())
                if found >= lines:
                    return False
            return True
    except OSError:
        return False


def repeated_ids(task: str, documents: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return a sentence where an `id` of a task's data stands on several items; none without.

    documents: by dataset split, because many data sets count from 0 in each.

    >>> repeated_ids("t", {"train": [{"id": 7}, {"id": 7}], "test": [{"id": 7}, {}]})
    ["task 't': the id 7 of its data stands on 2 items; check that no rows were copied"]
    """
    counts: Counter[str] = Counter()
    for part in documents.values():
        ids = Counter(repr(doc["id"]) for doc in part if isinstance(doc, Mapping) and _is_id(doc.get("id")))
        counts.update({each: count for each, count in ids.items() if count > 1})
    if not counts:
        return []
    first, count = counts.most_common(1)[0]
    more = f" (and {len(counts) - 1} other ids on several)" if len(counts) > 1 else ""
    return [
        f"task {task!r}: the id {first[:80]} of its data stands on {count} items{more}; "
        "check that no rows were copied"
    ]


def _is_id(value: object) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or type(value) is int
