"""Facts about task vectors, told from the files."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import ConfigError
from evomerge.merging.analysis.norms import task_vector_norms


def test_norms_are_those_of_the_whole_task_vectors(models: dict[str, str], adapters: dict[str, str]) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64)
        return dict(model.named_parameters())  # a tied head counts once

    base = weights("base")
    norms = task_vector_norms(models | {"lora": adapters["plain"]}, "base")
    assert list(norms) == ["a", "b", "c", "lora"]
    for name in "abc":
        squares = [((tensor - base[key]) ** 2).sum().item() for key, tensor in weights(name).items()]
        assert norms[name] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    assert 0 < norms["lora"] < math.inf
    with pytest.raises(ConfigError, match="unknown base model 'bas'"):
        task_vector_norms(models, "bas")
