"""Models of the Hugging Face hub: ids with a revision, what is downloaded of them, and ids of local folders.

A location `org/name` or `org/name@revision` is a hub id, unless a folder of that name exists. A revision is a
branch, a tag or a commit. Downloaded are the weights that the index names (or the single file), and the files
that a merge takes over beside them (see `beside`), code included, which is never run; no pickled weights, no
states of trainings, no copies in other formats or folders.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from evomerge.errors import ConfigError, ModelError
from evomerge.files import expanded
from evomerge.merging.sources.file_kinds import LARGEST, LEFT_OUT, WRITTEN, is_tokenizers, matches
from evomerge.schema import load_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
READ = ("config.json", "README.md", INDEX, ADAPTER[0])
"""Files of the top level that are read, and not taken over."""
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)", re.ASCII)
"""A model's folder in the hub's cache; it holds `snapshots/COMMIT`."""


def split_id(location: str) -> tuple[str, str | None] | None:
    """Return (id, revision) if a location has the form of a hub id, else None.

    >>> split_id("org/model@v1.0"), split_id("org/model@refs/pr/3"), split_id("./org/model")
    (('org/model', 'v1.0'), ('org/model', 'refs/pr/3'), None)
    """
    match = _ID.fullmatch(location)
    return (match[1], match[2]) if match and ".." not in location and "--" not in match[1] else None


def is_local(location: str) -> bool:
    """Say whether a location is a folder of this machine."""
    try:
        return expanded(location).is_dir()
    except (ConfigError, OSError, ValueError):
        return False


def known_id(location: str) -> str | None:
    """Return the hub id (with its revision, if known) of a model's location, or None.

    It is the location itself, or the place of a folder in the hub's cache.

    >>> known_id("/cache/models--org--name/snapshots/0a1b2c")
    'org/name@0a1b2c'
    """
    if not is_local(location) and split_id(location) is not None:
        return location
    parts = expanded(location).resolve().parts
    for i, part in enumerate(parts):
        if match := _CACHED.fullmatch(part):
            commit = parts[i + 2 : i + 3] if parts[i + 1 : i + 2] == ("snapshots",) else ()
            return "@".join((f"{match[1]}/{match[2]}", *commit))
    return None


def folder_of(location: str) -> Path:
    """Return the folder of a model or adapter, which is downloaded if the location is a hub id.

    Raises:
        ModelError: it is neither a folder nor a model of the hub, or the hub is out of reach.
    """
    folder = expanded(location)
    if folder.is_dir():
        return folder
    found = split_id(location)
    if found is None:
        raise _no_folder(location)
    name, revision = found
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return _downloaded(name, revision)
    except HFValidationError:
        raise _no_folder(location) from None
    except ModelError:
        raise
    except Exception as error:  # the hub client raises errors of its own, of requests and of the OS
        for file in ("config.json", ADAPTER[0]):
            cached = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            if isinstance(cached, str):
                return Path(cached).parent
        raise ModelError(
            f"{location}: neither a local folder nor available from the Hugging Face hub",
            got=" ".join(str(error).split())[:300] or type(error).__name__,
            fix="check the spelling and the network, or download the model and give its folder",
        ) from None


def _downloaded(name: str, revision: str | None) -> Path:
    """Download the files of a model that a merge reads. On a terminal, the hub client shows its progress."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    files = [file.rfilename for file in info.siblings or ()]
    large = {file.rfilename for file in info.siblings or () if (file.size or 0) > LARGEST}
    shards: Iterable[str] = ()
    if SINGLE not in files and INDEX in files:
        index = load_json(Path(huggingface_hub.hf_hub_download(name, INDEX, revision=revision)))
        where = index.get("weight_map")
        shards = [str(shard) for shard in where.values()] if isinstance(where, dict) else ()
    wanted = needed(files, shards, large)
    if not any(file.endswith(".safetensors") for file in wanted):
        weights = [f for f in files if f.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
        raise ModelError(
            f"{name}: the hub has no weights of it that can be read",
            expected=f"{SINGLE}, or shards with {INDEX}",
            got=", ".join(weights[:4]) + (" ..." if len(weights) > 4 else "") or "no weights",
            fix="download it and make a folder of it: evomerge import FOLDER OUT",
        )
    cached = [huggingface_hub.try_to_load_from_cache(name, file, revision=info.sha) for file in wanted]
    if cached and all(isinstance(path, str) for path in cached):
        top = next(path for path, file in zip(cached, wanted, strict=True) if "/" not in file)
        return Path(str(top)).parent
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[re.sub(r"([*?[])", r"[\1]", file) for file in wanted]
        )
    )


def needed(files: Iterable[str], shards: Iterable[str], large: Collection[str] = ()) -> list[str]:
    """Return the files of a repository that a merge reads or takes over.

    Args:
        files: all files of the repository.
        shards: the files that its index names.
        large: files of more than `LARGEST` bytes.

    >>> needed(["config.json", "a.py", "onnx/config.json", "model.safetensors", "b.safetensors"], ())
    ['config.json', 'a.py', 'model.safetensors']
    """
    files = list(files)
    top = [file for file in files if "/" not in file and file.endswith(".safetensors")]
    if SINGLE in files:
        weights = {SINGLE}
    elif shards := set(shards):
        weights = shards
    elif ADAPTER[0] in files and "config.json" not in files:
        weights = {ADAPTER[1]}
    else:
        weights = set(top) if len(top) == 1 else set()
    return [file for file in files if file in weights or _is_beside(file, large)]


def _is_beside(file: str, large: Collection[str]) -> bool:
    *folders, name = file.split("/")
    if file in READ:
        return True
    if any(matches(folder, (*WRITTEN, *LEFT_OUT)) for folder in folders) or matches(name, LEFT_OUT):
        return False
    return (bool(folders) or not matches(name, WRITTEN)) and (file not in large or is_tokenizers(name))


def _no_folder(location: str) -> ModelError:
    folder, name = expanded(location).parent, expanded(location).name
    beside = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
    close = [folder / found for found in difflib.get_close_matches(name, beside, n=1, cutoff=0.5)]
    otherwise = "check the path, or give a Hugging Face hub id (owner/name or owner/name@revision)"
    return ModelError(
        f"{location}: no such model folder", fix=f"did you mean {close[0]}?" if close else otherwise
    )
