"""Families of models: some by default, all that can be built as tiny models with `make slow`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.merging import families

SOME = (
    "gemma3",  # a vision tower, tied
    "gemma4",  # embeddings per layer, infinite bounds
    "qwen3_5",  # linear and full attention, a vision tower
    "jamba",  # Mamba, attention and experts
    "gpt_oss",  # experts in one tensor
    "deepseek_v4",  # latent attention, a table of whole numbers
    "xlm",  # refused: its layers are lists of parts
)
REFUSED = {"xlm": "has none", "cpmant": "its tensors", "prophetnet": "its tensors", "hrm_text": "layers"}
"""Families that are refused, and a part of the message."""


def expected(result: families.Result) -> bool:
    if result.outcome == "refused":
        return REFUSED.get(result.family, "no message is expected") in result.note
    return result.outcome in ("merged", "not built")


@pytest.mark.parametrize("family", SOME)
def test_a_family_merges_or_is_refused(family: str, tmp_path: Path) -> None:
    result = families.tried(family, tmp_path)
    assert expected(result), result
    assert result.outcome != "not built"


@pytest.mark.slow
def test_every_family_merges_or_is_refused_by_name(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    results = [families.tried(family, tmp_path / family) for family in families.names()]
    assert [result for result in results if not expected(result)] == []
    assert sum(result.outcome == "merged" for result in results) >= 150


def test_the_page_lists_what_was_tried() -> None:
    page = families.table([families.Result(family="llama", built="LlamaForCausalLM", outcome="merged")])
    assert "1 families merge, 0 are refused" in page
    assert "| `llama` | LlamaForCausalLM | merged |  |" in page
    written = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    assert written.splitlines()[:3] == page.splitlines()[:3]
