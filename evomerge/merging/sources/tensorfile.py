"""safetensors files: validated headers without reading weights, and a streaming writer.

The library's writer needs all tensors at once. `ShardWriter` writes the header first and then one tensor at
a time, so memory stays bounded. The format is eight bytes of header length, a JSON header, and the raw
tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from evomerge.errors import ModelError
from evomerge.files import open_regular
from evomerge.merging.sources.arrays import WeightArray
from evomerge.schema import parse_json

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
ARRAY_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
"""The types a merge can read: safetensors' code -> numpy's name."""
COPIED = {
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "int64", "U32": "int32", "U16": "int16", "U8": "uint8"},
}
"""The types that are copied unchanged: whole numbers and truth values. Unsigned ones of several bytes are
read as their bits (numpy's uint16 stands for bfloat16)."""
PACKED = ("weight", "bias", "qweight", "qzeros", "g_idx", "weight_packed", "_blocks", "_scales")
"""Endings of the names of whole numbers that stand for weights, in quantised files."""
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NAMES = {code: name for name, code in CODES.items()}
HEADER_LIMIT = 25_000_000
"""Largest header that is read, in bytes: about 200,000 tensors in one file. (The library's is 100 million,
which would take a gigabyte of memory.)"""
LONGEST_NAME = 1000
"""Characters of a tensor's name."""
DIMENSIONS = 32
"""Most dimensions of a tensor, as in older numpy."""
ELEMENTS = 2**48
"""Most elements of a tensor, not counting dimensions of size 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One tensor's entry in a file's header: its shape, and its type as safetensors' code, e.g. `BF16`.

    offset: the start of its data, in bytes from the start of the file; not part of its identity.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int = field(default=0, compare=False)

    @property
    def count(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def is_copied(name: str, header: Header) -> bool:
    """Say whether a tensor holds whole numbers or truth values, and no packed weights.

    >>> is_copied("bn.num_batches_tracked", Header(shape=(), dtype="I64"))
    True
    """
    eight_bits = header.dtype in ("I8", "U8") and len(header.shape) > 1
    return header.dtype in COPIED and not eight_bits and not name.endswith(PACKED)


def read_header(path: Path) -> dict[str, Header]:
    """Return name -> header of a safetensors file, in the order of the data.

    Reads only the header, but compares it with the size of the file, so that a truncated download is noticed
    before any work starts. Raises ModelError.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise _damaged(path, f"a header of {length} bytes in a file of {size} bytes")
            data = parse_json(file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, f"a header that is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _damaged(path, "a header that is not a mapping")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "__metadata__ that is not a mapping of texts")
    return _validated(path, data, 8 + length, size)


def _validated(path: Path, data: Mapping[str, Any], begin: int, size: int) -> dict[str, Header]:
    entries = []
    for name, entry in data.items():
        if not _is_name(name):
            raise _damaged(path, f"a tensor with the name {name[:80]!r}")
        try:
            start, end = map(_whole, entry["data_offsets"])
            shape = tuple(map(_whole, entry["shape"]))
            header = Header(shape=shape, dtype=entry["dtype"], offset=begin + start)
            known = header.dtype in ITEM_SIZES
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"an unreadable entry for tensor {name!r}") from None
        if not known:
            raise ModelError(
                f"{path}: tensor {name!r} has the unknown type {str(header.dtype)[:40]!r}",
                expected=", ".join(ITEM_SIZES),
            )
        if len(shape) > DIMENSIONS:
            raise _damaged(path, f"tensor {name!r} of {len(shape)} dimensions")
        if (
            math.prod(filter(None, shape)) > ELEMENTS
            or end - start != header.count * ITEM_SIZES[header.dtype]
        ):
            raise _damaged(path, f"tensor {name!r} of shape {list(shape)} in {end - start} bytes")
        entries.append((start, end, name, header))
    entries.sort(key=lambda entry: entry[:2])
    expected = 0
    for start, end, name, _ in entries:
        if start != expected:
            raise _damaged(path, f"tensor {name!r} at byte {start} instead of {expected}")
        expected = end
    if expected != size - begin:
        raise _damaged(path, f"{size - begin} bytes of weights where the header announces {expected}")
    return {name: header for _, _, name, header in entries}


def _is_name(name: str) -> bool:
    """Say whether a text can be the name of a tensor, in whose parts digits are ASCII numbers."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    short = 0 < len(name) <= LONGEST_NAME and all(len(part) < 20 for part in numbers)
    return short and name.isprintable() and all(map(str.isascii, numbers))


def _whole(value: object) -> int:
    """Return a size or an offset; fractions, truth values and negative numbers raise ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _damaged(path: Path, got: str) -> ModelError:
    return ModelError(
        f"{path}: truncated or corrupt safetensors file",
        expected="a complete file whose header fits its size",
        got=got,
        fix="download or copy the file again",
    )


class ShardWriter:
    """Write one safetensors file, one tensor after the other, in the announced order.

    >>> import tempfile, numpy
    >>> headers = {"a": Header(shape=(2,), dtype="F32")}
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> with ShardWriter(path, headers) as writer:
    ...     writer.add("a", numpy.zeros(2, dtype="float32"))
    >>> read_header(path) == headers
    True
    """

    def __init__(self, path: Path, headers: Mapping[str, Header]) -> None:
        self._pending = list(headers.items())[::-1]
        self._file: BinaryIO = path.open("xb")
        self._file.write(_encoded(headers))

    def add(self, name: str, array: WeightArray) -> None:
        """Append the next tensor; its name, shape and type must be those announced."""
        expected, header = self._pending.pop()
        assert name == expected, (name, expected)
        assert array.shape == header.shape, name
        assert array.dtype == {**ARRAY_TYPES, **COPIED}[header.dtype], (array.dtype, header.dtype)
        self._file.write(array.reshape(-1).view("uint8").data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._pending, self._pending
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _encoded(headers: Mapping[str, Header]) -> bytes:
    data: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in headers.items():
        start, end = end, end + header.count * ITEM_SIZES[header.dtype]
        data[name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [start, end]}
    text = json.dumps(data, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as readers that map memory expect
    return struct.pack("<Q", len(text)) + text
