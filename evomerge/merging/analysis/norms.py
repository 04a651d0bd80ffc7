"""Norms of task vectors, from the models' files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging.compatibility import check_models
from evomerge.merging.methods.reduction import norm
from evomerge.merging.recipe import STORED
from evomerge.merging.sources.opening import open_sources


def task_vector_norms(
    models: Mapping[str, str], base: str, *, tokenizer: str = "", experts: str = STORED
) -> dict[str, float]:
    """Return the Frobenius norm of each model's whole task vector, by name, without the base.

    Weights divided by these norms give task vectors of different lengths the same influence. Arguments and
    errors are those of `tensor_norms`.
    """
    parts = tensor_norms(models, base, tokenizer=tokenizer, experts=experts)
    return {name: whole(by_tensor) for name, by_tensor in parts.items()}


def whole(by_tensor: Mapping[str, float]) -> float:
    """Return the norm of a whole task vector from those of its tensors."""
    return math.sqrt(math.fsum(part**2 for part in by_tensor.values()))


def tensor_norms(
    models: Mapping[str, str], base: str, *, tokenizer: str = "", experts: str = STORED
) -> dict[str, dict[str, float]]:
    """Return the Frobenius norm of each model's task vector in every tensor: name -> tensor -> norm.

    One tensor of the base and of one model is in memory at a time.

    Args:
        models: name -> location, with the base among them.
        base: the name of the base model.
        tokenizer, experts: as in a Recipe.

    Raises:
        ConfigError: `base` is not among the models.
        ModelError: the models do not fit each other, or have weights that are not finite.
    """
    if base not in models:
        raise ConfigError(f"unknown base model {base!r}", fix=nearest(base, models))
    sources = open_sources(models, base, tokenizer=tokenizer, experts=experts)
    check_models({base: sources[base]} | sources)
    norms: dict[str, dict[str, float]] = {name: {} for name in models if name != base}
    for tensor in sources[base].headers:
        origin = sources[base].tensor(tensor)
        for name, parts in norms.items():
            parts[tensor] = norm(sources[name].tensor(tensor) - origin)
    for name, parts in norms.items():
        if not math.isfinite(whole(parts)):
            raise ModelError(
                f"model {name!r} or its base {base!r} has weights that are NaN or infinite",
                got=f"{models[name]}, {models[base]}",
                fix="use a sound copy of the model",
            )
    return norms
