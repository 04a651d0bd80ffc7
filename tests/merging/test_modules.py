"""Models of several modules: layers are the text decoder's, and other modules are merged as asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from evomerge.config import ModelsSpec
from evomerge.errors import ConfigError
from evomerge.merging import mergekit, modules
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.model_config import model_class
from evomerge.merging.tensors.digest import folder_digest
from evomerge.prepare import _kept
from evomerge.search.spaces import kinds
from evomerge.search.spaces.preset import SpaceSpec

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3, 13)[None]


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "sliding_window": 8, "model_type": "gemma3_text"},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=39,
    )


def qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config={"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        image_token_id=39,
        video_token_id=38,
        vision_start_token_id=37,
        vision_end_token_id=36,
    )


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=39,
    )


@pytest.fixture(scope="module", params=[gemma3, qwen2_vl, llava])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a random base with a vision tower, and of two models like it, whose weights all differ."""
    build: Callable[[], Any] = request.param
    folder = tmp_path_factory.mktemp(build.__name__)
    for seed, name in enumerate(("base", "a", "b")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = build()
            model = model_class(config).from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "a", "b")}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def scored_is_exported(recipe: Recipe, out: Path) -> dict[str, torch.Tensor]:
    """Assert that live, written and reloaded model are one; return the written tensors."""
    bench = Workbench(dict(recipe.models), recipe.base)
    bench.load(recipe)
    write(recipe, out)
    assert bench.digest(recipe) == folder_digest(out, recipe.dtype)
    config = transformers.AutoConfig.from_pretrained(out)
    model, info = model_class(config).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(bench.model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    return weights(out)


def parts_of(names: Any) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(modules.module_of(name), []).append(name)
    return parts


def test_stacks_move_the_layers_of_the_text_decoder_only(vlm: dict[str, str], tmp_path: Path) -> None:
    ranges = [("a", 0, 1), ("b", 0, 1), ("a", 2, 4)]
    text = yaml.safe_dump(
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": vlm[m], "layer_range": [i, j]}]} for m, i, j in ranges],
            "dtype": "float32",
        }
    )
    recipe = mergekit.read(text)
    made = scored_is_exported(recipe, tmp_path / "out")
    a, b = weights(vlm["a"]), weights(vlm["b"])
    for name, tensor in made.items():
        layer = modules.layer_of(name)
        source = b if layer == 1 else a
        own = modules.shifted(name, -1 if layer == 1 else 0)
        assert torch.equal(tensor, source[own]), name
    assert {modules.layer_of(name) for name in made} == {None, 0, 1, 2, 3}
    again = mergekit.read(mergekit.write(recipe))
    assert set(yaml.safe_load(mergekit.write(recipe))["modules"]) == set(parts_of(made))
    assert all(again.group_for(n).reads(n) == recipe.group_for(n).reads(n) for n in made)


def test_a_deeper_stack_keeps_the_tower(vlm: dict[str, str], tmp_path: Path) -> None:
    groups = (
        TensorGroup(method="passthrough", sources=("a",), layers=(0, 1, 2, 3)),
        TensorGroup(method="passthrough", sources=("b",), layers=(4, 5), shift=(-2,)),
        TensorGroup(method="passthrough", sources=("base",), layers=OUTSIDE),
    )
    recipe = Recipe(models=vlm, base="base", groups=groups, num_layers=6, dtype="float32")
    made = scored_is_exported(recipe, tmp_path / "out")
    base = weights(vlm["base"])
    assert {modules.layer_of(name) for name in made} == {None, *range(6)}
    assert all(torch.equal(made[n], base[n]) for n in made if modules.layer_of(n) is None)


def test_gradients_count_the_layers_of_each_module(vlm: dict[str, str]) -> None:
    text = yaml.safe_dump(
        {
            "merge_method": "slerp",
            "base_model": vlm["base"],
            "models": [{"model": vlm["base"]}, {"model": vlm["a"]}],
            "parameters": {"t": [0.0, 1.0]},
            "dtype": "float32",
        }
    )
    recipe = mergekit.read(text)
    last = {}
    for name in weights(vlm["base"]):
        if place := modules.own_layer(name):
            last[place[0]] = max(last.get(place[0], 0), place[1])
    for name in weights(vlm["base"]):
        place = modules.own_layer(name)
        expected = place[1] / last[place[0]] if place else 0.0
        assert recipe.group_for(name).parameters["t"] == pytest.approx(expected), name


def test_mergekits_modules_are_read_and_written(vlm: dict[str, str], tmp_path: Path) -> None:
    others = [name for name in parts_of(weights(vlm["base"])) if name != "text_decoder"]
    weighted = [{"model": vlm[m], "parameters": {"weight": w}} for m, w in (("a", [0.2, 0.8]), ("b", 0.5))]
    entries: dict[str, Any] = {name: {"models": [{"model": vlm["base"]}]} for name in others}
    entries["text_decoder"] = {"models": weighted}
    data = {"merge_method": "task_arithmetic", "base_model": vlm["base"], "modules": entries}
    recipe = mergekit.read(yaml.safe_dump(data | {"dtype": "float32"}))
    made, base = scored_is_exported(recipe, tmp_path / "out"), weights(vlm["base"])
    changed = {name for name in made if not torch.equal(made[name], base[name])}
    assert changed == set(parts_of(made)["text_decoder"])
    again = mergekit.read(mergekit.write(recipe))
    for name in made:
        ours, theirs = recipe.group_for(name), again.group_for(name)
        assert (ours.method, dict(ours.parameters)) == (theirs.method, dict(theirs.parameters)), name
    with pytest.raises(ConfigError, match="does not say how every module is made"):
        mergekit.read(yaml.safe_dump(data | {"modules": {"text_decoder": {"models": weighted}}}))
    with pytest.raises(ConfigError, match=r"modules\.tower is no module"):
        mergekit.read(yaml.safe_dump(data | {"modules": entries | {"tower": entries[others[0]]}}))


@pytest.mark.parametrize("policy", ["copy", "merge", "search"])
def test_a_run_does_with_other_modules_as_asked(policy: str, vlm: dict[str, str]) -> None:
    sources = {name: vlm[name] for name in ("a", "b")}
    spec = ModelsSpec.model_validate({"base": vlm["base"], "sources": sources, "other_modules": policy})
    names = tuple(Checkpoint.open(vlm["base"]).headers)
    template = Recipe(
        models=vlm,
        base="base",
        groups=(TensorGroup(method="linear", sources=("a", "b")),),
        kept=_kept(spec, names),
    )
    space = kinds.apply(
        SpaceSpec.model_validate(
            {
                "name": "test",
                "about": "weights per layer",
                "method": "task_arithmetic",
                "layers": 1,
                "genes": {"weight": {"low": 0.0, "high": 1.0}},
            }
        ),
        template=template,
        sources=("a", "b"),
        tensors=dict.fromkeys(vlm, names),
    )
    assert space.dimension == 10  # four layers and the rest, two sources
    recipe = space.decode([0.3] * 10)  # type: ignore[arg-type]
    found = space.encode(recipe)
    assert found is not None
    assert space.decode(found) == recipe
    makers = {recipe.group_for(n).label() for n in names if modules.module_of(n) == "vision_tower"}
    maker = recipe.group_for(next(n for n in names if modules.module_of(n) == "vision_tower"))
    assert len(makers) == 1
    assert {"copy": ("base",), "merge": ("a", "b"), "search": ("a", "b")}[policy] == maker.sources
    assert (maker.method == "task_arithmetic") is (policy == "search")


def deepseek(folder: Path, seed: int, *, depth: int = 2) -> str:
    """Save a DeepSeek-V3 whose file numbers one layer for further tokens after the decoder's."""
    config = transformers.DeepseekV3Config(
        **TEXT | {"num_hidden_layers": depth, "num_key_value_heads": 2, "moe_intermediate_size": 8},
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.DeepseekV3ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        further = {f"model.layers.{depth}.{n}.weight": torch.randn(16, 16) for n in ("eh_proj", "enorm")}
    save_file(weights(folder) | further, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_layers_for_further_tokens_are_merged_and_stay_the_last(tmp_path: Path) -> None:
    models = {name: deepseek(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))}
    assert Checkpoint.open(models["a"]).num_layers == 2
    group = TensorGroup(method="linear", sources=("a", "b"))
    recipe = Recipe(models=models, base="base", groups=(group,), dtype="float32")
    bench = Workbench(models, "base")
    bench.load(recipe)
    made = weights(write(recipe, tmp_path / "out"))
    assert bench.digest(recipe) == folder_digest(tmp_path / "out", "float32")
    a, b = weights(models["a"]), weights(models["b"])
    assert made.keys() == a.keys()
    assert all(torch.allclose(made[name], (a[name] + b[name]) / 2, atol=1e-6) for name in made)
    stack = Recipe(
        models=models,
        base="base",
        groups=(
            TensorGroup(method="passthrough", sources=("a",), layers=(0, 1)),
            TensorGroup(method="passthrough", sources=("b",), layers=(2,), shift=(-1,)),
            TensorGroup(method="passthrough", sources=("base",), layers=OUTSIDE),
        ),
        num_layers=3,
        dtype="float32",
    )
    bench.load(stack)
    stacked, base = weights(write(stack, tmp_path / "stack")), weights(models["base"])
    assert bench.digest(stack) == folder_digest(tmp_path / "stack", "float32")
    assert torch.equal(stacked["model.layers.3.eh_proj.weight"], base["model.layers.2.eh_proj.weight"])
    assert torch.equal(stacked["model.layers.2.mlp.gate.weight"], b["model.layers.1.mlp.gate.weight"])
    config = json.loads((tmp_path / "stack" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 1)


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("model.layers.7.mlp.experts.3.up_proj.weight", "text_decoder", 7),
        ("transformer.h.2.attn.c_attn.weight", "text_decoder", 2),
        ("transformer.blocks.2.ffn.up_proj.weight", "text_decoder", 2),
        ("bert.encoder.layer.5.attention.self.query.weight", "text_decoder", 5),
        ("transformer.encoder.layers.5.mlp.weight", "text_decoder", 5),
        ("language_model.model.layers.4.vision_expert.weight", "text_decoder", 4),
        ("thinker.model.layers.4.mlp.up_proj.weight", "text_decoder", 4),
        ("model.encoder.layers.5.conv.weight", "encoder", None),
        ("visual.merger.mlp.0.weight", "multi_modal_projector", None),
        ("model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", "vision_tower", None),
        ("vision_model.global_transformer.layers.3.mlp.fc1.weight", "vision_tower", None),
        ("model.embed_tokens_extend.image_embed.img_processor.encoder.layers.3.a", "vision_tower", None),
        ("thinker.audio_tower.layers.3.fc1.weight", "audio_tower", None),
        ("talker.model.layers.3.mlp.up_proj.weight", "talker", None),
        ("mtp.layers.0.mlp.up_proj.weight", "mtp", None),
        ("model.mtp_layers.0.mlp.up_proj.weight", "mtp_layers", None),
        ("model.altup_projections.1.weight", "text_decoder", None),
        ("lm_head.weight", "text_decoder", None),
    ],
)
def test_names_say_module_and_layer(name: str, module: str, layer: int | None) -> None:
    assert (modules.module_of(name), modules.layer_of(name)) == (module, layer)


def test_kinds_of_layers_that_the_class_computes_move_with_their_layers(tmp_path: Path) -> None:
    """Published Gemma 2 configs have no list of kinds: every second layer has a sliding window."""
    text = TEXT | {"head_dim": 8, "sliding_window": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**text)).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    kinds_of_layers = config.pop("layer_types")
    path.write_text(json.dumps(config))
    stack = Recipe(
        models={"a": str(tmp_path / "a")},
        groups=(
            TensorGroup(method="passthrough", sources=("a",), layers=(0, 1, 2), shift=(1,)),
            TensorGroup(method="passthrough", sources=("a",), layers=OUTSIDE),
        ),
        num_layers=3,
        dtype="float32",
    )
    scored_is_exported(stack, tmp_path / "out")
    made = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert made.layer_types == kinds_of_layers[1:]


def test_modules_that_mergekit_calls_by_their_layers_names_are_read(
    vlm: dict[str, str], tmp_path: Path
) -> None:
    """Without a definition of an architecture, mergekit has a module per list of layers and `default`."""
    base, a = weights(vlm["base"]), weights(vlm["a"])
    lists = {match.group(1) for name in base if (match := re.match(r"(.*?)\.\d+\.", name))}
    text = next(name for name in lists if modules.layer_of(f"{name}.0.weight") == 0)
    entries: dict[str, Any] = {
        name: {"models": [{"model": vlm["base"], "parameters": {"scale": 0.5}}]} for name in lists
    }
    ranges = [("a", 0, 2), ("base", 1, 4)]
    entries[text] = {
        "slices": [{"sources": [{"model": vlm[m], "layer_range": [i, j]}]} for m, i, j in ranges]
    }
    entries["default"] = {"models": [{"model": vlm["a"]}]}
    data = {"merge_method": "passthrough", "modules": entries, "dtype": "float32"}
    recipe = mergekit.read(yaml.safe_dump(data))
    made = scored_is_exported(recipe, tmp_path / "out")
    for name, tensor in made.items():
        if (layer := modules.layer_of(name)) is not None:
            expected = a[name] if layer < 2 else base[modules.shifted(name, -1)]
        else:
            listed = any(name.startswith(f"{start}.") for start in lists)
            expected = base[name] * 0.5 if listed else a[name]
        assert torch.equal(tensor, expected), name
    assert {modules.layer_of(name) for name in made} == {None, *range(5)}
    del entries["default"]
    if modules.PROJECTOR not in {modules.module_of(f"{name}.") for name in lists}:
        with pytest.raises(ConfigError, match="does not say how every module"):
            mergekit.read(yaml.safe_dump(data))


def test_stacks_beside_averaged_modules_are_written_for_mergekit(vlm: dict[str, str], tmp_path: Path) -> None:
    """As a run over paths of layers makes them with `other_modules: merge`."""
    names = weights(vlm["base"])
    starts = tuple(s for module in modules.beside_text(names) for s in modules.prefixes(names, module))
    groups = (
        TensorGroup(method="linear", sources=("a", "b"), layers=OUTSIDE, match=starts),
        TensorGroup(method="passthrough", sources=("a",), layers=(0, 2, 3)),
        TensorGroup(method="passthrough", sources=("b",), layers=(1,), shift=(2,)),
        TensorGroup(method="passthrough", sources=("a",), layers=OUTSIDE),
    )
    recipe = Recipe(models=vlm, base="base", groups=groups, dtype="float32")
    made = scored_is_exported(recipe, tmp_path / "out")
    text = mergekit.write(recipe)
    slices = yaml.safe_load(text)["modules"]["text_decoder"]["slices"]
    assert all("weight" in source["parameters"] for part in slices for source in part["sources"])
    again = weights(write(mergekit.read(text), tmp_path / "again"))
    assert all(torch.equal(made[name], again[name]) for name in made)


@pytest.mark.parametrize(
    ("end", "message"), [(2, "no slice of .* makes its layer 2"), (9, "has fewer layers")]
)
def test_slices_of_a_tower_are_its_layers(end: int, message: str, vlm: dict[str, str]) -> None:
    others = [name for name in parts_of(weights(vlm["base"])) if name != "text_decoder"]
    entries: dict[str, Any] = {name: {"models": [{"model": vlm["a"]}]} for name in ("text_decoder", *others)}
    ranged = {"model": vlm["a"], "layer_range": [0, end]}
    entries["vision_tower"] = {"slices": [{"sources": [ranged]}]}
    data = {"merge_method": "passthrough", "modules": entries, "dtype": "float32"}
    with pytest.raises(ConfigError, match=message):
        mergekit.read(yaml.safe_dump(data))
