"""Merges exported as LoRA adapters: exact where they are sums of adapters, measured where they are cut."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.errors import ConfigError, DiskError
from evomerge.evaluation import likelihood
from evomerge.merging.export import adapter, writer
from evomerge.merging.export.adapter import AdapterReport, low_rank, write_adapter
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.adapter import AdaptedCheckpoint
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.model_config import model_class
from evomerge.merging.sources.opening import open_source
from tests.examples import examples
from tests.merging import families
from tests.merging.conftest import llama, perturb
from tests.merging.sources.test_adapter import gpt2, trained

IDS = torch.arange(3, 19)[None]
PAIRS = [([4, 5, 6], [7, 8]), ([9, 10], [11]), ([12, 13, 14, 15], [16])]


def group(
    method: str, sources: str, layers: tuple[int, ...] | None = None, **parameters: object
) -> TensorGroup:
    return TensorGroup(method=method, sources=tuple(sources.split()), layers=layers, parameters=parameters)  # type: ignore[arg-type]


def full(recipe: Recipe, folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(writer.write(recipe, folder), dtype=torch.float32).eval()


def adapted(folder: Path) -> torch.nn.Module:
    """Load an adapter as any user would: the base its config names, and peft."""
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).eval()


def scores(model: torch.nn.Module) -> list[float]:
    plan = likelihood.plan(PAIRS, batch_size=2, max_length=32, names=["t"] * len(PAIRS))
    return plan.score(model).ll.tolist()


def check_equal(recipe: Recipe, folder: Path) -> AdapterReport:
    """Write a recipe both ways, and compare logits and scores."""
    report = write_adapter(recipe, folder / "adapter")
    merged, loaded = full(recipe, folder / "full"), adapted(folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    assert scores(loaded) == pytest.approx(scores(merged), abs=1e-5)
    return report


SUMS = {
    "task arithmetic": ((group("task_arithmetic", "p r", weight=(0.7, -0.4)),), "base"),
    "three, and a lambda": (
        (group("task_arithmetic", "p r t", weight=(1.0, 2.0, 0.5), normalize=True, **{"lambda": 0.6}),),
        "base",
    ),
    "other weights per layer": (
        (
            group("task_arithmetic", "p t", (0,), weight=(0.3, 0.9)),
            group("linear", "p t base", (1,), weight=(1.0, 2.0, 1.0)),
            group("passthrough", "t"),
        ),
        "base",
    ),
    "without a named base": ((group("linear", "p t", weight=(0.2, 0.6)),), None),
    "weights that add up to 1": ((group("linear", "p t", weight=(0.25, 0.75), normalize=False),), None),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_adapters_is_exported_exactly(
    name: str, models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    groups, base = SUMS[name]
    places = {
        "base": models["base"],
        "p": adapters["plain"],
        "r": adapters["rslora"],
        "t": adapters["patterns"],
    }
    recipe = Recipe(models=places, base=base, groups=groups, dtype="float32")
    report = check_equal(recipe, tmp_path)
    assert report.exact
    assert (report.energy, report.lost, report.whole) == (1.0, (), ())
    assert report.base == places["base"]
    assert Recipe.from_yaml((tmp_path / "adapter" / "recipe.yaml").read_text()) == recipe
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
    ]
    assert not list(tmp_path.glob(".*"))


def test_factors_are_the_sources_factors_stacked(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    recipe = Recipe(
        models={"base": models["base"], "p": adapters["plain"], "t": adapters["patterns"]},
        base="base",
        groups=(
            group("task_arithmetic", "p t", (1,), weight=(0.5, 0.0)),
            group("task_arithmetic", "p t", weight=(0.5, -2.0)),
        ),
    )
    report = write_adapter(recipe, tmp_path / "out")
    sources = {"p": (0.5, open_source(adapters["plain"])), "t": (-2.0, open_source(adapters["patterns"]))}
    found = open_source(str(tmp_path / "out"))
    assert isinstance(found, AdaptedCheckpoint)
    for name in found.headers:
        parts = [
            source.factors(name)
            for weight, source in sources.values()
            if isinstance(source, AdaptedCheckpoint) and name in source.updates
            if weight == 0.5 or ".1." not in name
        ]
        expected = [
            weight * source.update(name)
            for weight, source in sources.values()
            if isinstance(source, AdaptedCheckpoint) and name in source.updates
            if weight == 0.5 or ".1." not in name
        ]
        assert (name in found.updates) == bool(parts), name
        if parts:
            up, down = found.factors(name)
            torch.testing.assert_close(up @ down, sum(expected), rtol=0, atol=1e-6)
            assert torch.equal(down, torch.cat([part[1] for part in parts]))
            assert report.ranks[name.removesuffix(".weight")] == down.shape[0] == up.shape[1]
            assert found.updates[name].scale == 1.0
    assert {4, 8} <= set(report.ranks.values())


@pytest.mark.parametrize(
    ("base", "first", "second"),
    [
        (llama, {"modules_to_save": ["norm"]}, {}),
        (llama, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"r": 5}),
        (lambda: llama(tie_word_embeddings=False), {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        (lambda: llama(tie_word_embeddings=False), {"target_modules": ["embed_tokens", "lm_head"]}, {}),
        (lambda: llama(attention_bias=True), {"bias": "all"}, {"lora_bias": True}),
        (
            lambda: llama(attention_bias=True),
            {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]},
            {},
        ),
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj"], "use_rslora": True}),
    ],
    ids=["norms", "tied embeddings", "embeddings", "adapted embeddings", "biases", "a layer", "Conv1D"],
)
def test_what_adapters_store_whole_is_stored_whole_again(
    base: object, first: dict[str, object], second: dict[str, object], tmp_path: Path
) -> None:
    base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    places = {"base": str(tmp_path / "base")}
    for name, options in (("x", first), ("y", second)):
        if base is gpt2:
            options = {"target_modules": ["c_attn"], **options}
        places[name] = f"{tmp_path / 'base'}+{trained(tmp_path / 'base', tmp_path / name, **options)}"
    recipe = Recipe(
        models=places,
        base="base",
        groups=(group("task_arithmetic", "x y", weight=(0.6, 0.5)),),
        dtype="float32",
    )
    report = check_equal(recipe, tmp_path)
    assert report.exact
    again = open_source(str(tmp_path / "adapter"))
    merged = open_source(str(tmp_path / "full"))
    for name in merged.headers:
        torch.testing.assert_close(again.tensor(name), merged.tensor(name), rtol=0, atol=1e-6)


def ties(models: dict[str, str], **changes: object) -> Recipe:
    settings = {
        "models": {name: models[name] for name in ("base", "a", "b")},
        "base": "base",
        "groups": (group("ties", "a b", density=0.5),),
        "dtype": "float32",
    }
    return Recipe(**(settings | changes))  # type: ignore[arg-type]


def test_full_rank_and_the_rest_kept_lose_nothing(models: dict[str, str], tmp_path: Path) -> None:
    recipe = ties(models)
    report = write_adapter(recipe, tmp_path / "adapter", rank=999, keep_rest=True)
    assert not report.exact
    assert report.energy >= 1 - 1e-6
    assert report.lost == ()
    assert "model.norm.weight" in report.whole
    merged, loaded = full(recipe, tmp_path / "full"), adapted(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)


def test_energy_falls_with_the_rank_and_says_what_is_lost(models: dict[str, str], tmp_path: Path) -> None:
    recipe = ties(models)
    reports = {rank: write_adapter(recipe, tmp_path / str(rank), rank=rank) for rank in (1, 4, 12, 16)}
    energies = [report.energy for report in reports.values()]
    assert energies == sorted(energies)
    assert 0 < energies[0] < energies[-1] < 1
    report = reports[4]
    assert report.rank == 4
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(report.lost)
    assert all(report.shares[name] == 0 for name in report.lost)
    assert all(0 < share < 1 for name, share in report.shares.items() if name not in report.lost)
    base, merged = open_source(models["base"]), full(recipe, tmp_path / "full").state_dict()
    found = open_source(str(tmp_path / "4"))
    change = {name: merged[name] - base.tensor(name) for name in base.headers}
    missed = {name: merged[name] - found.tensor(name) for name in base.headers}
    total = sum(float((d**2).sum()) for d in change.values())
    assert report.energy == pytest.approx(
        1 - sum(float((d**2).sum()) for d in missed.values()) / total, abs=1e-5
    )
    best = torch.linalg.svdvals(change["model.layers.0.mlp.up_proj.weight"]) ** 2
    assert report.shares["model.layers.0.mlp.up_proj.weight"] == pytest.approx(
        float(best[:4].sum() / best.sum()), abs=1e-5
    )
    assert all(map(math.isfinite, scores(adapted(tmp_path / "4"))))


def test_a_change_of_low_rank_is_captured_at_that_rank(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    recipe = Recipe(
        models={"base": models["base"], "p": adapters["plain"]},
        base="base",
        groups=(group("ties", "p", density=1.0, **{"lambda": 0.8}),),
    )
    report = write_adapter(recipe, tmp_path / "4", rank=4)
    assert not report.exact
    assert report.energy >= 1 - 1e-6
    assert report.lost == ()
    assert set(report.ranks.values()) == {4}
    assert write_adapter(recipe, tmp_path / "3", rank=3).energy < 1 - 1e-3


def test_a_rank_too_small_for_the_sum_cuts_it(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    recipe = Recipe(
        models={"base": models["base"], "p": adapters["plain"], "t": adapters["patterns"]},
        base="base",
        groups=(group("task_arithmetic", "p t"),),
    )
    assert write_adapter(recipe, tmp_path / "8", rank=8).exact
    cut = write_adapter(recipe, tmp_path / "5", rank=5)
    assert not cut.exact
    assert cut.rank == 5
    assert 0.5 < cut.energy < 1


def test_layers_stored_transposed_are_cut_too(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    perturb(gpt2(), 1).save_pretrained(tmp_path / "tuned")
    recipe = Recipe(
        models={"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")},
        base="base",
        groups=(group("task_arithmetic", "tuned", weight=0.5),),
        dtype="float32",
    )
    report = write_adapter(recipe, tmp_path / "adapter", rank=64, keep_rest=True)
    assert report.energy >= 1 - 1e-6
    merged, loaded = full(recipe, tmp_path / "full"), adapted(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 2**16)
)
@settings(max_examples=examples(40), deadline=None)
def test_the_cut_is_the_best_there_is(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    up, down = low_rank(matrix, rank)
    assert up.shape == (rows, min(rank, rows, columns))
    assert down.shape == (min(rank, rows, columns), columns)
    rest = torch.linalg.svdvals(matrix)[rank:]
    assert float(torch.linalg.matrix_norm(matrix - up @ down)) == pytest.approx(
        float(rest.norm()) if len(rest) else 0.0, abs=1e-4
    )


def test_large_matrices_are_cut_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 30, generator=generator) @ torch.randn(30, 180, generator=generator)
    matrix += torch.randn(200, 180, generator=generator)
    up, down = low_rank(matrix, 8)
    best = torch.linalg.matrix_norm(matrix - up @ down)
    monkeypatch.setattr("evomerge.merging.export.adapter.WHOLE_SVD", 100)
    before = torch.random.get_rng_state()
    up, down = low_rank(matrix, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert best <= torch.linalg.matrix_norm(matrix - up @ down) < 1.001 * best
    assert torch.equal(low_rank(matrix, 8)[0], up)


def test_the_base_stays_where_the_user_said(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(models["base"]).parent)
    recipe = Recipe(
        models={"base": "base", "p": f"base+{adapters['plain']}"},
        base="base",
        groups=(group("task_arithmetic", "p"),),
    )
    write_adapter(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})


def test_stored_types(models: dict[str, str], tmp_path: Path) -> None:
    write_adapter(ties(models, dtype="bfloat16"), tmp_path / "out", rank=2, keep_rest=True)
    writer.write(ties(models, dtype="bfloat16"), tmp_path / "full")
    exported = load_file(tmp_path / "full" / "model.safetensors")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor, whole = file.get_tensor(key), key.removeprefix("base_model.model.")
            if whole in exported:
                assert torch.equal(tensor, exported[whole])
            else:
                assert tensor.dtype == torch.float32 or whole == "lm_head.weight"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((group("ties", "p a"),), "group 'all' (ties)"),
        ((group("task_arithmetic", "p a"),), "source 'a', which is not an adapter on"),
        ((group("linear", "p base", weight=(1.0, 1.0), normalize=False),), "group 'all' (linear)"),
        ((group("passthrough", "p", scale=0.5),), "group 'all' (passthrough)"),
    ],
)
def test_what_is_not_a_sum_of_adapters_needs_a_rank(
    groups: tuple[TensorGroup, ...],
    message: str,
    models: dict[str, str],
    adapters: dict[str, str],
    tmp_path: Path,
) -> None:
    places = {"base": models["base"], "a": models["a"], "p": adapters["plain"]}
    recipe = Recipe(models=places, base="base", groups=groups)
    with pytest.raises(ConfigError, match="must be truncated") as caught:
        write_adapter(recipe, tmp_path / "out")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert not write_adapter(recipe, tmp_path / "out", rank=2).exact


def test_what_can_not_be_an_adapter(models: dict[str, str], adapters: dict[str, str], tmp_path: Path) -> None:
    places = {"base": models["base"], "a": models["a"], "p": adapters["plain"]}
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="names none"):
        write_adapter(Recipe(models=places, groups=(group("linear", "a"),)), out, rank=1)
    with pytest.raises(ConfigError, match="itself an adapter"):
        write_adapter(Recipe(models=places, base="p", groups=(group("ties", "a"),)), out, rank=1)
    with pytest.raises(ConfigError, match="this merge changes no linear layer of the model"):
        write_adapter(Recipe(models=places, base="base", groups=(group("linear", "base"),)), out)
    with pytest.raises(ConfigError, match="at least 1"):
        write_adapter(ties(models), out, rank=0)
    moved = (TensorGroup(method="ties", sources=("a",), shift=(1,)),)
    for stacked in ({"num_layers": 1}, {"groups": moved}):
        with pytest.raises(ConfigError, match="moves layers to other places"):
            write_adapter(dataclasses.replace(ties(models), **stacked), out, rank=1)
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(DiskError, match="already exists"):
        write_adapter(ties(models), out, rank=1)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_tensor_the_live_model_does_not_know_is_lost_and_named(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As single experts are, where the live model holds all of a layer's in one parameter."""
    layers = adapter._layers(Checkpoint.open(models["base"]))
    gone = "model.layers.1.mlp.up_proj"
    fewer = dataclasses.replace(
        layers, names=tuple(n for n in layers.names if n != gone), linear=layers.linear - {gone}
    )
    monkeypatch.setattr(adapter, "_layers", lambda _: fewer)
    report = write_adapter(ties(models), tmp_path / "out", rank=999, keep_rest=True)
    assert report.lost == (f"{gone}.weight",)
    assert report.energy < 1
    assert f"not held: {gone}.weight" in report.summary()


def test_a_failing_finish_leaves_nothing(models: dict[str, str], tmp_path: Path) -> None:
    def finish(folder: Path, report: AdapterReport) -> dict[str, str]:
        assert scores(adapted(folder))
        assert report.rank == 1
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        write_adapter(ties(models), tmp_path / "out", rank=1, finish=finish)
    assert not list(tmp_path.iterdir())


def test_parameters_beside_linear_layers_are_not_held(tmp_path: Path) -> None:
    """Linear attention has `A_log` beside its projections; peft can't adapt layers of a module it stores."""
    for seed, name in enumerate(("base", "a")):
        families.build("qwen3_next", seed).save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("base", "a")}
    recipe = Recipe(models=models, base="base", groups=(group("linear", "a"),), dtype="float32")
    report = write_adapter(recipe, tmp_path / "out", rank=2, keep_rest=True)
    assert {"A_log", "dt_bias"} <= {name.rpartition(".")[2] for name in report.lost}
    assert any(".linear_attn." in layer for layer in report.ranks)
    adapted(tmp_path / "out")


@pytest.mark.parametrize("chosen", [None, "base", "a"])
def test_a_base_without_the_heads_of_the_merge_is_refused(chosen: str | None, tmp_path: Path) -> None:
    for seed, (name, tied) in enumerate((("base", True), ("a", False), ("b", True))):
        llama(seed, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("base", "a", "b")}
    base, source = models[chosen] if chosen else None, "b" if chosen == "a" else "a"
    used = {name: models[name] for name in ("base", source)}
    recipe = Recipe(models=used, base="base", groups=(group("linear", source),))
    with pytest.raises(ConfigError, match="an adapter can't be written for this base"):
        write_adapter(recipe, tmp_path / "out", rank=2, base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "llava"])
def test_a_model_with_a_vision_tower(family: str, tmp_path: Path) -> None:
    """The file has the names of the live model, which differ from those in the base's files."""
    for seed, name in enumerate(("base", "a")):
        families.build(family, seed).save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("base", "a")}
    recipe = Recipe(models=models, base="base", groups=(group("linear", "a"),), dtype="float32")
    report = write_adapter(recipe, tmp_path / "adapter", rank=256, keep_rest=True)
    assert any("vision" in name or "visual" in name for name in report.ranks)
    config = transformers.AutoConfig.from_pretrained(models["base"])
    kind = model_class(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = kind.from_pretrained(models["base"], dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        tuned = kind.from_pretrained(models["a"], dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-4)
    merged, expected = loaded.merge_and_unload().state_dict(), tuned.state_dict()
    differing = [n for n, tensor in expected.items() if not torch.allclose(merged[n], tensor, atol=1e-4)]
    assert len(differing) == len(report.lost) < 4  # a module with linear layers below can't be stored whole
    assert all("vision_tower.head" in name for name in report.lost)
    again = open_source(f"{models['base']}+{tmp_path / 'adapter'}")
    tensors = Checkpoint.open(models["a"])
    for name in again.headers.keys() - set(report.lost):
        torch.testing.assert_close(again.tensor(name), tensors.tensor(name), rtol=0, atol=1e-4)


def test_the_adapter_names_the_hub_id_of_its_base(models: dict[str, str], tmp_path: Path) -> None:
    cached = tmp_path / "models--org--name" / "snapshots" / "0a1b2c"
    cached.parent.mkdir(parents=True)
    shutil.copytree(models["base"], cached)
    places = {"base": str(cached), "a": models["a"]}
    recipe = Recipe(models=places, base="base", groups=(group("linear", "a"),))
    for base_id, expected in ((None, ("org/name", "0a1b2c")), ("else/where", ("else/where", None))):
        out = tmp_path / str(base_id).replace("/", "-")
        report = write_adapter(recipe, out, rank=1, base_id=base_id)
        config = PeftConfig.from_pretrained(out)
        assert (config.base_model_name_or_path, config.revision) == expected
        assert report.base == str(cached)
