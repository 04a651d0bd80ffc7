"""`evomerge export --push`: what was scored is uploaded, by huggingface_hub's login, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

import evomerge
from evomerge.cli import app
from evomerge.errors import ConfigError, StoreError, UserError
from tests.delivery.hub_stand_in import TOKEN, Hub, Repository, hub_stand_in

TARGET = "forge/merged"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""huggingface_hub uses its HTTP library in an old way."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in in place of the hub, with a login."""
    with hub_stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def run(finished_run: Path) -> evomerge.Run:
    return evomerge.load(finished_run)


@pytest.fixture(scope="module")
def model(run: evomerge.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    run.export(folder)
    return folder


Command = Callable[..., Result]


@pytest.fixture
def command(finished_run: Path) -> Command:
    def command(out: Path, *words: str) -> Result:
        return CliRunner().invoke(app, ["export", str(finished_run), str(out), *words])

    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_whole_folder_is_uploaded_in_one_commit(hub: Hub, command: Command, tmp_path: Path) -> None:
    result = command(tmp_path / "model", "--push", TARGET, "--private", "--json")
    assert result.exit_code == 0, result.output
    repository = hub.repositories[TARGET]
    assert repository.private
    assert repository.files == contents(tmp_path / "model")
    data = json.loads(result.stdout)
    assert (data["equals_scored"], data["upload"]["private"]) == (True, True)
    assert data["upload"]["url"] == f"{hub.url}/{TARGET}"
    assert repository.commits == [f"Export by evomerge: recipe {data['recipe'][:12]}"]


def test_a_dry_run_names_files_and_target_and_asks_nothing(
    hub: Hub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = command(tmp_path / "model", "--push", TARGET, "--dry-run")
    assert result.exit_code == 0, result.output
    for name, content in contents(tmp_path / "model").items():
        assert f"{name} " in result.output
        assert f"{len(content):,} bytes" in result.output
    assert f"to {hub.url}/{TARGET}; nothing was uploaded" in " ".join(result.output.split())
    assert hub.asked == []


def test_a_stopped_upload_goes_on_from_the_folder(hub: Hub, command: Command, tmp_path: Path) -> None:
    hub.failing = "/commit/"
    result = command(tmp_path / "model", "--push", TARGET)
    assert result.exit_code == 2
    assert "the same command goes on" in result.stderr
    sent = [line for line in hub.asked if line.startswith("PUT")]
    assert sent
    hub.failing = None
    result = command(tmp_path / "model", "--push", TARGET)
    assert result.exit_code == 0, result.output
    assert "holds this export already" in result.output
    assert [line for line in hub.asked if line.startswith("PUT")] == sent  # what is there is not sent again
    assert hub.repositories[TARGET].files == contents(tmp_path / "model")


def test_without_a_login_nothing_is_written(
    hub: Hub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    result = command(tmp_path / "model", "--push", TARGET)
    assert result.exit_code == 2
    assert "hf auth login" in result.stderr
    monkeypatch.delenv("HF_TOKEN")
    result = command(tmp_path / "model", "--push", TARGET)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {TARGET}: not logged in")
    assert not (tmp_path / "model").exists()
    assert hub.repositories == {}


def test_other_weights_than_the_scored_ones_are_not_uploaded(
    hub: Hub, run: evomerge.Run, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(model, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(StoreError, match="differ from those that were scored"):
        run.push(folder, TARGET)
    with pytest.raises(ConfigError, match="no export of"):
        run.push(model, TARGET, pick="TIES")
    assert hub.repositories == {}
    assert run.push(folder, TARGET, accept_difference=True).url is not None


def test_repositories_that_are_there_keep_what_they_hold(hub: Hub, run: evomerge.Run, model: Path) -> None:
    hub.repositories[TARGET] = Repository(private=False, files={"README.md": b"mine"})
    with pytest.raises(UserError, match="everyone can read it"):
        run.push(model, TARGET, private=True)
    hub.repositories["forge/other"] = Repository(
        private=True, files={"model-00001-of-2.safetensors": b"mine"}
    )
    with pytest.raises(UserError, match="holds other weights already"):
        run.push(model, "forge/other")
    assert hub.repositories["forge/other"].files == {"model-00001-of-2.safetensors": b"mine"}
    assert run.push(model, TARGET).private is False
    assert hub.repositories[TARGET].files == contents(model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--push", "merged"), "ORG/NAME"),
        (("--push", "forge/merged@main"), "ORG/NAME"),
        (("--push", TARGET, "--as", "adapter"), "--push is for models"),
        (("--gguf", "--as", "mergekit"), "--gguf is for models"),
        (("--private",), "--private is for --push"),
        (("--dry-run",), "--dry-run is for --push"),
        (("--llama-cpp", "here"), "--llama-cpp is for --gguf"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: tuple[str, ...], said: str, hub: Hub, command: Command, tmp_path: Path
) -> None:
    result = command(tmp_path / "out", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.end_to_end
def test_the_command_uses_the_endpoint_and_login_of_huggingface_hub(
    hub: Hub, finished_run: Path, model: Path
) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = "import sys; from evomerge.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "export", str(finished_run), str(model), "--push", TARGET]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{TARGET}" in done.stdout
    assert hub.repositories[TARGET].files == contents(model)
