"""Models that changed after a run are refused by every command that reads their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.merging.export import adapter, writer
from evomerge.running.store import RunStore, facts
from tests.test_cli import refuse, succeed


def weights(run: Path) -> Path:
    """Return the weight file of a source of a run."""
    with RunStore.read(run) as store:
        sources = facts.CONFIG.require(store)["models"]["sources"].values()
    return Path(next(place for place in sources if "+" not in place)) / "model.safetensors"


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run on copied models."""
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
    return run


@pytest.fixture
def changed(copied: Path, tmp_path: Path) -> Path:
    """The same, after its winner was exported and one source was overwritten."""
    succeed("export", copied, tmp_path / "model")
    succeed("export", copied, tmp_path / "recipe.yaml", "--as", "recipe")
    shutil.copyfile(tmp_path / "zoo" / "base" / "model.safetensors", weights(copied))
    return copied


def test_every_command_that_reads_the_models_refuses(changed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for command in (
        ("export", changed, tmp_path / "out"),
        ("export", changed, tmp_path / "out", "--as", "adapter", "--rank", "4"),
        ("export", changed, tmp_path / "out.yaml", "--as", "recipe"),
        ("export", changed, tmp_path / "out.yaml", "--as", "mergekit"),
        ("export", changed, tmp_path / "out", "--pick", "uniform average"),
        ("predict", changed, recipe),
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
    written = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "out")]
    assert written[0] != written[1]


def test_a_change_that_no_fingerprint_shows_is_found_when_it_is_exported(
    copied: Path, tmp_path: Path
) -> None:
    victim = weights(copied)
    size, data = victim.stat().st_size, bytearray(victim.read_bytes())
    unsampled = (size - 4096) * 5 // 15 + 4096
    assert unsampled < (size - 4096) * 6 // 15
    data[unsampled] ^= 4
    victim.write_bytes(bytes(data))
    said = refuse("export", copied, tmp_path / "out", folder=tmp_path)
    assert "differ from those that were scored on `test`" in said
    assert "--accept-difference" in said
    assert not (tmp_path / "out").exists()
    said = succeed("export", copied, tmp_path / "out", "--accept-difference")
    assert "WARNING: its weights differ" in said
    assert "differ from those that were scored" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_that_the_weights_were_compared(copied: Path, tmp_path: Path) -> None:
    for pick in ("winner", "uniform average", "base"):
        said = succeed("export", copied, tmp_path / pick, "--pick", pick)
        assert "its weights are those that were scored on `test`, bit for bit" in said
        assert "their hash was compared" in (tmp_path / pick / "README.md").read_text()


@pytest.mark.parametrize("form", ["run", "recipe", "adapter"])
def test_models_overwritten_while_they_are_merged(
    form: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("export", copied, tmp_path / "recipe.yaml", "--as", "recipe")
    place = (adapter, "_write_weights") if form == "adapter" else (writer, "merge_array")
    called, victim = getattr(*place), weights(copied)

    def slow(*arguments: Any, **options: Any) -> Any:
        shutil.copyfile(tmp_path / "zoo" / "base" / "model.safetensors", victim)
        return called(*arguments, **options)

    monkeypatch.setattr(*place, slow)
    command = ("export", copied) if form == "run" else ("merge", tmp_path / "recipe.yaml")
    options = ("--as", "adapter", "--rank", "4", "--keep-rest") if form == "adapter" else ()
    (tmp_path / "empty").mkdir()
    said = refuse(*command, tmp_path / "out", *options, folder=tmp_path / "empty")
    assert "model files changed while they were merged" in said
    assert not (tmp_path / "out").exists()
