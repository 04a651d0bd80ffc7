"""Opening model folders: what they tell without their weights, and how damage is named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.sources.checkpoint import Checkpoint, read_vocabulary
from evomerge.merging.sources.tensorfile import read_header
from tests.examples import examples
from tests.merging.conftest import WORDS, llama, save


@pytest.fixture
def folder(models: dict[str, str], tmp_path: Path) -> Path:
    """A private copy of `base`, to be damaged."""
    return Path(shutil.copytree(models["base"], tmp_path / "model"))


@pytest.fixture
def sharded(models: dict[str, str], tmp_path: Path) -> Path:
    """A private copy of the sharded `c`, to be damaged."""
    return Path(shutil.copytree(models["c"], tmp_path / "sharded"))


def refusal(folder: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(str(folder))
    return str(caught.value)


def test_a_folder_tells_its_layout_without_reading_weights(models: dict[str, str]) -> None:
    found = Checkpoint.open(models["base"])
    assert found.num_layers == 3
    assert found.layout.outside == ("model.embed_tokens.weight", "model.norm.weight")
    assert "self_attn.q_proj.weight" in found.layout.modules
    assert len(found.layout.modules) == 9
    assert found.headers["model.embed_tokens.weight"].shape == (32, 16)
    assert found.headers["model.embed_tokens.weight"].dtype == "BF16"
    assert found.config["hidden_size"] == 16
    assert found.tied
    assert found.vocabulary == {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize("name", ["base", "c"])
def test_tensors_are_those_transformers_loads(name: str, models: dict[str, str]) -> None:
    found = Checkpoint.open(models[name])
    expected = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).state_dict()
    assert set(found.headers) == set(expected) - {"lm_head.weight"}
    for tensor in found.headers:
        assert found.tensor(tensor).dtype == torch.float32
        assert torch.equal(found.tensor(tensor), expected[tensor])


def test_an_untied_head_is_a_tensor_and_a_stored_tied_one_is_not(tmp_path: Path, folder: Path) -> None:
    untied = Checkpoint.open(str(save(llama(tie_word_embeddings=False), tmp_path / "untied")))
    assert not untied.tied
    assert "lm_head.weight" in untied.headers
    tensors = load_file(folder / "model.safetensors")
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copy, folder / "model.safetensors")
    assert "lm_head.weight" not in Checkpoint.open(str(folder)).headers


def test_fingerprints_follow_content_not_place(models: dict[str, str], folder: Path) -> None:
    before = Checkpoint.open(str(folder)).fingerprint
    assert before == Checkpoint.open(models["base"]).fingerprint
    assert before != Checkpoint.open(models["a"]).fingerprint
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert Checkpoint.open(str(folder)).fingerprint != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such model folder\n  do: check the path"),
        (lambda f: (f / "config.json").unlink(), "no config.json in the folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a mapping"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "no weights in the folder\n  expected: model.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pickled weights are not read, because they can run code\n  expected: safetensors files\n"
            "  got: pytorch_model.bin\n  do: write them as safetensors: evomerge import",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: holds no vocabulary"),
    ],
)
def test_unusable_folders_are_named(damage, message: str, folder: Path) -> None:  # type: ignore[no-untyped-def]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        _ = Checkpoint.open(str(folder)).vocabulary
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"model.norm.weight": "../evil.safetensors"}, "names a file outside its folder"),
        ({"model.norm.weight": "/etc/passwd"}, "names a file outside its folder"),
        ({"model.norm.weight": "absent.safetensors"}, "the index names a missing file"),
        ({"no.such.tensor": "model-00001-of-0000N.safetensors"}, "index and shard do not match"),
        (None, "holds no weight_map"),
    ],
)
def test_bad_indices_are_refused(shards: dict[str, str] | None, message: str, sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] |= {k: v if "0000N" not in v else first for k, v in (shards or {}).items()}
    path.write_text(json.dumps(index if shards else {}))
    assert message in refusal(sharded)


@settings(
    max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_truncation_or_header_damage_goes_unnoticed(data: st.DataObject, folder: Path, models) -> None:  # type: ignore[no-untyped-def]
    raw = (Path(models["base"]) / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    cut = data.draw(st.one_of(st.integers(0, len(raw) - 1), st.integers(0, header + 8)))
    (folder / "model.safetensors").write_bytes(raw[:cut])
    assert "truncated or corrupt safetensors file" in refusal(folder)
    (folder / "model.safetensors").write_bytes(raw + b"x")
    assert "truncated or corrupt safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "tensor 'w' of shape [2] in 4 bytes"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "at byte 4 instead of 0"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "an unreadable entry for tensor 'w'"),
        ({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, "unknown type 'X9'"),
        ([], "a header that is not a mapping"),
    ],
)
def test_contradictory_headers_are_named(header: object, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert message in str(caught.value)


def test_unigram_vocabularies_and_added_tokens_are_read(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}
    data = {"model": model, "added_tokens": [{"content": "<x>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert read_vocabulary(tmp_path) == {"<unk>": 0, "a": 1, "<x>": 2}
