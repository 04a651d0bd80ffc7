"""Quantised, pickled and GGUF models become folders that merge; transformers is the judge of the numbers."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import ModelError
from evomerge.merging.export.writer import write
from evomerge.merging.importing import packed, whole
from evomerge.merging.importing.folder import import_model
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_source
from tests.merging.conftest import llama, save

FLOAT8 = torch.float8_e4m3fn


def quantised(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """Write other weights and a quantization_config into a model's folder."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def in_blocks(weights: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 elements and the scale of each block; the last ones may be smaller."""
    scales = torch.stack(
        [torch.stack([b.abs().max() for b in part.split(columns, 1)]) for part in weights.split(rows, 0)]
    ).div(448)
    whole = packed.expanded_scale(scales, tuple(weights.shape), (rows, columns))
    return (weights / whole).to(FLOAT8), scales


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    folder = save(llama(3), tmp_path / "fp8")
    tensors = {}
    for name, weights in load_file(folder / "model.safetensors").items():
        tensors[name] = weights
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(weights.float(), 8, 4)
    config = {"quant_method": "fp8", "weight_block_size": [8, 4], "activation_scheme": "dynamic"}
    return quantised(folder, tensors, config)


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    folder = tmp_path / "oss"
    config = GptOssConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    GptOssForCausalLM(config).save_pretrained(folder)
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, weights in load_file(folder / "model.safetensors").items():
        if weights.dim() == 3:
            experts, inner, outer = weights.shape
            shape = (experts, outer, inner // 32)
            draw: Callable[..., torch.Tensor] = torch.randint
            tensors[f"{name}_blocks"] = draw(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
            tensors[f"{name}_scales"] = draw(110, 130, shape, generator=generator).to(torch.uint8)
        else:
            tensors[name] = weights.bfloat16()
    return quantised(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def assert_equals_transformers(folder: Path, out: Path, config: Any) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    ours, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_fp8_in_blocks_equals_transformers_and_merges(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"quantised.*\n.*\n.*\n.*evomerge import"):
        write(Recipe.copy_of(str(fp8), dtype="float32"), tmp_path / "no")
    (fp8 / "1_Pooling").mkdir()
    (fp8 / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("x")
    (fp8 / "notes.txt").symlink_to(tmp_path / "secret")
    done = import_model(str(fp8), tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert not (tmp_path / "out" / "notes.txt").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert (done.form, done.dtype, done.streamed) == ("fp8 (8 bits)", "bfloat16", True)
    assert_equals_transformers(fp8, tmp_path / "out", FineGrainedFP8Config(dequantize=True))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    write(Recipe.copy_of(str(tmp_path / "out"), dtype="float32"), tmp_path / "merged")


def test_a_last_block_may_be_smaller() -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128, where transformers divides 576 by the number of blocks."""
    weights = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    elements, scales = in_blocks(weights, 16, 8)
    assert scales.shape == (2, 2)
    back = elements.float() * packed.expanded_scale(scales, (24, 16), (16, 8))
    assert (back - weights).abs().max() <= weights.abs().max() / 16  # half a step of FP8


def test_mxfp4_equals_transformers(mxfp4: Path, tmp_path: Path) -> None:
    assert import_model(str(mxfp4), tmp_path / "out").form == "MXFP4"
    assert_equals_transformers(mxfp4, tmp_path / "out", Mxfp4Config(dequantize=True))


@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        ((6, 4), (), None),
        ((6, 4), (1,), None),
        ((6, 4), (6, 1), None),
        ((6, 4), (6,), None),
        ((2, 6, 4), (2, 1, 1), None),
        ((6, 5), (3, 3), (2, 2)),
        ((2, 6, 5), (2, 3, 3), (2, 2)),
    ],
)
def test_scales_of_all_shapes(
    shape: tuple[int, ...], scale: tuple[int, ...], block: Any, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shape, generator=generator).to(FLOAT8)
    scales = torch.rand(scale, generator=generator) + 0.5
    found = weights.float() * packed.expanded_scale(scales, shape, block)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        place = []
        for axis, size in enumerate(scale):
            at = index[axis] if len(scale) > 1 or size == shape[0] else 0
            steps = block is not None and axis >= len(shape) - 2
            place.append(0 if size == 1 else at // block[axis - len(shape)] if steps else at)
        assert found[tuple(index)] == weights[tuple(index)].float() * scales[tuple(place)]


@pytest.mark.parametrize(
    "kind", ["shards", *(pytest.param(k, marks=pytest.mark.slow) for k in ("one", "legacy", "state_dict"))]
)
def test_pickled_weights(kind: str, tmp_path: Path) -> None:
    folder = save(llama(1), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "shards":
        names = sorted(tensors)
        for number, part in enumerate((names[:5], names[5:]), start=1):
            torch.save({n: tensors[n] for n in part}, folder / f"pytorch_model-{number:05d}-of-00002.bin")
        where = {n: f"pytorch_model-{1 + (n in names[5:]):05d}-of-00002.bin" for n in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    elif kind == "state_dict":
        torch.save({"state_dict": tensors}, folder / "last.pt")
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "one")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    with pytest.raises(ModelError, match=f"evomerge import {folder} OUT"):
        open_source(str(folder))
    done = import_model(str(folder), tmp_path / "out")
    assert (done.form, done.dtype) == ("pickled", "bfloat16")
    source = open_source(str(tmp_path / "out"))
    assert source.headers.keys() == tensors.keys()
    assert all(torch.equal(source.tensor(name), tensors[name].float()) for name in tensors)
    assert not list((tmp_path / "out").glob("*.bin"))


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "content",
    ["code", "nan", *(pytest.param(c, marks=pytest.mark.slow) for c in ("old code", "noise", "numbers"))],
)
def test_bad_pickled_files_are_one_message(content: str, tmp_path: Path) -> None:
    folder = save(llama(1), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path, touched = folder / "pytorch_model.bin", tmp_path / "touched"
    if content == "code":
        torch.save({"a": Harmful(touched)}, path)
    elif content == "old code":
        path.write_bytes(pickle.dumps({"a": Harmful(touched)}))
    elif content == "noise":
        path.write_bytes(b"PK\x03\x04" + bytes(range(200)))
    elif content == "numbers":
        torch.save({"a": 1}, path)
    else:
        next(iter(weights.values()))[0] = float("nan")
        torch.save(weights, path)
    result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert ("system, which is no tensor and can run code" in result.output) == (content == "code")
    assert "Re-running" not in result.output  # torch's advice to load code all the same
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_what_needs_no_import_or_is_no_model(tmp_path: Path) -> None:
    folder = save(llama(1), tmp_path / "m")
    with pytest.raises(ModelError, match="ordinary safetensors already"):
        import_model(str(folder), tmp_path / "out")
    with pytest.raises(ModelError, match="no such folder"):
        import_model(str(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="can't read this gguf model"):
        import_model(str(tmp_path / "x.gguf"), tmp_path / "out")
    assert (
        CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "o"), "--dtype", "int4"]).exit_code
        == 2
    )


def test_scales_that_do_not_fit_are_refused(fp8: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file(tensors | {name: torch.ones(5, 3)}, fp8 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its scales don't fit it"):
        import_model(str(fp8), tmp_path / "out")


def test_what_unpacked_weights_is_not_undone_when_they_are_written() -> None:
    """transformers reverses on saving what it did on loading; unpacking has no way back."""

    class Unpacking:
        def reverse_transform(self) -> None:
            raise NotImplementedError

    class Renaming:
        def reverse_transform(self) -> str:
            return "the other way"

    renaming = Renaming()
    for before, after in (([Unpacking(), renaming], [renaming]), ([Unpacking()], None), (None, None)):
        model = SimpleNamespace(_weight_conversions=before)
        whole._forget_dequantising(model)
        assert model._weight_conversions == after


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_model_becomes_float_weights(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    packing = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=packing, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    import_model(tmp_path / "packed", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        difference = found(tokens).logits - model(tokens).logits.float()
    assert float(difference.abs().max()) < 0.02  # of logits around 0.5; its activations have 8 bits
