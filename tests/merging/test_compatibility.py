"""What is refused before the first weight is read, and what is only noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.compatibility import check
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.source import Source
from tests.merging.conftest import WORDS, llama, save


def linear(models: dict[str, str], *sources: str, **changes: Any) -> Recipe:
    return Recipe(models=models, groups=(TensorGroup(method="linear", sources=sources, **changes),))


def refusal(models: dict[str, str], **changes: Any) -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        check(linear(models, *models, **changes), open_sources(models, None))
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_models_of_one_family_pass_without_reading_weights(
    models: dict[str, str], adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: dict[str, Source] = open_sources(models | {"lora": adapters["plain"]}, "base")
    for source in sources.values():
        monkeypatch.setattr(type(source), "tensor", None)
    assert check(linear(models | {"lora": "x"}, "a", "b", "lora"), sources) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32, "head_dim": 8},
            r"tensor 'model.embed_tokens.weight' has another shape in 'odd' than in 'base'",
        ),
        ({"num_hidden_layers": 4}, r"num_hidden_layers differs"),
        ({"num_attention_heads": 4, "head_dim": 8}, r"num_attention_heads differs"),
        ({"hidden_act": "gelu"}, r"hidden_act differs"),
    ],
)
def test_other_architectures_and_shapes_are_refused(
    changes: dict[str, Any], message: str, models: dict[str, str], tmp_path: Path
) -> None:
    odd = save(llama(**changes), tmp_path / "odd")
    text = refusal({"base": models["base"], "odd": str(odd)})
    assert message in text
    assert "\n  expected: " in text
    assert "\n  got: " in text
    assert "\n  do: " in text


def test_another_model_type_is_named_first(models: dict[str, str], tmp_path: Path) -> None:
    odd = save(llama(num_hidden_layers=5), tmp_path / "odd")
    edit(odd, architectures=["MistralForCausalLM"], model_type="mistral")
    text = refusal({"base": models["base"], "odd": str(odd)})
    assert "architectures differs\n  expected: LlamaForCausalLM as in base" in text
    assert "got: MistralForCausalLM in odd" in text


def test_missing_and_surplus_tensors_are_named(models: dict[str, str], tmp_path: Path) -> None:
    odd = save(llama(), tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, odd / "model.safetensors")
    text = refusal({"base": models["base"], "odd": str(odd)})
    assert "do not have the same tensors" in text
    assert "odd lacks 'model.norm.weight'; odd also has 'model.extra.weight'" in text


def test_a_lost_head_is_explained(tmp_path: Path) -> None:
    folders = {name: save(llama(tie_word_embeddings=False), tmp_path / name) for name in ("base", "odd")}
    tensors = load_file(folders["odd"] / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folders["odd"] / "model.safetensors")
    text = refusal({name: str(folder) for name, folder in folders.items()})
    assert "odd lacks 'lm_head.weight'" in text
    assert "do: set tie_word_embeddings in the config of the model whose head is missing" in text


def test_other_vocabularies_are_refused_with_examples(models: dict[str, str], tmp_path: Path) -> None:
    words = [*WORDS[:30], "new", WORDS[30]]
    odd = save(llama(), tmp_path / "odd", words=words)
    text = refusal({"base": models["base"], "odd": str(odd)})
    assert "have different vocabularies" in text
    assert "3 tokens differ: 'w26' is row 31 in odd and row 30 in base, 'w27' is absent in odd" in text


def test_types_that_can_not_be_merged_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    odd = save(llama(), tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, odd / "model.safetensors")
    assert "'model.norm.weight' has a type that can't be merged" in refusal({"odd": str(odd)})
    edit(odd, quantization_config={"quant_method": "gptq"})
    assert "model 'odd' is quantised" in refusal({"odd": str(odd)})


def test_harmless_differences_are_noted(models: dict[str, str], tmp_path: Path) -> None:
    odd = save(llama().to(torch.float16), tmp_path / "odd")
    edit(odd, rms_norm_eps=1e-5)
    both = {"base": models["base"], "odd": str(odd)}
    notes = check(linear(both, "base", "odd"), open_sources(both, None))
    assert notes == (
        "rms_norm_eps differs: odd has 1e-05, base 1e-06",
        "stored types differ (base BF16, odd F16); merging computes in float32",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 7)}, "names layers the model does not have\n  expected: layers 0 to 2\n  got: 7"),
        ({"match": ("self_atn",)}, "matches no tensor"),
        ({"layers": (0,)}, "no group matches tensor 'model.embed_tokens.weight'"),
        ({"parameters": {"weight": (1.0, -1.0)}}, "weights cancel"),
    ],
)
def test_recipes_that_do_not_fit_the_models_are_refused(
    changes: dict[str, Any], message: str, models: dict[str, str]
) -> None:
    used = {name: models[name] for name in ("base", "a")}
    group = TensorGroup(method="linear", sources=("base", "a"), **changes)
    rest = () if message.startswith("no group") else (TensorGroup(method="linear", sources=("a",)),)
    with pytest.raises(ConfigError) as caught:
        check(Recipe(models=used, groups=(group, *rest)), open_sources(used, None))
    assert message in str(caught.value)


def test_a_filter_for_the_head_of_a_tied_model_is_no_mistake(models: dict[str, str]) -> None:
    used = {"a": models["a"]}
    groups = (
        TensorGroup(method="linear", sources=("a",), match=("lm_head",)),
        TensorGroup(method="linear", sources=("a",)),
    )
    assert check(Recipe(models=used, groups=groups), open_sources(used, None)) == ()
