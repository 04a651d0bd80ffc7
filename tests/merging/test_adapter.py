"""LoRA adapters as sources, against what peft merges."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.adapter import split_location
from evomerge.merging.source import AdaptedCheckpoint, open_source

from .conftest import llama, save

NAMES = ("plain", "rslora", "patterns")


@pytest.fixture
def folder(adapters: dict[str, str], tmp_path: Path) -> Path:
    """A private copy of the plain adapter, to be changed."""
    return Path(shutil.copytree(adapters["plain"], tmp_path / "adapter"))


def settings(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(location: str, base: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        open_source(location, base=base)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", [True, False])
def test_adapted_tensors_are_those_peft_merges(
    name: str, alone: bool, models: dict[str, str], adapters: dict[str, str]
) -> None:
    source = open_source(adapters[name] if alone else f"{models['base']}+{adapters[name]}")
    assert isinstance(source, AdaptedCheckpoint)
    base = LlamaForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    plain = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers deprecates
        merged = PeftModel.from_pretrained(base, adapters[name]).merge_and_unload().state_dict()
    changed = [key for key in source.headers if not torch.equal(merged[key], plain[key])]
    assert sorted(changed) == sorted(source.updates)
    for key in source.headers:
        torch.testing.assert_close(source.tensor(key), merged[key], rtol=1e-6, atol=1e-7)


def test_an_adapter_reads_like_its_base(models: dict[str, str], adapters: dict[str, str]) -> None:
    base, adapted = open_source(models["base"]), open_source(adapters["plain"])
    assert adapted.headers == base.headers
    assert adapted.layout == base.layout
    assert (adapted.num_layers, adapted.tied, adapted.config) == (3, True, base.config)
    assert adapted.vocabulary == base.vocabulary
    assert len({open_source(adapters[name]).fingerprint for name in NAMES} | {base.fingerprint}) == 4


def test_the_base_of_an_adapter_alone(models: dict[str, str], folder: Path) -> None:
    settings(folder, base_model_name_or_path="../gone")
    assert "the adapter's base model is not there\n  got: base_model_name_or_path: '../gone'" in refusal(
        str(folder)
    )
    assert open_source(str(folder), base=models["base"]).num_layers == 3


def test_a_plus_sign_in_a_folder_name_is_not_an_adapter(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    odd = tmp_path / "c++"
    shutil.copytree(models["base"], odd)
    assert split_location(str(odd)) == (str(odd), None)
    assert split_location(f"{odd}+{adapters['plain']}") == (str(odd), adapters["plain"])
    assert open_source(f"{odd}+{adapters['plain']}").num_layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "the adapter uses use_dora, which is not supported"),
        ({"bias": "lora_only"}, "uses bias, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, 'got: modules_to_save: ["lm_head"]'),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"brand_new_option": 3}, "uses brand_new_option"),
        ({"peft_type": "IA3"}, "unsupported adapter type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the base"),
        ({"r": 5}, "rank of 'model.layers.0.mlp.down_proj'"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(changes: dict[str, object], message: str, folder: Path) -> None:
    settings(folder, **changes, base_model_name_or_path="nowhere")
    base = folder.parent / "base"
    save(llama(), base)
    assert message in refusal(f"{base}+{folder}")


def test_damaged_and_foreign_adapters_are_refused(
    models: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    where = f"{models['base']}+{folder}"
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_B" in key)
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert "only one of lora_A and lora_B" in refusal(where)
    save_file(tensors | {name: torch.zeros(3, 4)}, path)
    assert "does not fit 'model.layers.0.mlp.down_proj.weight'" in refusal(where)
    save_file({k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}, path)
    assert "changes 'model.layers.7.mlp.down_proj.weight', which its base does not have" in refusal(where)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, path)
    assert "unsupported tensor 'base_model.model.lm_head.weight'" in refusal(where)
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated or corrupt" in refusal(where)
    path.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin, which is pickled" in refusal(where)
    assert "is not an adapter" in refusal(f"{models['base']}+{tmp_path / 'none'}")
