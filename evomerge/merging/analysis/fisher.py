"""Estimate a model's diagonal Fisher information on a text file, for the method `fisher`.

    evomerge fisher MODEL TEXT OUT           # then, in recipe.yaml:   fisher: {maths: OUT, ...}

A sequence is a line of the text. For each, the gradient of its log-likelihood (the sum over its tokens)
is squared; the Fisher is the mean of these squares over the sequences. They are gradients of single
sequences: squaring the gradient of a batch's mean would be something else. With labels from the text this
is the *empirical* Fisher; with labels drawn from the model it is one sample per sequence of the Fisher
itself. Memory: three times the model in float32 (weights, gradients, sums), and one sequence's activations.

Not covered: other than diagonal, and Fishers that do not fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from evomerge.errors import ConfigError, DiskError, NonFiniteError, nearest
from evomerge.files import drafted_file
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.fisher_files import KIND

if TYPE_CHECKING:
    from torch import Tensor

Labels = Literal["text", "model"]
LABELS: tuple[Labels, ...] = get_args(Labels)
MAX_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """What was written: how many sequences and tokens, and the mean of the diagonal."""

    file: Path
    sequences: int
    tokens: int
    mean: float


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
    """Write the diagonal Fisher of a causal LM on a text, one sequence per line, to a safetensors file.

    labels: "text" (empirical Fisher) or "model" (tokens drawn from the model's own predictions, with
    `seed`). sequences: how many lines at most, the first ones. max_length: tokens of a line that count.
    The file has the model's tensor names, float32, and says in its metadata how it was made. It is
    complete or not there, and an existing file is never touched.

    Raises ModelError, ConfigError for a text without two tokens in any line, NonFiniteError, DiskError.
    """
    import torch

    if labels not in LABELS:
        raise ConfigError(f"unknown labels {labels!r}", fix=nearest(labels, LABELS))
    if out.exists():
        raise DiskError(f"{out}: already exists", expected="a new file", fix="choose another name")
    lines = _lines(text)[:sequences]
    bench = Workbench({"model": location}, device=device)
    bench.load(Recipe.copy_of(location, dtype="float32"))
    rows = [bench.tokenizer(line, truncation=True, max_length=max_length)["input_ids"] for line in lines]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(f"{text}: no line of at least two tokens", got=f"{len(lines)} lines with text")
    model, draws = bench.model, torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for number, row in enumerate(rows, start=1):
        tokens = torch.tensor([row], device=device)
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True).grad = None
            logs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            targets = tokens[0, 1:]
            if labels == "model":
                chances = logs.detach().exp().cpu()
                targets = torch.multinomial(chances, 1, generator=draws)[:, 0].to(device)
            logs.gather(1, targets[:, None]).sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square()
        if progress is not None:
            progress(number, len(rows))
    found = {name: (total / len(rows)).cpu() for name, total in sums.items()}
    missing = [name for name in bench.sources["model"].headers if name not in found]
    assert not missing, missing  # the workbench checked the names against the live model
    for name, one in found.items():
        if not bool(one.isfinite().all()):
            raise NonFiniteError(
                f"{location}: the Fisher of {name!r} is not finite", fix="check that the model's weights are"
            )
    tokens_seen = sum(map(len, rows))
    made = {
        "format": "pt",
        "kind": KIND,
        "labels": labels,
        "sequences": str(len(rows)),
        "tokens": str(tokens_seen),
        "max_length": str(max_length),
        "seed": str(seed),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "model_fingerprint": bench.sources["model"].fingerprint,
    }
    _write(found, made, out)
    count = sum(one.numel() for one in found.values())
    mean = sum(one.double().sum().item() for one in found.values()) / count
    return Estimated(file=out, sequences=len(rows), tokens=tokens_seen, mean=mean)


def _lines(text: Path) -> list[str]:
    try:
        content = text.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{text}: no such file", expected="a text file, one sequence per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: can't be read", got=str(error)) from None
    return [line.strip() for line in content.splitlines() if line.strip()]


def _write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], out: Path) -> None:
    from safetensors.torch import save_file

    with drafted_file(out) as draft:
        save_file({name: one.contiguous() for name, one in tensors.items()}, draft, metadata=dict(metadata))
