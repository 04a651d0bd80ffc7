"""What matching the experts is worth: merges of a base and a fine-tune whose experts stand in another order.

    python -m tests.merging.experts_shuffled

Tiny random models of several families. The merge with the fine-tune as it was before its experts were
shuffled is the right one; printed is how far the logits of the other merges are from its logits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import MATCHED, STORED, Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.experts import experts_of
from tests.merging import families

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "granitemoe")


def shuffled(folder: Path, out: Path, seed: int = 1, routers: bool = True) -> dict[str, list[int]]:
    """Write a model with the experts of every layer in another order; return the orders."""
    generator = np.random.default_rng(seed)
    tensors, source = load_file(folder / "model.safetensors"), Checkpoint.open(str(folder))
    moved, orders = dict(tensors), {}
    for start, experts in experts_of(source.headers).items():
        order = orders[start] = generator.permutation(experts.count).tolist()
        for place, own in zip(sorted(experts.tensors), order, strict=False):
            for ending, name in experts.tensors[place].items():
                moved[name] = tensors[experts.tensors[own][ending]].clone()
        for name in (*experts.joined, *(experts.routers if routers else ())):
            moved[name] = tensors[name][order].clone()
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    return orders


def merged(models: dict[str, str], experts: str) -> torch.Tensor:
    """Return the logits of the mean of two models."""
    recipe = Recipe(
        models=models,
        base="base",
        groups=(TensorGroup(method="linear", sources=("base", "tuned")),),
        dtype="float32",
        experts=experts,
    )
    bench = Workbench(models, "base", experts=experts)
    bench.load(recipe)
    return families.logits(bench.model)


def errors(family: str, folder: Path) -> tuple[float, float]:
    """Return the relative errors of the merged logits without and with matching."""
    for seed, name in enumerate(("base", "tuned")):
        families.build(family, seed).save_pretrained(folder / name)
    shuffled(folder / "tuned", folder / "shuffled")
    base = str(folder / "base")
    right = merged({"base": base, "tuned": str(folder / "tuned")}, STORED)
    models = {"base": base, "tuned": str(folder / "shuffled")}
    stored, matched = (
        float((merged(models, experts) - right).norm() / right.norm()) for experts in (STORED, MATCHED)
    )
    return stored, matched


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| family | experts as stored | matched |\n|---|---|---|")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            stored, matched = errors(family, Path(folder))
        print(f"| `{family}` | {100 * stored:.2f} % | {100 * matched:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
