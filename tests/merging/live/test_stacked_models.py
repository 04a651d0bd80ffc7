"""Stacked recipes in place: the exported model's bits, shared weights, and what is left of others."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from evomerge.errors import ModelError
from evomerge.merging.export.writer import write
from evomerge.merging.live import stacked_models, workbench
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.tensors.digest import folder_digest
from evomerge.merging.tensors.merge_tensor import NonFiniteWeights
from tests.merging import families
from tests.merging.conftest import WORDS, llama, save
from tests.merging.live.test_architectures import COMMON, FAMILIES

IDS = torch.arange(4, 20)[None]


def path(
    models: dict[str, str],
    *layers: tuple[str, int],
    outside: str = "a",
    dtype: str = "bfloat16",
    **scales: Any,
) -> Recipe:
    """Return the stack of (model, layer) pairs; scales: tensor-name part -> what multiplies it in layer 1."""
    groups = [
        TensorGroup(
            method="passthrough",
            sources=(layers[1][0],),
            layers=(1,),
            match=(match,),
            shift=(layers[1][1] - 1,),
            parameters={"scale": scale},
        )
        for match, scale in scales.items()
    ]
    groups += [
        TensorGroup(method="passthrough", sources=(name,), layers=(i,), shift=(layer - i,))
        for i, (name, layer) in enumerate(layers)
    ]
    groups.append(TensorGroup(method="passthrough", sources=(outside,), layers=OUTSIDE))
    return Recipe(models=models, base="base", groups=tuple(groups), num_layers=len(layers), dtype=dtype)


def assert_exported(bench: Workbench, recipe: Recipe, out: Path, ids: torch.Tensor = IDS) -> None:
    """Load a recipe, write it, and compare weights, logits and generations bit by bit."""
    bench.load(recipe)
    loaded = AutoModelForCausalLM.from_pretrained(write(recipe, out), dtype=torch.float32)
    assert bench.digest(recipe) == folder_digest(out, recipe.dtype)
    state = loaded.state_dict()
    live = bench.model.state_dict()
    assert live.keys() == state.keys()
    assert all(torch.equal(live[name], state[name]) for name in state)
    assert torch.equal(bench.model(ids).logits, loaded(ids).logits)
    told = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (bench.model, loaded)]
    assert torch.equal(*told)
    assert bench.model.config.num_hidden_layers == loaded.config.num_hidden_layers == recipe.num_layers


LONG = (("a", 0), ("b", 2), ("a", 1), ("a", 1), ("base", 2))


@pytest.mark.parametrize(
    ("layers", "scales"),
    [
        (LONG, {}),
        (LONG, {"o_proj": 0.5, "down_proj": 1.25}),
        ((("b", 2), ("c", 0)), {"down_proj": -0.3}),
        ((("c", 0), ("c", 1), ("c", 2)), {}),
    ],
)
def test_a_stack_is_the_exported_model(
    layers: tuple[tuple[str, int], ...], scales: dict[str, float], models: dict[str, str], tmp_path: Path
) -> None:
    bench = Workbench(models, "base")
    bench.load(path(models, ("b", 0), ("b", 1), ("a", 0), ("c", 0), o_proj=2.0))
    assert_exported(bench, path(models, *layers, **scales), tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt-neox-tied", "phi3", "qwen3-moe", "qwen2-moe"])
def test_families(name: str, tmp_path: Path) -> None:
    kind, changes, _ = FAMILIES[name]
    places = {}
    for seed, model in enumerate(("base", "a", "b")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = COMMON | {"num_hidden_layers": 3} | changes
            config = getattr(transformers, kind)(**settings)
            made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        made.save_pretrained(tmp_path / model)
        places[model] = str(tmp_path / model)
    bench = Workbench(places, "base")
    scaled = {"attn.c_proj": 0.5, "mlp.c_proj": 0.8} if name == "gpt2" else {"down_proj": 0.5}
    if name == "gpt-neox-tied":
        scaled = {"attention.dense": 0.5}
    dense = 0 if name == "qwen2-moe" else 1  # there layer 0 has no experts
    bench.load(path(places, ("b", 2), ("b", 1), outside="b"))
    layers = (("a", 0), ("b", 2), ("a", dense), ("b", 2), ("a", 2))
    assert_exported(bench, path(places, *layers, **scaled), tmp_path / "out")


def test_weights_are_shared_and_only_scaled_tensors_are_made(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = workbench.merge_tensor

    def counting(recipe: Recipe, name: str, inputs: Any, **options: Any) -> Any:
        made.append(name)
        return real(recipe, name, inputs, **options)

    bench = Workbench(models, "base")
    bench.load(path(models, *LONG))
    held = bench.nbytes
    monkeypatch.setattr(workbench, "merge_tensor", counting)
    bench.load(path(models, ("a", 1), ("a", 0), ("b", 2), ("a", 0), ("base", 2), ("a", 1)))
    averages = [
        dataclasses.replace(group, method="linear", parameters={"weight": 2.0})
        for group in path(models, ("a", 1), ("b", 2)).groups
    ]
    bench.load(path(models, ("a", 1), ("b", 2)).with_groups(averages, num_layers=2))
    bench.load(path(models, ("a", 1), ("a", 0), ("b", 2), ("a", 0), ("base", 2), ("a", 1)))
    assert made == []
    layers = bench.model.model.layers
    assert layers[0].mlp.up_proj.weight.data_ptr() == layers[5].mlp.up_proj.weight.data_ptr()
    assert bench.nbytes == held
    bench.load(path(models, *LONG, o_proj=0.5))
    assert made == ["model.layers.1.self_attn.o_proj.weight"]
    assert bench.nbytes == held + 16 * 16 * 4
    bench.load(path(models, *LONG, o_proj=0.5, down_proj=2.0))  # what is as before is kept
    assert made[1:] == ["model.layers.1.mlp.down_proj.weight"]
    bench.load(path(models, *LONG))
    assert (len(made), bench.nbytes) == (2, held)


def test_the_order_of_candidates_changes_no_bit(models: dict[str, str]) -> None:
    plain = TensorGroup(method="task_arithmetic", sources=("a", "b"), parameters={"weight": 0.5})
    recipes = [
        path(models, *LONG, o_proj=0.5),
        Recipe(models=models, base="base", groups=(plain,)),
        path(models, *LONG, outside="b"),
        path(models, ("c", 0), ("b", 1), down_proj=3.0, dtype="float16"),
    ]
    seen: dict[str, list[torch.Tensor]] = {}
    for order in (recipes, recipes[::-1], recipes[::2] + recipes):
        bench = Workbench(models, "base")
        for recipe in order:
            bench.load(recipe)
            seen.setdefault(recipe.hash, []).append(bench.model(IDS).logits)
    assert all(torch.equal(found[0], other) for found in seen.values() for other in found)
    assert len({tuple(found[0].flatten().tolist()) for found in seen.values()}) == len(recipes)


def test_few_frames_are_kept(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked_models, "FRAMES", 2)
    built: list[int] = []
    real = stacked_models.build

    def counting(source: Any, data: Any, *rest: Any) -> Any:
        built.append(data["num_hidden_layers"])
        return real(source, data, *rest)

    monkeypatch.setattr(stacked_models, "build", counting)
    bench = Workbench(models, "base")
    for depth in (4, 5, 4, 6, 4, 5):
        bench.load(path(models, *[("a", 1)] * depth))
    assert built == [3, 4, 5, 6, 5]


def test_weights_that_overflow_are_refused_and_the_next_stack_is_right(tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate(("base", "a")):
        model = llama(seed)
        model.model.layers[1].mlp.down_proj.weight.data.fill_(10.0)
        models[name] = str(save(model, tmp_path / name))
    bench = Workbench(models, "base")
    with pytest.raises(NonFiniteWeights, match=r"layers\.1\.mlp\.down_proj"):
        bench.load(path(models, ("a", 0), ("a", 1), down_proj=1e4, dtype="float16"))
    assert_exported(bench, path(models, ("base", 0), ("a", 1)), tmp_path / "out")


def test_adapters_and_other_vocabularies(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    words = [*WORDS[:20], "other", *WORDS[20:]]
    other = save(llama(5, vocab_size=len(words)), tmp_path / "other", words)
    places = {"base": models["base"], "a": adapters["plain"], "other": str(other)}
    recipe = replace(
        path(places, ("a", 2), ("other", 1), ("a", 1), outside="other", down_proj=0.5), tokenizer="union"
    )
    bench = Workbench(places, "base", tokenizer="union")
    assert_exported(bench, recipe, tmp_path / "out")


def test_layers_that_break_a_computed_pattern_of_kinds_are_refused_also_by_a_kept_frame(
    tmp_path: Path,
) -> None:
    """Jamba computes a layer's kind from its number, so a stack has the same config in any order."""
    models = {}
    for seed, name in enumerate(("base", "a")):
        families.build("jamba", seed).save_pretrained(tmp_path / name)
        models[name] = str(tmp_path / name)
    bench = Workbench(models, "base")
    bench.load(path(models, ("a", 0), ("base", 1), ("a", 2), ("a", 3), dtype="float32"))
    with pytest.raises(ModelError, match="do not have the weights"):
        bench.load(path(models, ("a", 1), ("a", 0), ("a", 2), ("a", 3), dtype="float32"))


def saved(kind: Any, folder: Path) -> dict[str, str]:
    """Save two random models near each other. kind: a family's name, or a function seed -> model."""
    build = kind if callable(kind) else lambda seed: families.build(kind, seed)
    for seed, name in enumerate(("base", "a")):
        build(seed).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "a")}


def test_a_config_with_infinite_numbers_is_stacked(tmp_path: Path) -> None:
    """transformers writes those of Falcon-H1's `time_step_limit` as objects."""
    models = saved("falcon_h1", tmp_path)
    bench = Workbench(models, "base")
    recipe = path(models, ("a", 1), ("base", 0), ("a", 2), dtype="float32")
    assert_exported(bench, recipe, tmp_path / "out", torch.arange(3, 13)[None])


def test_entries_of_single_layers_move_with_them(tmp_path: Path) -> None:
    """Gemma 4's layers with full attention have a head size of their own, in `per_layer_config`."""

    def gemma4(seed: int) -> Any:
        text = families._known(transformers.Gemma4TextConfig, families.SIZES)
        torch.manual_seed(0)
        changes: dict[str, Any] = {"hidden_size_per_layer_input": 0, "num_hidden_layers": 6}
        config = transformers.Gemma4TextConfig(**text | changes, global_head_dim=16)
        model = transformers.Gemma4ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.01 * seed * torch.randn(parameter.shape)
        return model

    models = saved(gemma4, tmp_path)
    recipe = path(models, ("a", 5), ("base", 0), ("a", 1), ("a", 5), dtype="float32")
    assert_exported(Workbench(models, "base"), recipe, tmp_path / "out", torch.arange(3, 13)[None])


def test_embeddings_with_a_part_for_each_layer_are_not_stacked(tmp_path: Path) -> None:
    models = saved("gemma4", tmp_path)
    recipe = path(models, ("a", 0), ("base", 1), ("a", 3), dtype="float32")
    with pytest.raises(ModelError, match="can't be stacked") as raised:
        write(recipe, tmp_path / "out")
    assert "embed_tokens_per_layer" in str(raised.value)
    assert not (tmp_path / "out").exists()
