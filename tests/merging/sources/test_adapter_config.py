"""adapter_config.json: wrong entries are listed at once, and no pattern takes long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ModelError
from evomerge.merging.sources.adapter_config import AdapterConfig, Scales


def read(folder: Path, **entries: Any) -> AdapterConfig:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(entries))
    return AdapterConfig.read(path)[0]


def test_all_wrong_entries_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read(
            tmp_path,
            r=None,
            lora_alpha="x",
            rank_pattern={"(": 8},
            modules_to_save="head",
            other=object.__doc__,
        )
    lines = str(error.value).splitlines()
    assert lines[0].endswith("adapter_config.json: 4 problems")
    assert [line.split(":")[0].strip(" -") for line in lines[1:]] == [
        "r",
        "lora_alpha",
        "rank_pattern",
        "modules_to_save",
    ]


def test_scales_follow_patterns_and_rslora(tmp_path: Path) -> None:
    config = read(
        tmp_path, r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 4}
    )
    scales = Scales(config, "adapter")
    assert scales.of("model.layers.0.self_attn.q_proj", 4) == 4.0
    assert scales.of("model.layers.1.self_attn.k_proj", 8) == 0.5
    assert Scales(read(tmp_path, r=4, lora_alpha=8, use_rslora=True), "adapter").of("x", 4) == 4.0
    with pytest.raises(ModelError, match="rank of 'model"):
        scales.of("model.v_proj", 4)


def test_a_pattern_that_never_ends_is_a_message(tmp_path: Path) -> None:
    config = read(tmp_path, rank_pattern={"(.*)" * 8 + r"\1\d": 8})
    with pytest.raises(ModelError, match="take too long to match"):
        Scales(config, "adapter").of("model.layers.0.self_attn.q_proj", 8)
