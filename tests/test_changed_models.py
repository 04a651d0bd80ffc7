"""Models that changed after a run are refused by every command that reads their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.running.store import RunStore, facts
from tests.test_cli import refuse, succeed


@pytest.fixture
def changed(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run on copied models: its winner is exported, then one source is overwritten."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with RunStore.open(run) as store:
        config = facts.CONFIG.require(store)
        zoo = Path(config["models"]["base"]).parent
        shutil.copytree(zoo, tmp_path / "zoo")
        moved = {
            name: place.replace(str(zoo), str(tmp_path / "zoo"))
            for name, place in config["models"]["sources"].items()
        }
        config["models"] = {"base": str(tmp_path / "zoo" / "base"), "sources": moved}
        facts.CONFIG.set(store, config)
    succeed("export", run, tmp_path / "model")
    succeed("export", run, tmp_path / "recipe.yaml", "--as", "recipe")
    victim = next(place for place in moved.values() if "+" not in place)
    shutil.copyfile(tmp_path / "zoo" / "base" / "model.safetensors", Path(victim) / "model.safetensors")
    return run


def test_every_command_that_reads_the_models_refuses(changed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for command in (
        ("export", changed, tmp_path / "out"),
        ("export", changed, tmp_path / "out", "--as", "adapter", "--rank", "4"),
        ("export", changed, tmp_path / "out.yaml", "--as", "recipe"),
        ("export", changed, tmp_path / "out.yaml", "--as", "mergekit"),
        ("export", changed, tmp_path / "out", "--pick", "uniform average"),
        ("predict", changed, recipe),
        ("show", changed, "winner", "--items", "demo_upper"),
        ("resume", changed, "--evaluations", "40"),
    ):
        said = refuse(*command, folder=tmp_path)
        assert "model files changed since the run began" in said, command
        assert "model.safetensors (other contents)" in said, command
    for written in (recipe, tmp_path / "model" / "recipe.yaml"):
        said = refuse("merge", written, tmp_path / "out", folder=tmp_path)
        assert "model files changed since the recipe was written" in said
        assert "delete `fingerprints`" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.yaml").exists()


def test_a_recipe_without_fingerprints_merges_what_is_there(changed: Path, tmp_path: Path) -> None:
    text = (tmp_path / "recipe.yaml").read_text()
    start, end = text.index("fingerprints:"), text.index("groups:")
    (tmp_path / "free.yaml").write_text(text[:start] + text[end:])
    succeed("merge", tmp_path / "free.yaml", tmp_path / "out")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "out")]
    assert weights[0] != weights[1]
