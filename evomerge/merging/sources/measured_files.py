"""What was measured of a model on a text, in safetensors files with its tensor names, read tensor by tensor.

Two kinds: diagonal Fisher information, a tensor of the weight's shape for every tensor; and Gram matrices of
the inputs of linear layers, (inputs, inputs) for their weights only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.methods.declaration import FILES, FileKind
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.tensorfile import Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[FileKind, str] = {
    "fisher": "diagonal Fisher information",
    "gram": "Gram matrices of inputs",
}
"""The `kind` in a file's metadata, so that a model's weights or another kind are not mistaken for it."""


def headers(kind: FileKind, file: str) -> Mapping[str, Header]:
    """Return tensor name -> header of a file, or raise ModelError."""
    _stamp(kind, file)
    return read_header(Path(file))


def tensor(kind: FileKind, file: str, name: str) -> Tensor | None:
    """Return one tensor in float32; None if a file of Gram matrices has none for it.

    It may be a view of the mapped file: don't modify it.
    """
    import torch

    opened = _opened(file, _stamp(kind, file))
    if kind == "gram" and name not in opened.keys():  # noqa: SIM118  (not a mapping)
        return None
    found: Tensor = opened.get_tensor(name).to(torch.float32)
    lowest = found if kind == "fisher" else found.diagonal()
    if found.numel() and not (lowest.min() >= 0 and torch.isfinite(found).all()):
        raise ModelError(
            f"{file}: {name!r} has elements that are negative or not finite",
            fix=f"measure it again: evomerge {kind} MODEL TEXT OUT",
        )
    return found


def check(recipe: Recipe, pattern: Mapping[str, Header], fingerprints: Mapping[str, str]) -> None:
    """Check from headers that a recipe's files belong to its models.

    pattern: the headers of the models. fingerprints: model -> its fingerprint, compared if the file has one.
    Raises ModelError that names the file and the tensor.
    """
    for kind in FILES:
        for name in recipe.used_files(kind):
            file = recipe.files(kind)[name]
            fix = f"evomerge {kind} {recipe.models[name]} TEXT OUT"
            stored = headers(kind, file)
            facts = _opened(file, _stamp(kind, file)).metadata() or {}
            if facts.get("kind") != KINDS[kind]:
                raise ModelError(
                    f"{file}: not a {kind.title()} file",
                    expected=f"kind: {KINDS[kind]!r} in its metadata",
                    got=repr(facts.get("kind")),
                    fix=fix,
                )
            if facts.get("model_fingerprint") not in (None, fingerprints[name]):
                raise ModelError(
                    f"{file}: the {FILES[kind]} of another model than {name!r}",
                    fix=fix,
                )
            _check_shapes(kind, file, stored, pattern, name, fix)


def _check_shapes(
    kind: FileKind,
    file: str,
    stored: Mapping[str, Header],
    pattern: Mapping[str, Header],
    model: str,
    fix: str,
) -> None:
    """Raise ModelError for the first tensor that does not fit the model's."""
    for name, header in pattern.items():
        shape = header.shape
        if kind == "gram":
            if name not in stored:
                continue
            shape = (header.shape[-1],) * 2
        if name not in stored or stored[name].shape != shape:
            raise ModelError(
                f"{file}: not the {FILES[kind]} of model {model!r}",
                expected=f"tensor {name!r} of shape {list(shape)}",
                got=f"shape {list(stored[name].shape)}" if name in stored else "no such tensor",
                fix=fix,
            )


def _stamp(kind: FileKind, file: str) -> tuple[int, int]:
    try:
        facts = Path(file).stat()
    except OSError as error:
        raise ModelError(
            f"{file}: no such {kind.title()} file",
            got=error.strerror,
            fix=f"evomerge {kind} MODEL TEXT OUT",
        ) from None
    return facts.st_mtime_ns, facts.st_size


@functools.lru_cache(maxsize=16)
def _opened(file: str, stamp: tuple[int, int]) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: can't be read", got=str(error)) from None
