"""Runs and models that were moved go on; models that changed are refused, file by file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.running.store import RunStore, facts
from tests.conftest import write_suite
from tests.running import quick

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def project(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with models, an adapter among them, a suite and a finished run of one generation."""
    monkeypatch.setattr(compose.executors, "build", quick.build(0))
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("base", "upper", "add"):
        shutil.copytree(tiny_zoo / name, folder / name)
    suite = write_suite(folder, generate=False)
    models = {
        "base": str(folder / "base"),
        "sources": {"upper": str(folder / "upper"), "add": f"{folder / 'base'}+{folder / 'add'}"},
    }
    path = config(models=models, suite=str(suite), budget={"generations": 1}, out=str(folder / "run"))
    text = suite.read_text().replace("specialist: reverse", "specialist: add")
    suite.write_text(text)
    compose.start(RunConfig.load(path), Silent())
    return folder


def resume(run: Path, *words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["resume", str(run), "--quiet", *(str(word) for word in words)])
    return done.exit_code, done.stderr


@pytest.mark.end_to_end
def test_a_project_moved_as_a_whole_goes_on(project: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    with RunStore.read(project / "run") as store:
        digest = store.digest()
    project.rename(moved)
    code, said = resume(moved / "run")
    assert code == 2
    assert f"base: {project / 'base'}" in said
    assert "--model base=PATH --model upper=PATH --model add=PATH" in said
    places = (
        *("--model", f"base={moved / 'base'}", "--model", f"upper={moved / 'upper'}"),
        *("--model", f"add={moved / 'base'}+{moved / 'add'}"),
    )
    code, said = resume(moved / "run", *places)
    assert code == 2
    assert "suite.yaml" in said
    assert resume(moved / "run", *places, "--suite", moved / "suite.yaml") == (0, "")
    with RunStore.read(moved / "run") as store:
        assert store.digest() == digest
        assert facts.CONFIG.get(store)["models"]["base"] == str(moved / "base")
    assert resume(moved / "run", "--generations", 2) == (0, "")  # they are remembered
    assert not project.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [("uper=x", "did you mean 'upper'?"), ("upper", "NAME=PATH"), ("upper=no/such/folder", "no/such/folder")],
)
def test_mistakes_in_naming_a_model(project: Path, given: str, message: str) -> None:
    code, said = resume(project / "run", "--model", given)
    assert code == 2
    assert message in said


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def other_contents(folder: Path) -> None:
    flip(folder / "upper" / "model.safetensors", -100)


def other_header(folder: Path) -> None:
    path = folder / "upper" / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])


def other_config(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


def other_tokenizer(folder: Path) -> None:
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left", "note": 1}))


def other_adapter(folder: Path) -> None:
    flip(folder / "add" / "adapter_model.safetensors", -100)


def another_model(folder: Path) -> None:
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, folder / "upper" / path.name)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_contents, ["upper: model.safetensors (other contents)"]),
        (other_header, ["upper: model.safetensors (another "]),
        (other_config, ["base: config.json (other contents)", "add: config.json (other contents)"]),
        (other_tokenizer, ["base: tokenizer_config.json (other contents)"]),
        (other_adapter, ["add: adapter_model.safetensors (other contents)"]),
        (another_model, ["upper: model.safetensors (other contents)"]),
    ],
)
def test_changed_model_files_are_refused_by_name(
    project: Path, change: Callable[[Path], None], named: list[str]
) -> None:
    before = (project / "run" / "run.sqlite").read_bytes()
    change(project)
    code, said = resume(project / "run", "--generations", 2)
    assert code == 2
    assert "model files changed since the run began" in said
    assert all(words in said for words in named), said
    assert "put the old files back" in said
    assert (project / "run" / "run.sqlite").read_bytes() == before


def test_a_copy_in_another_layout_is_the_same_model(project: Path) -> None:
    path = project / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert resume(project / "run") == (0, "")


def test_every_byte_is_compared_on_request(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore.read(project / "run") as store:
        digest = store.digest()
    assert resume(project / "run", "--full-hash") == (0, "")
    with RunStore.read(project / "run") as store:
        hashes: dict[str, Any] = facts.FULL_HASHES.get(store)
        assert store.digest() == digest
    assert set(hashes) == {"base", "upper", "add"}
    assert {"config.json", "model.safetensors", "adapter_model.safetensors"} <= set(hashes["add"])
    assert resume(project / "run", "--full-hash") == (0, "")
    monkeypatch.setattr("evomerge.merging.sources.checkpoint.sample_hash", lambda _: "same")
    for module in ("stored", "running.inputs"):  # as if no sample had met it
        monkeypatch.setattr(f"evomerge.{module}.changed_models", lambda *_: "")
    other_contents(project)
    assert resume(project / "run") == (0, "")
    code, said = resume(project / "run", "--full-hash")
    assert code == 2
    assert "upper: model.safetensors (other contents)" in said
    assert "since every byte of them was hashed" in said
