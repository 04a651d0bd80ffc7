"""One table of model families: what is merged loads in plain transformers, and is what was scored.

No family is known by name in the package; a new one is a new row here, and nothing else.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.export.writer import write
from evomerge.merging.live import live_weights
from evomerge.merging.live.live_weights import Spread
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.modules import layer_of
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.vocabulary import row_tensors
from evomerge.merging.tensors.digest import folder_digest

COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: config class, changes to COMMON, embeddings
    "llama": ("LlamaConfig", UNTIED, "model.embed_tokens.weight"),
    "llama-tied-gqa-bias": (
        "LlamaConfig",
        TIED | GQA | {"attention_bias": True},
        "model.embed_tokens.weight",
    ),
    "qwen2": ("Qwen2Config", UNTIED, "model.embed_tokens.weight"),
    "qwen2-tied": ("Qwen2Config", TIED, "model.embed_tokens.weight"),
    "qwen3": ("Qwen3Config", TIED, "model.embed_tokens.weight"),
    "mistral": ("MistralConfig", UNTIED | {"sliding_window": 8}, "model.embed_tokens.weight"),
    "gemma2": ("Gemma2Config", TIED | {"query_pre_attn_scalar": 8}, "model.embed_tokens.weight"),
    "gemma3": ("Gemma3TextConfig", TIED, "model.embed_tokens.weight"),
    "phi3": ("Phi3Config", UNTIED, "model.embed_tokens.weight"),
    "phi": ("PhiConfig", UNTIED, "model.embed_tokens.weight"),
    "gpt-neox": ("GPTNeoXConfig", UNTIED, "gpt_neox.embed_in.weight"),
    "gpt-neox-tied": ("GPTNeoXConfig", TIED, "gpt_neox.embed_in.weight"),
    "gpt2": ("GPT2Config", TIED, "transformer.wte.weight"),
    "mixtral": ("MixtralConfig", UNTIED | {"num_local_experts": 11}, "model.embed_tokens.weight"),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        UNTIED | EXPERTS | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
        "model.embed_tokens.weight",
    ),
    "qwen3-moe": ("Qwen3MoeConfig", TIED | EXPERTS, "model.embed_tokens.weight"),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "model.embed_tokens.weight",
    ),
}
IDS = torch.tensor([[1, 5, 9, 13, 17, 21, 25, 29]])


def build(name: str, seed: int) -> torch.nn.Module:
    """Return a random model of a family in bfloat16; seeds after 0 are fine-tunes of seed 0."""
    kind, changes, _ = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(COMMON | changes)))
        torch.manual_seed(seed)
        for parameter in model.parameters():  # every element its own: a mix-up of two must show
            parameter.data += torch.randn(parameter.shape) * (0.02 if seed else 0.1)
    return model.to(torch.bfloat16).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """A family's name, and name -> folder of a base and two fine-tunes, the second sharded."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "a", "b")):
        options = {"max_shard_size": "4KB"} if name == "b" else {}
        build(request.param, seed).save_pretrained(folder / name, **options)
    return request.param, {name: str(folder / name) for name in ("base", "a", "b")}


def recipe_of(models: dict[str, str], method: str, sources: tuple[str, ...], **parameters: Any) -> Recipe:
    group = TensorGroup(method=method, sources=sources, parameters=parameters)
    return Recipe(models=models, base="base", groups=(group,))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS.to(model.device)).logits
    assert found.isfinite().all()
    return found


def load(folder: str | Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_scored_is_exported_and_loads(family: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    _, models = family
    bench = Workbench(models, "base")
    layered = Recipe(
        models=models,
        base="base",
        groups=(
            TensorGroup(method="slerp", sources=("a", "b"), layers=OUTSIDE),
            TensorGroup(method="dare_ties", sources=("b", "a"), layers=(1,), parameters={"density": 0.5}),
            TensorGroup(method="linear", sources=("a", "b")),
        ),
    )
    recipes = [
        recipe_of(models, "ties", ("a", "b"), density=(0.4, 0.7), weight=(0.8, 0.5)),
        recipe_of(models, "linear", ("a", "b"), weight=(0.25, 0.75)),
        layered,
    ]
    seen = []
    for index, recipe in enumerate(recipes):
        bench.load(recipe)
        exported = load(folder := write(recipe, tmp_path / str(index)))
        assert bench.digest(recipe) == folder_digest(folder, recipe.dtype)
        live = bench.model.state_dict()
        assert live.keys() == exported.state_dict().keys()
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, live[name]), name
        seen.append(logits(bench.model))
        assert torch.equal(seen[-1], logits(exported))
    assert len({tuple(each.flatten().tolist()) for each in seen}) == len(recipes)


@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_one_hot_is_the_source(source: str, family: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    _, models = family
    recipe = recipe_of(models, "linear", ("base", "a", "b"), weight=tuple(float(n == source) for n in models))
    out = write(recipe, tmp_path / "out")
    original, merged = Checkpoint.open(models[source]), Checkpoint.open(str(out))
    assert list(original.headers) == list(merged.headers)
    assert all(torch.equal(original.stored(name), merged.stored(name)) for name in original.headers)
    bench = Workbench(models, "base")
    bench.load(recipe)
    assert torch.equal(logits(bench.model), logits(load(models[source])))


def test_layers_and_embeddings_are_found_by_name(family: tuple[str, dict[str, str]]) -> None:
    name, models = family
    checkpoint = Checkpoint.open(models["base"])
    assert checkpoint.num_layers == 2
    outside = [tensor for tensor in checkpoint.headers if layer_of(tensor) is None]
    assert all("layer" not in tensor.replace("layernorm", "").replace("layer_norm", "") for tensor in outside)
    rows = row_tensors(checkpoint)
    assert FAMILIES[name][2] in rows
    config = AutoConfig.from_pretrained(models["base"])
    live = AutoModelForCausalLM.from_pretrained(models["base"])
    heads = 0 if config.tie_word_embeddings else 1 + (live.get_output_embeddings().bias is not None)
    assert len(rows) == 1 + heads
    stored = checkpoint.stored(FAMILIES[name][2])
    assert torch.equal(stored, live.get_input_embeddings().weight)


def test_a_model_in_half_precision_gets_its_experts(tmp_path: Path) -> None:
    build("mixtral", 0).save_pretrained(tmp_path / "base")
    models = {"base": str(tmp_path / "base")}
    bench = Workbench(models, "base", compute_dtype="bfloat16")
    bench.load(recipe_of(models, "linear", ("base",)))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in bench.model.state_dict().items())


def test_a_checkpoint_without_prefix_or_with_old_buffers(tmp_path: Path) -> None:
    """The first GPT-2 and GPT-NeoX files: no `transformer.`, causal masks among the weights."""
    model = build("gpt2", 1)
    model.transformer.save_pretrained(tmp_path / "bare")  # type: ignore[union-attr, operator]
    config = tmp_path / "bare" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    path = tmp_path / "bare" / "model.safetensors"
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(load_file(path) | masks, path, metadata={"format": "pt"})
    models = {"base": str(tmp_path / "bare")}
    assert Checkpoint.open(models["base"]).headers.keys() == {
        name.removeprefix("transformer.") for name in model.state_dict() if name != "lm_head.weight"
    }
    recipe = recipe_of(models, "linear", ("base",))
    bench = Workbench(models, "base")
    bench.load(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = AutoModelForCausalLM.from_pretrained(write(recipe, tmp_path / "out"), dtype=torch.float32)
    assert torch.equal(logits(bench.model), logits(out))
    assert torch.equal(logits(bench.model), logits(model.float()))


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let transformers think that Llama checkpoints need one more conversion."""
    from transformers import conversion_mapping

    def register(converter: Any) -> None:
        mapping = conversion_mapping._build_checkpoint_conversion_mapping()
        monkeypatch.setattr(
            conversion_mapping, "_checkpoint_conversion_mapping_cache", mapping | {"llama": [converter]}
        )

    return register


def split_llama(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Save a Llama whose file has gate and up projections in one tensor."""
    model = build("llama", 1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        parts = [tensors.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"model.layers.{layer}.mlp.fused.weight"] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.float() for name, tensor in model.state_dict().items()}, {"base": str(folder)}


@pytest.mark.parametrize("turned", [False, True])
def test_what_transformers_splits_or_reorders_is_followed(
    turned: bool, converted: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading as loading

    monkeypatch.setattr(live_weights, "BLOCK", 7)
    expected, models = split_llama(tmp_path / "m")
    operations = [loading.Interleave(dim=0), loading.Chunk(dim=0)] if turned else [loading.Chunk(dim=0)]
    converted(
        loading.WeightConverter(
            source_patterns="mlp.fused.weight",
            target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=operations,
        )
    )
    bench = Workbench(models)
    places = live_weights.locate(bench.model, bench.sources["base"].headers, "base")
    assert [name for name, place in places.items() if isinstance(place, Spread)] == [
        f"model.layers.{layer}.mlp.fused.weight" for layer in range(2)
    ]
    recipe = Recipe(models=models, groups=(TensorGroup(method="linear", sources=("base",)),))
    bench.load(recipe)
    loaded = load(models["base"]).state_dict()
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
        assert turned or torch.equal(tensor, expected[name])


def test_a_conversion_that_computes_is_refused(converted: Callable[[Any], None], tmp_path: Path) -> None:
    from transformers import core_model_loading as loading

    class Doubled(loading.ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}

    build("llama", 1).save_pretrained(tmp_path / "m")
    converted(
        loading.WeightConverter(
            source_patterns="mlp.up_proj.weight", target_patterns="mlp.up_proj.weight", operations=[Doubled()]
        )
    )
    with pytest.raises(
        ModelError, match=r"can't be written into LlamaForCausalLM.*\n.*up_proj.*\n.*computes"
    ):
        Workbench({"base": str(tmp_path / "m")})


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    build("qwen3-moe", 0).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    lost = tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its tensors can't be written into Qwen3MoeForCausalLM"):
        Workbench({"base": str(tmp_path / "m")})
    save_file(tensors | {"model.layers.1.mlp.experts.2.up.weight": lost}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        Workbench({"base": str(tmp_path / "m")})
