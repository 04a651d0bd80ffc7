"""The live model: what is loaded, what is skipped, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.export import writer
from evomerge.merging.export.writer import write
from evomerge.merging.live import workbench
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.opening import open_source
from evomerge.merging.tensors.digest import folder_digest
from evomerge.merging.tensors.inputs import KEPT, WarmInputs
from evomerge.merging.tensors.merge_tensor import NonFiniteWeights
from tests.merging.conftest import llama, save


def layered(models: dict[str, str], *weights: float, dtype: str = "bfloat16", seed: int = 0) -> Recipe:
    """Return task arithmetic of `a` with one weight per layer, the last one for the rest."""
    groups = [
        TensorGroup(method="task_arithmetic", sources=("a",), layers=(i,), parameters={"weight": w})
        for i, w in enumerate(weights[:-1])
    ]
    groups.append(TensorGroup(method="task_arithmetic", sources=("a",), parameters={"weight": weights[-1]}))
    return Recipe(models=models, base="base", groups=tuple(groups), dtype=dtype, seed=seed)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors that were merged since the last `clear`."""
    names: list[str] = []
    merge = workbench.merge_tensor

    def counting(recipe: Recipe, name: str, inputs: Any, **options: Any) -> torch.Tensor:
        names.append(name)
        return merge(recipe, name, inputs, **options)

    monkeypatch.setattr(workbench, "merge_tensor", counting)
    return names


def test_the_live_model_is_ready_to_score(models: dict[str, str]) -> None:
    bench = Workbench(models, "base", attn_implementation="eager")
    assert isinstance(bench.model, LlamaForCausalLM)
    assert not bench.model.training
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())
    assert bench.model.lm_head.weight.data_ptr() == bench.model.model.embed_tokens.weight.data_ptr()
    assert bench.model.dtype == torch.float32
    assert bench.model.config._attn_implementation == "eager"
    assert bench.tokenizer("w1").input_ids == [5]
    assert bench.notes == ()


@pytest.mark.parametrize("name", ["base", "a", "c"])
def test_a_source_is_the_parent_itself(name: str, models: dict[str, str]) -> None:
    bench = Workbench(models, "base")
    bench.load(Recipe(models=models, base="base", groups=(TensorGroup(method="linear", sources=(name,)),)))
    ids = torch.arange(4, 20)[None]
    own = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    assert torch.equal(bench.model(ids).logits, own(ids).logits)


def test_only_what_changed_is_merged_again(models: dict[str, str], merged: list[str]) -> None:
    bench = Workbench(models, "base")
    bench.load(layered(models, 0.1, 0.2, 0.3, 0.4))
    assert len(merged) == len(bench.sources["a"].headers)
    merged.clear()
    bench.load(layered(models, 0.1, 0.25, 0.3, 0.4, seed=9))  # task arithmetic draws nothing
    assert len(merged) == 9
    assert all(".layers.1." in name for name in merged)
    merged.clear()
    bench.load(layered(models, 0.1, 0.25, 0.3, 0.4, dtype="float16"))
    assert len(merged) == len(bench.sources["a"].headers)
    bench.load(Recipe(models=models, base="base", groups=(TensorGroup(method="linear", sources=("b",)),)))
    merged.clear()
    bench.load(layered(models, 0.1, 0.25, 0.3, 0.4, dtype="float16"))
    assert len(merged) == len(bench.sources["a"].headers)


def test_a_seed_matters_to_random_methods_only(models: dict[str, str], merged: list[str]) -> None:
    group = TensorGroup(method="dare_linear", sources=("a",), parameters={"density": 0.5})
    bench = Workbench(models, "base")
    states = []
    for seed in (0, 1, 0):
        merged.clear()
        bench.load(Recipe(models=models, base="base", groups=(group,), seed=seed))
        assert merged
        states.append(torch.cat([p.flatten() for p in bench.model.parameters()]))
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


def test_the_order_of_candidates_changes_no_bit(models: dict[str, str]) -> None:
    recipes = [layered(models, *w) for w in ((0.1, 0.2, 0.3, 0.4), (0.9, 0.2, -0.5, 0.4), (1, 1, 1, 1))]
    seen: dict[str, list[torch.Tensor]] = {}
    for order in (recipes, recipes[::-1]):
        bench = Workbench(models, "base")
        for recipe in order:
            bench.load(recipe)
            weights = torch.cat([p.flatten() for p in bench.model.parameters()])
            seen.setdefault(recipe.hash, []).append(weights)
    assert all(torch.equal(*pair) for pair in seen.values())


def test_no_global_randomness_is_touched(models: dict[str, str]) -> None:
    before = torch.get_rng_state()
    bench = Workbench(models, "base")
    group = TensorGroup(method="dare_ties", sources=("a", "b"), parameters={"density": 0.5})
    bench.load(Recipe(models=models, base="base", groups=(group,)))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_are_checked(models: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'bse'\n.*did you mean 'base'"):
        Workbench(models, "bse")
    bench = Workbench({name: models[name] for name in ("base", "a")}, "base")
    group = TensorGroup(method="linear", sources=("b",))
    with pytest.raises(ConfigError, match="model 'b' was not opened"):
        bench.load(Recipe(models=models, base="base", groups=(group,)))
    with pytest.raises(ConfigError, match="recipe's tokenizer is not the workbench's"):
        bench.load(
            Recipe(models=models, groups=(TensorGroup(method="linear", sources=("a",)),), tokenizer="a")
        )


def test_a_config_that_does_not_fit_its_weights_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save(llama(), tmp_path / "m")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ModelError, match=r"num_hidden_layers is 4\n  expected: 3"):
        Workbench({"m": str(folder)})
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ModelError, match=r"its tensors are not those of LlamaForCausalLM\n.*\n.*layers\.2\."):
        Workbench({"m": str(folder)})
    config.write_text(config.read_text().replace('"llama"', '"lama"').replace("Llama", "Lama"))
    with pytest.raises(ModelError, match="transformers can't build this model"):
        Workbench({"m": str(folder)})


def test_adapters_are_loaded_as_they_are_written_and_cost_their_factors(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    places = {"base": models["base"], "p": adapters["plain"], "q": f"{models['a']}+{adapters['patterns']}"}
    bench = Workbench(places, "base")
    recipe = Recipe(
        models=places,
        base="base",
        groups=(
            TensorGroup(method="task_arithmetic", sources=("p",), layers=(0,), parameters={"weight": 0.4}),
            TensorGroup(method="ties", sources=("p", "q"), parameters={"density": 0.6}),
        ),
    )
    bench.load(recipe)
    written = open_source(str(writer.write(recipe, tmp_path / "out")))
    live = bench.model.state_dict()
    for name in written.headers:
        assert torch.equal(live[name], written.tensor(name)), name
    adapter = bench.sources["p"]
    assert isinstance(adapter, AdaptedCheckpoint)
    assert {part.split(".lora_")[0] for part in adapter._factors} == {
        f"base_model.model.{name.removesuffix('.weight')}" for name in adapter.updates
    }
    bench = Workbench(places, "base", low_memory=True)
    bench.load(recipe)
    assert bench.nbytes == 0


def test_statistics_that_no_candidate_needs_any_more_are_forgotten(models: dict[str, str]) -> None:
    def merged(method: str, weight: float) -> Recipe:
        parameters = {"weight": weight} | ({"density": 0.5} if method == "ties" else {})
        group = TensorGroup(method=method, sources=("a", "b"), parameters=parameters)
        return Recipe(models=models, base="base", groups=(group,))

    bench, trimmed = Workbench(models, "base"), merged("ties", 0.5)
    bench.load(trimmed)
    first, size = bench.digest(trimmed), bench.nbytes
    for number in range(KEPT):
        assert bench.nbytes == size > 0
        bench.load(merged("task_arithmetic", 0.5 + number / 100))
    bench.load(merged("task_arithmetic", 0.1))
    assert bench.nbytes == 0
    bench.load(trimmed)
    assert (bench.digest(trimmed), bench.nbytes) == (first, size)


def test_statistics_are_kept_up_to_a_size(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    group = TensorGroup(method="ties", sources=("a", "b"), parameters={"density": 0.5})
    recipe = Recipe(models=models, base="base", groups=(group,))
    whole = Workbench(models, "base")
    whole.load(recipe)
    most = whole.nbytes // 2
    monkeypatch.setattr(workbench, "WarmInputs", lambda sources, **_: WarmInputs(sources, most=most))
    bench = Workbench(models, "base")
    for _ in range(2):
        bench.load(recipe)
        assert bench.digest(recipe) == whole.digest(recipe)
        assert 0 < bench.nbytes <= most
        bench.load(recipe.with_groups([TensorGroup(method="linear", sources=("a", "b"))]))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_numbers_that_all_models_share_are_kept(
    method: str, dtype: str, models: dict[str, str], tmp_path: Path
) -> None:
    """Models may hold bounds of activations that are infinite; sums and differences of them are NaN."""
    name, folders = "model.norm.weight", {}
    for model in ("base", "a", "b"):
        folders[model] = str(shutil.copytree(models[model], tmp_path / model))
        path = tmp_path / model / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = torch.tensor([float("inf"), -float("inf"), 1.0, 0.5] * 4, dtype=torch.bfloat16)
        save_file(tensors, path, metadata={"format": "pt"})
    recipe = Recipe(
        models=folders, base="base", groups=(TensorGroup(method=method, sources=("a", "b")),), dtype=dtype
    )
    bench = Workbench(folders, "base")
    bench.load(recipe)
    out = write(recipe, tmp_path / "out")
    assert bench.digest(recipe) == folder_digest(out, dtype)
    assert torch.equal(load_file(out / "model.safetensors")[name].float(), tensors[name].float())
    tensors[name] = tensors[name].clone()
    tensors[name][0] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeights):
        write(recipe, tmp_path / "other")


def test_its_tensors_are_those_of_an_export(models: dict[str, str], tmp_path: Path) -> None:
    recipe = layered(models, 0.2, 0.4, 0.6, 0.8, dtype="float32")
    bench = Workbench(models, "base")
    bench.load(recipe)
    exported = open_source(str(write(recipe, tmp_path / "out")))
    found = dict(bench.tensors())
    assert found.keys() == exported.headers.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exported.stored(name)), name
