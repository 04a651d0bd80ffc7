"""config.json: wrong entries are listed at once; what real configs have is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.errors import ModelError
from evomerge.merging.sources.model_config import read_config

REAL = {
    "architectures": ["Zamba2ForCausalLM"],
    "num_hidden_layers": 4,
    "num_key_value_heads": None,
    "quantization_config": None,
    "text_config": {"vocab_size": 128256, "tie_word_embeddings": False},
    "time_step_limit": [0.0, float("inf")],
    "rope_scaling": {"factor": 8.0, "type": "yarn"},
}


def test_what_real_configs_have_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REAL))
    assert read_config(path) == REAL


def test_all_wrong_entries_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"vocab_size": "253", "num_hidden_layers": 10**9, "text_config": {"head_dim": 0}})
    )
    with pytest.raises(ModelError) as error:
        read_config(path)
    assert [line.split(":")[0].strip(" -") for line in str(error.value).splitlines()[1:]] == [
        "vocab_size",
        "num_hidden_layers",
        "text_config.head_dim",
    ]
