"""Measure the Gram matrices of the inputs of a model's linear layers on a text, for the method `regmean`.

    evomerge gram MODEL TEXT OUT           # then, in recipe.yaml:   gram: {maths: OUT, ...}

A sequence is a line of the text. For every Linear module with inputs X (tokens, inputs), X' X is summed over
the sequences and divided by the number of tokens.

Memory: the model in float32, and for every linear layer a matrix (inputs, inputs) in float64. For a model of
7 billion parameters that is about 60 GB; the method itself reads one matrix at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, DiskError, NonFiniteError
from evomerge.files import drafted_file, read_regular
from evomerge.merging.analysis.fisher import LARGEST_TEXT, MAX_LENGTH, lines_of, tokenized
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.measured_files import KINDS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredInputs:
    """What `measure` wrote: the file, and the numbers of sequences and tokens used and of matrices."""

    file: Path
    sequences: int
    tokens: int
    matrices: int


def measure(
    location: str,
    text: Path,
    out: Path,
    *,
    sequences: int | None = None,
    max_length: int = MAX_LENGTH,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> MeasuredInputs:
    """Write the Gram matrices of a causal LM's linear layers to a safetensors file, complete or not at all.

    The matrices are in float32 and named like the layers' weights; the metadata say how they were made. The
    arguments are those of `fisher.estimate`.

    Raises:
        ModelError: the model can't be opened.
        ConfigError: the text can't be read or has no line of two tokens, or no layer has Linear modules.
        NonFiniteError: an input is NaN or infinite.
        DiskError: `out` exists or can't be written.
    """
    if out.exists():
        raise DiskError(f"{out}: already exists", expected="a new file", fix="choose another name")
    lines = lines_of(text)[:sequences]
    bench = Workbench({"model": location}, device=device)
    bench.load(Recipe.copy_of(location, dtype="float32"))
    source = bench.sources["model"]
    rows = tokenized(bench, lines, text, max_length)
    grams = _mean_products(bench.model, rows, source.headers, progress)
    if not any(layer_of(name) is not None for name in grams):
        raise ConfigError(
            f"{location}: its layers have no Linear modules, so there is nothing to measure",
            expected="layers of torch.nn.Linear; Conv1D layers (GPT-2) and fused experts are not measured",
            fix="use another method than regmean",
        )
    for name, gram in grams.items():
        if not bool(gram.isfinite().all()):
            raise NonFiniteError(
                f"{location}: the inputs of {name!r} are not finite",
                fix="check that the model's weights are finite",
            )
    tokens = sum(map(len, rows))
    facts = {"sequences": len(rows), "tokens": tokens, "max_length": max_length}
    _write(grams, out, text=text, fingerprint=source.fingerprint, facts=facts)
    return MeasuredInputs(file=out, sequences=len(rows), tokens=tokens, matrices=len(grams))


def _mean_products(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    names: Mapping[str, object],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """Return X' X / tokens of every Linear module whose weight has one of the names, on the CPU."""
    import torch

    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(_: Any, given: tuple[Tensor, ...]) -> None:
            inputs = given[0].detach().flatten(0, -2).float()
            sums[name] += (inputs.T @ inputs).cpu()

        return add

    for module_name, module in model.named_modules():
        name = f"{module_name}.weight"
        if isinstance(module, torch.nn.Linear) and name in names:
            width = module.in_features
            sums[name] = torch.zeros(width, width, dtype=torch.float64)
            hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        with torch.no_grad():
            for number, row in enumerate(rows, start=1):
                model(input_ids=torch.tensor([row], device=model.device))
                if progress is not None:
                    progress(number, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(map(len, rows))
    return {name: (total / tokens).float() for name, total in sums.items()}


def _write(
    grams: Mapping[str, Tensor], out: Path, *, text: Path, fingerprint: str, facts: Mapping[str, int]
) -> None:
    from safetensors.torch import save_file

    metadata = {
        "format": "pt",
        "kind": KINDS["gram"],
        **{name: str(value) for name, value in facts.items()},
        "text_sha256": hashlib.sha256(read_regular(text, LARGEST_TEXT)).hexdigest(),
        "model_fingerprint": fingerprint,
    }
    with drafted_file(out) as draft:
        save_file(dict(grams), draft, metadata=metadata)
