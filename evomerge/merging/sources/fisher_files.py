"""Diagonal Fisher information in safetensors files with a model's tensor names, read tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.tensorfile import Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

KIND = "diagonal Fisher information"
"""The `kind` in a Fisher file's metadata, so that a model's weights are not mistaken for one."""


def headers(file: str) -> Mapping[str, Header]:
    """Return tensor name -> header of a Fisher file, or raise ModelError."""
    _stamp(file)
    return read_header(Path(file))


def tensor(file: str, name: str) -> Tensor:
    """Return one Fisher tensor in float32. It may be a view of the mapped file: don't modify it."""
    import torch

    information: Tensor = _opened(file, _stamp(file)).get_tensor(name).to(torch.float32)
    if information.numel() and not (information.min() >= 0 and torch.isfinite(information.max())):
        raise ModelError(
            f"{file}: {name!r} has elements that are negative or not finite",
            fix="estimate it again: evomerge fisher MODEL TEXT OUT",
        )
    return information


def check(recipe: Recipe, pattern: Mapping[str, Header], fingerprints: Mapping[str, str]) -> None:
    """Check from headers that a recipe's Fisher files belong to its models.

    pattern: the headers of the models. fingerprints: model -> its fingerprint, compared if the file has one.
    Raises ModelError that names the file and the tensor.
    """
    for name in recipe.used_fishers():
        file = recipe.fisher[name]
        stored = headers(file)
        facts = _opened(file, _stamp(file)).metadata() or {}
        if facts.get("kind") != KIND:
            raise ModelError(
                f"{file}: not a Fisher file",
                expected=f"kind: {KIND!r} in its metadata",
                got=repr(facts.get("kind")),
                fix=f"evomerge fisher {recipe.models[name]} TEXT OUT",
            )
        if facts.get("model_fingerprint") not in (None, fingerprints[name]):
            raise ModelError(
                f"{file}: the Fisher information of another model than {name!r}",
                fix=f"evomerge fisher {recipe.models[name]} TEXT OUT",
            )
        for tensor_name, header in pattern.items():
            if tensor_name not in stored or stored[tensor_name].shape != header.shape:
                raise ModelError(
                    f"{file}: not the Fisher information of model {name!r}",
                    expected=f"tensor {tensor_name!r} of shape {list(header.shape)}",
                    got=f"shape {list(stored[tensor_name].shape)}"
                    if tensor_name in stored
                    else "no such tensor",
                    fix=f"evomerge fisher {recipe.models[name]} TEXT OUT",
                )


def _stamp(file: str) -> tuple[int, int]:
    try:
        facts = Path(file).stat()
    except OSError as error:
        raise ModelError(
            f"{file}: no such Fisher file", got=error.strerror, fix="evomerge fisher MODEL TEXT OUT"
        ) from None
    return facts.st_mtime_ns, facts.st_size


@functools.lru_cache(maxsize=16)
def _opened(file: str, stamp: tuple[int, int]) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: can't be read", got=str(error)) from None
