"""Files of several documents: each stage is merged, used by later ones, and its recipe is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from evomerge.errors import ConfigError, DiskError, ModelError
from evomerge.merging.export import writer
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.stages import merge_stages, read_stages

TWO = """
# ä stage
name: first
merge_method: linear
dtype: float32
models: [{{model: {a}, parameters: {{weight: 1}}}}, {{model: {b}, parameters: {{weight: 3}}}}]
---
name: second
merge_method: slerp
dtype: float32
base_model: first
models: [{{model: {c}}}]
parameters: {{t: 0.25}}
---
merge_method: task_arithmetic
dtype: float32
base_model: {base}
models: [{{model: second}}, {{model: first, parameters: {{weight: 0.5}}}}]
"""


@pytest.fixture
def file(models: Mapping[str, str], tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "stages.yaml"
        path.write_text(text.format(**models), encoding="utf-8")
        return path

    return write


def test_a_result_is_that_of_its_stages_merged_one_by_one(
    file: Callable[[str], Path], models: Mapping[str, str], tmp_path: Path
) -> None:
    path = file(TWO)
    notes: list[str] = []
    merge_stages(read_stages(path), tmp_path / "out", root=tmp_path, max_shard_bytes=20_000, say=notes.append)
    assert [note for note in notes if note.startswith("stage")] == ["stage first", "stage second"]
    alone = tmp_path / "alone"
    alone.mkdir()
    for name, text in zip(("first", "second", "last"), TWO.split("---"), strict=True):
        (alone / f"{name}.yaml").write_text(text.format(**models))
        writer.write(read_recipe(alone / f"{name}.yaml"), alone / name)
    one, other = Checkpoint.open(str(tmp_path / "out")), Checkpoint.open(str(alone / "last"))
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in other.headers)
    assert len(one.files) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "out", "stages.yaml"]


def test_recipes_of_all_stages_make_the_same_model(file: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = merge_stages(read_stages(file(TWO)), out, root=tmp_path)
    assert recipe == Recipe.from_yaml((out / "recipe.yaml").read_text())
    assert recipe.models["second"] == "second"
    assert not any(".partial-" in path.read_text() for path in out.glob("*.yaml"))
    for name in ("first", "second"):
        writer.write(read_recipe(out / f"recipe-{name}.yaml"), out / name)
    again = writer.write(read_recipe(out / "recipe.yaml"), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: first", "nme: first", "document 1 of 3 needs a name"),
        ("name: first", "name: ../first", "document 1 of 3 needs a name"),
        ("name: second", "name: first", "has the name 'first' of an earlier one"),
        ("merge_method: slerp", "merge_methd: slerp", "document 2 of 3 has no merge_method"),
        ("merge_method: slerp", "merge_method: slrp", "document 2 of 3: unknown merge method 'slrp'"),
        ("t: 0.25", "tt: 0.25", "document 2 of 3: mergekit file: parameters: method slerp has no parameter"),
        ("base_model: first", "base_model: second", "document 2 uses 'second' before it is merged"),
        ("model: second", "model: {a}", "no later document uses 'second'"),
        ("dtype: float32\nbase", "dtype: int3\nbase", "document 2 of 3: mergekit file: dtype"),
        ("---\nmerge_method", "---\n- [\n", "not valid YAML"),
        ("---\nmerge_method", "---\n3\n---\nmerge_method", "not a mapping"),
    ],
)
def test_mistakes_are_found_before_anything_is_merged(
    old: str, new: str, message: str, file: Callable[[str], Path]
) -> None:
    assert old in TWO
    with pytest.raises(ConfigError) as caught:
        read_stages(file(TWO.replace(old, new, 1)))
    assert message in str(caught.value)


def test_a_failing_stage_is_named_and_leaves_nothing(file: Callable[[str], Path], tmp_path: Path) -> None:
    stages = read_stages(file(TWO.replace("{c}", "no/such/model")))
    with pytest.raises(ModelError, match="stage second: no/such/model"):
        merge_stages(stages, tmp_path / "out", root=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        merge_stages(stages, tmp_path / "file" / "out", root=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "stages.yaml"]


def test_one_document_stays_one_and_several_are_one_recipe_nowhere_else(file: Callable[[str], Path]) -> None:
    single = "---\nmerge_method: linear\ndtype: float32\nmodels: [{{model: {a}}}]\n---\n"
    assert len(read_stages(file(single))) == 1
    read_recipe(file(single))
    with pytest.raises(ConfigError, match="several merges in one file"):
        read_recipe(file(TWO))
