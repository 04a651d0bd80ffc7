"""LoRA adapters as sources, against what peft merges."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.sources.adapter import AdaptedCheckpoint, is_embedding, split_location
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.source import task_vector
from tests.merging.conftest import llama, save

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


def gpt2() -> GPT2LMHeadModel:
    """Its layers are stored (in, out), the square ones among them, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


BASES = {
    "tied": llama,
    "untied": lambda: llama(tie_word_embeddings=False),
    "biased": lambda: llama(attention_bias=True),
    "gpt2": gpt2,
}
TRAINED: dict[str, tuple[str, dict[str, object]]] = {
    "a norm": ("tied", {"modules_to_save": ["norm"]}),
    "linear layers": ("tied", {"modules_to_save": ["up_proj"]}),
    "whole blocks": ("tied", {"modules_to_save": ["mlp"]}),
    "the head": ("untied", {"modules_to_save": ["lm_head"]}),
    "embeddings and head": ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embeddings": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "adapted embeddings": ("untied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "all biases": ("biased", {"bias": "all"}),
    "biases of adapted layers": ("biased", {"bias": "lora_only"}),
    "biases of B": ("biased", {"lora_bias": True, "use_rslora": True}),
    "layers stored transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "their flag forgotten": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}),
    "a flag that does not fit": ("tied", {"fan_in_fan_out": True}),
    "DoRA": ("untied", {"use_dora": True, "use_rslora": True}),
    "DoRA of transposed layers": (
        "gpt2",
        {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "DoRA of embeddings": ("untied", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "PiSSA": ("untied", {"init_lora_weights": "pissa"}),
    "PiSSA of transposed layers": (
        "gpt2",
        {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "OLoRA": ("untied", {"init_lora_weights": "olora", "use_rslora": True}),
    "tokens": ("untied", {"trainable_token_indices": [1, 5]}),
    "tokens of tied embeddings": ("tied", {"trainable_token_indices": [7]}),
    "tokens of embeddings and head": (
        "untied",
        {"trainable_token_indices": {"embed_tokens": [2, 3], "lm_head": [3, 4]}},
    ),
}


def trained(base: Path, folder: Path, **options: object) -> Path:
    """Save an adapter as training leaves it: everything peft trains has moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on its defaults for embeddings and Conv1D
        adapted = get_peft_model(model, LoraConfig(**chosen))
        generator = torch.Generator().manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_everything_an_adapter_may_store_is_read_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    kind, options = TRAINED[name]
    base = tmp_path / "base"
    BASES[kind]().save_pretrained(base)
    adapter = trained(base, tmp_path / "adapter", **options)
    source = open_source(f"{base}+{adapter}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert source.headers == open_source(str(base)).headers
    assert any(not torch.equal(merged[key], plain[key]) for key in source.headers)
    for key in source.headers:
        torch.testing.assert_close(source.tensor(key), merged[key], rtol=1e-6, atol=1e-7)
        assert source.tensor(key).is_contiguous()
    if source.tied:
        embeddings = next(key for key in source.headers if is_embedding(key))
        assert torch.equal(merged["lm_head.weight"], source.tensor(embeddings))


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_a_tied_head_is_not_taken_apart(options: dict[str, object], tmp_path: Path) -> None:
    """peft unties the merged model, or adds the update to both: neither is a source like its base."""
    base = tmp_path / "base"
    llama().save_pretrained(base)
    adapter = trained(base, tmp_path / "adapter", **options)
    assert "changes the embeddings and the head" in refusal(f"{base}+{adapter}")


def test_the_task_vector_of_an_adapter_is_its_product(
    models: dict[str, str], adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = open_source(models["base"]), open_source(adapters["rslora"])
    assert isinstance(source, AdaptedCheckpoint)
    expected = {name: source.tensor(name) - base.tensor(name) for name in base.headers}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("the base was read"))
        found = {name: task_vector(source, base, name) for name in base.headers}
        assert task_vector(base, base, "model.norm.weight") is None
    assert {name for name, vector in found.items() if vector is not None} == set(source.updates)
    for name, vector in found.items():
        if vector is None:
            assert not expected[name].any()
            continue
        up, down = source.factors(name)
        torch.testing.assert_close(vector, up @ down, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(vector, expected[name], rtol=0, atol=1e-7)
        assert torch.equal(base.tensor(name) + vector, source.tensor(name))


def test_the_task_vector_of_an_adapter_on_another_model(
    models: dict[str, str], adapters: dict[str, str]
) -> None:
    base, other = open_source(models["base"]), open_source(models["a"])
    source = open_source(f"{models['a']}+{adapters['plain']}")
    assert isinstance(source, AdaptedCheckpoint)
    for name in base.headers:
        moved = other.tensor(name) - base.tensor(name)
        update = source.update(name)
        vector = task_vector(source, base, name, origin=lambda name=name: base.tensor(name))
        assert vector is not None
        assert torch.equal(vector, moved if update is None else moved + update)
    against_adapter = task_vector(base, source, "model.norm.weight")
    assert against_adapter is not None
    assert torch.equal(against_adapter, base.tensor("model.norm.weight") - other.tensor("model.norm.weight"))


def test_a_stored_tensor_gives_a_difference(tmp_path: Path) -> None:
    save(llama(), tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "adapter", modules_to_save=["norm"])
    base, source = open_source(str(tmp_path / "base")), open_source(f"{tmp_path / 'base'}+{adapter}")
    vector = task_vector(source, base, "model.norm.weight")
    assert vector is not None
    assert torch.equal(vector, source.tensor("model.norm.weight") - base.tensor("model.norm.weight"))


def test_an_adapter_reads_like_its_base(models: dict[str, str], adapters: dict[str, str]) -> None:
    base, adapted = open_source(models["base"]), open_source(adapters["plain"])
    assert adapted.headers == base.headers
    assert adapted.layout == base.layout
    assert (adapted.num_layers, adapted.tied, adapted.config) == (3, True, base.config)
    assert adapted.vocabulary == base.vocabulary
    assert len({open_source(adapters[name]).fingerprint for name in NAMES} | {base.fingerprint}) == 4


def test_the_base_of_an_adapter_alone(models: dict[str, str], folder: Path) -> None:
    settings(folder, base_model_name_or_path="../gone")
    assert "the adapter's base model can't be found\n  got: base_model_name_or_path: '../gone'" in refusal(
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
        ({"use_dora": True}, "config and file differ about DoRA"),
        ({"modules_to_save": ["norm"]}, "lacks a tensor of its modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, "expected: 'lm_head.weight' stored whole, for 'lm_head'"),
        ({"trainable_token_indices": [1]}, "config and file differ about trained tokens"),
        ({"init_lora_weights": "corda"}, "corda changed the base"),
        ({"target_parameters": ["w"]}, "uses target_parameters"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"brand_new_option": 3}, "uses brand_new_option"),
        ({"peft_type": "IA3"}, "unsupported adapter type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base"),
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
    for odd in ("lm_head.weights", "model.norm.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"):
        save_file(tensors | {f"base_model.model.{odd}": torch.zeros(2)}, path)
        assert f"unsupported tensor 'base_model.model.{odd}'" in refusal(where)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.zeros(2)}, path)
    assert "does not fit 'model.norm.weight'\n  expected: [16]\n  got: [2]" in refusal(where)
    save_file(tensors | {"base_model.model.model.norm.lora_C": torch.zeros(2)}, path)
    assert "unsupported tensor 'base_model.model.model.norm.lora_C'" in refusal(where)
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated or corrupt" in refusal(where)
    path.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin, a pickled file" in refusal(where)
    assert "is not an adapter" in refusal(f"{models['base']}+{tmp_path / 'none'}")
