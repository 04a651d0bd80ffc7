"""Models of the hub: what is downloaded, revisions, and ids of folders. A folder plays the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from evomerge.config import resolve_location
from evomerge.errors import ModelError
from evomerge.merging.export import writer
from evomerge.merging.mergekit import read
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.beside import beside
from evomerge.merging.sources.file_kinds import LARGEST
from evomerge.merging.sources.hub import SINGLE, folder_of, known_id, split_id
from evomerge.merging.sources.opening import open_source

COMMIT = "0123abc"
CLUTTER = (
    *("consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json", "original/params.json"),
    *(
        "checkpoint-500/model.safetensors",
        "checkpoint-500/config.json",
        "pytorch_model.bin",
        ".gitattributes",
    ),
    *("onnx/1_Pooling/config.json", "model.fp16.safetensors", "runs/events.json", "coreml/weights.model"),
    *("gguf/model.Q4.gguf", "training_args.bin", "trainer_state.json", "1_Pooling/model.safetensors"),
)
"""Files of real repositories that no merge reads."""
BESIDE = (
    *("README.md", "LICENSE", "tokenizer.model", "additional_chat_templates/tools.jinja", "modeling.py"),
    *("1_Pooling/config.json", "modules.json", "tekken.json", "sentencepiece.bpe.model", "configs/a/code.py"),
    *("preprocessor_config.json", "special.txt"),
)
"""Files that a merge takes over."""


class FakeHub:
    """Repositories that are folders; downloads are copies. asked: (id, revision, files) of every download."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.repositories = cache, dict[str, Path]()
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def folder(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT

    def model_info(
        self, name: str, revision: str | None = None, files_metadata: bool = True
    ) -> SimpleNamespace:
        if name not in self.repositories or revision not in (None, "v1", "refs/pr/3", COMMIT):
            raise ConnectionError("name resolution failed")
        root = self.repositories[name]
        sizes = {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}
        siblings = [SimpleNamespace(rfilename=file, size=sizes[file]) for file in sorted(sizes)]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(self, name: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        files = [file.rfilename for file in self.model_info(name, revision).siblings]
        wanted = [file for file in files if any(fnmatchcase(file, part) for part in allow_patterns)]
        self.asked.append((name, revision, wanted))
        for file in wanted:
            (self.folder(name) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repositories[name] / file, self.folder(name) / file)
        return str(self.folder(name))

    def hf_hub_download(self, name: str, file: str, *, revision: str | None = None) -> str:
        self.snapshot_download(name, allow_patterns=[file], revision=revision)
        return str(self.folder(name) / file)

    def try_to_load_from_cache(self, name: str, file: str, *, revision: str | None = None) -> str | None:
        path = self.folder(name) / file
        return str(path) if path.exists() else None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    for name in ("snapshot_download", "hf_hub_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def cluttered(root: Path) -> Path:
    for file in CLUTTER:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"much")
    for file in BESIDE:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("little")
    return root


def downloaded(hub: FakeHub) -> set[str]:
    return {file for _, _, files in hub.asked for file in files}


def test_one_file_of_weights_and_the_small_files_are_downloaded(
    hub: FakeHub, models: Mapping[str, str], tmp_path: Path
) -> None:
    hub.repositories["org/model"] = cluttered(Path(shutil.copytree(models["base"], tmp_path / "repository")))
    assert open_source("org/model").num_layers == 3
    files = downloaded(hub)
    assert not files & set(CLUTTER)
    assert files >= {"config.json", "model.safetensors", *BESIDE}
    open_source("org/model")
    assert len(hub.asked) == 1  # what is in the cache is not asked for again


def test_what_is_downloaded_is_what_a_merge_takes_over(
    hub: FakeHub, models: Mapping[str, str], tmp_path: Path
) -> None:
    root = hub.repositories["org/model"] = cluttered(Path(shutil.copytree(models["base"], tmp_path / "all")))
    with (root / "video.mp4").open("wb") as file:
        file.truncate(LARGEST + 1)
    there = beside(open_source(str(root)))
    assert "video.mp4" not in downloaded(hub)
    assert there.files.keys() == beside(open_source("org/model")).files.keys()
    assert beside(open_source("org/model")).left_out == ()


def test_of_shards_those_in_the_index_are_downloaded(
    hub: FakeHub, models: Mapping[str, str], tmp_path: Path
) -> None:
    recipe = Recipe.copy_of(models["base"], dtype="float32")
    root = cluttered(writer.write(recipe, tmp_path / "repository", max_shard_bytes=20_000))
    (root / "model-00009-of-00009.safetensors").write_bytes(b"of an older upload")
    hub.repositories["org/model"] = root
    opened = open_source("org/model@v1")
    shards = set(json.loads((root / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    assert {file for file in downloaded(hub) if file.endswith(".safetensors")} == shards
    assert {revision for _, revision, _ in hub.asked} == {"v1"}
    assert opened.location == "org/model@v1"


@pytest.mark.parametrize("files", [("pytorch_model.bin",), ("a.safetensors", "b.safetensors"), ()])
def test_a_repository_without_weights_says_what_it_has(
    files: tuple[str, ...], hub: FakeHub, models: Mapping[str, str], tmp_path: Path
) -> None:
    root = hub.repositories["org/model"] = tmp_path / "repository"
    root.mkdir()
    shutil.copy(Path(models["base"]) / "config.json", root)
    for file in files:
        (root / file).write_bytes(b"much")
    with pytest.raises(ModelError) as caught:
        open_source("org/model")
    assert f"org/model: the hub has no weights of it that can be read\n  expected: {SINGLE}" in str(
        caught.value
    )
    assert ", ".join(files) in str(caught.value)
    assert hub.asked == []


def test_a_model_in_the_cache_is_read_without_the_hub(
    hub: FakeHub, models: Mapping[str, str], tmp_path: Path
) -> None:
    hub.repositories["org/model"] = Path(models["base"])
    open_source("org/model")
    del hub.repositories["org/model"]
    assert open_source("org/model").num_layers == 3


@pytest.mark.parametrize("location", ["org/model@v1+{adapter}", "org/model@refs/pr/3+org/lora"])
def test_adapters_go_with_revisions_and_come_from_the_hub(
    location: str, hub: FakeHub, models: Mapping[str, str], adapters: Mapping[str, str]
) -> None:
    adapter = adapters["plain"]
    hub.repositories |= {"org/model": Path(models["base"]), "org/lora": Path(adapter)}
    opened = open_source(location.format(adapter=adapter))
    assert opened.fingerprint == open_source(f"{models['base']}+{adapter}").fingerprint
    assert open_source("org/lora", base="org/model").fingerprint == opened.fingerprint


def test_a_folder_with_an_at_sign_stays_a_folder(
    hub: FakeHub, models: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models["base"], tmp_path / "org" / "model@v1")
    monkeypatch.chdir(tmp_path)
    assert open_source("org/model@v1").num_layers == 3
    assert resolve_location("org/model@v1", tmp_path) == str(tmp_path / "org" / "model@v1")
    assert hub.asked == []


def test_a_config_stores_the_revision(tmp_path: Path) -> None:
    assert resolve_location("org/model@refs/pr/3", tmp_path) == "org/model@refs/pr/3"
    assert resolve_location("./model@v1", tmp_path) == str(tmp_path / "model@v1")
    text = "merge_method: linear\nmodels: [{model: org/a@v1}, {model: org/a@v2}]\ndtype: float32"
    assert dict(read(text).models) == {"a": "org/a@v1", "a-2": "org/a@v2"}


def test_the_hub_out_of_reach_is_a_clear_error(hub: FakeHub) -> None:
    with pytest.raises(ModelError) as caught:
        open_source("someone/some-model@v7")
    expected = "neither a local folder nor available from the Hugging Face hub\n  got: name resolution"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "location", ["a/b/c", "gpt2", "../org/model", "org/mo del", "org/model@", "/org/model"]
)
def test_what_is_no_hub_id_is_no_such_folder(location: str, hub: FakeHub) -> None:
    assert split_id(location) is None
    with pytest.raises(ModelError, match="no such model folder"):
        open_source(location)


def test_folders_of_the_cache_have_an_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert known_id(str(snapshot)) == f"org/name@{COMMIT}"
    assert known_id("org/name@v1") == "org/name@v1"
    assert known_id(str(tmp_path)) is None


def test_an_adapter_of_a_revision_is_applied_to_it(
    hub: FakeHub, models: Mapping[str, str], adapters: Mapping[str, str], tmp_path: Path
) -> None:
    hub.repositories["org/model"] = Path(models["base"])
    folder = Path(shutil.copytree(adapters["plain"], tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "org/model", "revision": "v1"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert open_source(str(folder)).num_layers == 3
    assert {(name, revision) for name, revision, _ in hub.asked} == {("org/model", "v1")}


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_location("org/modle", tmp_path) == str(tmp_path / "org" / "modle")
    assert resolve_location("other/modle", tmp_path) == "other/modle"
    with pytest.raises(ModelError, match=r"did you mean .*org/model\?"):
        folder_of(str(tmp_path / "org" / "modle"))
