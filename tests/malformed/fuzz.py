"""Fuzz every parser: python -m tests.malformed.fuzz [--examples N]

Valid inputs are changed at random: values, keys and entries of their data, and bytes of their files. A parser
returns, or raises an error that the command line shows as one message (UserError, OSError). What it finds is
mended, and kept as a case of this folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sqlite3
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from evomerge.config import RunConfig
from evomerge.delivery.convert.draft import ConvertOptions
from evomerge.delivery.convert.writer import convert
from evomerge.errors import UserError
from evomerge.evaluation.suite import Suite
from evomerge.merging.reading import read_recipe
from evomerge.merging.sources.checkpoint import Checkpoint, read_vocabulary
from evomerge.merging.sources.opening import open_source
from evomerge.running.store import StoreReader
from evomerge.schema import load_yaml
from evomerge.search.spaces.kinds import parse_space
from tests.malformed.models import INDEX, shard
from tests.malformed.workspace import (
    CONFIG,
    EVOLVE,
    GENETIC,
    MERGEKIT,
    PATH_SPACE,
    RECIPE,
    SPACE,
    SUITE,
    ZOO,
    header,
    limit_memory,
    replaced,
    write_valid,
)

HANG = 20
"""Seconds after which a parser counts as hanging."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 10**18, 10**30, -(10**20), 10**400]),
    st.floats(),
    st.sampled_from(
        ["", "~nosuchuser", "..", "/dev/zero", "\0", "base", "add", "x" * 300, "1e999", "\n", "(a+)+$"]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from _places(data[key], (*place, key))


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Draw data with one to three changes: of values, of keys, or of the number of entries."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in _places(data) if place] or [(None,)]))
        if last is None:
            return data
        holder = data
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(("replace", "replace", "remove", "add", "rename", "double")))
        if action == "replace":
            holder[last] = draw(VALUES)
        elif action == "remove":
            del holder[last]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(VALUES)
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(last)
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
    return data


@st.composite
def bytes_changed(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file's content, in a third of the draws with bytes removed, inserted or replaced."""
    if draw(st.integers(0, 2)):
        return content
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((0, 1, 2, 8, 100)))
        content = content[:at] + draw(st.binary(max_size=8)) + content[at + length :]
    return content


def _yaml(data: Any) -> bytes:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _json(data: Any) -> bytes:
    return json.dumps(data).encode()


def _shard(data: Any, weights: bytes) -> bytes:
    encoded = _json(data)
    return struct.pack("<Q", len(encoded)) + encoded + weights


Target = tuple[st.SearchStrategy[bytes], str, Callable[[], object]]
"""Contents of a file, its place, and what reads it."""


def targets(folder: Path) -> dict[str, Target]:
    """Return the parsers by name; they read files of a folder of valid inputs, which is the current one."""
    config, suite, space, recipe = (
        folder / f"{name}.yaml" for name in ("config", "suite", "space", "recipe")
    )
    data, weights = header(ZOO / "add" / "model.safetensors")
    lora, factors = header(ZOO / "sort" / "adapter_model.safetensors")
    model_config = json.loads((ZOO / "add" / "config.json").read_text())
    adapter_config = json.loads((ZOO / "sort" / "adapter_config.json").read_text())
    vocabulary = json.loads((ZOO / "add" / "tokenizer.json").read_text())
    index = shard(folder / "base")
    stored = folder / "run" / "run.sqlite"
    stored.parent.mkdir()
    with sqlite3.connect(stored) as database:
        database.execute("create table facts (key text, value text)")
    database.close()

    def texts(valid: Any) -> st.SearchStrategy[bytes]:
        return changed(valid).map(_yaml).flatmap(bytes_changed)

    def documents(valid: Any) -> st.SearchStrategy[bytes]:
        return changed(valid).map(_json).flatmap(bytes_changed)

    def shards(valid: Any, behind: bytes) -> st.SearchStrategy[bytes]:
        return changed(valid).map(lambda made: _shard(made, behind)).flatmap(bytes_changed)

    def read_space() -> object:
        return parse_space(load_yaml(space), str(space))

    def read_store() -> None:
        with StoreReader.read(stored.parent):
            pass

    def converted(**options: Any) -> None:
        (folder / "new.yaml").unlink(missing_ok=True)
        convert(recipe, ConvertOptions(out=folder / "new.yaml", **options))

    add = folder / "add"
    return {
        "config": (texts(CONFIG), "config.yaml", lambda: RunConfig.load(config)),
        "suite": (texts(SUITE), "suite.yaml", lambda: Suite.load(suite)),
        "space": (texts(SPACE), "space.yaml", read_space),
        "layer path": (texts(PATH_SPACE), "space.yaml", read_space),
        "recipe": (texts(RECIPE), "recipe.yaml", lambda: read_recipe(recipe)),
        "mergekit": (texts(MERGEKIT), "recipe.yaml", lambda: read_recipe(recipe)),
        "mergekit as a start": (texts(MERGEKIT), "recipe.yaml", lambda: converted(suite=str(suite))),
        "mergekit-evolve": (texts(EVOLVE), "recipe.yaml", converted),
        "mergenetic": (texts(GENETIC), "recipe.yaml", converted),
        "safetensors": (
            shards(data, weights),
            "add/model.safetensors",
            lambda: Checkpoint.open(str(add)),
        ),
        "lora": (
            shards(lora, factors),
            "sort/adapter_model.safetensors",
            lambda: open_source(f"{add}+{folder / 'sort'}"),
        ),
        "index": (
            documents(index),
            INDEX.replace("add", "base"),
            lambda: Checkpoint.open(str(folder / "base")),
        ),
        "model config": (documents(model_config), "add/config.json", lambda: Checkpoint.open(str(add))),
        "adapter config": (
            documents(adapter_config),
            "sort/adapter_config.json",
            lambda: open_source(f"{add}+{folder / 'sort'}"),
        ),
        "tokenizer": (documents(vocabulary), "add/tokenizer.json", lambda: read_vocabulary(add)),
        "store": (st.just(stored.read_bytes()).flatmap(bytes_changed), "run/run.sqlite", read_store),
    }


@contextmanager
def _alarm() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"hangs for {HANG} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, folder: Path, examples: int, *, reproducible: bool = False) -> tuple[int, int, float]:
    """Read changed inputs with one parser. Raises what escapes.

    Returns: their number, that of those that were accepted, and the longest time.
    """
    contents, place, read = targets(folder)[name]
    valid = (folder / place).read_bytes() if (folder / place).exists() else None
    count, accepted, slowest = 0, 0, 0.0

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=reproducible,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(contents)
    def every(content: bytes) -> None:
        nonlocal count, accepted, slowest
        replaced(folder, place).write_bytes(content)
        started = time.monotonic()
        try:
            with _alarm():
                read()
            accepted += 1
        except TimeoutError:
            raise
        except (UserError, OSError):
            pass
        count, slowest = count + 1, max(slowest, time.monotonic() - started)

    every()
    if valid is not None:
        replaced(folder, place).write_bytes(valid)
    return count, accepted, slowest


PARSERS = (
    "config",
    "suite",
    "space",
    "layer path",
    "recipe",
    "mergekit",
    "mergekit as a start",
    "mergekit-evolve",
    "mergenetic",
    "safetensors",
    "lora",
    "index",
    "model config",
    "adapter config",
    "tokenizer",
    "store",
)


def main() -> int:
    """Fuzz all parsers; return 0 if nothing escaped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="for each parser")
    parser.add_argument("--parser", choices=PARSERS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    limit_memory(4000)
    escaped = 0
    for name in [options.parser] if options.parser else PARSERS:
        with tempfile.TemporaryDirectory(prefix="malformed-") as place:
            folder = Path(place)
            write_valid(folder)
            try:
                count, accepted, slowest = fuzz(name, folder, options.examples)
                print(
                    f"{name}: {count} changed inputs, {count - accepted} refused, nothing escaped; "
                    f"slowest {slowest:.2f} s",
                    flush=True,
                )
            except Exception:
                escaped += 1
                print(f"{name}: escaped", flush=True)
                traceback.print_exc()
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
