"""What the files tell about a merge before it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evomerge.errors import ConfigError, ModelError, nearest
from evomerge.merging.compatibility import check_models
from evomerge.merging.methods.reduction import norm
from evomerge.merging.sources.opening import open_sources


def task_vector_norms(models: Mapping[str, str], base: str, *, tokenizer: str = "") -> dict[str, float]:
    """Return the global Frobenius norm of each model's task vector, by name, the base left out.

    Streams: one tensor of the base and of one model is in memory at a time. Dividing weights by these
    norms puts fine-tunes of different lengths on an equal footing.

    models: name -> location, base among them. tokenizer: as in a Recipe. Raises ModelError where they do
    not fit each other, or where weights are not finite.
    """
    if base not in models:
        raise ConfigError(f"unknown base model {base!r}", fix=nearest(base, models))
    sources = open_sources(models, base, tokenizer=tokenizer)
    check_models({base: sources[base]} | sources)
    squares: dict[str, list[float]] = {name: [] for name in models if name != base}
    for tensor in sources[base].headers:
        origin = sources[base].tensor(tensor)
        for name, parts in squares.items():
            parts.append(norm(sources[name].tensor(tensor) - origin) ** 2)
    norms = {name: math.sqrt(math.fsum(parts)) for name, parts in squares.items()}
    for name, length in norms.items():
        if not math.isfinite(length):
            raise ModelError(
                f"model {name!r} or its base {base!r} has weights that are NaN or infinite",
                got=f"{models[name]}, {models[base]}",
                fix="use a sound copy of the model",
            )
    return norms
