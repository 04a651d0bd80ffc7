"""A model folder in safetensors: its facts without reading weights, and its tensors on demand.

Covers local folders and hub ids (see `hub`), single files and shards, tied and untied heads. Not covered:
pickled weights (refused, because they can run code), quantised weights and remote code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.modules import TEXT, file_name, layer_of, module_of, next_layers
from evomerge.merging.recipe_data import LAYERS
from evomerge.merging.sources.arrays import WeightArray, to_tensor
from evomerge.merging.sources.hub import INDEX, SINGLE, folder_of
from evomerge.merging.sources.model_config import (
    COUNTS,
    read_config,
    text_part,
    tied_by_default,
    with_text_part,
)
from evomerge.merging.sources.tensorfile import (
    ARRAY_TYPES,
    COPIED,
    ITEM_SIZES,
    Header,
    is_copied,
    read_header,
)
from evomerge.schema import load_json

if TYPE_CHECKING:
    from torch import Tensor

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Endings of the names of output projections, which a tied model shares with its embeddings."""
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
"""Endings of the names of token embeddings, which a tied model's head shares."""
_EMBEDS = re.compile(r"embed|wte")
DERIVED = ("rotary_emb.inv_freq", ".masked_bias", "attn.bias_mask")
"""Buffers in old files that the model computes itself; they are not weights."""
MASKS = ("attn.bias", "attention.bias")
"""Causal masks of old GPT-2 and GPT-NeoX files, which have four dimensions, unlike biases."""
READ_BY_TRANSFORMERS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
LARGEST_TOKENIZER = 64_000_000
"""Bytes of a tokenizer.json; that of 262,000 tokens and their merges has 33 million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """A model's tensor names, sorted: the number of layers, the names inside a layer, and the rest.

    modules: distinct names inside the layers, e.g. `self_attn.q_proj.weight`, in the model's order.
    outside: full names of the tensors outside the layers.
    """

    num_layers: int
    modules: tuple[str, ...]
    outside: tuple[str, ...]

    @classmethod
    def of(cls, names: tuple[str, ...]) -> TensorNames:
        """Sort tensor names into a layout."""
        layers = {layer for name in names if (layer := layer_of(name)) is not None}
        modules = dict.fromkeys(
            name.partition(f".{layer}.")[2] for name in names if (layer := layer_of(name)) is not None
        )
        outside = tuple(name for name in names if layer_of(name) is None)
        return cls(num_layers=max(layers, default=-1) + 1, modules=tuple(modules), outside=outside)


class Checkpoint:
    """One model folder. Opening it reads JSON and headers only.

    headers: tensor name -> shape and stored type, in natural order, without tied heads.
    copied: the same for whole numbers and truth values, which merges copy unchanged; not among the headers.
    config: config.json as plain data. folder: the files' folder. location: the location as the user wrote it.

    >>> Checkpoint.open("no/such/folder")
    Traceback (most recent call last):
    evomerge.errors.ModelError: no/such/folder: no such model folder
    ...
    """

    def __init__(self, folder: Path, location: str) -> None:
        self.folder, self.location = folder, location
        self.config = self._raw_config = read_config(folder / "config.json")
        for name in READ_BY_TRANSFORMERS:
            if (folder / name).exists():
                load_json(folder / name)  # refuses a damaged file now
        self._files: dict[str, Path] = {}
        self._maps: dict[Path, WeightArray] = {}
        stored: dict[str, Header] = {}
        for path, names in _weight_files(folder, location):
            headers = read_header(path)
            for name in headers if names is None else names:
                if name not in headers:
                    raise ModelError(
                        f"{folder / INDEX}: index and shard do not match",
                        expected=f"tensor {name!r} in {path.name}",
                        got=f"{len(headers)} other tensors",
                        fix="download or copy the model again",
                    )
                stored[name] = headers[name]
                self._files[name] = path
        self._stored = self._renamed(stored)
        stored = self._stored
        weights = [name for name in stored if not self._is_derived(name) and not self._is_tied(name)]
        weights.sort(key=natural_order)
        self.copied: Mapping[str, Header] = {
            name: stored[name] for name in weights if is_copied(name, stored[name])
        }
        self.headers: Mapping[str, Header] = {n: stored[n] for n in weights if n not in self.copied}
        self._check_layers()
        self._check_embeddings()
        if not self.tied and self._raw_config.get("tie_word_embeddings") is not False:
            heads = any(name.endswith(HEADS) for name in self.headers)
            self.config = with_tying(self.config, tied=False) if heads else self.config

    def _renamed(self, stored: dict[str, Header]) -> dict[str, Header]:
        """Return the headers, with layers that predict further tokens under names of their own."""
        text = text_part(self.config)
        count = next((text[key] for key in COUNTS if text.get(key)), None)
        if count is None:
            return stored
        names = next_layers(stored, count)
        if not text.get("num_nextn_predict_layers") and not any("eh_proj" in name for name in names):
            return stored
        self._files = {names.get(name, name): path for name, path in self._files.items()}
        return {names.get(name, name): header for name, header in stored.items()}

    def _check_layers(self) -> None:
        """Raise ModelError for a layer number beyond all models, or a config that announces more layers."""
        if not self.headers:
            raise ModelError(f"{self.location}: no tensors in the model's files", fix="download it again")
        if self.num_layers > LAYERS:
            last = next(name for name in self.headers if layer_of(name) == self.num_layers - 1)
            raise ModelError(
                f"{self.location}: tensor {last!r} is of layer {self.num_layers - 1}",
                expected=f"at most {LAYERS} layers",
            )
        text = text_part(self.config)
        for key in COUNTS:
            if (text.get(key) or 0) > self.num_layers:
                raise ModelError(
                    f"{self.folder / 'config.json'}: {key} is {text[key]}",
                    expected=f"{self.num_layers}, the number of layers in the model's files",
                    fix="download or copy the model again"
                    if self.num_layers
                    else "evomerge finds layers by names like `layers.0.`; this model has none",
                )

    def _check_embeddings(self) -> None:
        """Raise ModelError for a tied model whose files hold the head in place of the embeddings."""
        heads = [name for name in self._stored if self._is_tied(name) and module_of(name) == TEXT]
        if heads and not any(layer_of(name) is None and _EMBEDS.search(name) for name in self.headers):
            raise ModelError(
                f"{self.location}: its head is tied to the embeddings, but its files hold only the head",
                expected="the embeddings, such as model.embed_tokens.weight",
                got=heads[0],
                fix="load it with transformers and save it again, which stores the embeddings",
            )

    @classmethod
    def open(cls, location: str) -> Checkpoint:
        """Open a folder or a hub id (`org/name`, `org/name@revision`). Raises ModelError."""
        return cls.within(folder_of(location), location)

    @classmethod
    def within(cls, folder: Path, location: str) -> Checkpoint:
        """Open the folder of a location, or raise ModelError."""
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{location}: no config.json in the folder",
                expected="a Hugging Face model folder",
                got=_listing(folder),
            )
        return cls(folder, location)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the output projection is the embedding matrix.

        As in transformers, it is if the config, or the default of its class, says so, unless the files hold
        both with different elements.
        """
        said = self._raw_config.get("tie_word_embeddings")
        heads = [name for name in self._stored if name.endswith(HEADS) and module_of(name) == TEXT]
        if said is False or not heads:
            return said is not False
        shape = self._stored[heads[0]].shape
        embeddings = [
            name
            for name, header in self._stored.items()
            if header.shape == shape and name not in heads and layer_of(name) is None and _EMBEDS.search(name)
        ]
        if not embeddings:
            return bool(said)
        same = any(self._same_elements(heads[0], name) for name in embeddings)
        return same and (tied_by_default(self._raw_config) if said is None else True)

    def _same_elements(self, name: str, other: str) -> bool:
        header, other_header = self._stored[name], self._stored[other]
        if (header.shape, header.dtype) != (other_header.shape, other_header.dtype):
            return False
        ours, theirs = (self.array(n).reshape(-1) for n in (name, other))
        step = 2**22
        return all(
            bool((ours[i : i + step] == theirs[i : i + step]).all()) for i in range(0, len(ours), step)
        )

    def _is_derived(self, name: str) -> bool:
        mask = name.endswith(MASKS) and len(self._stored[name].shape) == 4
        return mask or name.endswith(DERIVED)

    def _is_tied(self, name: str) -> bool:
        return self.tied and name.endswith(HEADS)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(sorted(set(self._files.values())))

    @functools.cached_property
    def layout(self) -> TensorNames:
        """Names sorted into layers and the rest."""
        return TensorNames.of(tuple(self.headers))

    @property
    def num_layers(self) -> int:
        """The number of layers, from the tensor names."""
        return self.layout.num_layers

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Token -> id from tokenizer.json, with added tokens; None without such a file."""
        return read_vocabulary(self.folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, headers, file sizes and samples of the files, which is fast to compute."""
        named = {file_name(name, self.num_layers): header for name, header in self.headers.items()}
        headers = [(name, named[name].shape, named[name].dtype) for name in sorted(named, key=natural_order)]
        files = {path.name: sample_hash(path) for path in set(self._files.values())}
        text = json.dumps([self._raw_config, headers, sorted(files.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return a tensor in its stored type as an array (see `arrays`). Don't modify it.

        mapped: return a view of the mapped file, whose pages the operating system caches; else a copy that
        is freed with the array.
        """
        header, path = self._stored[name], self._files[name]
        size = header.count * ITEM_SIZES[header.dtype]
        if mapped:
            data = self._map(path)[header.offset : header.offset + size]
            data = data if header.offset % 8 == 0 else data.copy()  # old files may not be aligned
        else:
            data = _read(path, header.offset, size)
        return data.view({**ARRAY_TYPES, **COPIED}[header.dtype]).reshape(header.shape)

    def stored(self, name: str, *, mapped: bool = True) -> Tensor:
        """Return the same as `array`, as a torch tensor."""
        return to_tensor(self.array(name, mapped=mapped))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32. It may be a view of the mapped file: don't modify it."""
        import torch

        return self.stored(name).to(torch.float32)

    def _map(self, path: Path) -> WeightArray:
        if path not in self._maps:
            import numpy

            try:  # copy-on-write, because torch warns about read-only memory
                self._maps[path] = numpy.memmap(path, dtype=numpy.uint8, mode="c").view(numpy.ndarray)
            except OSError as error:
                raise ModelError(f"{path}: can't be read", got=error.strerror or str(error)) from None
        return self._maps[path]


def _read(path: Path, offset: int, size: int) -> WeightArray:
    import numpy

    data = numpy.empty(size, dtype=numpy.uint8)
    view = memoryview(data)  # type: ignore[arg-type]
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                done = file.readinto(view)
                if not done:
                    raise ModelError(
                        f"{path}: ends before byte {offset + size}", fix="download or copy the model again"
                    )
                view = view[done:]
    except OSError as error:
        raise ModelError(f"{path}: can't be read", got=error.strerror or str(error)) from None
    return data


def is_embedding(name: str) -> bool:
    """Say whether a tensor is the matrix of token embeddings, by its name.

    >>> is_embedding("model.embed_tokens.weight"), is_embedding("transformer.wpe.weight")
    (True, False)
    """
    return name.endswith(EMBEDDINGS)


def with_tying(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return a config that says whether head and embeddings are tied, wherever it speaks of that."""
    part = text_part(config)
    if part is not config and "tie_word_embeddings" in part:
        config = with_text_part(config, {**part, "tie_word_embeddings": tied})
    return {**config, "tie_word_embeddings": tied}


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts layer 2 before layer 10.

    >>> sorted(["h.10.w", "h.2.w"], key=natural_order)
    ['h.2.w', 'h.10.w']
    """
    parts = name.split(".")
    return tuple((0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in parts)


def read_vocabulary(folder: Path) -> Mapping[str, int] | None:
    """Return token -> id from a folder's tokenizer.json, or None without such a file. Raises ModelError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    data = load_json(path, limit=LARGEST_TOKENIZER)
    try:
        pieces = data["model"]["vocab"]
        if isinstance(pieces, list):  # Unigram models list (token, score) pairs in the order of ids
            vocabulary = {piece[0]: index for index, piece in enumerate(pieces)}
        else:
            vocabulary = dict(pieces)
        vocabulary |= {added["content"]: added["id"] for added in data.get("added_tokens") or ()}
        if not all(type(token) is str and type(row) is int for token, row in vocabulary.items()):
            raise TypeError
        if not all(0 <= row < 2**31 for row in vocabulary.values()):
            raise ValueError
    except (KeyError, TypeError, IndexError, ValueError):
        raise ModelError(
            f"{path}: holds no vocabulary",
            expected="a file of the `tokenizers` library",
            fix="download the file again",
        ) from None
    return vocabulary


def sample_hash(path: Path) -> str:
    """Return a hash of a file's size and of 16 blocks of 4 KB, spread evenly over the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(16):
            file.seek((size - 4096) * block // 15 if size > 4096 else 0)
            digest.update(file.read(4096))
    return digest.hexdigest()


def _weight_files(folder: Path, location: str) -> list[tuple[Path, list[str] | None]]:
    """Return the files with the tensors to take from each (None: all), following an index if any."""
    if (folder / SINGLE).exists():
        return [(folder / SINGLE, None)]
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return [(files[0], None)]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{location}: pickled weights are not read, because they can run code",
            expected="safetensors files",
            got=", ".join(pickled[:3]),
            fix=f"write them as safetensors: evomerge import {location} OUT",
        )
    if files:
        raise ModelError(
            f"{location}: several weight files and no index that says which tensors to take from each",
            expected=f"{INDEX} beside them, or one file {SINGLE}",
            got=", ".join(path.name for path in files[:3]) + (" ..." if len(files) > 3 else ""),
            fix="download or copy the index, too",
        )
    raise ModelError(f"{location}: no weights in the folder", expected=SINGLE, got=_listing(folder))


def _indexed_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    where = load_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(s, str) for s in where.values()):
        raise ModelError(
            f"{folder / INDEX}: holds no weight_map",
            expected="weight_map: {tensor: file, ...}",
            fix="download the file again",
        )
    shards: dict[str, list[str]] = {}
    for name, shard in where.items():
        shards.setdefault(shard, []).append(name)
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
            raise ModelError(
                f"{folder / INDEX}: names a file outside its folder",
                expected="plain file names",
                got=repr(shard),
            )
        if not (folder / shard).exists():
            raise ModelError(
                f"{folder}: the index names a missing file", expected=shard, fix="download or copy the file"
            )
    return [(folder / shard, names) for shard, names in sorted(shards.items())]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "an empty folder"
