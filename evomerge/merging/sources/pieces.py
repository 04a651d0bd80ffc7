"""Tokens and their ids in tokenizers without tokenizer.json: sentencepiece, byte pairs, word pieces, tekken.

They only serve to compare models: two models with the same kind of file whose ids differ can't be merged. The
ids in a file are not always the model's (some tokenizers add special tokens before them), so embedding rows
are never matched by them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.files import read_regular
from evomerge.merging.sources.beside import tokenizer_folder
from evomerge.merging.sources.checkpoint import LARGEST_TOKENIZER
from evomerge.merging.sources.source import Source
from evomerge.schema import load_json

Tokens = Mapping[str, int]
KINDS = ("vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.model")
"""Names of the files, one per kind of tokenizer."""
ADDED = "added_tokens.json"
"""The tokens beside those of any of them."""


def other_tokens(source: Source) -> dict[str, tuple[str, Tokens]]:
    """Return kind -> name of the file and its tokens, for a model's files that are no tokenizer.json.

    Raises ModelError for a file that holds no tokens.
    """
    folder = tokenizer_folder(source)
    added = _cached(folder / ADDED) if (folder / ADDED).is_file() else {}
    found: dict[str, tuple[str, Tokens]] = {}
    for kind in KINDS:
        path = next((p for p in sorted(folder.glob("*")) if fnmatch(p.name, kind) and p.is_file()), None)
        if path is not None:
            found[kind] = path.name, {**_cached(path), **added}
    return found


def _cached(path: Path) -> Tokens:
    found = path.stat()
    return _read(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _read(path: Path, size: int, changed: int) -> Tokens:
    """Return the tokens of a file. size, changed: make the cached tokens of an older file unused."""
    readers = {".json": _of_json, ".txt": _of_lines, ".tiktoken": _of_ranks, ".model": _of_sentencepiece}
    try:
        tokens = readers[path.suffix](path)
        if not tokens and path.name != ADDED:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{path}: holds no tokens", expected="the file of a tokenizer", fix="download the file again"
        ) from None
    return tokens


def _of_json(path: Path) -> dict[str, int]:
    data: Mapping[str, Any] = load_json(path, limit=LARGEST_TOKENIZER)
    if path.name == "tekken.json":
        listed = data.get("special_tokens") or ()
        special = {str(entry["token_str"]): -1 - int(entry["rank"]) for entry in listed}
        return {str(entry["token_bytes"]): int(entry["rank"]) for entry in data["vocab"]} | special
    return {token: int(row) for token, row in data.items()}


def _of_lines(path: Path) -> dict[str, int]:
    lines = read_regular(path, LARGEST_TOKENIZER).decode().split("\n")
    return {token.rstrip("\r"): row for row, token in enumerate(lines) if token.strip()}


def _of_ranks(path: Path) -> dict[str, int]:
    lines = read_regular(path, LARGEST_TOKENIZER).decode().split("\n")
    return {token: int(rank) for token, rank in (line.split() for line in lines if line.strip())}


def _of_sentencepiece(path: Path) -> dict[str, int]:
    """Read the pieces of sentencepiece's ModelProto: field 1 of it, whose own field 1 is the piece's text."""
    content = read_regular(path, LARGEST_TOKENIZER)
    pieces = [piece for field, piece in _fields(content) if field == 1]
    texts = [next((text for field, text in _fields(piece) if field == 1), b"") for piece in pieces]
    return {text.decode(): row for row, text in enumerate(texts)}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of a protobuf message; ValueError if it is none."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            _, at = _number(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _number(message, at)
            yield field, message[at : at + size]
            at += size
        else:
            raise ValueError
    if at != len(message):
        raise ValueError


def _number(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError
