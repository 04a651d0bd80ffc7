"""Estimate a model's diagonal Fisher information on a text file, for the method `fisher`.

    evomerge fisher MODEL TEXT OUT           # then, in recipe.yaml:   fisher: {maths: OUT, ...}

A sequence is a line of the text. The gradient of its log-likelihood (the sum over its tokens) is squared,
and the Fisher is the mean of these squares over the sequences. One backward pass takes one sequence, because
the square of a batch's mean gradient is something else. With labels from the text this is the *empirical*
Fisher; with labels sampled from the model it is an estimate of the true Fisher, one sample per sequence.

Memory: three times the model in float32 (weights, gradients, sums), and the activations of one sequence.
Not covered: the Fisher's off-diagonal elements, and a diagonal that does not fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from evomerge.errors import ConfigError, DiskError, NonFiniteError, nearest
from evomerge.files import drafted_file, read_regular
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.measured_files import KINDS
from evomerge.merging.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Labels = Literal["text", "model"]
LABELS: tuple[Labels, ...] = get_args(Labels)
MAX_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """What `estimate` wrote: the file, the number of sequences and tokens used, and the diagonal's mean."""

    file: Path
    sequences: int
    tokens: int
    mean: float


LARGEST_TEXT = 100_000_000
"""Bytes of a text; a diagonal Fisher needs thousands of lines, not millions."""


def estimate(
    location: str,
    text: Path,
    out: Path,
    *,
    labels: str = "text",
    sequences: int | None = None,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Estimated:
    """Write the diagonal Fisher of a causal LM on a text to a safetensors file, complete or not at all.

    The file has the model's tensor names, in float32, and its metadata say how it was made.

    Args:
        location: the model's folder, hub id, or `path+adapter`.
        text: UTF-8 text, one sequence per line; empty lines and lines of one token are skipped.
        out: the safetensors file to write.
        labels: "text" (empirical Fisher), or "model" (tokens sampled from the model's own predictions).
        sequences: the largest number of lines to read, from the first one; None reads all.
        max_length: the largest number of tokens per line; the rest of a longer line is cut off.
        seed: of the sampled labels.
        device: where the model runs, e.g. "cuda".
        progress: called after each sequence as `progress(sequences done, sequences in all)`.

    Raises:
        ModelError: the model can't be opened.
        ConfigError: unknown labels, or the text can't be read or has no line of two tokens.
        NonFiniteError: a squared gradient is NaN or infinite.
        DiskError: `out` exists or can't be written.
    """
    if labels not in LABELS:
        raise ConfigError(f"unknown labels {labels!r}", fix=nearest(labels, LABELS))
    if out.exists():
        raise DiskError(f"{out}: already exists", expected="a new file", fix="choose another name")
    lines = lines_of(text)[:sequences]
    bench = Workbench({"model": location}, device=device)
    bench.load(Recipe.copy_of(location, dtype="float32"))
    rows = tokenized(bench, lines, text, max_length)
    squares = _mean_squares(bench.model, rows, labels == "model", seed, progress)
    for name, parameter in bench.model.named_parameters():
        parameter.grad = squares[name].to(parameter.device)
    diagonal = bench.gradients()  # by the names in the model's files
    tokens = sum(map(len, rows))
    counts = {"sequences": len(rows), "tokens": tokens, "max_length": max_length, "seed": seed}
    _check(diagonal, bench.sources["model"])
    _write(diagonal, text, bench.sources["model"], labels, counts, out)
    size = sum(fisher.numel() for fisher in diagonal.values())
    mean = sum(fisher.double().sum().item() for fisher in diagonal.values()) / size
    return Estimated(file=out, sequences=len(rows), tokens=tokens, mean=mean)


def _mean_squares(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sampled: bool,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """Return the mean over the rows of each squared gradient of the log-likelihood, on the CPU.

    sampled: draw the labels from the model's predictions instead of taking the row's own tokens.
    """
    import torch

    draws = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for number, row in enumerate(rows, start=1):
        tokens = torch.tensor([row], device=model.device)
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True).grad = None
            logs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            targets = tokens[0, 1:]
            if sampled:
                chances = logs.detach().exp().cpu()
                targets = torch.multinomial(chances, 1, generator=draws)[:, 0].to(tokens.device)
            logs.gather(1, targets[:, None]).sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square()
        if progress is not None:
            progress(number, len(rows))
    return {name: (total / len(rows)).cpu() for name, total in sums.items()}


def tokenized(bench: Workbench, lines: Sequence[str], text: Path, max_length: int) -> list[list[int]]:
    """Return the tokens of the lines that have at least two; raise ConfigError if none has."""
    rows = [bench.tokenizer(line, truncation=True, max_length=max_length)["input_ids"] for line in lines]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(f"{text}: no line of at least two tokens", got=f"{len(lines)} lines with text")
    return rows


def lines_of(text: Path) -> list[str]:
    """Return the lines of a text that are not empty, or raise ConfigError."""
    try:
        content = read_regular(text, LARGEST_TEXT).decode()
    except FileNotFoundError:
        raise ConfigError(f"{text}: no such file", expected="a text file, one sequence per line") from None
    except OSError as error:
        raise ConfigError(f"{text}: can't be read", got=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: not UTF-8 text", got=str(error)) from None
    return [line.strip() for line in content.splitlines() if line.strip()]


def _check(diagonal: Mapping[str, Tensor], source: Source) -> None:
    for name, fisher in diagonal.items():
        if not bool(fisher.isfinite().all()):
            raise NonFiniteError(
                f"{source.location}: the Fisher of {name!r} is not finite",
                fix="check that the model's weights are finite",
            )


def _write(
    diagonal: Mapping[str, Tensor],
    text: Path,
    source: Source,
    labels: str,
    counts: Mapping[str, int],
    out: Path,
) -> None:
    from safetensors.torch import save_file

    metadata = {
        "format": "pt",
        "kind": KINDS["fisher"],
        "labels": labels,
        **{name: str(count) for name, count in counts.items()},
        "text_sha256": hashlib.sha256(read_regular(text, LARGEST_TEXT)).hexdigest(),
        "model_fingerprint": source.fingerprint,
    }
    with drafted_file(out) as draft:
        save_file({name: fisher.contiguous() for name, fisher in diagonal.items()}, draft, metadata=metadata)
