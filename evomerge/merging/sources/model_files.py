"""Facts about a model's files, from which a later session can tell which of them changed and how.

For weight files these are the size, the header and samples of the contents, which is fast for any size; all
bytes are hashed on request only. Small files (config, tokenizer) are hashed completely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.merging.sources import adapter
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.beside import unwrapped
from evomerge.merging.sources.checkpoint import Checkpoint, sample_hash
from evomerge.merging.sources.source import Source
from evomerge.schema import load_json

Facts = Mapping[str, Mapping[str, int | str]]
"""File -> its facts: size, header and sample, or the hash of its contents."""
Stats = Mapping[Path, tuple[int, ...]]
"""File -> device, inode, size and times, of which at least one changes when it is written or replaced."""
JSON = ("config.json", adapter.CONFIG)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
ASKING = ("chat_template.jinja", "generation_config.json")
"""What asks a model and ends its answers. Runs of older versions did not look at these two."""
_WORDS = {"size": "another size", "header": "another header", "sample": "other contents"}


def files_of(source: Source) -> dict[str, Path]:
    """Return name -> path of all files that determine what a model computes.

    An adapter's files come after those of its base model.
    """
    source = unwrapped(source)
    if isinstance(source, AdaptedCheckpoint):
        adapter_files = (source.adapter / adapter.CONFIG, source.adapter / adapter.WEIGHTS)
        return files_of(source.base) | {path.name: path for path in adapter_files}
    assert isinstance(source, Checkpoint)
    small = (source.folder / name for name in (*JSON[:1], *TOKENIZER, *ASKING))
    return {path.name: path for path in (*small, *source.files) if path.is_file()}


def facts(source: Source) -> dict[str, dict[str, int | str]]:
    """Return facts about a model's files without reading all bytes."""
    return {name: _of_file(path) for name, path in files_of(source).items()}


def full_hashes(source: Source) -> dict[str, str]:
    """Return the SHA-256 of every byte of a model's files."""
    hashes = {}
    for name, path in files_of(source).items():
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def stats(sources: Iterable[Source], others: Iterable[Path] = ()) -> Stats:
    """Return the sizes and times of models' files and of other files, which cost microseconds."""
    files = [path for source in sources for path in files_of(source).values()]
    return {path: _stat(path) for path in (*files, *others)}


def facts_of_measured(path: Path) -> dict[str, int | str]:
    """Return facts about a Fisher or Gram file, whatever its name ends in."""
    return {"size": path.stat().st_size, "sample": sample_hash(path)}


def refuse_changed(before: Stats) -> None:
    """Raise ModelError if files were written or replaced since `stats` looked at them."""
    if changed := changed_since(before):
        raise ModelError(
            "model files changed while they were merged, so nothing was written",
            got=", ".join(map(str, changed)),
            fix="let the other program finish, then run this again",
        )


def changed_since(before: Stats) -> list[Path]:
    """Return the files that were written, replaced or removed since `stats` looked at them."""
    return [path for path, stat in before.items() if _stat(path) != stat]


def changes(before: Facts, after: Facts) -> list[str]:
    """List the files of a model that changed, and how.

    >>> weights = {"size": 10, "header": "a", "sample": "b"}
    >>> changes({"w.safetensors": weights}, {"w.safetensors": {**weights, "sample": "c"}})
    ['w.safetensors (other contents)']
    >>> changes({"a.json": {"contents": "a"}}, {"b.json": {"contents": "a"}})
    ['a.json (missing)', 'b.json (new)']
    """
    changed = [f"{name} (missing)" for name in before if name not in after]
    for name in after:
        if name not in before:
            changed.append(f"{name} (new)")
        elif before[name] != after[name]:
            keys = [key for key in after[name] if before[name].get(key) != after[name][key]]
            changed.append(f"{name} ({_WORDS.get(keys[0] if keys else '', 'other contents')})")
    return changed


def _stat(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _of_file(path: Path) -> dict[str, int | str]:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = hashlib.sha256(file.read(length)).hexdigest()
        return {"size": path.stat().st_size, "header": header, "sample": sample_hash(path)}
    content = path.read_bytes()
    if path.name in JSON:  # tools that copy a model rewrite it in another layout
        content = json.dumps(load_json(path, infinity=True), sort_keys=True).encode()
    return {"contents": hashlib.sha256(content).hexdigest()}
