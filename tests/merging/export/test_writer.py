"""Writing merged models, and the promise that what was scored is what is exported."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import ConfigError, DiskError
from evomerge.merging import methods
from evomerge.merging.export import writer
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.sources.arrays import of_tensor
from evomerge.merging.sources.tensorfile import Header, ShardWriter, read_header
from evomerge.merging.tensors import kernels, merge_tensor
from evomerge.merging.tensors.merge_tensor import NonFiniteWeights

SOURCES = ("a", "b", "c")
DENSE = {"density": (0.3, 0.55, 0.8)}
WEIGHTED = {"weight": (0.7, -0.2, 0.45)}


def one(models: dict[str, str], method: str, **changes: Any) -> Recipe:
    """Return a recipe of one group with uneven legal parameters."""
    declared = methods.get(method)
    sources = changes.pop("sources", SOURCES[: declared.max_sources])
    uneven: dict[str, Any] = DENSE | WEIGHTED | {"t": 0.3, "select_topk": 0.6, "filter_wise": True}
    uneven |= {
        "gamma": 0.1,
        "epsilon": 0.2 if method.startswith("della") else 0.01,
        "scale": 0.9,
        "nuslerp_flatten": False,
    }
    parameters = {k: v for k, v in uneven.items() if k in declared.parameters}
    if "weight" in parameters:
        uneven_weights = WEIGHTED["weight"][: len(sources)]
        positive = declared.parameters["weight"].low == 0.0
        parameters["weight"] = tuple(map(abs, uneven_weights)) if positive else uneven_weights
    group = TensorGroup(method=method, sources=sources, parameters=changes.pop("parameters", parameters))
    if kind := declared.file:
        changes[kind] = {name: f"{models[name]}.{kind}.safetensors" for name in sources}
    return Recipe(models=models, base="base", groups=(group,), **changes)


def mixed(models: dict[str, str]) -> Recipe:
    """Return a recipe of several methods, by layer and by module."""
    groups = (
        TensorGroup(method="slerp", sources=("b", "a"), layers=OUTSIDE, parameters={"t": 0.2}),
        TensorGroup(
            method="ties", sources=SOURCES, layers=(0, 2), match=("mlp",), parameters=DENSE | WEIGHTED
        ),
        TensorGroup(method="dare_ties", sources=("c", "a"), layers=(1,), parameters={"density": 0.5}),
        TensorGroup(method="linear", sources=SOURCES),
    )
    return Recipe(models=models, base="base", groups=groups, seed=5)


def assert_same_bits(bench: Workbench, out: Path, dtype: str = "bfloat16") -> None:
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert exported.dtype == getattr(torch, dtype)
    live = bench.model.state_dict()
    assert exported.state_dict().keys() == live.keys()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor.float(), live[name].float()), name


@pytest.mark.parametrize("method", [name for name in methods.names() if not methods.get(name).factored])
def test_what_is_scored_is_what_is_exported(method: str, models: dict[str, str], tmp_path: Path) -> None:
    recipe = one(models, method, seed=3)
    bench = Workbench(models, "base")
    bench.load(one(models, "task_arithmetic"))  # a used workbench, its caches warm
    bench.load(recipe)
    assert_same_bits(bench, write(recipe, tmp_path / "out"))


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]
)
def test_scored_is_exported_in_every_dtype(
    dtype: str, compute_dtype: str, models: dict[str, str], tmp_path: Path
) -> None:
    recipe = one(models, "ties", dtype=dtype)
    bench = Workbench(models, "base", compute_dtype=compute_dtype)
    bench.load(recipe)
    assert_same_bits(bench, write(recipe, tmp_path / "out"), dtype)


def test_scored_is_exported_per_layer_with_an_adapter_and_any_number_of_threads(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    models = models | {"c": adapters["plain"]}
    recipe = mixed(models)
    torch.set_num_threads(2)
    out = write(recipe, tmp_path / "out", max_shard_bytes=4000)
    torch.set_num_threads(1)
    bench = Workbench(models, "base")
    bench.load(recipe)
    assert_same_bits(bench, out)


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.get(name).by_rows])
def test_rows_at_a_time_change_no_bit(
    method: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for at_once in (1, 100, 1 << 18):
        monkeypatch.setattr(merge_tensor, "ROWS_AT_ONCE", at_once)
        files.append(write(one(models, method), tmp_path / str(at_once)) / "model.safetensors")
    assert len({file.read_bytes() for file in files}) == 1


def test_export_is_a_complete_model_folder(models: dict[str, str], tmp_path: Path) -> None:
    recipe = one(models, "linear", dtype="float16")
    out = write(recipe, tmp_path / "deep" / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["torch_dtype"] == "float16"  # the name that transformers 4 reads
    assert Recipe.from_yaml((out / "recipe.yaml").read_text()) == recipe
    assert AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == [5, 6]
    assert (out / "generation_config.json").is_file()
    assert {header.dtype for header in read_header(out / "model.safetensors").values()} == {"F16"}


def test_large_models_are_sharded_and_indexed(models: dict[str, str], tmp_path: Path) -> None:
    out = write(one(models, "linear"), tmp_path / "out", max_shard_bytes=5000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(
        2 * header.count for shard in shards for header in read_header(out / shard).values()
    )
    single = write(one(models, "linear"), tmp_path / "single")
    both = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, single)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])


def test_an_existing_folder_with_files_is_left_alone(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(DiskError, match=r"already exists and is not an empty folder"):
        write(one(models, "linear"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (write(one(models, "linear"), tmp_path / "empty") / "config.json").is_file()


def test_no_room_is_said_before_anything_is_written(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(
        DiskError, match=r"not enough disk space[^\n]*\n  expected: 0.06 GB free\n  got: 0.00 GB"
    ):
        write(one(models, "linear"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    error: BaseException, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, calls = merge_tensor.merge_array, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise error
        return merge(*arguments)

    monkeypatch.setattr(writer, "merge_array", failing)
    with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
        write(one(models, "linear"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed_by_the_next(models: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from evomerge.merging.export import writer\n"
        "writer._write_rest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from evomerge.merging.recipe import Recipe\n"
        "writer.write(Recipe.from_yaml(sys.stdin.read()), Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, input=one(models, "linear").to_yaml(), text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    write(one(models, "linear"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
def test_a_merge_of_blends_does_not_import_torch(models: dict[str, str], tmp_path: Path) -> None:
    """Importing it takes longer than many a merge."""
    script = (
        "import sys; from pathlib import Path; from evomerge.merging.export import writer\n"
        "from evomerge.merging.recipe import Recipe\n"
        "writer.write(Recipe.from_yaml(sys.stdin.read()), Path(sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, input=one(models, "ties").to_yaml(), text=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("mark", ["abc-{host}-x", "{host}", "{host}-x-y", "elsewhere-x"])
def test_folders_that_only_look_abandoned_are_left_alone(
    mark: str, models: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / f".out.partial-{mark.format(host=socket.gethostname())}"
    other.mkdir()
    write(one(models, "linear"), tmp_path / "out")
    assert other.is_dir()


def test_weights_that_are_not_finite_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    recipe = one(models, "task_arithmetic", dtype="float16", parameters={"weight": 1e4, "lambda": 1e4})
    with pytest.raises(NonFiniteWeights, match=r"is not finite[^$]*float16[^$]*task_arithmetic") as caught:
        write(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    bench = Workbench(models, "base")
    with pytest.raises(NonFiniteWeights):
        bench.load(recipe)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is NonFiniteWeights
    assert str(again) == str(caught.value)
    bench.load(one(models, "linear"))
    assert all(parameter.isfinite().all() for parameter in bench.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    ("method", "broken"), [("linear", "b"), ("ties", "b"), ("slerp", "b"), ("ties", "base")]
)
def test_a_source_that_is_not_finite_is_named(
    method: str, broken: str, dtype: str, models: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models[broken], tmp_path / "broken")
    file, tensor = tmp_path / "broken" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    weights[tensor][0, :2] = float("nan")
    weights[tensor][3, 0] = float("-inf")
    save_file(weights, file, {"format": "pt"})
    own = models | {broken: str(tmp_path / "broken")}
    with pytest.raises(NonFiniteWeights) as caught:
        write(one(own, method, dtype=dtype), tmp_path / "out")
    assert caught.value.what == f"the merged tensor {tensor!r} is not finite"
    place = f"model {broken!r} ({tmp_path / 'broken'})"
    assert f"{place}: 3 of 384 elements of {tensor!r} are NaN or infinite" in str(caught.value)
    assert str(caught.value).count("elements of") == 1


def test_an_adapter_that_is_not_finite_is_named(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from evomerge.merging.export.adapter import write_adapter

    shutil.copytree(adapters["plain"], tmp_path / "broken")
    file = tmp_path / "broken" / "adapter_model.safetensors"
    factors = load_file(file)
    first = next(name for name in factors if "lora_A" in name)
    factors[first][0, 0] = float("inf")
    save_file(factors, file)
    own = {"base": models["base"], "tuned": f"{models['base']}+{tmp_path / 'broken'}"}
    recipe = one(own, "task_arithmetic", sources=("tuned",), parameters={})
    for form in (write, write_adapter):
        with pytest.raises(NonFiniteWeights, match=r"model 'tuned' .* elements of .* are NaN or infinite"):
            form(recipe, tmp_path / "out")


def test_a_parent_that_is_a_file_is_a_clear_error(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="can't be written\n  got: File exists"):
        write(one(models, "linear"), tmp_path / "file" / "out")


def test_a_recipe_that_does_not_fit_is_refused_before_writing(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights cancel"):
        write(one(models, "linear", parameters={"weight": (1.0, -1.0, 0.0)}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_our_files_are_read_by_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"s": torch.tensor(1.5), "e": torch.zeros(0, 3), "m": torch.ones(2, 3, dtype=torch.float16)}
    codes = {"s": "F32", "e": "F32", "m": "F16"}
    headers = {name: Header(shape=tuple(t.shape), dtype=codes[name]) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "x.safetensors", headers) as writer:
        for name, tensor in tensors.items():
            writer.add(name, of_tensor(tensor))
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_header(tmp_path / "x.safetensors") == headers
