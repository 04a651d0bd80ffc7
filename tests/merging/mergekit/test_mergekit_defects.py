"""What mergekit 0.1.4 gets wrong about merging, and where it is tested that we do not.

Each row of `DEFECTS` names one defect and the tests that show ours does not have it; those below go
from a YAML file to a written model, the others are where their subject is tested.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merging import mergekit
from evomerge.merging.export import writer
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.opening import open_source
from evomerge.merging.sources.tensorfile import read_header
from evomerge.merging.tensors import merge_tensor

DEFECTS = {
    "the scored model is not the exported one: DARE in memory is not seeded": (
        "merging.export.test_writer.test_what_is_scored_is_what_is_exported",
        "merging.export.test_writer.test_scored_is_exported_per_layer_with_an_adapter_and_any_number_of_threads",
        "merging.methods.test_methods.test_draws_belong_to_seed_tensor_and_source_alone",
        "merging.mergekit.test_mergekit_defects.test_a_seed_decides_every_random_mask",
    ),
    "exported configs point at private paths": (
        "merging.mergekit.test_mergekit_defects.test_exported_recipes_name_the_models_as_the_user_did",
    ),
    "misspelt keys are accepted in silence": (
        "merging.mergekit.test_mergekit_defects.test_a_misspelt_key_is_refused_wherever_it_stands",
        "merging.test_recipe.test_bad_yaml_is_refused",
    ),
    "a misspelt filter changes nothing, in silence": (
        "merging.mergekit.test_mergekit_defects.test_a_filter_that_matches_nothing_is_refused",
    ),
    "linear with weights 1 and -1 gives NaN": (
        "merging.methods.test_methods.test_linear_refuses_to_normalise_weights_that_cancel",
        "merging.mergekit.test_mergekit_defects.test_weights_that_cancel_are_refused_before_anything_is_written",
    ),
    "ties with nearly cancelling weights gives enormous weights": (
        "merging.methods.test_methods.test_nearly_cancelling_weights_do_not_blow_ties_up",
    ),
    "breadcrumbs zeroes every tensor with gamma * n < 1": (
        "merging.methods.test_methods.test_breadcrumbs_of_a_tensor_too_small_for_an_outlier_keep_its_largest",
        "merging.mergekit.test_mergekit_defects.test_breadcrumbs_keep_the_norms",
    ),
    "ties crashes where int(density * n) = 0": (
        "merging.methods.test_methods.test_a_density_too_small_for_one_element_keeps_nothing",
        "merging.mergekit.test_mergekit_defects.test_ties_of_a_density_that_leaves_nothing_is_the_base",
    ),
    "della crashes at density 0.9 with its own default epsilon": (
        "merging.methods.test_methods.test_della_keeps_by_rank_and_keeps_the_mean",
        "merging.mergekit.test_mergekit_defects.test_della_runs_at_any_density_with_its_defaults",
    ),
    "vocabulary mismatches are truncated or crash, by method": (
        "merging.test_compatibility.test_other_vocabularies_are_refused_with_examples",
    ),
    "uneven slices drop a source in silence": (
        "merging.mergekit.test_slices.test_slices_that_say_nothing_sound_are_refused",
        "merging.mergekit.test_mergekit_defects.test_a_last_slice_with_more_sources_loses_none_of_them",
    ),
    "the same model twice in a slice collapses to one": (
        "merging.mergekit.test_mergekit.test_one_model_twice_stays_two_sources",
        "merging.mergekit.test_slices.test_slices_say_which_layers",
        "merging.mergekit.test_mergekit_defects.test_the_same_model_twice_in_a_slice_counts_twice",
    ),
    "the stored type is not the one config.json names": (
        "merging.export.test_writer.test_export_is_a_complete_model_folder",
        "merging.mergekit.test_mergekit_defects.test_the_config_names_the_type_that_is_stored",
    ),
    "an interrupted merge of an adapter leaves a partial folder that is used again": (
        "merging.export.test_writer.test_what_a_killed_write_left_is_removed_by_the_next",
        "merging.mergekit.test_mergekit_defects.test_an_interrupted_merge_of_an_adapter_leaves_nothing",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_has_its_tests(defect: str) -> None:
    for place in DEFECTS[defect]:
        module, _, name = place.rpartition(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), name)), place


class Files:
    """Writes mergekit files about the models `base`, `a`, `b`, `c`, and merges them."""

    def __init__(self, folder: Path, models: dict[str, str]) -> None:
        self.folder, self.models = folder, models

    def read(self, text: str, **options: Any) -> Recipe:
        for name in self.models:
            text = text.replace(f"model: {name}", f"model: {self.models[name]}")
        return mergekit.read(text, **options)

    def merge(self, text: str, out: str = "out", **options: Any) -> dict[str, Tensor]:
        source = open_source(str(writer.write(self.read(text, **options), self.folder / out)))
        return {name: source.tensor(name) for name in source.headers}

    def source(self, name: str) -> dict[str, Tensor]:
        source = open_source(self.models[name])
        return {tensor: source.tensor(tensor) for tensor in source.headers}


@pytest.fixture
def files(models: dict[str, str], tmp_path: Path) -> Files:
    return Files(tmp_path, models)


def test_a_seed_decides_every_random_mask(files: Files) -> None:
    text = """
{merge_method: dare_ties, base_model: base, dtype: float32, parameters: {density: 0.5, weight: 0.7},
 models: [{model: a}, {model: b}]}"""
    first, again = (files.merge(text, out, seed=1) for out in ("first", "again"))
    other = files.merge(text, "other", seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_exported_recipes_name_the_models_as_the_user_did(
    files: Files, adapters: dict[str, str], tmp_path: Path
) -> None:
    files.models = files.models | {"lora": f"{files.models['base']}+{adapters['plain']}"}
    recipe = files.read(
        "{merge_method: ties, base_model: base, dtype: float32, models: [{model: a}, {model: lora}]}"
    )
    data = yaml.safe_load(mergekit.write(recipe))
    assert data["base_model"] == files.models["base"]
    assert [entry["model"] for entry in data["models"]] == [files.models["a"], files.models["lora"]]
    written = yaml.safe_load((writer.write(recipe, tmp_path / "out") / "recipe.yaml").read_text())
    assert set(written["models"].values()) == {files.models[name] for name in ("base", "a", "lora")}


def keys(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every key of nested data."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if isinstance(data, dict):
            yield (*path, key)
        yield from keys(value, (*path, key))


WHOLE = """
merge_method: ties
base_model: m/base
dtype: float32
out_dtype: float16
tokenizer_source: base
parameters: {normalize: true, lambda: [{filter: mlp, value: 0.5}, {value: 1.0}]}
modules:
  default:
    parameters: {density: 0.5}
    slices:
      - base_model: m/b
        parameters: {weight: [0.1, 0.7]}
        sources:
          - {model: m/b, layer_range: [0, 2]}
          - {model: m/a, layer_range: [1, 3], parameters: {density: 0.4}}
"""


@pytest.mark.parametrize("place", list(keys(yaml.safe_load(WHOLE))), ids=lambda p: ".".join(map(str, p)))
def test_a_misspelt_key_is_refused_wherever_it_stands(place: tuple[Any, ...]) -> None:
    tensors = [f"h.{layer}.{module}" for layer in range(3) for module in ("mlp", "attn")]
    data = yaml.safe_load(WHOLE)
    mergekit.read(yaml.safe_dump(data), tensors=tensors)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[f"{place[-1]}x"] = inner.pop(place[-1])
    if place == ("modules", "default"):
        return  # its name depends on the architecture
    with pytest.raises(ConfigError):
        mergekit.read(yaml.safe_dump(data), tensors=tensors)


def test_a_filter_that_matches_nothing_is_refused(files: Files) -> None:
    text = """
{merge_method: linear, dtype: float32,
 models: [{model: a, parameters: {weight: [{filter: self_atn, value: 0.2}, {value: 1}]}}, {model: b}]}"""
    with pytest.raises(ConfigError, match="matches no tensor"):
        files.merge(text)


def test_weights_that_cancel_are_refused_before_anything_is_written(files: Files) -> None:
    text = """
{merge_method: linear, dtype: float32,
 models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]}"""
    with pytest.raises(ConfigError, match="weights cancel"):
        files.merge(text)
    assert list(files.folder.iterdir()) == []


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keep_the_norms(method: str, files: Files) -> None:
    merged = files.merge(f"""
{{merge_method: {method}, base_model: base, dtype: float32, parameters: {{weight: 1, density: 0.9}},
 models: [{{model: a}}]}}""")
    base, model = files.source("base"), files.source("a")
    for name in (name for name in merged if merged[name].dim() == 1):
        kept = merged[name] != base[name]
        torch.testing.assert_close(merged[name][kept], model[name][kept])
        largest = (model[name] - base[name]).abs().argmax()
        assert kept[largest]


def test_ties_of_a_density_that_leaves_nothing_is_the_base(files: Files) -> None:
    merged = files.merge("""
{merge_method: ties, base_model: base, dtype: float32, parameters: {weight: 1, density: 0.01},
 models: [{model: a}, {model: b}]}""")
    base = files.source("base")
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert not torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("density", [0.01, 0.1, 0.9, 0.99])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_runs_at_any_density_with_its_defaults(method: str, density: float, files: Files) -> None:
    merged = files.merge(f"""
{{merge_method: {method}, base_model: base, dtype: float32, parameters: {{weight: 1, density: {density}}},
 models: [{{model: a}}]}}""")
    base, model = files.source("base"), files.source("a")
    changed = torch.cat([(merged[n] != base[n])[model[n] != base[n]].flatten() for n in merged])
    assert changed.float().mean().item() == pytest.approx(density, abs=0.05)


def test_a_last_slice_with_more_sources_loses_none_of_them(files: Files) -> None:
    """mergekit pairs the last slice's sources with the first slice's tensors and stops at the shorter."""
    merged = files.merge("""
merge_method: linear
dtype: float32
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources:
      - {model: a, layer_range: [1, 3]}
      - {model: b, layer_range: [1, 3]}
      - {model: c, layer_range: [1, 3]}
""")
    name = "model.norm.weight"
    mean = sum(files.source(model)[name] for model in "abc") / 3
    torch.testing.assert_close(merged[name], mean)


def test_the_same_model_twice_in_a_slice_counts_twice(files: Files) -> None:
    merged = files.merge("""
merge_method: linear
dtype: float32
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: a, layer_range: [1, 3], parameters: {weight: 3}}
""")
    own = files.source("a")
    first, second = (own[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    torch.testing.assert_close(merged["model.layers.0.mlp.up_proj.weight"], 0.25 * first + 0.75 * second)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("dtype: float32", "float32"),
        ("dtype: float32, out_dtype: float16", "float16"),
        ("out_dtype: float32", "float32"),
        ("tokenizer_source: base", "bfloat16"),
    ],
)
def test_the_config_names_the_type_that_is_stored(types: str, expected: str, files: Files) -> None:
    out = files.folder / "out"
    files.merge(f"{{merge_method: linear, {types}, models: [{{model: a}}, {{model: b}}]}}")
    config = json.loads((out / "config.json").read_text())
    codes = {header.dtype for header in read_header(out / "model.safetensors").values()}
    assert (config["dtype"], config["torch_dtype"]) == (expected, expected)
    assert codes == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[expected]}


def test_an_interrupted_merge_of_an_adapter_leaves_nothing(
    files: Files, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.models = files.models | {"lora": f"{files.models['base']}+{adapters['plain']}"}
    text = "{merge_method: linear, dtype: float32, models: [{model: a}, {model: lora}]}"
    around = [Path(files.models["base"]), Path(adapters["plain"]), Path(adapters["plain"]).parent]
    before = [sorted(folder.iterdir()) for folder in around]
    merge, calls = merge_tensor.merge_array, 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return merge(*arguments)

    monkeypatch.setattr(writer, "merge_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.merge(text)
    assert list(files.folder.iterdir()) == []
    assert [sorted(folder.iterdir()) for folder in around] == before
    monkeypatch.undo()
    assert len(files.merge(text)) == len(files.source("a"))
