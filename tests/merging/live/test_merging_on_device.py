"""A live model merged on its device is the one that the processor makes. Triton's interpreter stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.merging.export.writer import write
from evomerge.merging.live import workbench
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.tensors.digest import folder_digest
from evomerge.merging.tensors.merge_tensor import NonFiniteWeights
from evomerge.merging.tensors.on_device import DeviceMerger, available
from tests.merging.live.test_stacked_models import path

pytestmark = pytest.mark.skipif(not available("cpu"), reason="no Triton")


def mixed(models: dict[str, str], weight: float = 0.4, dtype: str = "bfloat16") -> Recipe:
    """Return a recipe of blends and others, with a group for each layer."""
    names = tuple(name for name in models if name != "base")
    groups = (
        TensorGroup(method="dare_ties", sources=names, layers=(0,), parameters={"density": 0.6}),
        TensorGroup(method="ties", sources=names, layers=(1,), match=("mlp",), parameters={"density": 0.3}),
        TensorGroup(method="della", sources=names, layers=(1,), parameters={"density": 0.5}),
        TensorGroup(method="slerp", sources=names[:2], layers=(2,), match=("self_attn",)),
        TensorGroup(method="task_arithmetic", sources=names, parameters={"weight": weight}),
    )
    return Recipe(models=models, base="base", groups=groups, dtype=dtype, seed=3)


def merged_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of tensors that the processor merges for a live model, as they are merged."""
    names: list[str] = []
    merge = workbench.merge_tensor

    def counting(recipe, name, inputs, **options):  # type: ignore[no-untyped-def]
        names.append(name)
        return merge(recipe, name, inputs, **options)

    monkeypatch.setattr(workbench, "merge_tensor", counting)
    return names


@pytest.mark.parametrize(("dtype", "live"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_live_model_has_the_digest_of_the_exported_one(
    dtype: str, live: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = merged_here(monkeypatch)
    bench = Workbench(models, "base", compute_dtype=live, merge_on="device")
    recipe = mixed(models, dtype=dtype)
    bench.load(recipe)
    assert {name.rpartition(".layers.1.")[2].partition(".")[0] for name in here} == {
        *("self_attn", "input_layernorm", "post_attention_layernorm"),
    }
    if live == "float32":
        assert bench.digest(recipe) == folder_digest(write(recipe, tmp_path / "out"), dtype)
    plain = Workbench(models, "base", compute_dtype=live)
    plain.load(recipe)
    assert bench.digest(recipe) == plain.digest(recipe)


def test_only_what_changed_is_merged_again_and_sources_may_leave(models: dict[str, str]) -> None:
    bench, plain = Workbench(models, "base", merge_on="device"), Workbench(models, "base")
    first, second = (
        Recipe(
            models=models,
            base="base",
            groups=(
                TensorGroup(
                    method="task_arithmetic", sources=("a",), layers=(0,), parameters={"weight": weight}
                ),
                TensorGroup(method="linear", sources=("base",)),
            ),
        )
        for weight in (0.3, 0.7)
    )
    bench.load(first)
    assert bench.give_way()
    assert not bench.give_way()
    bench.load(second)
    plain.load(second)
    assert bench.digest(second) == plain.digest(second)
    assert not plain.give_way()


def test_adapters_are_merged_on_the_device(
    models: dict[str, str], adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = merged_here(monkeypatch)
    places = {"base": models["base"], "p": adapters["plain"], "q": f"{models['a']}+{adapters['patterns']}"}
    group = TensorGroup(method="ties", sources=("p", "q"), layers=(1,), parameters={"density": 0.6})
    copied = TensorGroup(method="passthrough", sources=("p",))
    recipe = Recipe(models=places, base="base", groups=(group, copied))
    bench, plain = Workbench(places, "base", merge_on="device"), Workbench(places, "base")
    bench.load(recipe)
    assert here == []
    plain.load(recipe)
    assert bench.digest(recipe) == plain.digest(recipe)


def test_stacked_layers_are_merged_by_the_processor(models: dict[str, str], tmp_path: Path) -> None:
    recipe = path(models, ("a", 0), ("b", 1), ("a", 1))
    bench = Workbench(models, "base", merge_on="device")
    bench.load(recipe)
    assert bench.digest(recipe) == folder_digest(write(recipe, tmp_path / "out"), recipe.dtype)


def test_what_is_not_finite_is_said_in_the_same_words(models: dict[str, str]) -> None:
    many = {"weight": 9999.0, "normalize": False}  # seven times that is no float16
    groups = (
        TensorGroup(method="linear", sources=("b",) * 7, layers=(1, 2), parameters=many),
        TensorGroup(method="passthrough", sources=("b",)),
    )
    recipe = Recipe(models=models, base="base", groups=groups, dtype="float16")
    texts = []
    for merge_on in ("cpu", "device"):
        with pytest.raises(NonFiniteWeights) as raised:
            Workbench(models, "base", merge_on=merge_on).load(recipe)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


def test_merging_on_a_device_needs_one(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="candidates can't be merged on cpu"):
        Workbench(models, "base", merge_on="device")
    assert not isinstance(Workbench(models, "base", merge_on="auto")._on_device, DeviceMerger)
