"""LoRA adapters as sources: a checkpoint plus low-rank updates, read like one model.

A tensor of an adapted model equals that of peft's `merge_and_unload` in float32: the base's tensor, or the
whole tensor that the adapter stores instead (modules_to_save, trained biases), plus scale * B A. Supported:
alpha, rsLoRA, rank and alpha patterns, layers stored transposed (Conv1D), adapted embeddings, lora_bias,
DoRA, trained rows of embeddings, embeddings with added rows, PiSSA and OLoRA. Everything else that changes a
model's output is an error that names it. So is an adapter that changes a tied head and its embeddings
differently: merged, it would not be the trained model, or would have other tensors than its base.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, ModelError
from evomerge.files import expanded
from evomerge.merging.methods.reduction import one_thread
from evomerge.merging.sources.adapter_config import UNMERGEABLE, AdapterConfig, Scales, refuse_unsupported
from evomerge.merging.sources.arrays import WeightArray, of_tensor
from evomerge.merging.sources.checkpoint import (
    HEADS,
    Checkpoint,
    TensorNames,
    is_embedding,
    read_vocabulary,
    sample_hash,
)
from evomerge.merging.sources.hub import split_id
from evomerge.merging.sources.live_names import LiveNames
from evomerge.merging.sources.model_config import with_rows
from evomerge.merging.sources.tensorfile import ARRAY_TYPES, Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PAIRS = (("A.weight", "B.weight"), ("embedding_A", "embedding_B"))
"""Endings of the factors' names in the file, after `lora_`: of layers and of embeddings."""
BIAS, MAGNITUDE = "B.bias", "magnitude_vector"
TOKENS = "token_adapter"
SAVED, UNUSED = ".modules_to_save.", (".original_module.",)
"""Parts of the names of whole tensors, where peft stores them with the names of its wrappers."""
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Model types whose layers are stored (in, out), which the shape of square weights doesn't show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """One update: names of A (r, in) and B (out, r) in the adapter file, and the factor `scale` of B A.

    down: None for the update of a bias (lora_bias), which is `scale` times the vector `up`. start: how the
    base was changed before training ("pissa", "olora"); that is part of the update.
    """

    down: str | None
    up: str
    scale: float
    transposed: bool
    start: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """A DoRA update (arXiv:2402.09353, equation 5): base + scale * B A, its rows rescaled to stored lengths.

    magnitude: name of the lengths in the adapter file; columns are rescaled where the weight is transposed.
    """

    low_rank: LowRank
    magnitude: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """Rows of a matrix of tokens that the adapter stores (trainable tokens). rows: the name in its file."""

    indices: tuple[int, ...]
    rows: str


class AdaptedCheckpoint:
    """A checkpoint with a LoRA adapter applied; reads like the checkpoint itself.

    updates: tensor name -> the low-rank update that is added. replaced: tensor name -> the name of the whole
    tensor that the file stores instead. computed: tensor name -> another change. All other tensors are the
    base's.
    """

    def __init__(self, base: Checkpoint, folder: Path, location: str) -> None:
        self.base, self.adapter, self.location = base, folder, location
        self.folder, self.config, self.headers = base.folder, base.config, base.headers
        self.copied = base.copied
        config, self._settings = AdapterConfig.read(folder / CONFIG)
        self._factors: dict[str, Tensor] = {}
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        refuse_unsupported(config, self._settings, location)
        if not (folder / WEIGHTS).exists():
            pickled = (folder / "adapter_model.bin").is_file()
            raise ModelError(
                f"{location}: no {WEIGHTS} in the folder",
                got="adapter_model.bin, a pickled file, which is not read" if pickled else None,
                fix="save the adapter again with safe_serialization=True" if pickled else None,
            )
        headers = read_header(folder / WEIGHTS)
        _check_types(headers, location)
        names = LiveNames(base.folder, frozenset(base.headers))
        updates = _updates(headers, location, config, base, names)
        self.computed: dict[str, Rescaled | TrainedRows] = {
            **_rescaled(headers, location, config, updates),
            **_trained_rows(headers, location, config, base, names),
        }
        self.updates = {name: update for name, update in updates.items() if name not in self.computed}
        self.replaced = _replaced(headers, location, config, base, updates, names)
        if base.tied:
            self._check_tied()
        self._widen(headers)

    def _widen(self, headers: Mapping[str, Header]) -> None:
        """Take the number of rows from stored embeddings, which training may have extended."""
        wider = {
            name: headers[part].shape
            for name, part in self.replaced.items()
            if name in self.headers and headers[part].shape != self.headers[name].shape
        }
        if wider:
            rows = next(iter(wider.values()))[0]
            self.config = with_rows(self.config, rows)
            self.headers = {
                name: Header(shape=wider.get(name, header.shape), dtype=header.dtype)
                for name, header in self.headers.items()
            }

    @property
    def tied(self) -> bool:
        return self.base.tied

    @property
    def layout(self) -> TensorNames:
        return self.base.layout

    @property
    def num_layers(self) -> int:
        return self.base.num_layers

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The base's tokens, or those of the adapter's own tokenizer.json that have a row."""
        own, theirs = read_vocabulary(self.adapter), self.base.vocabulary
        if own is None:
            return theirs
        rows = next((header.shape[0] for name, header in self.headers.items() if is_embedding(name)), 0)
        return {t: row for t, row in own.items() if row < rows or (theirs or {}).get(t) == row}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base's fingerprint and the adapter's config and weights (sampled)."""
        parts = [self.base.fingerprint, self._settings, sample_hash(self.adapter / WEIGHTS)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def array(self, name: str, *, mapped: bool = True) -> WeightArray:
        """Return the tensor in float32 where the adapter changes it, else as stored."""
        changed = name in self.updates or name in self.replaced or name in self.computed
        return of_tensor(self.tensor(name)) if changed else self.base.array(name, mapped=mapped)

    def tensor(self, name: str) -> Tensor:
        """Return the adapted tensor in float32: base + scale * B A. Don't modify it."""
        weights = self._stored(self.replaced[name]) if name in self.replaced else self.base.tensor(name)
        change = self.computed.get(name)
        if isinstance(change, TrainedRows):
            weights = weights.clone()
            weights[list(change.indices)] = self._stored(change.rows)
            return weights
        if isinstance(change, Rescaled):
            return self._rescale(weights + self._product(change.low_rank), change)
        update = self.update(name)
        return weights if update is None else weights + update

    def update(self, name: str) -> Tensor | None:
        """Return scale * B A of a tensor in float32, or None if it has no low-rank update.

        Where the base was changed before training, that change is part of it.
        """
        factors = self.updates.get(name)
        if factors is None:
            return None
        if factors.down is None:
            return self._factor(factors.up) * factors.scale
        if factors.start is None:
            return self._product(factors)
        up, down = self.factors(name)
        with one_thread():
            product = up @ down
        return product.T.contiguous() if factors.transposed else product

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return B (out, r), times the scale, and A (r, in) of an updated weight, in float32."""
        update = self.updates[name]
        assert update.down is not None, name
        up, down = self._factor(update.up) * update.scale, self._factor(update.down)
        if update.start is None:
            return up, down
        import torch

        left, right = self._start(name, update)
        return torch.cat((up, -left), dim=1), torch.cat((down, right))

    def _product(self, factors: LowRank) -> Tensor:
        assert factors.down is not None
        with one_thread():
            product: Tensor = self._factor(factors.up) @ self._factor(factors.down)
        return (product.T.contiguous() if factors.transposed else product) * factors.scale

    def _rescale(self, weights: Tensor, change: Rescaled) -> Tensor:
        import torch

        axis = 0 if change.low_rank.transposed else 1
        with one_thread():
            lengths = torch.linalg.norm(weights, dim=axis)
        rescaled: Tensor = weights * (self._stored(change.magnitude).reshape(-1) / lengths).unsqueeze(axis)
        return rescaled

    def _start(self, name: str, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return the factors (out, r) and (r, in) that were subtracted from a base's weight before training.

        PiSSA (arXiv:2404.02948): its largest r singular values. OLoRA (arXiv:2406.01775): the first r columns
        and rows of its QR decomposition, times the scale. As in peft, computed in float32.
        """
        key = f"start of {name}"
        if key not in self._starts:
            import torch

            weights = self.base.tensor(name)
            weights = weights.T if update.transposed else weights
            rank = self._factor(update.up).shape[1]
            with one_thread():
                if update.start == "pissa":
                    left, values, right = torch.linalg.svd(weights, full_matrices=False)
                    self._starts[key] = left[:, :rank] * values[:rank], right[:rank].contiguous()
                else:
                    left, right = torch.linalg.qr(weights)
                    self._starts[key] = left[:, :rank] * update.scale, right[:rank].contiguous()
        return self._starts[key]

    def _factor(self, part: str) -> Tensor:
        """Return a factor in float32; factors are small and stay in memory."""
        if part not in self._factors:
            self._factors[part] = self._stored(part)
        return self._factors[part]

    def _stored(self, part: str) -> Tensor:
        import torch

        tensor: Tensor = self._file.get_tensor(part)
        return tensor.to(torch.float32)

    @functools.cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.adapter / WEIGHTS, framework="pt", device="cpu")

    def _check_tied(self) -> None:
        """Raise if a tied head and its embeddings are changed differently; drop an equal copy of the head."""
        import torch

        heads = [name for name in self.replaced if name.endswith(HEADS)]
        embeddings = [name for name in self.replaced if name not in heads and is_embedding(name)]
        changed = [*self.updates, *self.computed]
        adapted = [name for name in changed if name.endswith(HEADS) or is_embedding(name)]
        adapted = [name for name in adapted if not isinstance(self.computed.get(name), TrainedRows)]
        if not adapted and not heads and not embeddings:
            return
        if not adapted and len(heads) == len(embeddings) == 1:
            head, matrix = (self._stored(self.replaced[name]) for name in (heads[0], embeddings[0]))
            if torch.equal(head, matrix):
                del self.replaced[heads[0]]
                return
        raise _taken_apart(self.location, *dict.fromkeys((*adapted, *heads, *embeddings)))


def split_location(location: str) -> tuple[str, str | None]:
    """Split `path+adapter`; a folder that really has a plus sign in its name stays whole.

    >>> split_location("models/base+adapters/maths")
    ('models/base', 'adapters/maths')
    """
    if "+" not in location or expanded(location).is_dir():
        return location, None
    for cut in (match.start() for match in re.finditer(r"\+", location)):
        if expanded(location[:cut]).is_dir():
            return location[:cut], location[cut + 1 :]
    model, _, adapter = location.partition("+")
    return model, adapter


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter and not a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def open_adapter(
    base: Checkpoint | None, folder: Path, location: str, *, fallback: str | None = None
) -> AdaptedCheckpoint:
    """Open an adapter on a base (None: the base that its config names, else `fallback`).

    A relative `base_model_name_or_path` starts at the adapter's folder, else at the current folder.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{location}: {folder} is not an adapter",
            expected=f"a folder with {CONFIG}",
            got="no such folder" if not folder.is_dir() else "a folder without it",
        )
    if base is None:
        base = Checkpoint.open(_own_base(folder, location, fallback))
    return AdaptedCheckpoint(base, folder, location)


def _own_base(folder: Path, location: str, fallback: str | None) -> str:
    config, data = AdapterConfig.read(folder / CONFIG)
    named, revision = config.base_model_name_or_path, data.get("revision")
    if isinstance(named, str) and named:
        with contextlib.suppress(ConfigError, OSError):  # a hub id may be no path at all
            for path in (folder / expanded(named), expanded(named)):
                if (path / "config.json").is_file():
                    return str(path)
    if fallback is not None:
        return fallback
    if isinstance(named, str) and (found := split_id(named)) is not None:
        return f"{named}@{revision}" if isinstance(revision, str) and revision and not found[1] else named
    raise ModelError(
        f"{location}: the adapter's base model can't be found",
        got=f"base_model_name_or_path: {named!r}",
        fix="write the location as `base+adapter`",
    )


def _check_types(headers: Mapping[str, Header], location: str) -> None:
    """Refuse an adapter without tensors, or with tensors that are not of floats."""
    if not headers:
        raise ModelError(f"{location}: the adapter holds no tensors", fix="save the adapter again")
    for name, header in headers.items():
        if header.dtype not in ARRAY_TYPES:
            raise ModelError(
                f"{location}: tensor {name!r} of the adapter has a type that can't be merged",
                expected=", ".join(ARRAY_TYPES),
                got=header.dtype,
            )


def _updates(
    headers: Mapping[str, Header], location: str, config: AdapterConfig, base: Checkpoint, names: LiveNames
) -> dict[str, LowRank]:
    """Return tensor name -> update for every tensor of the base that has one."""
    scales = Scales(config, location)
    updates: dict[str, LowRank] = {}
    for name, header in headers.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if not module or part == MAGNITUDE:
            continue
        pair = next((pair for pair in PAIRS if part in pair), None)
        if pair is None and part != BIAS:
            raise _unsupported(location, name)
        target = f"{module}.weight" if pair else f"{module}.bias"
        target = names.file_name(target) or target
        if target not in base.headers:
            if base.tied and target.endswith(HEADS):
                raise _taken_apart(location, target)
            raise ModelError(
                f"{location}: the adapter changes {target!r}, which its base does not have",
                expected="an adapter made for this base",
                fix="check which base the adapter was trained on",
            )
        shape = base.headers[target].shape
        if pair is None:
            other = headers.get(f"{name[: -len(BIAS)]}A.weight")
            if other is None or header.shape != shape:
                raise _misfit(location, target, shape, header)
            scale = scales.of(module, other.shape[0])
            updates[target] = LowRank(down=None, up=name, scale=scale, transposed=False)
            continue
        down, up = (f"{name[: -len(part)]}{ending}" for ending in pair)
        if down not in headers or up not in headers:
            raise ModelError(f"{location}: the adapter has only one of lora_A and lora_B for {module!r}")
        flipped = pair == PAIRS[1] or _stored_transposed(base, shape, headers[down], headers[up])
        if flipped:
            shape = shape[::-1]
        _check_shapes(location, target, shape, headers[down], headers[up])
        scale = scales.of(module, headers[down].shape[0])
        start = config.start if pair == PAIRS[0] else None
        if start == "olora" and flipped:
            raise _unsupported(location, name)
        updates[target] = LowRank(down=down, up=up, scale=scale, transposed=flipped, start=start)
    return updates


def _rescaled(
    headers: Mapping[str, Header], location: str, config: AdapterConfig, updates: Mapping[str, LowRank]
) -> dict[str, Rescaled]:
    """Return tensor name -> DoRA update, for all updates of an adapter with DoRA."""
    found = {}
    stored = [name for name in headers if name.endswith(f".lora_{MAGNITUDE}")]
    if bool(config.use_dora) != bool(stored):
        raise ModelError(
            f"{location}: the adapter's config and file differ about DoRA",
            expected=f"tensors named lora_{MAGNITUDE} if and only if use_dora is true",
            got=f"use_dora: {json.dumps(config.use_dora)} and {len(stored)} such tensors",
            fix="save the adapter again",
        )
    for target, update in updates.items():
        magnitude = f"{update.up.rpartition('.lora_')[0]}.lora_{MAGNITUDE}"
        if magnitude in headers and update.down is not None:
            out = headers[update.up].shape[0]
            if headers[magnitude].count != out:
                raise _misfit(location, magnitude, (out,), headers[magnitude])
            found[target] = Rescaled(low_rank=update, magnitude=magnitude)
        elif stored:
            raise _unsupported(location, update.up)
    return found


def _trained_rows(
    headers: Mapping[str, Header], location: str, config: AdapterConfig, base: Checkpoint, names: LiveNames
) -> dict[str, TrainedRows]:
    """Return tensor name -> the rows that were trained, for embeddings and heads."""
    found = {}
    given = config.trainable_token_indices
    for name, header in headers.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(f".{TOKENS}.")
        if not module or not part:
            continue
        indices = given
        if isinstance(given, dict):
            indices = next((rows for key, rows in given.items() if module.endswith(key)), None)
        target = names.file_name(f"{module}.weight") or f"{module}.weight"
        if base.tied and target.endswith(HEADS):
            raise _taken_apart(location, target)
        if not isinstance(indices, list) or target not in base.headers:
            raise _unsupported(location, name)
        rows, width = base.headers[target].shape
        if header.shape != (len(indices), width) or max(indices, default=0) >= rows:
            raise _misfit(location, target, (len(indices), width), header)
        found[target] = TrainedRows(indices=tuple(indices), rows=name)
    if bool(found) != bool(given):
        raise ModelError(
            f"{location}: the adapter's config and file differ about trained tokens",
            expected=f"trainable_token_indices and tensors named {TOKENS}, or neither",
            got=f"{len(found)} such tensors",
            fix="save the adapter again",
        )
    return found


def _stored_transposed(base: Checkpoint, shape: tuple[int, ...], down: Header, up: Header) -> bool:
    """Say whether a layer's weight is stored (in, out), as in Conv1D.

    The shapes decide, and not `fan_in_fan_out`, which peft ignores for layers that it does not fit.
    """
    if len(shape) == 2 and shape[0] == shape[1]:
        return base.config.get("model_type") in CONV1D
    return up.shape[:1] + down.shape[1:] == shape[::-1]


def _replaced(
    headers: Mapping[str, Header],
    location: str,
    config: AdapterConfig,
    base: Checkpoint,
    updates: Mapping[str, LowRank],
    names: LiveNames,
) -> dict[str, str]:
    """Return tensor name -> name in the file, for every tensor the adapter stores whole."""
    adapted = {target.rpartition(".")[0] for target in updates}
    replaced: dict[str, str] = {}
    for name, header in headers.items():
        bare = name.removeprefix(PREFIX)
        if ".lora_" in bare or f".{TOKENS}." in bare:
            continue
        if any(word in bare for word in UNUSED):
            continue
        target = bare.replace(".base_layer.", ".").replace(SAVED, ".")
        if SAVED not in bare and f"{name.rpartition('.')[0]}{SAVED}{name.rpartition('.')[2]}" in headers:
            continue  # the tensor before training, which peft stores too where the vocabulary was resized
        target = names.file_name(target) or target
        tied = base.tied and target.endswith(HEADS)
        below = ".base_layer." in bare  # the names of an adapted layer's own tensors
        if (target not in base.headers and not tied) or below != (target.rpartition(".")[0] in adapted):
            raise _unsupported(location, name)
        if not tied and header.shape != base.headers[target].shape and not _extends(target, header, base):
            raise _misfit(location, target, base.headers[target].shape, header)
        replaced[target] = name
    _check_rows(replaced, headers, location, base)
    for module in config.modules_to_save or ():
        lacking = [name for name in base.headers if _within(name, module) and name not in replaced]
        if base.tied and not any(name.endswith(HEADS) for name in replaced):
            lacking += [name for name in HEADS if _within(name, module)]
        if lacking:
            raise ModelError(
                f"{location}: the adapter lacks a tensor of its modules_to_save",
                expected=f"{lacking[0]!r} stored whole, for {module!r}",
                fix="save the adapter again",
            )
    return replaced


def _extends(target: str, header: Header, base: Checkpoint) -> bool:
    """Say whether a stored matrix of tokens has the base's rows and more."""
    shape = base.headers[target].shape
    tokens = is_embedding(target) or target.endswith(HEADS)
    return tokens and len(header.shape) == 2 and header.shape[0] > shape[0] and header.shape[1:] == shape[1:]


def _check_rows(
    replaced: Mapping[str, str], headers: Mapping[str, Header], location: str, base: Checkpoint
) -> None:
    """Raise ModelError where only one of embeddings and head has added rows."""
    of_tokens = [name for name in base.headers if is_embedding(name) or name.endswith(HEADS)]
    rows = {
        name: (headers[replaced[name]] if name in replaced else base.headers[name]).shape[0]
        for name in of_tokens
    }
    if len(set(rows.values())) > 1:
        raise ModelError(
            f"{location}: the adapter adds rows to one of embeddings and head only",
            expected="both stored whole (modules_to_save), with the same number of rows",
            got=", ".join(f"{name}: {count}" for name, count in rows.items()),
        )


def _within(tensor: str, module: str) -> bool:
    """Say whether a tensor belongs to a module that modules_to_save names; peft compares endings."""
    parts = tensor.split(".")[:-1]
    return any(".".join(parts[: end + 1]).endswith(module) for end in range(len(parts)))


def _unsupported(location: str, name: str) -> ModelError:
    return ModelError(
        f"{location}: the adapter has an unsupported tensor {name!r}",
        expected="lora_A and lora_B of linear layers and embeddings, or tensors of the base stored whole",
        fix=UNMERGEABLE,
    )


def _misfit(location: str, target: str, shape: tuple[int, ...], header: Header) -> ModelError:
    return ModelError(
        f"{location}: the adapter does not fit {target!r}",
        expected=str(list(shape)),
        got=str(list(header.shape)),
        fix="apply it to the base it was trained on, resized vocabulary included",
    )


def _taken_apart(location: str, *names: str) -> ModelError:
    return ModelError(
        f"{location}: the adapter changes the embeddings and the head that is tied to them differently",
        expected="both unchanged, or both stored whole and equal (modules_to_save)",
        got=f"changes of {', '.join(names)}",
        fix="save the base with tie_word_embeddings=False and the head stored, and apply the adapter to that",
    )


def _check_shapes(location: str, target: str, shape: tuple[int, ...], down: Header, up: Header) -> None:
    fits = len(down.shape) == len(up.shape) == len(shape) == 2
    if not fits or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise ModelError(
            f"{location}: the adapter does not fit {target!r}",
            expected=f"B (out, r) and A (r, in) for a weight of shape {list(shape)}",
            got=f"B {list(up.shape)}, A {list(down.shape)}",
        )
