"""Layers stacked, skipped, repeated and shifted: what is made, what its config says, what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evomerge.errors import ConfigError, ModelError
from evomerge.merging.export.writer import write
from evomerge.merging.live import workbench
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.modules import layer_of, shifted
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.tensorfile import Header
from evomerge.merging.stacking import output_headers, stacked_config
from tests.merging.conftest import llama, perturb, save
from tests.merging.export.test_writer import assert_same_bits


def group(method: str, *sources: str, **changes: Any) -> TensorGroup:
    return TensorGroup(method=method, sources=sources, **changes)


def frankenstein(models: dict[str, str], **changes: Any) -> Recipe:
    """Return a recipe of five layers: `a` 0 and 1, then mixtures whose sources and bases are shifted."""
    groups = (
        group("passthrough", "a", layers=(0, 1)),
        group("dare_ties", "b", "c", layers=(2,), shift=(-1, 0), base_shift=-2, parameters={"density": 0.5}),
        group("linear", "a", "a", layers=(3,), match=("mlp",), shift=(-3, -1), parameters={"weight": (1, 3)}),
        group("slerp", "b", "a", layers=(3, 4), shift=(-2, -2), parameters={"t": 0.25}),
        group("task_arithmetic", "c", layers=OUTSIDE, base="b"),
    )
    settings: dict[str, Any] = {"base": "base", "groups": groups, "num_layers": 5, "seed": 3} | changes
    return Recipe(models=models, **settings)


def test_names_are_shifted_by_their_first_number() -> None:
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    assert shifted(name, 9) == "model.layers.12.mlp.experts.7.down_proj.weight"
    assert shifted(shifted(name, -2), 2) == name
    assert shifted("lm_head.weight", 4) == "lm_head.weight"


def test_each_layer_is_made_of_the_layers_it_names(models: dict[str, str], tmp_path: Path) -> None:
    out = write(frankenstein(models, dtype="float32"), tmp_path / "out", max_shard_bytes=9000)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    made = AutoModelForCausalLM.from_pretrained(out)
    state = made.state_dict()
    assert made(torch.arange(4, 20)[None]).logits.isfinite().all()
    sources = open_sources(models, "base")

    def tensor(model: str, layer: int, module: str) -> torch.Tensor:
        return sources[model].tensor(f"model.layers.{layer}.{module}.weight")

    def result(layer: int, module: str) -> torch.Tensor:
        return state[f"model.layers.{layer}.{module}.weight"]

    assert torch.equal(result(1, "self_attn.k_proj"), tensor("a", 1, "self_attn.k_proj"))
    twice = 0.25 * tensor("a", 0, "mlp.up_proj") + 0.75 * tensor("a", 2, "mlp.up_proj")
    torch.testing.assert_close(result(3, "mlp.up_proj"), twice)
    first, second = (tensor(model, 2, "mlp.up_proj").flatten() for model in "ba")
    angle = torch.arccos(torch.cosine_similarity(first, second, dim=0))
    arc = torch.sin(0.75 * angle) * first + torch.sin(0.25 * angle) * second
    torch.testing.assert_close(result(4, "mlp.up_proj").flatten(), arc / torch.sin(angle))
    drawn = result(2, "mlp.up_proj") - tensor("base", 0, "mlp.up_proj")
    one = 2 * (tensor("b", 1, "mlp.up_proj") - tensor("base", 0, "mlp.up_proj"))
    two = 2 * (tensor("c", 2, "mlp.up_proj") - tensor("base", 0, "mlp.up_proj"))
    nearest = torch.stack([(drawn - each).abs() for each in (0 * one, one, two, one + two)]).amin(0)
    assert nearest.max() < 1e-6
    assert (drawn != 0).float().mean() > 0.4
    whole = sources["b"].tensor("model.norm.weight")
    torch.testing.assert_close(
        state["model.norm.weight"], whole + (sources["c"].tensor("model.norm.weight") - whole)
    )


def test_what_is_scored_is_what_is_exported(models: dict[str, str], tmp_path: Path) -> None:
    recipe = frankenstein(models)
    bench = Workbench(models, "base")
    copies = group("passthrough", "c", shift=(-2,), layers=(3, 4))
    bench.load(frankenstein(models, groups=(copies, group("ties", "b", "c"))))
    bench.load(recipe)
    assert bench.model.config.num_hidden_layers == 5
    assert_same_bits(bench, write(recipe, tmp_path / "out"))


def test_only_layers_that_are_made_otherwise_are_merged_again(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(models, "base")
    bench.load(frankenstein(models))
    put: list[int | None] = []
    real = workbench.merge_tensor

    def counting(recipe: Recipe, name: str, inputs: Any, **options: Any) -> Any:
        put.append(layer_of(name))
        return real(recipe, name, inputs, **options)

    monkeypatch.setattr(workbench, "merge_tensor", counting)
    moved = list(frankenstein(models).groups)
    moved[0] = group("passthrough", "a", layers=(0, 1), shift=(1,))
    bench.load(frankenstein(models, groups=tuple(moved)))
    assert set(put) == {2}  # the layer of `a` that no stack took before


def test_models_of_other_depths_can_be_stacked(models: dict[str, str], tmp_path: Path) -> None:
    deep = save(perturb(llama(num_hidden_layers=5), 9), tmp_path / "deep")
    both = {"a": models["a"], "deep": str(deep)}
    groups = (
        group("passthrough", "a", layers=(0, 1)),
        group("passthrough", "deep", layers=(2, 3), shift=(1,)),
        group("linear", "a", "deep"),
    )
    recipe = Recipe(models=both, groups=groups, num_layers=4, dtype="bfloat16")
    out = write(recipe, tmp_path / "out")
    state, own = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (out, deep))
    assert torch.equal(state["model.layers.3.mlp.up_proj.weight"], own["model.layers.4.mlp.up_proj.weight"])
    with pytest.raises(ModelError, match="num_hidden_layers differs"):
        write(Recipe(models=both, groups=groups[2:]), tmp_path / "plain")


# The config ----------------------------------------------------------------------------------------


def test_lists_with_an_entry_per_layer_follow_the_layers(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=kinds,
        sliding_window=4,
        use_sliding_window=True,
        eos_token_id=[2, 3, 4, 5],
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "q")
    groups = (group("passthrough", "q", layers=(1, 2), shift=(1,)), group("passthrough", "q"))
    recipe = Recipe(models={"q": str(tmp_path / "q")}, groups=groups, num_layers=3, dtype="float32")
    written = json.loads((write(recipe, tmp_path / "out") / "config.json").read_text())
    assert written["layer_types"] == [kinds[0], kinds[2], kinds[3]]
    assert written["eos_token_id"] == [2, 3, 4, 5]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.sliding_window for layer in loaded.model.layers] == [None, None, 4]
    bench = Workbench(recipe.models)
    bench.load(recipe)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(bench.model(ids).logits, loaded(ids).logits)
    other = (group("passthrough", "q", layers=(2,), shift=(-1,)), group("passthrough", "q"))
    bench.load(Recipe(models=recipe.models, groups=other, num_layers=3, dtype="float32"))
    assert [layer.self_attn.sliding_window for layer in bench.model.model.layers] == [None, 4, 4]


@dataclass
class Fake:
    """A source by headers alone: alternating attention and mixer layers."""

    config: dict[str, Any]
    kinds: tuple[str, ...] = ("attn", "mixer", "attn", "mixer")
    location: str = "fake"
    headers: dict[str, Header] = field(init=False)
    copied: dict[str, Header] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers = {
            name: Header(shape=(2,), dtype="F32")
            for layer, kind in enumerate(self.kinds)
            for name in (f"h.{layer}.{kind}.w", f"h.{layer}.norm")
        } | {"wte": Header(shape=(2,), dtype="F32")}

    @property
    def num_layers(self) -> int:
        return len(self.kinds)


def fakes(**config: Any) -> dict[str, Any]:
    return {"m": Fake(config), "n": Fake(config)}


def hybrid(*groups: TensorGroup, num_layers: int | None = None) -> Recipe:
    return Recipe(models={"m": "m", "n": "n"}, groups=groups, num_layers=num_layers)


def test_layers_of_several_kinds_keep_their_modules() -> None:
    recipe = hybrid(
        group("linear", "m", layers=(0, 1), shift=(1,)),
        group("linear", "n", layers=(2,), shift=(-1,)),
        group("linear", "m"),
        num_layers=4,
    )
    names = ["h.0.mixer.w", "h.0.norm", "h.1.attn.w", "h.1.norm", "h.2.mixer.w", "h.2.norm"]
    assert list(output_headers(recipe, fakes())) == [*names, "h.3.mixer.w", "h.3.norm", "wte"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 4, "kinds": list("abab")}, {"n_layer": 3, "kinds": list("aba")}),
        ({"num_layers": 4, "k_section": [1, 2, 3, 4]}, {"num_layers": 3, "k_section": [1, 2, 3, 4]}),
        ({"num_hidden_layers": 4, "short": [1, 2]}, {"num_hidden_layers": 3, "short": [1, 2]}),
        (
            {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
            {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        ),
        (
            {"x": [1, 2, 3, 4], "text_config": {"num_hidden_layers": 4, "kinds": list("abcd")}},
            {"x": [1, 2, 3, 4], "text_config": {"num_hidden_layers": 3, "kinds": list("abc")}},
        ),
        (
            {"num_hidden_layers": 4, "text_config": {"a": [1, 2, 3, 4]}},
            {"num_hidden_layers": 3, "text_config": {"a": [1, 2, 3, 4]}},
        ),
    ],
)
def test_the_config_counts_the_layers_of_the_result(config: Any, expected: Any) -> None:
    assert stacked_config(hybrid(group("linear", "m"), num_layers=3), fakes(**config)) == expected
    assert stacked_config(hybrid(group("linear", "m")), fakes(**config)) == config


def test_a_config_without_a_number_of_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="does not say how many layers"):
        stacked_config(hybrid(group("linear", "m"), num_layers=3), fakes())


def test_sources_of_other_kinds_of_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'h.0.attn.w' of the result takes 'h.1.attn.w' of n"):
        output_headers(hybrid(group("linear", "m", "n", shift=(0, 1)), num_layers=3), fakes())


# Mistakes ------------------------------------------------------------------------------------------

REST = group("linear", "a", layers=OUTSIDE)


@pytest.mark.parametrize(
    ("groups", "num_layers", "message"),
    [
        ((group("linear", "a"),), 4, "no group makes layer 3 of the result"),
        ((group("linear", "a", shift=(-1,)),), None, "no group makes layer 0 of the result"),
        ((group("linear", "a", layers=(0, 2)), REST), None, "no group matches tensor 'model.layers.1.input"),
        ((group("linear", "a", layers=(0, 2)), REST), 3, "got: no group for layer 1"),
        ((group("linear", "a", layers=(0, 1, 5)), REST), 3, "names layers the model does not have"),
        (
            (group("linear", "a", "b", shift=(0, 1)),),
            None,
            "layer 2 of the result takes layer 3 of b\n  expected: a layer from 0 to 2, which b has",
        ),
        ((group("ties", "a", base_shift=-1),), None, "layer 0 of the result takes layer -1 of base"),
        ((group("linear", "a", match=("mlp",)), REST), 3, "no group matches tensor"),
    ],
)
def test_layers_without_a_maker_are_one_message(
    groups: tuple[TensorGroup, ...],
    num_layers: int | None,
    message: str,
    models: dict[str, str],
    tmp_path: Path,
) -> None:
    recipe = Recipe(models=models, base="base", groups=groups, num_layers=num_layers)
    with pytest.raises(ConfigError) as caught:
        write(recipe, tmp_path / "out")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shift: {c: 1}", "shift: unknown key 'c'"),
        ("shift: [1]", "shift needs one value per source\n  expected: 2 (a, b)\n  got: 1"),
        ("shift: 1", "shift\n  expected: source: whole number, or a list of whole numbers"),
        ("shift: {a: 1.5}", "shift\n  expected: a whole number"),
        ("base_shift: true", "base_shift\n  expected: a whole number"),
        ("base: [a]", "base\n  expected: the name of a model"),
        ("base: c", "names an unknown model 'c'"),
        ("sources: [a, a], shift: {a: 1}", "expected: a list, because a source appears twice"),
    ],
)
def test_mistakes_in_shifts_are_named(text: str, message: str) -> None:
    start = "method: linear, sources: [a, b], " if "sources" not in text else "method: linear, "
    with pytest.raises(ConfigError) as caught:
        Recipe.from_yaml(f"models: {{a: x, b: y}}\ngroups: [{{{start}{text}}}]")
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "three"])
def test_a_number_of_layers_is_a_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        Recipe.from_data(
            {"models": {"a": "x"}, "num_layers": value, "groups": [{"method": "linear", "sources": ["a"]}]}
        )
