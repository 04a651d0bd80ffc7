"""Fisher files: what is estimated, what a recipe makes of them, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import files
from evomerge.errors import ConfigError, DiskError, ModelError
from evomerge.merging.analysis.fisher import estimate
from evomerge.merging.export.writer import write
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources import measured_files
from evomerge.merging.sources.opening import open_source
from tests.merging import families
from tests.merging.conftest import save

LINES = ["w1 w2 w3 w4", "", "w9 w8", "w5", "  w7 w7 w20 w1 w2 w3 "]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


def squares(location: str, lines: list[str]) -> list[dict[str, Tensor]]:
    """The squared gradients of each line's log-likelihood, through the model's own loss."""
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(location)
    found = []
    for line in lines:
        ids = tokenizer(line, return_tensors="pt").input_ids
        model.zero_grad()
        (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        found.append({name: p.grad.square().clone() for name, p in model.named_parameters()})
    return found


def test_the_empirical_fisher_is_the_mean_of_squared_gradients_of_sequences(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    done = estimate(models["a"], text, tmp_path / "a.st", progress=lambda i, n: steps.append((i, n)))
    assert (done.sequences, done.tokens, steps) == (3, 12, [(1, 3), (2, 3), (3, 3)])
    each = squares(models["a"], [LINES[0], LINES[2], LINES[4].strip()])
    found = load_file(tmp_path / "a.st")
    assert set(found) == set(open_source(models["a"]).headers)
    for name, one in found.items():
        expected = (each[0][name] + each[1][name] + each[2][name]) / 3
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-8)
    mean = sum(one.sum().item() for one in found.values()) / sum(one.numel() for one in found.values())
    assert done.mean == pytest.approx(mean, rel=1e-5)
    with safe_open(tmp_path / "a.st", framework="pt") as file:
        said = file.metadata()
    assert said["sequences"] == "3"
    assert said["labels"] == "text"
    assert said["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.st", "text.txt"]


def test_labels_of_the_model_are_drawn_with_the_seed(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    def made(name: str, **options: Any) -> dict[str, Tensor]:
        estimate(models["a"], text, tmp_path / name, **options)
        return load_file(tmp_path / name)

    first, again = made("1", labels="model", seed=3), made("2", labels="model", seed=3)
    others = made("3", labels="model", seed=4), made("4")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[key], again[key])
    assert not any(torch.equal(first[key], other[key]) for other in others)


def test_labels_of_the_model_sample_the_fisher_itself(models: dict[str, str], tmp_path: Path) -> None:
    """With one prediction per line, the expected square over labels can be summed exactly."""
    count = 600
    (tmp_path / "many.txt").write_text("w1 w2\n" * count)
    estimate(models["b"], tmp_path / "many.txt", tmp_path / "f", labels="model")
    found = load_file(tmp_path / "f")["model.norm.weight"]
    model = AutoModelForCausalLM.from_pretrained(models["b"], dtype=torch.float32)
    logs = model(input_ids=torch.tensor([[5, 6]])).logits[0, 0].log_softmax(-1)
    expected = torch.zeros_like(found)
    for label in range(len(logs)):
        (gradient,) = torch.autograd.grad(logs[label], model.model.norm.weight, retain_graph=True)
        expected += logs[label].exp().detach() * gradient.square()
    assert (found / expected - 1).abs().mean() < 0.2
    assert found.mean() / expected.mean() == pytest.approx(1.0, abs=0.1)


def test_limits_and_adapters(
    models: dict[str, str], adapters: dict[str, str], text: Path, tmp_path: Path
) -> None:
    assert estimate(models["a"], text, tmp_path / "1", sequences=1).tokens == 4
    assert estimate(models["a"], text, tmp_path / "2", max_length=2).tokens == 6
    done = estimate(f"{models['base']}+{adapters['plain']}", text, tmp_path / "deep" / "3")
    assert set(load_file(done.file)) == set(open_source(models["base"]).headers)


def test_a_recipe_with_fishers_is_written_as_defined(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    for name in "ab":
        estimate(models[name], text, tmp_path / f"{name}.st")
    data = {
        "models": {name: models[name] for name in "ab"},
        "fisher": {"a": "a.st", "b": "b.st"},
        "dtype": "float32",
        "groups": [{"method": "fisher", "sources": ["a", "b"], "parameters": {"weight": {"a": 1, "b": 2}}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.fisher["a"] == str(tmp_path / "a.st")
    out = load_file(write(recipe, tmp_path / "out") / "model.safetensors")
    assert read_recipe(tmp_path / "out" / "recipe.yaml").hash == recipe.hash
    loaded = {name: (open_source(models[name]), load_file(tmp_path / f"{name}.st")) for name in "ab"}
    for name, merged in out.items():
        (a, f), (b, g) = ((source.tensor(name), file[name]) for source, file in loaded.values())
        floor = 1e-6 * max(f.max(), g.max())
        f, g = f.clamp(min=floor), 2 * g.clamp(min=floor)
        torch.testing.assert_close(merged, (f * a + g * b) / (f + g), rtol=1e-4, atol=1e-6)


def recipe(models: dict[str, str], **files: Path) -> Recipe:
    return Recipe(
        models=models,
        base="base",
        groups=(TensorGroup(method="fisher", sources=("a", "b")),),
        fisher={name: str(path) for name, path in files.items()},
    )


def test_files_that_do_not_fit_are_refused_before_anything_is_written(
    models: dict[str, str], tmp_path: Path
) -> None:
    good = Path(f"{models['a']}.fisher.safetensors")
    tensors = load_file(good)
    name = "model.layers.1.mlp.up_proj.weight"
    kind = {"kind": measured_files.KINDS["fisher"]}
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "short", kind)
    save_file(tensors | {name: torch.ones(2)}, tmp_path / "small", kind)
    save_file(tensors, tmp_path / "weights")
    save_file(tensors, tmp_path / "other", kind | {"model_fingerprint": "0"})
    save_file(tensors | {name: -tensors[name]}, tmp_path / "negative", kind)
    (tmp_path / "torn").write_bytes(good.read_bytes()[:-8])
    for file, message in (
        ("short", f"not the Fisher information of model 'b'\n  expected: tensor '{name}'"),
        ("small", "got: shape [2]"),
        ("torn", "truncated or corrupt"),
        ("none", "no such Fisher file"),
        ("weights", "not a Fisher file"),
        ("other", "the Fisher information of another model than 'b'"),
        ("negative", f"{name!r} has elements that are negative"),
    ):
        with pytest.raises(ModelError) as caught:
            write(recipe(models, a=good, b=tmp_path / file), tmp_path / "out")
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "f"
    save_file({"x": torch.ones(1)}, path)
    assert measured_files.tensor("fisher", str(path), "x").item() == 1
    path.unlink()
    save_file({"x": torch.full((2,), 2.0)}, path)
    assert measured_files.tensor("fisher", str(path), "x").tolist() == [2, 2]


def test_what_cannot_be_estimated_is_refused(models: dict[str, str], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    with pytest.raises(ConfigError, match=r"unknown labels 'txt'\n  do: did you mean 'text'"):
        estimate(models["a"], text, out, labels="txt")
    with pytest.raises(ConfigError, match="no such file"):
        estimate(models["a"], tmp_path / "none.txt", out)
    text.write_text("w1\n\nw2\n")
    with pytest.raises(ConfigError, match="no line of at least two tokens"):
        estimate(models["a"], text, out)
    out.write_text("mine")
    with pytest.raises(DiskError, match="already exists"):
        estimate(models["a"], text, out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    error: BaseException, models: dict[str, str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise error

    monkeypatch.setattr(files, "sync", failing)
    with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
        estimate(models["a"], text, tmp_path / "out.st")
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("family", ["llava", "granite_speech", "deepseek_v4", "mixtral"])
def test_the_names_are_those_in_the_files(family: str, text: Path, tmp_path: Path) -> None:
    """Of models with other names when loaded, with buffers, with whole numbers, and with joined experts."""
    folder = save(families.build(family, 0), tmp_path / "model")
    estimate(str(folder), text, tmp_path / "fisher.st")
    found, headers = load_file(tmp_path / "fisher.st"), open_source(str(folder)).headers
    assert {name: tuple(one.shape) for name, one in found.items()} == {n: h.shape for n, h in headers.items()}
    assert sum(bool(one.any()) for one in found.values()) > 20
